"""Results that cannot be written are still printed; a place that takes no files is refused at once."""

import errno
import json
import os
import time

import pytest
from conftest import ROOT

from nanochat import locks, metrics
from nanochat.errors import InputError
from nanochat.files import check_out

LAYER_MAPS = ["--model-tag", "a", "--maps", "1,0", "--device-type", "cpu"]
SMALL_MODEL = {"depth": 1, "model-dim": 64, "head-dim": 32, "vocab-size": 64, "max-seq-len": 32}
SHORT_BENCH = {"batch-sizes": 1, "prompt-tokens": 4, "repeats": 1, "device-type": "cpu"}
BENCH = [f"--{flag}={value}" for flag, value in (SMALL_MODEL | SHORT_BENCH).items()]


def check_error(stderr, *words):
    """The last line is the only error, and has these words."""
    last = stderr.splitlines()[-1]
    assert last.startswith("error: "), stderr
    assert stderr.count("error") == 1, stderr
    assert all(word in last for word in words), stderr


def test_an_evaluation_is_shown_where_its_file_cannot_be_written(train, command):
    train(tag="a")
    (metrics.runs_dir() / "a/eval_000006.json/in_the_way").mkdir(parents=True)
    code, stdout, stderr = command(
        "scripts/base_eval.py", "--model-tag", "a", "--eval", "bpb", "--eval-tokens", 1024
    )
    assert code == 2 and "val   | 1,024 tokens | loss" in stdout
    check_error(stderr, "eval_000006.json: cannot be written", "shown above")


def test_figures_are_shown_where_their_files_cannot_be_written(train, command, tmp_path):
    train(tag="a")
    for script, file, flags, shown in [
        ("scripts/report.py", "loss.png", ["a"], "Outcome"),
        ("scripts/infer_bench.py", "infer_bench.json", BENCH, "tokens/s"),
        ("scripts/layer_map_eval.py", "layer_maps.csv", LAYER_MAPS, "ppl "),
    ]:
        (tmp_path / script / file / "in_the_way").mkdir(parents=True)
        code, stdout, stderr = command(script, *flags, "--out", tmp_path / script)
        assert code == 2 and shown in stdout, script
        check_error(stderr, file)


@pytest.mark.parametrize(
    "script, flag, flags",
    [
        ("scripts/report.py", "--out", ["a"]),
        ("scripts/infer_bench.py", "--out", ["--model-tag", "a"]),
        ("scripts/layer_bench.py", "--out", []),
        ("scripts/layer_map_eval.py", "--out", ["--model-tag", "a", "--maps", "0"]),
        ("scripts/materialize.py", "--safetensors", ["--model-tag", "a"]),
        ("dev/bench/train_step.py", "--out", []),
        ("dev/bench/loss_memory.py", "--out", []),
        ("dev/bench/gpu/__main__.py", "--out", ["1", "--tiny", "--device-type", "cpu"]),
    ],
)
def test_a_place_that_takes_nothing_is_refused_at_once(command, tmp_path, monkeypatch, script, flag, flags):
    monkeypatch.syspath_prepend(ROOT / "dev/bench")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "file").write_text("")
    for place in ("/proc/nothing", tmp_path / "file/below", tmp_path / ("x" * 300) / "y"):
        started = time.monotonic()
        code, stdout, stderr = command(script, *flags, flag, f"{place}/x.safetensors")
        assert code == 2 and time.monotonic() - started < 10 and "measured" not in stdout
        check_error(stderr, flag, "give a")
    assert not (tmp_path / "base").exists()


def test_a_sweep_knows_before_its_runs_that_its_report_cannot_be_written(
    command, base_dir, tmp_path, corpus_dir
):
    path = tmp_path / "e.toml"
    path.write_text(
        f"seeds = [1]\n[flags]\nvocab-size = 300\ndata = {json.dumps(str(corpus_dir))}\n"
        "num-iterations = 1\ntotal-batch-size = 65536\n"
    )
    code, _, stderr = command("scripts/sweep.py", path, "--out", "/proc/nothing")
    assert code == 2 and not (base_dir / "sweeps").exists()
    check_error(stderr, "--out /proc/nothing: cannot be written")


def test_check_out_leaves_nothing_behind(tmp_path):
    check_out("--out", tmp_path / "new/deeper")
    check_out("--out", tmp_path / "new/file.json", is_file=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="is a folder; give a file"):
        check_out("--out", tmp_path, is_file=True)


def test_a_base_folder_that_cannot_be_written_to_is_named_with_the_way_out(base_dir, command, monkeypatch):
    def refuse(*_, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(base_dir / "locks/tokenizer.lock"))

    monkeypatch.setattr(locks, "acquire", refuse)
    code, _, stderr = command("scripts/tok_train.py", "--data", "stdlib")
    assert code == 2
    check_error(stderr, "tokenizer.lock: Read-only file system", "NANOCHAT_BASE_DIR")
