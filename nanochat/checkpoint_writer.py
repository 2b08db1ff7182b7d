"""The process that writes a checkpoint under a launcher.

torchrun kills its processes half a minute after it was asked to stop, and a checkpoint may take longer to
write. So a process of its own writes it, in a session that the launcher does not know, and goes on when the
training process is killed. Without a launcher nothing kills the training process alone: it writes itself.
"""

import contextlib
import os
import pickle
import signal
import warnings

import torch

from nanochat.errors import InputError
from nanochat.locks import WRITING
from nanochat.signals import ENDING


def under_launcher() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_RANK" in os.environ


def on_cpu(state, copies: dict | None = None):
    """Tensors, nested in dicts and lists, on the CPU: as they are, or copies from another device."""
    copies = {} if copies is None else copies
    if isinstance(state, dict):
        return {key: on_cpu(value, copies) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(on_cpu(value, copies) for value in state)
    if not isinstance(state, torch.Tensor) or state.device.type == "cpu":
        return state
    storage = (state.data_ptr(), state.shape, state.dtype)  # the same for tensors that share their memory
    if storage not in copies:
        copies[storage] = state.cpu()
    return copies[storage]


def write_in_fork(write, lock, if_orphaned):
    """write() in a forked process, which is waited for. What it raises is raised here.

    It must touch files and CPU tensors only: a forked process has neither the threads nor the devices of
    this one.
    lock: the locks.Lock that says whose run this is. The writer holds it too: nobody takes the run before.
    if_orphaned(): what the writer does after write() if this process is gone by then.
    """
    reads, writes = os.pipe()
    lock.sign(WRITING)
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of fork beside threads
        pid = os.fork()
    if pid == 0:
        run_writer(write, if_orphaned, parent, writes, lock)
    os.close(writes)
    with open(reads, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(pid, 0)[1]
    lock.sign()
    if not answer:
        raise InputError(
            f"the process that writes the checkpoint was ended by {how_it_ended(status)}; "
            "continue with --resume auto"
        )
    if error := pickle.loads(answer):
        raise error


def run_writer(write, if_orphaned, parent: int, answers: int, lock):
    """All that the forked process does. It does not return."""
    error = None
    try:
        detach_from_parent({answers, lock.fileno()})
        lock.sign(WRITING)
        write()
        if os.getppid() != parent:
            if_orphaned()
            lock.close()
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
