"""A checkpoint is the commit of a run: what it vouches for is there, and nothing else has to be."""

import json
import math
import os
import shutil

import pytest
import torch
from conftest import Killed, losses

from nanochat import checkpoint_manager as cm
from nanochat import metrics
from nanochat.adapters.loading import load_model
from nanochat.checkpoint_files import inner_dict, leaves
from nanochat.errors import InputError
from nanochat.history_writer import HistoryWriter
from nanochat.run_files import read_meta, read_summary, step_folder, write_meta
from scripts import adapter_train, base_train

FILES = ("__0_0.distcp", "__0_0.json", ".metadata", "meta.json")
RESUME = ("--save-every", 3, "--resume", "auto", "--ppl-thresholds", "290")


def contents(folder):
    """Of a run folder, without what differs between two runs: clocks, memory, versions."""
    differ = ("total_training_time", "train/dt", "train/tok_per_sec", "mem/")
    history = []
    for row in metrics.read_history(folder):
        history.append({key: value for key, value in row.items() if not key.startswith(differ)})
    return history, cm.load_checkpoint(folder, 6)[0]


def assert_same(a, b):
    assert contents(a)[0] == contents(b)[0]
    before, after = (dict(cm.named_tensors(contents(folder)[1])) for folder in (a, b))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def die_before_summary(monkeypatch):
    """The process is killed after its last checkpoint, before the summary that says finished."""

    def arm(status="finished"):
        summarize = metrics.RunRecord.summarize

        def killed(record, said):
            if said == status:
                raise Killed
            summarize(record, said)

        monkeypatch.setattr(metrics.RunRecord, "summarize", killed)
        return lambda: monkeypatch.setattr(metrics.RunRecord, "summarize", summarize)

    return arm


@pytest.mark.parametrize(
    "flags", [(), ("--stop-at-ppl", 296, "--num-iterations", 40)], ids=["steps", "stop-at-ppl"]
)
def test_a_run_killed_between_its_last_checkpoint_and_its_summary_is_finished(
    train, die_before_summary, capsys, flags
):
    flags = (*RESUME, *flags)
    live = die_before_summary()
    with pytest.raises(Killed):
        train(*flags)
    live()
    folder = metrics.runs_dir() / "tiny"
    assert json.loads((folder / "summary.json").read_text())["status"] == "running"
    assert metrics.load_run(folder).summary["status"] == "finished"  # for sweeps, reports, adapters
    adapter_train.main(["--model-tag", "tiny", "--run-tag", "adapter", "--dry-run"])
    (folder / "summary.json").write_text("{")
    steps = read_summary(folder)["step"]
    run = train(*flags)
    assert (
        "already finished" in capsys.readouterr().out
        and run.summary["step"] == steps == run.history[-1]["step"]
    )
    assert json.loads((folder / "summary.json").read_text()) == run.summary
    straight = train(*flags, tag="straight")
    assert losses(run) == losses(straight)
    untimed = [
        key
        for key in straight.summary
        if "time" not in key
        and "second" not in key
        and "tok_per" not in key
        and key not in ("train/dt", "mem/peak_bytes")
    ]
    assert {key: run.summary[key] for key in untimed} == {key: straight.summary[key] for key in untimed}


def test_a_record_that_lost_lines_is_refused_and_one_that_lost_half_a_line_is_cut(train, kill_after):
    straight = train(*RESUME, tag="straight")
    kill_after(5)
    with pytest.raises(Killed):
        train(*RESUME)
    kill_after(None)
    path = metrics.runs_dir() / "tiny" / "metrics.jsonl"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole.replace(b'"step": 1,', b'"step": 9,'), b""):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError,
            match=r"metrics.jsonl: .*checkpoint of step 3 vouches for [\d,]+ bytes of it; restore it, or",
        ):
            train(*RESUME)
        assert path.read_bytes() == damaged
    path.write_bytes(whole + b'{"step": 6, "train/lo\0\0\0')
    run = train(*RESUME)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 4, 5, 6]
    assert_same(metrics.runs_dir() / run.name, metrics.runs_dir() / straight.name)


def test_lines_survive_once_committed_and_their_sum_goes_on_after_a_restart(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = HistoryWriter(path)
    file.append({"step": 1})
    first = file.commit()
    file.close()
    with open(path, "ab") as f:
        f.write(b"x" * (3 * 2**20))  # half a line, longer than what is read at once
    file = HistoryWriter(path)
    assert path.read_bytes() == b'{"step": 1}\n' and file.commit() == first
    file.append({"step": 2})
    second = file.commit()
    file.close()
    assert HistoryWriter(path).commit() == second and second["bytes"] == os.path.getsize(path)


# ---- damage ------------------------------------------------------------------------------------------------


def changed(**changes):
    """A damage to meta.json that its sum tells of."""

    def damage(folder):
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def signed(**changes):
    """One by somebody who made a new sum."""
    return lambda folder: write_meta(folder, json.loads((folder / "meta.json").read_text()) | changes)


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def unsummed(folder):
    """As an earlier version wrote it, with another step."""
    path = folder / "meta.json"
    meta = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if key not in ("format", "meta_sha256")
    }
    path.write_text(json.dumps(meta | {"step": 4}))


DAMAGES = {
    "step": changed(step=4),
    "steps": changed(step=3.5),
    "time": changed(total_training_time=1.0),
    "model": changed(model={}),
    "no object": written("meta.json", b"[]"),
    "empty": written("meta.json", b""),
    "binary": written("meta.json", b"\xff\xfe\x00"),
    "deep": written("meta.json", b"[" * 100_000),
    "sum of another type": signed(sha256=3),
    "newer": changed(format=9, flavour=1),
    "another step": signed(step=4),
    "of then": unsummed,
    "state": written("__0_0.distcp", b"PK\x03\x04"),
    "empty state": written("__0_0.distcp", b""),
    "list": written("__0_0.json", b"{}"),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "a folder": lambda folder: ((folder / "__0_0.distcp").unlink(), (folder / "__0_0.distcp").mkdir()),
}


@pytest.fixture
def interrupted(train, kill_after):
    """A run with checkpoints of steps 3 and 5, killed in step 6."""
    kill_after(5)
    with pytest.raises(Killed):
        train("--save-every", 3)
    kill_after(None)
    folder = metrics.runs_dir() / "tiny"
    shutil.copytree(step_folder(folder, 3), step_folder(folder, 5))
    write_meta(step_folder(folder, 5), read_meta(folder, 3) | {"step": 5})
    return folder


def test_a_damaged_checkpoint_is_said_in_a_line_and_the_one_before_is_used(interrupted, capsys):
    for name, damage in DAMAGES.items():
        folder = step_folder(interrupted, 5)
        kept = interrupted / "kept"
        shutil.copytree(folder, kept)
        damage(folder)
        state, meta = cm.load_newest(interrupted)
        lines = capsys.readouterr().out.splitlines()
        assert (
            meta["step"] == 3
            and len(lines) == 1
            and lines[0].startswith("skipped: ")
            and "step_000005" in lines[0]
        ), name
        shutil.rmtree(folder)
        kept.rename(folder)
    assert cm.load_newest(interrupted)[1]["step"] == 5
    write_meta(step_folder(interrupted, 5), read_meta(interrupted, 5))
    changed(format=9, flavour=1)(step_folder(interrupted, 5))
    cm.load_newest(interrupted)
    assert (
        "newer version of this program (format 9, here 3; new: flavour); use that version"
        in capsys.readouterr().out
    )


def in_memory(folder, step):
    """(state as plain dicts, meta) of a checkpoint."""
    stored, meta = cm.load_checkpoint(folder, step)
    state = {}
    for (*keys, last), value in leaves(stored):
        inner_dict(state, keys)[last] = value
    return state, meta


def test_a_state_of_another_model_is_a_line(interrupted):
    state, meta = in_memory(interrupted, 5)
    del state["model"]["lm_head.weight"]
    cm.save_checkpoint(
        interrupted,
        5,
        state,
        {key: value for key, value in meta.items() if key not in ("sha256", "files", "meta_sha256")},
    )
    with pytest.raises(
        InputError, match="step_000005: does not hold the model that it should .*; use another step"
    ):
        load_model(interrupted, 5)


def test_a_poisoned_checkpoint_is_skipped_and_none_is_written(train, interrupted, monkeypatch, capsys):
    state, meta = in_memory(interrupted, 5)
    state["optimizer"]["smear"]["exp_avg_sq"] = torch.full((), math.inf)
    cm.save_checkpoint(
        interrupted,
        5,
        state,
        {key: value for key, value in meta.items() if key not in ("sha256", "files", "meta_sha256")},
    )
    assert cm.load_newest(interrupted)[1]["step"] == 3
    assert (
        "step_000005: optimizer.smear.exp_avg_sq and 1 tensor(s) in all are not finite; use another step"
        in capsys.readouterr().out
    )
    update = base_train.update

    def poison(trainable, step, lrm):
        update(trainable, step, lrm)
        if step == 2:  # the update before the save: the weights are good
            next(iter(trainable.optimizers[0].state.values()))["exp_avg"].fill_(math.nan)

    monkeypatch.setattr(base_train, "update", poison)
    with pytest.raises(
        InputError, match=r"step 3: optimizer\..*exp_avg and 1 tensor.* not finite; nothing was saved"
    ):
        train("--save-every", 3, tag="poisoned")


def test_a_run_folder_without_its_config_is_refused(train, interrupted):
    (interrupted / "config.json").unlink()
    with pytest.raises(
        InputError,
        match=r"--model-tag tiny: has checkpoints \[3, 5\] and no config.json.*restore .*choose another tag",
    ):
        train("--save-every", 3, "--resume", "auto")


def test_a_diverged_run_says_so_and_does_not_become_finished(train, monkeypatch):
    monkeypatch.setattr(base_train, "gradient_norm", lambda trainable, clip: math.nan)
    flags = ("--max-bad-steps", 2, "--resume", "auto")
    for done in (3, 4):  # resumed, it has one more chance a time
        with pytest.raises(
            InputError, match=f"step {done}: loss or gradient not finite in {done} steps in a row"
        ):
            train(*flags)
        assert metrics.load_run(metrics.runs_dir() / "tiny").summary["status"] == "diverged"


def test_what_killed_writers_left_is_removed_at_the_next_start(train, interrupted):
    left = [interrupted / ".summary.json.0123456789ab.tmp", interrupted / "checkpoints/.step_000006.building"]
    left[0].touch()
    left[1].mkdir()
    mine = interrupted / "notes.tmp"
    mine.touch()
    shutil.rmtree(step_folder(interrupted, 5))
    train("--save-every", 3, "--resume", "auto")
    assert mine.exists() and not any(path.exists() for path in left)


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        cm.save_checkpoint(tmp_path, 1, {}, {})
    finally:
        os.umask(before)
    folder = step_folder(tmp_path, 1)
    assert {oct((folder / name).stat().st_mode & 0o777) for name in FILES} == {"0o640"}
    assert oct(folder.stat().st_mode & 0o777) == "0o750"
