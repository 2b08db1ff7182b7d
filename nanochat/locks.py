"""Locks between processes, and between machines that share a folder.

The kernel's flock is taken where the file system has it: it is freed when its last holder dies, however
that dies. Some network file systems have none (Lustre and NFS, as some sites mount them). There a second
file, `<path>.owner`, is the lock. Its holder creates it, is named in it, and removes it. One that a dead
process of this machine left is removed by the next process that wants the lock. Whether a process of
another machine lives cannot be told: its file stays until a person removes it.
"""
import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import sys
import time
from pathlib import Path

NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
WRITING = ", which writes a checkpoint"  # what Lock.sign says of a writer
POLL = 0.1           # seconds between two tries at an owner file
NOTICE_AFTER = 10.0  # seconds until a waiting process says what it waits for


class Lock:
    """A lock that this process has. Where there is flock, a child that inherits `fileno()` shares it."""

    def __init__(self, file, owner: Path | None = None, identity: dict | None = None):
        self.file = file
        self.owner = owner
        self.identity = identity

    def fileno(self) -> int:
        return self.file.fileno()

    def sign(self, activity: str = ""):
        """Say in the lock file that this process holds it and what it does. A forked process takes the lock
        over by doing the same.
        """
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}{activity}\n")
        self.file.flush()
        if self.owner:
            self.identity = this_process() | {"activity": activity}
            whole = self.owner.with_name(f"{self.owner.name}.{os.getpid()}.signed")
            whole.write_text(json.dumps(self.identity))
            os.replace(whole, self.owner)

    def close(self):
        if self.owner and read_owner(self.owner) == self.identity:
            self.owner.unlink(missing_ok=True)
        self.owner = None
        self.file.close()


def acquire(path: Path, wait: bool) -> Lock | None:
    """The exclusive lock on `path` (created if needed). None, without `wait`, if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock = Lock(file)
    except BlockingIOError:
        lock = None
    except OSError as e:
        if e.errno not in NO_FLOCK:
            e.filename = e.filename or str(path)
            file.close()
            raise
        lock = acquire_owner_file(path, file, wait)
    if lock is None:
        file.close()
        return None
    lock.sign()
    return lock


def holder(path: Path) -> str:
    """Who has the lock, in words; where no flock frees it, also what to do if that process is gone."""
    with contextlib.suppress(OSError):
        owner = owner_path(path)
        if owner.exists():
            identity = read_owner(owner)
            name = f"process {identity.get('pid')} on {identity.get('host')}{identity.get('activity', '')}"
            return f"{name} (remove {owner} if that process is gone)"
        return path.read_text(errors="replace").strip() or "another process"
    return "another process"


# ---- file systems without flock ----------------------------------------------------------------------------

def owner_path(path: Path) -> Path:
    return path.with_name(path.name + ".owner")


def acquire_owner_file(path: Path, file, wait: bool) -> Lock | None:
    """Create the owner file; None, without `wait`, if a process that may live has it."""
    owner = owner_path(path)
    identity = this_process()
    notice_at = time.monotonic() + NOTICE_AFTER
    while True:
        remove_if_stale(owner)
        if create_owner_file(owner, identity):
            return Lock(file, owner, identity)
        if not wait:
            return None
        if time.monotonic() >= notice_at:
            print(f"waiting for {path}: in use by {holder(path)}", file=sys.stderr, flush=True)
            notice_at = math.inf
        time.sleep(POLL)


def create_owner_file(owner: Path, identity: dict) -> bool:
    """Whether it was created. It appears with its content, as a hard link to a whole file."""
    whole = owner.with_name(f"{owner.name}.{identity['host']}.{identity['pid']}.{time.monotonic_ns()}")
    whole.write_text(json.dumps(identity))
    try:
        os.link(whole, owner)
        return True
    except FileExistsError:
        return False
    except OSError:  # no hard links here either
        return create_exclusively(owner, identity)
    finally:
        whole.unlink(missing_ok=True)


def create_exclusively(owner: Path, identity: dict) -> bool:
    try:
        with open(owner, "x") as f:
            f.write(json.dumps(identity))
        return True
    except FileExistsError:
        return False


def remove_if_stale(owner: Path):
    """Remove the owner file of a dead process of this machine. A folder beside it lets one process do so."""
    if not is_stale(read_owner(owner)):
        return
    takeover = owner.with_name(owner.name + ".takeover")
    try:
        takeover.mkdir()
    except FileExistsError:
        return  # another process is at it
    try:
        if is_stale(read_owner(owner)):
            owner.unlink(missing_ok=True)
    finally:
        takeover.rmdir()


def is_stale(identity: dict) -> bool:
    """Whether this owner was a process of this machine (its host, its process numbers) and is no more."""
    here = this_process()
    if not identity or any(identity.get(key) != here[key] for key in ("host", "pid_space")):
        return False
    pid = identity.get("pid")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        pass
    started = start_time(pid)
    return bool(started) and started != identity.get("started")


def this_process() -> dict:
    """What tells it from other processes, also from a later one with its number."""
    pid_space = ""
    with contextlib.suppress(OSError):  # containers on one machine may have one host name
        pid_space = os.readlink("/proc/self/ns/pid")
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "pid_space": pid_space, "started": start_time(pid)}


def start_time(pid: int) -> str:
    """As Linux counts it, since the machine started; '' where that cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return fields[19]


def read_owner(owner: Path) -> dict:
    """{} if there is no owner file, or it is being written."""
    try:
        identity = json.loads(owner.read_text())
    except (OSError, ValueError):
        return {}
    return identity if isinstance(identity, dict) and isinstance(identity.get("pid"), int) else {}
