"""Locks, on file systems with flock and without: one holder at a time, and a dead one blocks nobody."""

import errno
import fcntl
import json
import os
import signal
import time

import pytest
from processes import Launched, wait_for

from nanochat import leases, locks
from nanochat.checkpoint_writer import CheckpointWriter
from nanochat.common import claimed, locked
from nanochat.errors import InputError

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
            message = f"run x is in use by process {os.getpid()} on .*; wait for it, or stop it"
            with pytest.raises(InputError, match=message), claimed(path, "run x"):
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
    (holder,) = Launched(1, tmp_path / "output", hold, path, claimed).processes
    while not path.with_name("ready").exists():
        assert holder.is_alive()
        time.sleep(0.01)
    message = f"process {holder.pid} on .* \\(remove .*a.lock.owner if that process is gone\\)"
    with pytest.raises(InputError, match=message), claimed(path, "x"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with claimed(path, "x"):
        pass


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"pid_space": "pid:[1]"}])
def test_without_flock_a_holder_elsewhere_of_an_earlier_version_is_alive(
    tmp_path, without_flock, monkeypatch, capfd, change
):
    path = tmp_path / "a.lock"
    locks.owner_path(path).write_text(json.dumps(leases.this_process() | {"pid": 999_999_999} | change))
    assert locks.acquire(path, wait=False) is None
    monkeypatch.setattr(locks, "NOTICE_AFTER", 0)
    person = locks.owner_path(path).unlink
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: person())
    with locked(path):
        pass
    error = capfd.readouterr().err
    assert error.startswith(f"waiting for {path}: in use by process 999999999 on ") and error.count("\n") == 1


def test_without_flock_a_later_process_with_the_number_of_the_holder_is_another(tmp_path, without_flock):
    if not leases.start_time(os.getpid()):
        pytest.skip("this system does not tell when a process started")
    path = tmp_path / "a.lock"
    locks.owner_path(path).write_text(json.dumps(leases.this_process() | {"started": "1"}))
    with claimed(path, "x"):
        pass


# ---- leases: the holder is on another machine --------------------------------------------------------------

ELSEWHERE = {
    "pid": 4242,
    "host": "node\x1b[31m-7",
    "pid_space": "pid:[1]",
    "boot": "b",
    "started": "1",
    "token": "t",
}


def hold_elsewhere(path, seconds_ago, **changes):
    """The lease of a process of another machine, which last gave a sign of life so many seconds ago."""
    owner = locks.owner_path(path)
    owner.write_text(json.dumps({**ELSEWHERE, "lease": 120, **changes}))
    refreshed = owner.stat().st_mtime - seconds_ago
    os.utime(owner, (refreshed, refreshed))
    return owner


def test_a_lease_is_taken_over_after_its_time_by_the_clock_of_the_file_system(
    tmp_path, without_flock, monkeypatch, capfd
):
    monkeypatch.setattr(time, "time", lambda: 5.0)  # this machine's clock says nothing
    path = tmp_path / "a.lock"
    hold_elsewhere(path, 100)
    assert locks.acquire(path, wait=False) is None
    name = r"process 4242 on node\x1b[31m-7"
    assert locks.holder(path) == f"{name} (wait 120 s or remove {path}.owner if that process is gone)"
    hold_elsewhere(path, 130)
    with locked(path):
        assert locks.read_entry(locks.owner_path(path)).identity["pid"] == os.getpid()
    error = capfd.readouterr().err
    assert error == f"{path}.owner: taken over from {name}, which gave no sign of life for 120 s\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.lock"]


def test_a_damaged_lease_and_a_takeover_that_was_killed_block_nobody_for_long(tmp_path, without_flock):
    path = tmp_path / "a.lock"
    owner = hold_elsewhere(path, 130)
    digest = leases.read_entry(owner).digest
    killed = owner.with_name(f"{owner.name}.takeover-{digest}")
    killed.write_text(json.dumps(leases.this_process() | {"started": "1"}))  # of this machine
    with locked(path):
        pass
    owner.write_text("")  # a power cut
    assert locks.acquire(path, wait=False) is None
    os.utime(owner, (1, 1))
    (tmp_path / f".{owner.name}.abc.tmp").write_text("")  # of a killed process
    os.utime(tmp_path / f".{owner.name}.abc.tmp", (1, 1))
    with locked(path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a.lock"]


def test_who_saw_an_old_lease_looks_again_before_replacing_it(tmp_path, without_flock):
    path = tmp_path / "a.lock"
    owner = hold_elsewhere(path, 130)
    old = leases.read_entry(owner)
    with claimed(path, "x"):
        assert not leases.take_over(owner, old, {"pid": 1, "token": "late"})
        assert leases.read_entry(owner).identity["pid"] == os.getpid()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.lock", "a.lock.owner"]


def race(folder, times):
    refuse_flock()
    for number in range(times):
        wait_for((folder / f"go{number}").exists)
        lock = locks.acquire(folder / f"{number}.lock", wait=False)
        with open(folder / f"has{number}", "a") as f:
            f.write("yes\n" if lock else "no\n")
    answers = [folder / f"has{number}" for number in range(times)]
    # the lease of one that has ended is free
    wait_for(lambda: all(p.read_text().count("\n") == 3 for p in answers))


def test_of_processes_that_want_an_old_lease_one_gets_it(tmp_path):
    workers = [Launched(1, tmp_path / "output", race, tmp_path, 10) for _ in range(3)]
    for number in range(10):
        hold_elsewhere(tmp_path / f"{number}.lock", 130)
        (tmp_path / f"go{number}").touch()
    assert [w.codes() for w in workers] == [[0]] * 3
    for number in range(10):
        assert sorted((tmp_path / f"has{number}").read_text().split()) == ["no", "no", "yes"]
    assert (tmp_path / "output").read_text().count("taken over") == 10


@pytest.fixture
def quick(monkeypatch):
    """Leases of a second."""
    monkeypatch.setattr(leases, "HEARTBEAT", 0.02)
    monkeypatch.setattr(leases, "LEASE", 1.0)


def test_a_holder_gives_signs_of_life_and_notices_what_happens_to_its_lease(tmp_path, without_flock, quick):
    path = tmp_path / "a.lock"
    owner = locks.owner_path(path)
    with pytest.raises(InputError) as e, claimed(path, "x") as lock:
        os.utime(owner, (1, 1))
        wait_for(lambda: owner.stat().st_mtime > 1)
        lock.check()
        owner.unlink()  # by a person, who took its holder for dead
        wait_for(owner.exists)
        lock.check()
        owner.unlink()
        hold_elsewhere(path, 0)  # another process had it meanwhile
        lock.check()
    assert str(e.value).startswith(f"{owner}: process 4242 on node")
    assert "has taken over what this process" in str(e.value)
    assert owner.exists(), "it is the other process's"
    with pytest.raises(InputError, match="has taken over"):
        leases.Lease(owner, {"token": "mine", "lease": 1}).sign("")


def test_a_holder_whose_lease_was_taken_over_and_given_back_has_it_no_more(tmp_path, without_flock):
    path = tmp_path / "a.lock"
    with pytest.raises(InputError, match="has taken over what this process held"), claimed(path, "x") as lock:
        locks.owner_path(path).unlink()  # a person
        lock.check()
        lock.lease.refreshed -= 130  # it was stopped, and another process was here
        locks.owner_path(path).unlink()
        lock.check()
    assert [p.name for p in tmp_path.iterdir()] == ["a.lock"]


@pytest.mark.parametrize("work, times", [("write", 1), ("save", 1), ("update", 3)])
def test_a_run_whose_folder_was_taken_over_writes_nothing_more(
    train, base_dir, without_flock, monkeypatch, work, times
):
    from nanochat import metrics
    from nanochat.checkpoint_manager import NewCheckpoint
    from nanochat.run_output import RunOutput
    from scripts import base_train

    def save_and_wait(output, state):
        save(output, state)
        output.writer.wait()

    save = RunOutput.save
    if work != "write":  # there the folder is taken over while training goes on
        monkeypatch.setattr(RunOutput, "save", save_and_wait)
    module = {"write": NewCheckpoint, "save": RunOutput, "update": base_train}[work]
    original = getattr(module, work)
    left = iter(range(times - 1, -1, -1))

    def work_and_sleep(*arguments, **options):
        original(*arguments, **options)
        if next(left, None) == 0:
            hold_elsewhere(base_dir / "locks/slept.lock", 0)

    monkeypatch.setattr(module, work, work_and_sleep)
    message = r"slept.lock.owner: process 4242 on .* has taken over .*leave it to that process"
    with pytest.raises(InputError, match=message):
        train("--save-every", 2, "--num-iterations", 6, tag="slept")
    folder = metrics.runs_dir() / "slept"
    if work == "write":
        assert os.listdir(folder / "checkpoints") == []
        return
    assert os.listdir(folder / "checkpoints") == ["step_000002"]
    assert [entry["step"] for entry in metrics.read_history(folder)] == [1, 2]


def test_a_claim_waits_for_a_silent_holder_until_it_speaks_or_its_lease_ends(tmp_path, without_flock, capsys):
    path = tmp_path / "a.lock"
    owner = hold_elsewhere(path, 0, lease=0.5)
    with claimed(path, "run x"):
        assert capsys.readouterr().out.startswith("run x: waiting for process 4242 on ")
    owner = hold_elsewhere(path, 50)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        os.utime(owner)

    message = "run x is in use by process 4242"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=message):
        patch.setattr(time, "sleep", nap)
        with claimed(path, "run x"):
            pass
    assert len(naps) == 1


def write_slowly(folder):
    refuse_flock()
    leases.HEARTBEAT = 0.02
    path = folder / "a.lock"

    def write():
        (folder / "writer").write_text(str(os.getpid()))
        wait_for((folder / "go").exists)

    with claimed(path, "x") as lock:
        with CheckpointWriter(lock) as writer:
            writer.start(write, (folder / "orphan").touch)
        assert leases.read_entry(locks.owner_path(path)).identity["pid"] == os.getpid()


@pytest.mark.parametrize("killed", [False, True])
def test_a_writer_keeps_the_lease_of_a_process_that_is_killed(tmp_path, without_flock, killed):
    path = tmp_path / "a.lock"
    owner = locks.owner_path(path)
    launched = Launched(1, tmp_path / "output", write_slowly, tmp_path)
    (trainer,) = launched.processes
    wait_for((tmp_path / "writer").exists)
    if killed:
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.join()
    os.utime(owner, (1, 1))
    wait_for(lambda: owner.stat().st_mtime > 1)
    holder = int((tmp_path / "writer").read_text()) if killed else trainer.pid
    wait_for(lambda: leases.read_entry(owner).identity["pid"] == holder)
    assert locks.acquire(path, wait=False) is None
    (tmp_path / "go").touch()
    if not killed:
        assert launched.codes() == [0], (tmp_path / "output").read_text()
    wait_for(lambda: not owner.exists())
    assert (tmp_path / "orphan").exists() == killed


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.lock", "a.lock.owner"])
def test_a_lock_that_leads_to_another_file_is_refused_and_the_file_is_left_alone(tmp_path, file_system, name):
    if name.endswith("owner") and not file_system:
        pytest.skip("there is no such file where there is flock")
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")
    for target in (precious, tmp_path / "missing"):
        (tmp_path / name).symlink_to(target)
        with (
            pytest.raises(InputError, match=f"{name}: is a symbolic link, .*; remove the link"),
            claimed(tmp_path / "a.lock", "x"),
        ):
            pass
        (tmp_path / name).unlink()
    assert precious.read_text() == "years of work" and not (tmp_path / "missing").exists()
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: is no ordinary file"), claimed(tmp_path / "a.lock", "x"):
        pass


@pytest.mark.parametrize("umask, mode", [(0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_locks_have_the_permissions_that_the_umask_leaves(tmp_path, without_flock, umask, mode):
    before = os.umask(umask)
    try:
        with claimed(tmp_path / "a.lock", "x"):
            assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {mode}
    finally:
        os.umask(before)
