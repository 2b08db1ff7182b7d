"""Locks between processes, and between machines that share a folder.

Where the file system has flock, the lock is the kernel's: it is free when its last holder has died, in
whatever way. Some network file systems have no flock (Lustre and NFS, as some sites mount them). There a
second file, `<path>.owner`, is the lock: a lease, which its holder keeps alive (nanochat/leases.py).
"""

import contextlib
import errno
import fcntl
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path

from nanochat import leases
from nanochat.errors import path_in_errors, printable
from nanochat.leases import Lease, acquire_lease, describe_process, lease_seconds, open_own_file, read_entry

NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
WRITING = ", which writes a checkpoint"  # the activity of a writer, for Lock.sign
FIRST_PAUSE = 0.1  # seconds between the first two tries at a lease
LONGEST_PAUSE = 2.0  # between later ones: a try costs some calls to a server
NOTICE_AFTER = 10.0  # seconds until a waiting process says what it waits for


class Lock:
    """A lock that this process has. Where there is flock, a child that inherits `fileno()` shares it."""

    def __init__(self, path: Path, file, lease: Lease | None = None):
        self.path = path
        self.file = file
        self.lease = lease

    def fileno(self) -> int:
        return self.file.fileno()

    def check(self):
        """InputError if another process has taken the lock over. Call it before writing protected files."""
        if self.lease:
            self.lease.check()

    def sign(self, activity: str = ""):
        """Write into the lock file that this process holds it, and what it does.

        A forked process makes the lock its own in this way. InputError if another process has taken it over.
        """
        if self.lease:
            self.lease.sign(activity)
        with path_in_errors(self.path):
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}{activity}\n")
            self.file.flush()

    def share(self, parent: int):
        """Called in a forked process: hold the lock beside the parent, and for it once it is gone.

        A lease names one process. It stays the parent's while that lives, as whose it is refreshed here too.
        """
        if not self.lease:
            self.sign(WRITING)
            return
        self.lease.keep_alive()

        def inherit():
            while os.getppid() == parent:
                time.sleep(0.05)
            self.sign(WRITING)

        threading.Thread(target=inherit, name="lock", daemon=True).start()

    def hand_over(self):
        """Leave the lock to a forked process alone, which has signed it or will."""
        if self.lease:
            self.lease.released.set()
        self.file.close()

    def close(self):
        if self.lease:
            self.lease.release()
        self.lease = None
        self.file.close()


def acquire(path: Path, wait: bool) -> Lock | None:
    """The exclusive lock on `path`, a file that is created if needed.

    If another process has the lock: wait for it, or return None if `wait` is false. InputError if the path is
    a link, because its target would be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_own_file(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    lock: Lock | None = Lock(path, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as e:
        if e.errno not in NO_FLOCK:
            e.filename = e.filename or str(path)
            file.close()
            raise
        lock = lock_by_lease(path, file, wait)
    if not lock:
        file.close()
        return None
    try:
        lock.sign()
    except BaseException:
        lock.close()
        raise
    return lock


def lock_by_lease(path: Path, file, wait: bool) -> Lock | None:
    notice_at = time.monotonic() + NOTICE_AFTER
    pause = FIRST_PAUSE
    while not (lease := acquire_lease(owner_path(path))):
        if not wait:
            return None
        if time.monotonic() >= notice_at:
            print(f"waiting for {path}: in use by {holder(path)}", file=sys.stderr, flush=True)
            notice_at = math.inf
        time.sleep(pause)
        pause = min(1.1 * pause, LONGEST_PAUSE)
    return Lock(path, file, lease)


def owner_path(path: Path) -> Path:
    return path.with_name(path.name + ".owner")


def holder(path: Path) -> str:
    """Who has the lock, in words. For a lease also what to do if that process is gone."""
    with contextlib.suppress(OSError):
        owner = owner_path(path)
        entry = read_entry(owner)
        if entry:
            seconds = lease_seconds(entry)
            may_wait = seconds is not None and not leases.is_here(entry.identity)
            remedy = f"wait {seconds:.0f} s or remove" if may_wait else "remove"
            return f"{describe_process(entry.identity)} ({remedy} {owner} if that process is gone)"
        with open_own_file(path, os.O_RDONLY) as f:
            return printable(f.read().strip()) or "another process"
    return "another process"


def last_sign_of_life(path: Path) -> float | None:
    """When a holder on another machine last refreshed its lease; None for a holder on this machine."""
    with contextlib.suppress(OSError):
        entry = read_entry(owner_path(path))
        if entry and lease_seconds(entry) is not None and not leases.is_here(entry.identity):
            return entry.refreshed
    return None
