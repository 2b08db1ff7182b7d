"""Files that are none, values that no run writes, and files of another run: one line, and nothing is lost."""

import errno
import hashlib
import json
import os
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import Killed

from nanochat import checkpoint_manager as cm
from nanochat import metrics, run_files, run_text
from nanochat.continuation import inherit
from nanochat.dataset import Shard
from nanochat.errors import InputError
from nanochat.files import NoOrdinaryFile, Schema, digest_file, read_json, sha256
from nanochat.fingerprints import RECORDED_FROM, file_hash
from nanochat.flags import build_parser
from nanochat.history import read_history
from nanochat.token_cache import cache_folder, cached_tokens
from nanochat.tokenizer import load_tokenizer

STATE = {"model": {"w": torch.arange(6.0)}}


@pytest.fixture
def interrupted(train, kill_after):
    """A run of seed 42, and one of seed 7, each killed after its checkpoint of step 3: their folders."""
    for tag, seed in (("tiny", 42), ("other", 7)):
        kill_after(4)
        with pytest.raises(Killed):
            train("--save-every", 3, "--seed", seed, tag=tag)
    kill_after(None)
    return metrics.runs_dir() / "tiny", metrics.runs_dir() / "other"


def write_config(folder, flags: dict, **more):
    (folder / "config.json").write_text(json.dumps({"flags": flags, **more}))


def test_a_pipe_in_place_of_a_file_is_an_error_and_no_process_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    pipe = tmp_path / "metrics.jsonl"
    os.mkfifo(pipe)
    reads = (
        lambda: read_json(pipe, Schema("file", {})),
        lambda: sha256(pipe),
        lambda: digest_file(pipe, hashlib.sha256(), 1),
        lambda: list(read_history(tmp_path)),
    )
    for read in reads:
        with pytest.raises(NoOrdinaryFile):
            read()
    text = tmp_path / "text.parquet"
    text.write_bytes(b"x" * RECORDED_FROM)
    os.utime(text)
    monkeypatch.setattr("nanochat.fingerprints.SETTLED_AFTER", -1.0)
    digest = file_hash(text)
    (kept,) = (tmp_path / "base" / "fingerprints").iterdir()
    kept.unlink()
    os.mkfifo(kept)
    assert file_hash(text) == digest


def test_a_format_that_is_no_number_is_a_damage():
    with pytest.raises(InputError, match="format: 'x'"):
        Schema("file", {}).check("a.json", {"format": "x"})


@pytest.mark.parametrize(
    "name, value",
    [
        ("warmup_steps", None),
        ("mlp_rank", "a\0b"),
        ("seed", 10**299),
        ("final_lr_frac", "x"),
        ("tie_embeddings", "yes"),
        ("solve", "no"),
    ],
)
def test_a_value_that_a_run_cannot_inherit_is_one_line(name, value):
    args = build_parser().parse_args([])
    with pytest.raises(InputError, match=rf"config.json: flags.{name} is .* which no run writes"):
        inherit(args, {"flags": {name: value}, "given": []}, "tiny")


def test_what_a_record_lacks_is_named_with_its_file(tmp_path):
    write_config(tmp_path, {"seed": 1}, derived={"corpus": {"val_fingerprint": "1"}})
    run = Namespace(config=run_files.read_config(tmp_path))
    with pytest.raises(InputError, match="config.json: derived.corpus.train_fingerprint is missing"):
        run_text.recorded_text(run)
    with pytest.raises(InputError, match="config.json: flags.data is missing"):
        run_text.open_run_text(run)
    write_config(tmp_path, {}, derived={"corpus": "x"})
    with pytest.raises(InputError, match="corpus: 'x'"):
        run_files.read_config(tmp_path)


def test_checkpoints_of_another_run_are_refused_and_stay(interrupted, train):
    tiny, other = interrupted
    for name in ("checkpoints", "metrics.jsonl"):
        shutil.move(tiny / name, tiny / f"{name}.kept")
        shutil.copytree(other / name, tiny / name) if name == "checkpoints" else shutil.copy(
            other / name, tiny
        )
    with pytest.raises(InputError, match=r"none of its checkpoints \[3\] can be used"):
        train("--save-every", 3, "--resume", "auto")
    with pytest.raises(InputError, match="was made with seed 7, config.json has 42"):
        cm.load_checkpoint(tiny, 3)
    (tiny / "summary.json").write_text('{"status": "finished", "step": 6}')
    with pytest.raises(InputError, match="was made with seed 7"):
        train("--save-every", 3, "--resume", "auto")


def test_a_summary_of_another_run_ends_no_run(interrupted, train):
    tiny, _ = interrupted
    shutil.move(tiny / "summary.json", tiny / "kept.json")
    (tiny / "summary.json").write_text('{"status": "finished", "step": 6}')
    with pytest.raises(
        InputError, match="says finished, and the checkpoint of step 3 that it is not the last"
    ):
        train("--save-every", 3, "--resume", "auto")
    shutil.move(tiny / "kept.json", tiny / "summary.json")
    assert train("--save-every", 3, "--resume", "auto").summary["status"] == "finished"
    assert train("--save-every", 3).summary["step"] == 6


def test_a_later_checkpoint_does_not_push_out_the_one_that_is_saved(tmp_path):
    cm.save_checkpoint(tmp_path, 20, STATE, {})
    cm.save_checkpoint(tmp_path, 5, STATE, {}, keep=1)
    cm.save_checkpoint(tmp_path, 10, STATE, {}, keep=1)
    assert cm.saved_steps(tmp_path) == [10, 20]


def test_only_folders_with_the_name_of_a_checkpoint_are_checkpoints(tmp_path):
    cm.save_checkpoint(tmp_path, 5, STATE, {})
    folder = tmp_path / "checkpoints"
    for name in ("step_7", "step_0000009", f"step_{'9' * 100}"):
        (folder / name).mkdir()
    (folder / "step_000011").write_text("no folder")
    (folder / ".step_000010.building").symlink_to("step_000005")
    assert cm.saved_steps(tmp_path) == [5]
    cm.save_checkpoint(tmp_path, 10, STATE, {})
    assert cm.load_newest(tmp_path)[1]["step"] == 10


def test_checkpoints_that_cannot_be_listed_are_an_error_and_not_none(tmp_path, monkeypatch):
    def fails(folder):
        raise OSError(errno.EIO, "Input/output error", str(folder))

    assert cm.saved_steps(tmp_path) == []
    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(OSError, match="Input/output error: .*checkpoints"):
        cm.saved_steps(tmp_path)


def test_the_token_cache_of_another_text_is_built_again(base_dir, tmp_path, corpus_dir, capsys):
    tokenizer = load_tokenizer()
    shards = [Shard(name, (corpus_dir / f"{name}.jsonl",)) for name in ("val", "part1")]
    slots = [cached_tokens(shard, tokenizer).tolist() for shard in shards]
    folders = [cache_folder(shard, tokenizer) for shard in shards]
    shutil.move(folders[0], tmp_path / "aside")
    shutil.move(folders[1], folders[0])
    shutil.move(tmp_path / "aside", folders[1])
    assert [cached_tokens(shard, tokenizer).tolist() for shard in shards] == slots
    assert capsys.readouterr().out.count("has another fingerprint") == 2
    (folders[0] / "meta.json").unlink()
    os.mkfifo(folders[0] / "meta.json")
    assert cached_tokens(shards[0], tokenizer).tolist() == slots[0]
