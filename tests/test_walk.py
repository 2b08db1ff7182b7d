"""Every script, started with nothing, with nonsense and where nothing can be kept: help, a result, or one
line; never a traceback.
"""

import io
import os
import sys

import pytest
from conftest import ROOT, TINY

from nanochat import metrics

LADDER = ["dev/bench/gpu/__main__.py", "dev/bench/gpu/prepare.py"]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("scripts", "dev/bench")
    for path in (ROOT / folder).glob("[a-z]*.py")
) + ["nanochat/dataset.py", *LADDER]
# these do their work without any flag
BUSY = [
    "scripts/tok_train.py",
    "scripts/layer_bench.py",
    "scripts/infer_bench.py",
    *(script for script in SCRIPTS if script.startswith("dev/bench") and script not in LADDER),
]
TAGS = {
    "scripts/base_eval.py": [],
    "scripts/generate.py": ["-p", "a"],
    "scripts/infer_bench.py": [],
    "scripts/layer_map_eval.py": ["--maps", "0"],
    "scripts/materialize.py": ["--out-tag", "b"],
    "scripts/adapter_train.py": ["--run-tag", "b"],
}


@pytest.fixture
def walk(command, monkeypatch, tmp_path):
    """walk(script, flags, base) -> (exit code, stdout, the one line of stderr, or nothing)."""

    def run(script, *flags, base=tmp_path / "base"):
        monkeypatch.syspath_prepend(ROOT / "dev/bench")
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
        monkeypatch.chdir(tmp_path)
        code, stdout, stderr = command(script, *flags)
        assert code in (0, 2) and (code == 0 or (stderr.startswith("error: ") and stderr.count("\n") == 1)), (
            f"{script} {flags}: {code} {stderr}"
        )
        return code, stdout, stderr

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_what_is_no_flag(walk, tmp_path, script):
    code, stdout, _ = walk(script, "--help")
    assert code == 0 and stdout.startswith("usage: ")
    for nonsense in (["--no-such-flag"], ["--no-such-flag=1"], ["--", "--x"], ["\udcff"]):
        assert walk(script, *nonsense)[0] == 2
    if script not in BUSY:
        assert walk(script)[0] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", TAGS)
def test_a_run_that_is_not_there_or_a_place_that_is_none(walk, tmp_path, script):
    (tmp_path / "file").write_text("")
    for base in (tmp_path / "base", tmp_path / "file/below", "/proc/nothing"):
        assert "no such run in" in walk(script, "--model-tag", "nothing", *TAGS[script], base=base)[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_training_where_nothing_can_be_kept(walk, tmp_path, corpus_dir):
    """A tokenizer is not trained for nothing; a run stops before its first step."""
    (tmp_path / "file").write_text("")
    for base in (tmp_path / "file/below", "/proc/nothing"):
        for script, flags in [
            ("scripts/tok_train.py", ["--vocab-size", 300]),
            ("scripts/base_train.py", TINY),
            ("scripts/tok_eval.py", []),
        ]:
            code, stdout, stderr = walk(script, "--data", corpus_dir, *flags, base=base)
            assert code == 2 and str(base) in stderr and "step" not in stdout


def test_nothing_on_standard_input(train, command, monkeypatch):
    train(tag="a")
    with open(os.devnull) as devnull:
        monkeypatch.setattr(sys, "stdin", devnull)
        assert command("scripts/generate.py", "--model-tag", "a")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\nnot read"))
    assert command("scripts/generate.py", "--model-tag", "a", "--max-tokens", 3)[1].startswith("the cat")
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where the shell closed it
    code, _, stderr = command("scripts/generate.py", "--model-tag", "a")
    assert code == 2 and "error: -p: no prompt, and standard input is closed" in stderr
    assert "Traceback" not in stderr


def test_a_model_that_diverged_says_so_and_its_training_is_saved(train, command):
    """Two steps at a rate of 1e30: finite weights, logits that are no numbers, and a sample at the end."""
    from scripts import adapter_train

    train(tag="a")
    flags = "--model-tag a --run-tag wild --adapter none --lr 1e30 --num-iterations 2 --total-batch-size 256"
    sizes = "--device-batch-size 4 --eval-tokens 1024 --eval-every -1"
    adapter_train.main([*flags.split(), *sizes.split()])
    run = metrics.load_run(metrics.runs_dir() / "wild")
    assert run.summary["status"] == "finished"
    assert "(the model's logits are not finite numbers" in run.history[-1]["sample"][0]
    code, _, stderr = command("scripts/generate.py", "--model-tag", "wild", "-p", "a")
    assert code == 2 and "error: the model's logits are not finite numbers: it diverged" in stderr


def test_from_another_folder_with_paths_as_they_are_there(walk, tmp_path, corpus_dir):
    os.symlink(corpus_dir, tmp_path / "text")
    assert walk("scripts/tok_train.py", "--data", "text", "--vocab-size", 300)[0] == 0
    assert walk("scripts/base_train.py", "--data", "text", *TINY, "--model-tag", "a")[0] == 0
    for script, flags in [
        ("scripts/base_eval.py", ["--model-tag", "a"]),
        ("scripts/report.py", ["a", "--out", "report"]),
        ("scripts/layer_map_eval.py", ["--model-tag", "a", "--maps", "1,0", "--out", "maps"]),
        ("scripts/materialize.py", ["--model-tag", "a", "--safetensors", "a.safetensors"]),
    ]:
        assert walk(script, *flags)[0] == 0
    assert {"report", "maps", "a.safetensors", "a.json"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("dev/bench/train_step.py", ["--head-dim", 1, "--model-dim", 1], "has to be even"),
        ("dev/bench/train_step.py", ["--mlp-ratio", "1e30"], "parameters"),
        ("dev/bench/train_step.py", ["--mlp-ratio", "1e-30"], "no hidden layer"),
        ("dev/bench/train_step.py", ["--depth", 4096, "--model-dim", 2**20], "parameters"),
        ("dev/bench/subspace_step.py", ["--model-dim", 65], "not a multiple of 64"),
        ("dev/bench/core_speed.py", ["--model-dim", 65], "not a multiple of 64"),
        (
            "scripts/generate.py",
            ["-p", "a", "--num-samples", 2**17],
            "--num-samples: '131072' is not a whole number <= 65536",
        ),
        ("scripts/layer_map_eval.py", ["--model-tag", "a", "--random", 10**9], "--random"),
        ("nanochat/dataset.py", ["--data", "climbmix", "-n", 10**9], "-n 1000000000"),
        ("scripts/base_train.py", ["--layer-map", ",".join(["0"] * 5000)], "more than 4,096 positions"),
    ],
)
def test_what_would_only_end_in_a_traceback_or_never(walk, script, flags, message):
    code, _, stderr = walk(script, *flags)
    assert code == 2 and message in stderr
