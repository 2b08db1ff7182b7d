"""Leases: locks for file systems without flock, where no kernel frees a lock when its holder dies.

A lease is a file that names its holder: host and process. The holder refreshes the file's time every
HEARTBEAT seconds and removes the file in the end. If the holder was a process of this machine and is dead,
its lease may be taken over at once. The lease of a process on another machine may be taken over once it was
not refreshed for LEASE seconds. These are counted by the file system's clock, which dates the files of all
machines. A holder that slept for so long may find that another process has its lease: `Lease.check`.

Earlier versions of this program did not refresh their files. Such a file from another machine stays until a
person removes it.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import socket
import stat
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from nanochat.errors import InputError, path_in_errors, printable
from nanochat.files import TEMPORARY, open_new, parse_json

HEARTBEAT = 10.0  # seconds between two signs of life
LEASE = 120.0  # seconds without a sign of life after which a lease may be taken over
GONE = (errno.ENOENT, errno.ESTALE)  # ESTALE: the same on a network file system
TAKEOVER = ".takeover-"


class Lease:
    """A lease that this process has. A forked process keeps it alive too, once it has signed it."""

    def __init__(self, path: Path, identity: dict):
        self.path = path
        self.identity = identity
        self.refreshed = math.inf  # time of the last refresh, by the file system's clock
        self.keep_alive()

    def keep_alive(self):
        """Refresh the file from now on. A forked process must call this itself: it inherits no threads."""
        self.pid = os.getpid()
        self.mutex = threading.Lock()
        self.released = threading.Event()
        threading.Thread(target=self._beat, args=(self.released,), name="lease", daemon=True).start()

    def _beat(self, released: threading.Event):
        while not released.wait(HEARTBEAT):
            with contextlib.suppress(OSError, InputError), self.mutex:
                if not released.is_set():
                    self._refresh()

    def _refresh(self) -> dict:
        """Refresh the file. Returns the identity of the process that has the lease: this one, or another.

        {} if the lease had ended, and the process that took it over has ended too.
        """
        while True:
            try:
                with path_in_errors(self.path), open_own_file(self.path, os.O_RDONLY) as f:
                    identity = read_identity(f.read())
                    if identity.get("token") == self.identity["token"]:
                        os.utime(f.fileno())  # not by its name: another process may be replacing the file
                        self.refreshed = os.fstat(f.fileno()).st_mtime
                    return identity
            except OSError as e:
                if e.errno not in GONE:
                    raise
            if file_system_time(self.path.parent) - self.refreshed > self.identity["lease"]:
                return {}
            if create(self.path, self.identity):  # a person has removed the file
                return self.identity

    def check(self):
        """InputError if another process has taken the lease over because this one slept for too long."""
        with self.mutex:
            identity = self._refresh()
        if identity.get("token") != self.identity["token"]:
            raise InputError(
                f"{self.path}: {describe_process(identity)} has taken over what this process held, "
                f"which gave no sign of life for {LEASE:.0f} s (a sleeping machine, or a file "
                "system that did not answer); nothing more is written here: leave it to that "
                "process"
            )

    def sign(self, activity: str):
        """Write into the file which process holds the lease now, and what it does."""
        if os.getpid() != self.pid:
            self.keep_alive()
        self.check()
        with self.mutex:
            unchanged = {key: self.identity[key] for key in ("token", "lease")}
            self.identity = {**this_process(), **unchanged, "activity": activity}
            replace(self.path, self.identity)

    def release(self):
        self.released.set()
        with self.mutex:
            entry = read_entry(self.path)
            if entry and entry.identity.get("token") == self.identity["token"]:
                self.path.unlink(missing_ok=True)


def acquire_lease(path: Path) -> Lease | None:
    """A new lease, or None if a process that may be alive has it. Prints from whom it was taken over."""
    identity = this_process() | {"token": secrets.token_hex(8), "lease": LEASE}
    if not take(path, identity):
        return None
    with contextlib.suppress(OSError):  # another process removes them too
        remove_leftovers(path)
    return Lease(path, identity)


# ---- files -------------------------------------------------------------------------------------------------


def open_own_file(path: Path, flags: int):
    """Open a text file by os.open flags. InputError if it is a link, or no ordinary file."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as e:
        if e.errno not in (errno.ELOOP, errno.EMLINK):
            raise
        message = f"{path}: is a symbolic link, and a lock is a file of its own; remove the link"
        raise InputError(message) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: is no ordinary file, as a lock is; remove it")
    mode = "r" if flags & os.O_ACCMODE == os.O_RDONLY else "a+"
    return os.fdopen(descriptor, mode, encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class Entry:
    """The content of a lease's file."""

    identity: dict  # of the holder; {} if the file is damaged, or is being written
    digest: str  # of the file's name and content, which no other lease has
    refreshed: float  # when: seconds, by the file system's clock


def read_entry(path: Path) -> Entry | None:
    try:
        with path_in_errors(path), open_own_file(path, os.O_RDONLY) as f:
            text = f.read()
            refreshed = os.fstat(f.fileno()).st_mtime
    except OSError as e:
        if e.errno in GONE:
            return None
        raise
    digest = hashlib.sha256(f"{path.name}\n{text}".encode(errors="replace")).hexdigest()[:16]
    return Entry(read_identity(text), digest, refreshed)


def read_identity(text: str) -> dict:
    identity = parse_json(text)
    return identity if isinstance(identity, dict) and type(identity.get("pid")) is int else {}


def write_temporary(path: Path, identity: dict) -> Path:
    """A new file beside `path`, which replaces it later."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY}")
    with open_new(temporary) as f:
        f.write(json.dumps(identity).encode())
    return temporary


def replace(path: Path, identity: dict):
    os.replace(write_temporary(path, identity), path)


def create(path: Path, identity: dict) -> bool:
    """Whether this process created the file, which appears complete: as a hard link to a written file."""
    temporary = write_temporary(path, identity)
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return os.stat(temporary).st_nlink > 1  # the link is ours: the server's first answer was lost
    except OSError:  # the file system has no hard links either
        return create_exclusively(path, identity)
    finally:
        temporary.unlink(missing_ok=True)


def create_exclusively(path: Path, identity: dict) -> bool:
    try:
        with open_own_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as f:
            f.write(json.dumps(identity))
        return True
    except FileExistsError:
        return False


def file_system_time(folder: Path) -> float:
    """The time by the file system's clock, in seconds: the date of a new file."""
    probe = folder / f".time.{secrets.token_hex(6)}{TEMPORARY}"
    try:
        with open_own_file(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL) as f:
            f.write("now")
            f.flush()
            os.fsync(f.fileno())  # makes a file server date the file
            return os.fstat(f.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def remove_leftovers(path: Path):
    """Remove temporary files that killed processes left beside the lease."""
    now = file_system_time(path.parent)
    for entry in os.scandir(path.parent):
        temporary = entry.name.startswith((f".{path.name}.", ".time.")) and entry.name.endswith(TEMPORARY)
        left_over = temporary or entry.name.startswith(path.name + TAKEOVER)
        if left_over and now - entry.stat(follow_symlinks=False).st_mtime > LEASE:
            os.unlink(entry.path)


# ---- taking over -------------------------------------------------------------------------------------------


def take(path: Path, identity: dict) -> bool:
    """Whether this process now has the lease: there was none, or its holder was gone."""
    for _ in range(5):
        if create(path, identity):
            return True
        entry = read_entry(path)
        if entry:
            return is_over(path, entry) and take_over(path, entry, identity)
    return False  # others create and remove it all the time


def take_over(path: Path, entry: Entry, identity: dict) -> bool:
    """Replace a lease that is over. Returns False if another process does so.

    The right to replace it is a lease too. Its name is made from the old lease, so one process at a time has
    it. That process reads the old lease again: if it is unchanged, nobody else can replace it.
    """
    right = path.with_name(f"{path.name.partition(TAKEOVER)[0]}{TAKEOVER}{entry.digest}")
    if not take(right, identity):
        return False
    try:
        again = read_entry(path)
        if not again or again.digest != entry.digest or not is_over(path, again):
            return False
        replace(path, identity)
    finally:
        right.unlink(missing_ok=True)
    if not is_dead(entry.identity) and TAKEOVER not in path.name:
        name = describe_process(entry.identity)
        print(
            f"{path}: taken over from {name}, which gave no sign of life for {lease_seconds(entry):.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return True


def is_over(path: Path, entry: Entry) -> bool:
    if is_here(entry.identity):
        return is_dead(entry.identity)
    seconds = lease_seconds(entry)
    return seconds is not None and file_system_time(path.parent) - entry.refreshed > seconds


def lease_seconds(entry: Entry) -> float | None:
    """How long the lease lasts without a sign of life, in seconds; None: for ever."""
    if not entry.identity:
        return LEASE
    seconds = entry.identity.get("lease")
    return seconds if type(seconds) in (int, float) else None


# ---- processes ---------------------------------------------------------------------------------------------


def this_process() -> dict:
    """Its identity: it differs from all other processes', also from a later one's with the same number."""
    pid_space = ""
    boot = ""
    with contextlib.suppress(OSError):  # containers on one machine may share a host name
        pid_space = os.readlink("/proc/self/ns/pid")
    with contextlib.suppress(OSError):  # two machines may share one too
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "pid_space": pid_space,
        "boot": boot,
        "started": start_time(pid),
    }


def is_here(identity: dict) -> bool:
    """Whether it is, or was, a process of this machine, and of this container on it."""
    own = this_process()
    same_host = all(identity.get(key) == own[key] for key in ("host", "pid_space"))
    return same_host and identity.get("boot", own["boot"]) == own["boot"]  # earlier versions wrote none


def is_dead(identity: dict) -> bool:
    """Whether it was a process of this machine that has ended, even if its parent has not noticed yet."""
    if not is_here(identity):
        return False
    pid = identity["pid"]
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it lives, as another user's process
        pass
    started = start_time(pid)
    return bool(started) and (started != identity.get("started") or process_fields(pid)[:1] == ["Z"])


def start_time(pid: int) -> str:
    """When a process started, as Linux counts it since the machine started; '' where that is unknown."""
    return "".join(process_fields(pid)[19:20])


def process_fields(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; [] where they cannot be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def describe_process(identity: dict) -> str:
    words = f"process {identity.get('pid')} on {identity.get('host')}{identity.get('activity', '')}"
    return printable(words) if identity else "an unknown process"
