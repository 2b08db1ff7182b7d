"""Checkpoints are written beside training: it waits for the copy alone, and what goes wrong is not lost."""

import contextlib
import os
import re
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, losses
from processes import Launched, wait_for

from nanochat import agreement, checkpoint_files, checkpoint_writer, common, metrics
from nanochat.checkpoint_manager import NewCheckpoint, load_checkpoint
from nanochat.checkpoint_writer import CheckpointWriter
from nanochat.errors import InputError
from nanochat.processes import World
from nanochat.run_files import read_meta, step_folder
from nanochat.run_output import shared_folder
from scripts import adapter_train, base_train


@pytest.fixture
def writer(tmp_path):
    with common.claimed(tmp_path / "lock", "the run") as lock, CheckpointWriter(lock) as writer:
        yield writer


def test_the_writer_has_the_tensors_as_they_were_and_training_goes_on(tmp_path, writer):
    weights = torch.zeros(1000)

    def write():
        wait_for((tmp_path / "go").exists)
        torch.save(weights, tmp_path / "written")

    writer.start(write)
    weights += 1
    writer.check()
    assert not (tmp_path / "written").exists()
    (tmp_path / "go").touch()
    writer.wait()
    assert torch.load(tmp_path / "written").sum() == 0 and weights.sum() == 1000


def refuse():
    raise InputError("cannot write")


def test_what_went_wrong_is_said_at_the_next_step_at_the_end_or_beside_another_error(
    writer, tmp_path, capsys
):
    writer.start(refuse)
    with pytest.raises(InputError, match="cannot write"):
        wait_for(lambda: writer.check())
    writer.start(refuse)
    with pytest.raises(InputError, match="cannot write"):
        writer.wait()
    with pytest.raises(InputError, match="cannot write"), CheckpointWriter(None) as other:
        other.start(refuse)
    with pytest.raises(KeyError), CheckpointWriter(None) as other:
        other.start(refuse)
        raise KeyError
    assert capsys.readouterr().err == "note: cannot write\n"


def test_a_writer_that_is_killed_is_a_line(writer):
    writer.start(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        InputError, match=r"was ended by SIGKILL \(out of memory\?\); continue with --resume auto"
    ):
        writer.wait()


def test_the_next_save_waits_for_the_last_and_says_so_unless_the_run_is_to_stop(
    tmp_path, writer, monkeypatch, capsys
):
    def write(name, after):
        wait_for((tmp_path / after).exists)
        (tmp_path / name).touch()

    monkeypatch.setattr(checkpoint_writer, "NOTICE_AFTER", 0.0)
    writer.start(lambda: write("first", after="go"))
    writer.wait(lambda is_busy: False)
    writer.start(lambda: write("second", after="."))
    time.sleep(0.3)
    assert not (tmp_path / "second").exists(), "the second writer waits for the first"
    threading.Timer(0.5, (tmp_path / "go").touch).start()
    writer.wait()
    assert (tmp_path / "first").exists() and (tmp_path / "second").exists()
    assert capsys.readouterr().out == "waiting for a checkpoint that is still being written\n"


# ---- runs


def test_a_process_that_does_not_see_the_run_folder_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "LOAD_PATIENCE", 0.0)
    run = SimpleNamespace(world=World(torch.device("cpu")), folder=tmp_path / "run")
    with pytest.raises(InputError, match="run: process 0 writes the run there, and .* all machines share"):
        shared_folder(run)
    run.folder.mkdir()
    (run.folder / "config.json").touch()
    assert shared_folder(run)[0] == run.folder and shared_folder(run)[1] != shared_folder(run)[1]


def test_a_full_disk_while_training_goes_on_is_a_line_and_costs_no_earlier_checkpoint(train, monkeypatch):
    straight = train("--num-iterations", 8, tag="straight")

    def fail(new, pieces):
        if new.step > 2:
            with new.failing():
                raise OSError(28, "No space left on device")
        write(new, pieces)

    write = NewCheckpoint.write
    flags = ("--num-iterations", 8, "--save-every", 2, "--resume", "auto")
    message = r"step_000004: cannot write .*earlier ones are intact: \[2\]"
    with monkeypatch.context() as full, pytest.raises(InputError, match=message):
        full.setattr(NewCheckpoint, "write", fail)
        train(*flags)
    assert os.listdir(metrics.runs_dir() / "tiny/checkpoints") == ["step_000002"]
    assert losses(train(*flags)) == losses(straight)


def train_and_lose_a_writer(flags):
    """The writer of process 1 is killed while it writes the checkpoint of step 4."""
    write = NewCheckpoint.write

    def die(new, pieces):
        if (new.rank, new.step) == (1, 4):
            os.kill(os.getpid(), signal.SIGKILL)
        write(new, pieces)

    NewCheckpoint.write = die
    base_train.main(flags)


def test_a_writer_of_one_process_that_is_killed_ends_the_run_with_its_line(train, corpus_dir, tmp_path):
    flags = [
        *TINY,
        "--device-batch-size",
        "2",
        "--num-iterations",
        "8",
        "--save-every",
        "2",
        "--resume",
        "auto",
    ]
    flags += ["--data", str(corpus_dir), "--model-tag"]
    straight = Launched(2, tmp_path / "output", base_train.main, [*flags, "straight"])
    assert straight.codes() == [0, 0], (tmp_path / "output").read_text()
    (tmp_path / "output").unlink()
    launched = Launched(2, tmp_path / "output", train_and_lose_a_writer, [*flags, "lost"])
    assert 2 in launched.codes()
    errors = [line for line in (tmp_path / "output").read_text().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and re.match(
        "error: process 1 of 2: .*writes the checkpoint was ended by SIGKILL", errors[0]
    )
    resumed = Launched(2, tmp_path / "output", base_train.main, [*flags, "lost"])  # waits for writer 0
    assert resumed.codes() == [0, 0] and "from step 2" in (tmp_path / "output").read_text()
    runs = [metrics.load_run(metrics.runs_dir() / tag) for tag in ("straight", "lost")]
    assert losses(runs[0]) == losses(runs[1])


SUBSPACE = ["--subspace", "fastfood", "--subspace-dim", "200", "--subspace-scales"]
ADAPTER = ["--model-tag", "tiny", "--run-tag", "adapter", "--adapter", "adalora"]


def save_again(main, flags, out):
    """Go on from a checkpoint and, without a step, save what these processes have into another folder."""

    def save(run, trainable, batches, evaluation, output, state, stop):
        output.folder = out
        output.save(state)

    base_train.train_steps = save
    with contextlib.suppress(SystemExit):  # code 75: its last step is not made
        main([*flags, "--resume", "auto"])


@pytest.mark.parametrize(
    "flags",
    [["--attn-rank", "3", "--dtype", "bfloat16"], SUBSPACE, ADAPTER],
    ids=["masters", "subspace", "adapter"],
)
def test_the_state_is_the_same_to_the_bit_whatever_the_number_of_processes(
    train, corpus_dir, tmp_path, flags
):
    main = base_train.main
    folder = metrics.runs_dir() / "saved"
    horizon = ["--num-iterations", "4", "--save-every", "2", "--keep", "-1", "--eval-every", "-1"]
    horizon += ["--device-batch-size", "2", "--total-batch-size", "384"]
    command = [*TINY, *flags, "--model-tag", "saved", *horizon, "--data", str(corpus_dir)]
    if flags is ADAPTER:
        train("--num-iterations", 1)
        main = adapter_train.main
        folder = metrics.runs_dir() / "adapter"
        command = [*flags, *horizon]

    def launch(processes, function, *arguments):
        launched = Launched(processes, tmp_path / "output", function, *arguments)
        return launched.codes(), (tmp_path / "output").read_text()

    codes, output = launch(2, main, command)
    assert codes == [0, 0], output
    shutil.rmtree(step_folder(folder, 4))
    (folder / "summary.json").unlink()
    written = dict(checkpoint_files.leaves(load_checkpoint(folder, 2)[0]))
    for processes in (1, 3, 2):
        out = tmp_path / f"by_{processes}"
        codes, output = launch(processes, save_again, main, command, out)
        assert codes == processes * [0], output
        again = dict(checkpoint_files.leaves(load_checkpoint(out, 2)[0]))
        assert again.keys() == written.keys()
        for path, value in written.items():
            assert torch.equal(torch.as_tensor(again[path]), torch.as_tensor(value)), path
    two, one = (read_meta(place, 2)["files"] for place in (folder, tmp_path / "by_1"))
    assert read_meta(out, 2)["files"] == two and one.keys() < two.keys()
