"""Much text is tokenised by worker processes: the same caches, no worker left over, the usual errors."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, story

from nanochat import token_cache, token_workers
from nanochat.dataset import Shard
from nanochat.errors import InputError
from nanochat.token_cache import cache_folder, cached_tokens
from nanochat.tokenizer import load_tokenizer


@pytest.fixture
def shards(base_dir, tmp_path, monkeypatch) -> list[Shard]:
    """Five small files, for which workers are started all the same."""
    monkeypatch.setattr(token_workers, "SMALL_TEXT", 0)
    shards = []
    for part in range(5):
        file = tmp_path / f"part{part}.jsonl"
        texts = [story(1000 * part + i) for i in range(50)]
        if part == 3:
            texts.append("")
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
        shards.append(Shard(file.name, (file,)))
    return shards


def contents(shards: list[Shard], tokenizer) -> list[bytes]:
    return [(cache_folder(shard, tokenizer) / "tokens.bin").read_bytes() for shard in shards]


def remove_caches(shards: list[Shard], tokenizer):
    for shard in shards:
        folder = cache_folder(shard, tokenizer)
        folder.rename(folder.with_name(f"{folder.name}.before"))


@pytest.mark.parametrize("cores", [1, 3])
def test_workers_build_the_caches_that_one_process_builds(shards, monkeypatch, capfd, cores):
    tokenizer = load_tokenizer()
    for shard in shards:
        cached_tokens(shard, tokenizer)
    expected = contents(shards, tokenizer)
    remove_caches(shards, tokenizer)
    monkeypatch.setattr(token_workers, "usable_cores", lambda: cores)
    monkeypatch.setattr(token_cache, "write_tokens", None)  # none is left for this process
    capfd.readouterr()
    token_workers.build_caches(shards, tokenizer)
    assert contents(shards, tokenizer) == expected
    output, errors = capfd.readouterr()
    assert f"tokenising 5 file(s), 0.0 GB of text, {cores} worker(s)" in output
    assert "part3.jsonl: 1 of 51 documents are empty" in output
    assert "tokenised in" in output
    assert errors == ""
    token_workers.build_caches(shards, tokenizer)
    assert capfd.readouterr().out == ""  # all is there


def test_little_text_needs_no_workers(shards, monkeypatch):
    monkeypatch.setattr(token_workers, "SMALL_TEXT", 10**6)
    monkeypatch.setattr(token_workers, "Worker", None)
    token_workers.build_caches(shards, load_tokenizer())
    assert not cache_folder(shards[0], load_tokenizer()).exists()


def test_a_file_that_cannot_be_read_is_named_as_by_one_process(shards, capfd):
    path = shards[2].paths[0]
    path.write_text(path.read_text("utf-8") + "no JSON\n", "utf-8")
    with pytest.raises(InputError, match="part2.jsonl: line 51: not a JSON object"):
        token_workers.build_caches(shards, load_tokenizer())
    assert capfd.readouterr().err == ""


def test_what_dead_workers_leave_is_built_by_this_process(shards, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    token_workers.build_caches(shards, load_tokenizer())
    assert all(len(cached_tokens(shard, load_tokenizer())) > 50 for shard in shards)


@pytest.mark.parametrize("line", ["print('hello')", "import os; os.write(1, b'hello')"])
def test_what_else_a_worker_prints_stops_nothing(shards, tmp_path, monkeypatch, capfd, line):
    """Whatever an interpreter loads at its start may print, and so may a library in C."""
    (tmp_path / "sitecustomize.py").write_text(line + "\n", "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(token_cache, "write_tokens", None)  # none is left for this process
    token_workers.build_caches(shards, load_tokenizer())
    assert "hello" in capfd.readouterr().out
    assert all(len(cached_tokens(shard, load_tokenizer())) > 50 for shard in shards)


def test_a_report_that_cannot_be_read_is_the_end_of_its_worker(shards, monkeypatch):
    noted = []
    monkeypatch.setattr(threading, "excepthook", noted.append)
    monkeypatch.setattr(token_workers, "json", SimpleNamespace(loads=lambda line: 1 / 0))
    token_workers.build_caches(shards, load_tokenizer())
    assert noted and {type(note.exc_value) for note in noted} == {ZeroDivisionError}


WAITING = """
import sys
from pathlib import Path
from nanochat import token_workers
from nanochat.dataset import Shard
from nanochat.tokenizer import load_tokenizer

token_workers.SMALL_TEXT = 0
token_workers.usable_cores = lambda: 2
shards = [Shard(Path(name).name, (Path(name),)) for name in sys.argv[1:]]
for shard in shards:
    vars(shard)["fingerprint"] = shard.name  # of a pipe it cannot be computed
token_workers.build_caches(shards, load_tokenizer())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(base_dir, tmp_path, number):
    pipes = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for pipe in pipes:
        os.mkfifo(pipe)  # whoever reads it waits, since nobody writes
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    parent = subprocess.Popen([sys.executable, "-c", WAITING, *pipes], cwd=ROOT, **quiet)
    workers = children(parent.pid, 2)
    while len(unfinished(base_dir)) < 2:
        time.sleep(0.05)
    parent.send_signal(number)
    parent.wait(20)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    if number == signal.SIGINT:
        assert unfinished(base_dir) == []


def unfinished(base_dir) -> list[Path]:
    return list((base_dir / "token_cache").glob("*/*.building*"))


def children(pid: int, count: int) -> list[str]:
    """The process ids of the children of a process, once it has so many."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
        if len(pids) == count:
            return pids
        time.sleep(0.05)
    raise AssertionError("no workers were started")
