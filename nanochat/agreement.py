"""The processes of a run act as one: the first decides, the others follow or refuse, and all end together.

Each process reads files by itself, and what one reads another may not: a disk has an error, a network
directory is some seconds old, a machine has files of its own. So process 0 alone decides what there is to do,
and the others compare what they have with what it has.

A process that fails tells process 0, through the store by which the processes met. Process 0 prints the line,
and a thread in each process then ends it. So nobody waits for a process that is gone, whatever it is doing.
"""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from itertools import count
from pathlib import Path

from nanochat.common import differing_entries
from nanochat.errors import InputError, first_line, shortened
from nanochat.leases import is_dead, is_here, this_process
from nanochat.processes import World, process_layout

# keys in the store
FAILED = "nanochat/failed"  # [line, exit code] of the process that failed first, where that is not process 0
ENDED = "nanochat/ended"  # the exit code of all, once the line is printed
LEFT = "nanochat/left"  # how many processes know that, or have finished their work
IDENTITY = "nanochat/identity of"  # and a rank: leases.this_process() of that process

STORE_POLL = 0.2  # seconds between two reads of the store
SAME_FAILURE = 1.0  # seconds: process 0 may be about to fail in the same way
REPORT_PATIENCE = 10.0  # seconds: then a process that failed prints its own line

JOIN_PATIENCE = timedelta(minutes=30)
LOAD_PATIENCE = 30.0  # seconds: by then a network directory shows a checkpoint that is there
READ_PATIENCE = 3.0  # seconds: a file that is there and cannot be read is tried again

SAME_COMMAND = "start all processes with the same command, files and environment"


# ---- ending together ---------------------------------------------------------------------------------------


class Group:
    """The processes of a run, as one of them sees it: the store, and a thread that reads it."""

    def __init__(self, store, rank: int, world_size: int):
        # a connection of its own: one that waits for a key lets nobody else through
        self.store = store.clone() if hasattr(store, "clone") else store
        self.rank = rank
        self.world_size = world_size
        self.finished = threading.Event()
        self.printing = threading.Lock()  # whoever takes it prints the one line
        self.meetings = count(1)
        self.store.set(f"{IDENTITY} {rank}", json.dumps(this_process()))
        self.thread = threading.Thread(target=self.watch, daemon=True, name="other processes")
        self.thread.start()

    def watch(self):
        key = ENDED if self.rank else FAILED
        with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone
            while not self.finished.wait(STORE_POLL):
                if self.store.check([key]):
                    if self.rank:
                        self.follow()
                    else:
                        self.print_failure()
                    return

    def print_failure(self):
        """On process 0: print the line of a process that failed, and end the run."""
        line, code = json.loads(self.store.get(FAILED))
        time.sleep(SAME_FAILURE)
        if self.printing.acquire(blocking=False):
            self.end(line, code)

    def end(self, line: str, code: int):
        """On process 0: print the line, and leave after the others."""
        print_now(line)
        with contextlib.suppress(RuntimeError):
            self.store.set(ENDED, str(code))
            self.wait_for_others()
        exit_now(code)

    def wait_for_others(self, patience: float = 2.0):
        """Wait until they have left, because this process may keep the store."""
        deadline = time.monotonic() + patience
        while self.store.add(LEFT, 0) < self.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.02)

    def follow(self):
        """On another process than 0: leave, now that the line is printed."""
        code = int(self.store.get(ENDED))
        self.store.add(LEFT, 1)
        exit_now(code)

    def report(self, line: str, code: int):
        """On another process than 0: let process 0 print the line. Returns if it does not."""
        with contextlib.suppress(RuntimeError):
            self.store.compare_set(FAILED, "", json.dumps([line, code]))
            deadline = time.monotonic() + REPORT_PATIENCE
            while time.monotonic() < deadline:
                if self.store.check([ENDED]):
                    self.follow()
                time.sleep(0.05)
            self.store.set(ENDED, str(code))

    def close(self):
        """Leave the group, at the end of a run that has not failed."""
        self.finished.set()
        self.thread.join(5)  # Python aborts where it ends while a thread waits for the store
        with contextlib.suppress(RuntimeError):
            if self.rank:
                self.store.add(LEFT, 1)
            else:
                self.wait_for_others()

    def meet(self):
        """Wait until all processes are here, however long one of them works.

        InputError if one of this machine is gone; those of others are left to their launcher.
        """
        key = f"nanochat/meeting {next(self.meetings)}"
        self.store.add(key, 1)
        wait = 0.005
        while self.store.add(key, 0) < self.world_size:
            time.sleep(wait)
            wait = min(2 * wait, STORE_POLL)
            rank = self.first_gone() if wait == STORE_POLL else None
            if rank is None:
                continue
            time.sleep(2 * SAME_FAILURE)  # it may have said why, or have been here, and have ended since
            if self.store.add(key, 0) < self.world_size:
                raise InputError(f"process {rank} of {self.world_size} is gone; see what it said")

    def first_gone(self) -> int | None:
        """The rank of a process of this machine that is no more."""
        return next((rank for rank, identity in self.neighbours.items() if is_dead(identity)), None)

    @functools.cached_property
    def neighbours(self) -> dict[int, dict]:
        """The identities of the processes of this machine, by their ranks. All must have joined."""
        ranks = range(self.world_size)
        identities = {rank: json.loads(self.store.get(f"{IDENTITY} {rank}")) for rank in ranks}
        return {rank: identity for rank, identity in identities.items() if is_here(identity)}


group: Group | None = None  # while this process belongs to one


def join(rank: int, world_size: int):
    """Meet the other processes. Returns the store for torch's process group."""
    global group
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=JOIN_PATIENCE))
    group = Group(store, rank, world_size)
    return store


def leave_group():
    """Leave the group, if there is one, at the end of a run that has not failed."""
    global group
    if group:
        group.close()
        group = None


def fail(message: str, lost: bool = False):
    """End this process, and with it all others of its run, with one line on standard error.

    lost: the message is that another process is gone; that one may be about to say why.
    """
    if lost:
        time.sleep(2 * SAME_FAILURE)
    rank = 0
    world_size = 1
    with contextlib.suppress(InputError):
        rank, _, world_size = process_layout()
    line = f"error: process {rank} of {world_size}: {message}" if rank else f"error: {message}"
    if not group and rank > 0:
        join_late(rank, world_size)
    end_all(line, 2)
    print(line, file=sys.stderr, flush=True)
    sys.exit(2)


def end_all(line: str, code: int):
    """End all processes of the group with this line. Returns if no process 0 is there that prints it."""
    if not group:
        return
    if group.rank > 0:
        group.report(line, code)
        return
    if group.printing.acquire(blocking=False):
        group.end(line, code)
    time.sleep(REPORT_PATIENCE)  # the thread prints, and ends this process


def join_late(rank: int, world_size: int):
    """Meet process 0 after a failure. It may have failed too: then the launcher ends this process."""
    deadline = time.monotonic() + REPORT_PATIENCE
    try:
        while time.monotonic() < deadline:
            if store_answers():
                return join(rank, world_size)
            time.sleep(0.1)
    except (RuntimeError, ValueError, KeyError):  # there is no place to meet at
        time.sleep(max(0.0, deadline - time.monotonic()))


def store_answers() -> bool:
    """Whether the store is there. torch, asked too early, prints warnings."""
    try:
        with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=1):
            return True
    except OSError:
        return False


def lost_connection(e: Exception) -> str:
    """Why torch lost another process of this run, in a few words; '' if that is not what the error says."""
    if not group:
        return ""
    import torch.distributed as dist

    text = first_line(e)
    if not isinstance(e, dist.DistError) and "gloo" not in text and "NCCL" not in text:
        return ""
    reason = text.partition("] ")[2].partition(". ")[0] or text
    return f"another process of the run is gone ({shortened(reason)}); see what it said"


def print_now(line: str):
    """Print a line on standard error. Any thread may call it: it waits for no lock."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def exit_now(code: int):
    """End this process now: its main thread may be in a collective that will never end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


# ---- the same in all processes -----------------------------------------------------------------------------


def meet(world: World):
    """Wait until all processes are here. A barrier of torch has a time limit; one may read for hours."""
    if world.size > 1:
        assert group is not None  # `init_process` has joined it
        group.meet()


def from_first(world: World, function, *arguments):
    """Call function(*arguments) on process 0, and return its value on all processes.

    pickle must be able to store the value.
    """
    values = [function(*arguments) if world.rank == 0 else None]
    if world.size > 1:
        import torch
        import torch.distributed as dist

        meet(world)
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def confirm(world: World, values: dict, remedy: str = SAME_COMMAND):
    """InputError on a process whose values are not those of process 0; it names what differs.

    values: nested dicts, by names that the user knows.
    """
    first = from_first(world, dict, values)
    if world.rank == 0:
        return
    if names := differing(first, values):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(f"has other values than process 0: {', '.join(names[:3])}{more}; {remedy}")


def differing(first: dict, values: dict) -> list[str]:
    """Names of what differs in nested dicts, with the value here and the first process's."""
    entries = differing_entries(first, values, lambda a, b: repr(a) == repr(b))
    return [
        f"{'.'.join(map(str, names))} ({shortened(repr(value))}, there {shortened(repr(first_value))})"
        for names, first_value, value in entries
    ]


def load_same(world: World, load, path: Path):
    """Call load() in each process. It returns (…, meta of a checkpoint), of the same checkpoint in all."""
    loaded: tuple = load() if world.rank == 0 else ()
    meta = from_first(world, lambda: loaded[-1])
    return loaded or load_confirmed(load, path, meta)


def load_confirmed(load, path: Path, meta: dict):
    """Call load() until it returns (…, meta of a checkpoint) with the meta that process 0 has read.

    A network directory may show it some seconds later here than there. InputError, or OSError, if it does
    not.
    """
    patience = READ_PATIENCE if path.exists() else LOAD_PATIENCE
    deadline = time.monotonic() + patience
    while True:
        try:
            loaded = load()
            names = differing(meta, loaded[-1])
            if not names:
                return loaded
            problem: InputError | OSError = InputError(
                f"{path}: is another checkpoint than process 0 has read: "
                f"{', '.join(names[:3])}; let all processes see the same folder"
            )
        except (InputError, OSError) as e:
            problem = e
        if time.monotonic() > deadline:
            raise problem
        time.sleep(1.0)
