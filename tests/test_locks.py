"""Locks, on file systems with flock and without: one holder at a time, and a dead one blocks nobody."""
import errno
import fcntl
import json
import os
import signal
import time

import pytest

from nanochat import locks
from nanochat.common import InputError, claimed, locked
from processes import Launched

WITHOUT_FLOCK = [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL]


def refuse_flock(error=errno.ENOSYS):
    """In this process: flock fails as on a file system that has none."""
    def flock(*args):
        raise OSError(error, os.strerror(error))
    fcntl.flock = flock


@pytest.fixture
def without_flock(monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # restored at the end of the test
    refuse_flock()


@pytest.fixture(params=[None, *WITHOUT_FLOCK], ids=lambda error: errno.errorcode.get(error, "flock"))
def file_system(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(fcntl, "flock", fcntl.flock)
        refuse_flock(request.param)
    return request.param


def test_a_claim_is_one_processes_and_ends_with_it(tmp_path, file_system):
    path = tmp_path / "locks" / "run.lock"
    for _ in range(2):
        with claimed(path, "run x"):
            said = f"run x is in use by process {os.getpid()} on .*; wait for it, or stop it"
            with pytest.raises(InputError, match=said), claimed(path, "run x"):
                pass
            assert locks.acquire(path, wait=False) is None
    assert [p.name for p in path.parent.iterdir()] == ["run.lock"]


def test_other_errors_are_not_taken_for_a_missing_flock(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)
    refuse_flock(errno.EIO)
    with pytest.raises(OSError) as e, locked(tmp_path / "a.lock"):
        pass
    assert e.value.errno == errno.EIO and e.value.filename == str(tmp_path / "a.lock")


def count_up(folder, times):
    refuse_flock()
    for _ in range(times):
        with locked(folder / "lock"):
            value = int((folder / "count").read_text())
            time.sleep(0.002)
            (folder / "count").write_text(str(value + 1))


def test_without_flock_processes_take_turns(tmp_path):
    (tmp_path / "count").write_text("0")
    workers = [Launched(1, tmp_path / "output", count_up, tmp_path, 5) for _ in range(3)]
    assert [w.codes() for w in workers] == [[0]] * 3
    assert (tmp_path / "count").read_text() == "15"


def hold(path, claim):
    refuse_flock()
    with claim(path, "x"):
        path.with_name("ready").touch()
        time.sleep(60)


def test_without_flock_a_killed_holder_blocks_nobody(tmp_path, without_flock):
    path = tmp_path / "a.lock"
    holder, = Launched(1, tmp_path / "output", hold, path, claimed).processes
    while not path.with_name("ready").exists():
        assert holder.is_alive()
        time.sleep(0.01)
    said = f"process {holder.pid} on .* \\(remove .*a.lock.owner if that process is gone\\)"
    with pytest.raises(InputError, match=said), claimed(path, "x"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with claimed(path, "x"):
        pass


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"pid_space": "pid:[1]"}])
def test_without_flock_a_holder_elsewhere_is_alive(tmp_path, without_flock, monkeypatch, capfd, change):
    path = tmp_path / "a.lock"
    locks.owner_path(path).write_text(json.dumps(locks.this_process() | {"pid": 999_999_999} | change))
    assert locks.acquire(path, wait=False) is None
    monkeypatch.setattr(locks, "NOTICE_AFTER", 0)
    person = locks.owner_path(path).unlink
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: person())
    with locked(path):
        pass
    error = capfd.readouterr().err
    assert error.startswith(f"waiting for {path}: in use by process 999999999 on ") and error.count("\n") == 1


def test_without_flock_a_later_process_with_the_number_of_the_holder_is_another(tmp_path, without_flock):
    if not locks.start_time(os.getpid()):
        pytest.skip("this system does not tell when a process started")
    path = tmp_path / "a.lock"
    locks.owner_path(path).write_text(json.dumps(locks.this_process() | {"started": "1"}))
    with claimed(path, "x"):
        pass
