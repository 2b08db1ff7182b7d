"""The process that writes a checkpoint while training goes on.

A forked process sees the memory as it was at the fork, so training waits for the fork alone. Tensors of a GPU
are copied to the CPU before.

The writer has a session that the launcher does not know, and goes on when the training process is killed:
torchrun kills its processes half a minute after it was asked to stop, and a checkpoint may take longer.
"""

import contextlib
import os
import pickle
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import torch

from nanochat.errors import InputError
from nanochat.locks import NOTICE_AFTER, Lock
from nanochat.processes import print0
from nanochat.signals import ENDING

POLL = 0.02  # seconds


class Writer(NamedTuple):
    """A forked process, as the one that started it sees it."""

    pid: int
    answer: BinaryIO  # a pipe: what the process raised, pickled; it ends with the process

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Whether it has ended, or does so within these seconds."""
        poll = select.poll()
        poll.register(self.answer, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def wait_as_sibling(self):
        """Wait for its end in the writer that comes after it, and leave its answer to their parent."""
        poll = select.poll()
        poll.register(self.answer, 0)  # no event but that the pipe is closed
        poll.poll()


class CheckpointWriter:
    """The writers of this process: one, or two where the run was asked to stop while one was at work."""

    def __init__(self, lock: Lock | None):
        """lock: it says whose run this is. The writer holds it too: nobody takes the run before."""
        self.lock = lock
        self.writers: list[Writer] = []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Whatever ends a run, what it saved is written, and what went wrong with that is said."""
        try:
            self.wait()
        except (InputError, OSError) as e:
            if not error:
                raise
            print(f"note: {e}", file=sys.stderr, flush=True)

    def start(self, write: Callable, if_orphaned: Callable = bool, own_lock: Lock | None = None):
        """Call write() in a forked process, once the writer before it has ended.

        It must touch files and CPU tensors only: a forked process has neither the threads nor the devices of
        this one.
        if_orphaned(): what the writer does after write() if this process is gone by then. own_lock: one that
        the writer alone holds.
        """
        reads, writes = os.pipe()
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of fork beside threads
            pid = os.fork()
        if pid == 0:
            self.run(write, if_orphaned, own_lock, parent, writes)
        os.close(writes)
        if own_lock:
            own_lock.hand_over()
        self.writers.append(Writer(pid, os.fdopen(reads, "rb")))

    def check(self):
        """Raise what went wrong in a writer that has ended. Waits for none."""
        while self.writers and self.writers[0].has_ended():
            self.finish(self.writers.pop(0))

    def wait(self, goes_on: Callable[[bool], bool] = bool):
        """Wait until all writers have ended, and raise what went wrong.

        goes_on(whether a writer of this process is at work): whether to wait on. Where it ends the wait
        earlier, the next writer waits for the last one.
        """
        notice_at = time.monotonic() + NOTICE_AFTER
        while goes_on(bool(self.writers)):
            if not self.writers:
                time.sleep(POLL)
            elif self.writers[0].has_ended(POLL):
                self.finish(self.writers.pop(0))
            if time.monotonic() > notice_at:
                print0("waiting for a checkpoint that is still being written")
                notice_at = float("inf")

    def finish(self, writer: Writer):
        """Raise what a writer that has ended, or is about to, has raised."""
        with writer.answer:
            answer = writer.answer.read()
        status = os.waitpid(writer.pid, 0)[1]
        if self.lock and not self.writers:
            self.lock.sign()
        if not answer:
            raise InputError(
                f"the process that writes the checkpoint was ended by {how_it_ended(status)}; "
                "continue with --resume auto"
            )
        if error := pickle.loads(answer):
            raise error

    # ---- in the forked process

    def run(self, write, if_orphaned, own_lock: Lock | None, parent: int, answers: int):
        """All that the forked process does. It does not return."""
        error = None
        try:
            before = self.writers[-1:]
            locks = [lock for lock in (self.lock, own_lock) if lock]
            pipes = {answers, *(writer.answer.fileno() for writer in before)}
            detach_from_parent(pipes | {lock.fileno() for lock in locks})
            torch.set_num_threads(1)  # torch's other threads are the parent's
            if self.lock:
                self.lock.share(parent)
            if own_lock:
                own_lock.sign()
            for writer in before:
                writer.wait_as_sibling()
            write()
            if own_lock:
                own_lock.close()
            if os.getppid() != parent:
                if_orphaned()
                if self.lock:
                    self.lock.close()
        except BaseException as e:  # whatever it is, the parent raises it
            error = e
        try:
            os.write(answers, pickle.dumps(error))
        finally:
            os._exit(0)


def detach_from_parent(kept_open: set[int]):
    """Take a session of its own, ignore signals, and close the parent's files and connections except
    `kept_open`: they end with the parent.
    """
    os.setsid()
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for descriptor in set(map(int, os.listdir("/dev/fd"))) - kept_open - {0, 1, 2}:
        with contextlib.suppress(OSError):  # the one that listed them
            os.close(descriptor)


def how_it_ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name + (" (out of memory?)" if -code == signal.SIGKILL else "")
