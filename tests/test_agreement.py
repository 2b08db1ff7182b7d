"""Processes that see other files than process 0 follow it, or all end with one line. Nobody waits in vain."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import TINY, losses
from processes import Launched

from nanochat import agreement, metrics, processes
from nanochat.checkpoint_manager import saved_steps
from nanochat.dataset import open_corpus
from nanochat.errors import InputError
from nanochat.run_text import fingerprints
from nanochat.shared_text import confirm_caches, shared_text
from nanochat.tokenizer import load_tokenizer
from scripts import base_eval, base_train, tok_train

FLAGS = ["--save-every", "2", "--keep", "-1", "--eval-every", "-1", "--resume", "auto", "--model-tag", "tiny"]


@pytest.fixture
def run_two(tmp_path):
    """run_two(function, *arguments) in two processes: (exit codes, the lines that they print)."""

    def run(function, *arguments):
        output = tmp_path / "output"
        output.unlink(missing_ok=True)
        codes = Launched(2, output, function, *arguments).codes()
        return codes, output.read_text().splitlines() if output.exists() else []

    return run


def without_gloo(lines: list[str]) -> list[str]:
    """The lines without those of torch 2.9's gloo, which says that processes are connected."""
    return [line for line in lines if line and "[Gloo]" not in line]


def errors(lines: list[str]) -> list[str]:
    assert not any("Traceback" in line for line in lines), lines
    return [line for line in lines if line.startswith("error")]


@pytest.fixture
def killed_run(train, base_dir):
    """The folder of a run of 6 steps that was killed after step 5; its checkpoints are of steps 2 and 4."""
    train(*FLAGS, tag="tiny")
    folder = metrics.runs_dir() / "tiny"
    shutil.rmtree(folder / "checkpoints/step_000006")
    (folder / "summary.json").write_text('{"status": "running"}')
    return folder


@pytest.fixture
def other_base(base_dir, tmp_path):
    """other_base(): a copy of the base directory as it is now, as process 1 may see it."""

    def copy():
        shutil.copytree(base_dir, tmp_path / "other")
        return tmp_path / "other"

    return copy


# ---- in one of two processes


def in_other_base(base, main, flags, change=None):
    if processes.process_layout()[0] == 1:
        os.environ["NANOCHAT_BASE_DIR"] = str(base)
        if change:
            change(base)
    main(flags)


def with_a_read_error(part, flags):
    """Process 1 cannot read the files whose path has this part."""
    opened = os.open

    def fail(path, *args, **kwargs):
        if part in str(path):
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *args, **kwargs)

    agreement.READ_PATIENCE = 0.0
    if processes.process_layout()[0] == 1:
        os.open = fail
    base_train.main(flags)


def show_later(base):
    """What was hidden appears."""
    folder = base / "runs/tiny/checkpoints"

    def show():
        time.sleep(1.0)
        (folder / "hidden").rename(folder / "step_000004")

    threading.Thread(target=show).start()


def lose_patience(base):
    agreement.LOAD_PATIENCE = 0.0


# ---- a run that goes on


def test_all_stop_where_one_cannot_read_the_newest_checkpoint(killed_run, run_two, corpus_dir):
    record = (killed_run / "metrics.jsonl").read_bytes()
    flags = [*TINY, "--data", str(corpus_dir), *FLAGS]
    codes, lines = run_two(with_a_read_error, "step_000004/__0_0.distcp", flags)
    assert 2 in codes and 0 not in codes
    assert errors(lines) == lines[-1:]
    assert lines[-1].startswith("error: process 1 of 2: ") and "step_000004" in lines[-1]
    assert saved_steps(killed_run) == [2, 4] and (killed_run / "metrics.jsonl").read_bytes() == record


def test_a_checkpoint_that_appears_late_is_waited_for_and_a_finished_run_is_finished_for_all(
    killed_run, run_two, other_base, corpus_dir
):
    straight = losses(metrics.load_run(killed_run))
    other = other_base()
    checkpoints = other / "runs/tiny/checkpoints"
    (checkpoints / "step_000004").rename(checkpoints / "hidden")
    flags = [*TINY, "--data", str(corpus_dir), *FLAGS]
    codes, lines = run_two(in_other_base, other, base_train.main, flags, lose_patience)
    assert 2 in codes and lines[-1] == errors(lines)[0]
    assert lines[-1] == "error: process 1 of 2: tiny: no checkpoint of step 4; there are: [2]"
    assert saved_steps(killed_run) == [2, 4]

    codes, lines = run_two(in_other_base, other, base_train.main, flags, show_later)
    assert codes == [0, 0], lines
    assert losses(metrics.load_run(killed_run)) == pytest.approx(straight, abs=1e-4)
    # process 1 still sees a run that is killed
    codes, lines = run_two(in_other_base, other, base_train.main, flags)
    assert codes == [0, 0] and lines[-1].startswith("tiny: already finished")


def test_one_with_another_tokenizer_stops_all(base_dir, other_base, run_two, corpus_dir, monkeypatch):
    other = other_base()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(other))
    tok_train.main(["--data", str(corpus_dir), "--vocab-size", "290"])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    flags = [*TINY, "--data", str(corpus_dir), *FLAGS]
    codes, lines = run_two(in_other_base, other, base_train.main, flags)
    assert 2 in codes and 0 not in codes and len(errors(lines)) == 1
    assert lines[-1].startswith("error: process 1 of 2: has other values than process 0: tokenizer ('")
    assert "model.vocab_size (290, there 300); start all processes with the same command" in lines[-1]
    assert not (base_dir / "runs").exists()


def test_process_0_that_cannot_write_into_the_folder_ends_all(base_dir, run_two, corpus_dir):
    (base_dir / "runs/tiny/tokenizer.json/in the way").mkdir(parents=True)
    flags = [*TINY, "--data", str(corpus_dir), "--model-tag", "tiny"]
    codes, lines = run_two(base_train.main, flags)
    assert 2 in codes and 0 not in codes
    assert errors(lines) == [f"error: {base_dir}/runs/tiny/tokenizer.json: Is a directory"]


def test_an_evaluation_is_of_what_process_0_sees(train, other_base, run_two, corpus_dir):
    train(*FLAGS, tag="tiny")
    other = other_base()
    shutil.rmtree(other / "runs/tiny/checkpoints/step_000006")  # process 1 would evaluate step 4 ...
    folder = metrics.runs_dir() / "tiny"
    flags = ["--model-tag", "tiny", "--eval", "bpb", "--eval-tokens", "1024"]
    base_eval.main(flags)
    result = (folder / "eval_000006.json").read_bytes()
    codes, lines = run_two(in_other_base, other, base_eval.main, flags)  # ... and process 0 only show it
    assert codes == [0, 0] and "tiny, step 6" in lines
    assert (folder / "eval_000006.json").read_bytes() == result


# ---- text, flags, caches


def agree_step_by_step(folder, base):
    """What differs in process 1 is refused there, and named."""
    world = processes.init_process("cpu")
    rank = world.rank
    assert agreement.from_first(world, lambda: ["value of", os.environ["RANK"]]) == ["value of", "0"]

    def refused(part, function, *arguments):
        try:
            function(*arguments)
            assert rank == 0, part
        except InputError as e:
            assert rank == 1 and part in str(e), (rank, str(e))

    agreement.confirm(world, {"--seed": 1, "plan": {"lr": float("nan")}})
    own = {"--seed": 1 + rank, "plan": {"lr": 0.5, **({"steps": 3} if rank else {})}}
    refused("--seed (2, there 1), plan.steps (3, there None); start all", agreement.confirm, world, own)

    os.chdir(folder / f"process{rank}")  # each has another text of this name
    corpus = shared_text(world, lambda: open_corpus("text"))
    assert fingerprints(corpus)["val"] == agreement.from_first(world, fingerprints, corpus)["val"]
    list(corpus.val[0].read())
    refused("other text than process 0 has (fingerprint ", lambda: list(corpus.train[0].read()))

    if rank == 1:
        os.environ["NANOCHAT_BASE_DIR"] = str(base)
    tokenizer = load_tokenizer()
    other_tokens = "other tokens than process 0 has (slots: 7, there 8)"
    refused(other_tokens, confirm_caches, world, tokenizer, corpus.val)
    processes.end_process()


def test_what_differs_is_named(base_dir, other_base, run_two, tmp_path):
    for rank in (0, 1):
        text = tmp_path / f"process{rank}/text"
        text.mkdir(parents=True)
        (text / "train.jsonl").write_text(json.dumps({"text": f"of {rank}"}))
        (text / "val.jsonl").write_text(json.dumps({"text": "of both"}))
    fingerprint = open_corpus(str(text)).val[0].fingerprint
    cache = Path("token_cache", load_tokenizer().hash, fingerprint)
    other = other_base()
    for base, slots in ((base_dir, 8), (other, 7)):
        (base / cache).mkdir(parents=True)
        meta = {"slots": slots, "dtype": "uint16", "vocab_size": 300}
        (base / cache / "meta.json").write_text(json.dumps(meta))
    codes, lines = run_two(agree_step_by_step, tmp_path, other)
    assert codes == [0, 0], lines


# ---- one that fails


def fail(ranks, joined):
    rank = processes.process_layout()[0]
    world = processes.init_process("cpu") if joined else None
    if rank in ranks:
        raise InputError("broken")
    agreement.meet(world or processes.init_process("cpu"))
    if joined:
        time.sleep(60)  # in no collective


@pytest.mark.parametrize(
    "ranks, joined, said",
    [
        ([0], True, "error: broken"),
        ([1], True, "error: process 1 of 2: broken"),
        ([1], False, "error: process 1 of 2: broken"),
        ([0, 1], True, "error: broken"),
        ([0, 1], False, "error: broken"),
    ],
)
def test_one_that_fails_ends_all_with_one_line(ranks, joined, said, run_two):
    started = time.monotonic()
    codes, lines = run_two(fail, ranks, joined)
    assert without_gloo(lines) == [said] and 2 in codes and 0 not in codes
    assert time.monotonic() - started < 15


def die_while_others_wait():
    world = processes.init_process("cpu")
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    agreement.meet(world)


def test_one_that_is_killed_is_not_waited_for_where_no_launcher_ends_the_others(tmp_path):
    processes = Launched(2, tmp_path / "output", die_while_others_wait).processes
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [2, -signal.SIGKILL]
    lines = (tmp_path / "output").read_text().splitlines()
    assert without_gloo(lines) == ["error: process 1 of 2 is gone; see what it said"]


def test_a_script_of_one_process_says_so(run_two):
    codes, lines = run_two(processes.init_process, "cpu", True)
    line = "error: WORLD_SIZE=2: this script works in one process; start it without torchrun"
    assert codes[0] == 2 and lines == [line]
