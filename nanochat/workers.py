"""A run of several processes on this machine: they are started together, and they end together.

torchrun gives its workers sessions of their own and makes a 1 of every exit code. Whoever started it can
neither reach them all nor learn how they ended. A sweep has to, so it starts them itself, with the variables
that torchrun would set.
"""

import os
import signal
import socket
import subprocess
import sys
import time

from nanochat.common import REQUEUE

POLL = 0.2  # seconds between two looks at the workers
TO_SAVE = 600  # seconds from a request to stop: to finish a step or an evaluation, and write a checkpoint
TO_FOLLOW = 30  # seconds from when one has failed: without it the others can do nothing


def run_workers(command: list[str], count: int, stop) -> int:
    """Run `command` in `count` processes as one run, until all have ended.

    stop: an event that asks them to save and stop. Returns 0, common.REQUEUE if they stopped as asked, or the
    exit code of the first that failed. None of them outlives this call. Should this process be killed, they
    notice (`common.stop_without_launcher`), save, and stop.
    """
    workers = []
    try:
        start_workers(workers, command, count)
        return wait_for_workers(workers, stop)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


def start_workers(workers: list[subprocess.Popen], command: list[str], count: int):
    """Append the started processes to `workers`, one by one. They inherit the locks
    that this one was given.
    """
    group = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NANOCHAT_LAUNCHER": str(os.getpid()),
    }
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **group, **place}
        workers.append(subprocess.Popen(command, env=environment, close_fds=False))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for_workers(workers: list[subprocess.Popen], stop) -> int:
    """The exit code of the run. Workers are told once that they are to stop, and killed when time is over."""
    asked = False
    failed = None
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers):
        time.sleep(POLL)
        if stop.is_set() and not asked:
            asked = True
            deadline = min(deadline, time.monotonic() + TO_SAVE)
            send(workers, signal.SIGTERM)
        if failed is None and (failed := first_failed(workers)) is not None:
            deadline = min(deadline, time.monotonic() + TO_FOLLOW)
            if not asked:
                send(workers, signal.SIGTERM)
        if time.monotonic() > deadline:
            send(workers, signal.SIGKILL)
    failed = first_failed(workers) if failed is None else failed
    was_starting = failed is not None and asked and workers[failed].returncode == -signal.SIGTERM
    if failed is None or was_starting:  # one that was still starting had nothing to save
        stopped = asked or any(worker.returncode for worker in workers)
        return REQUEUE if stopped else 0
    return failure_code(failed, workers)


def send(workers: list[subprocess.Popen], number: int):
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def first_failed(workers: list[subprocess.Popen]) -> int | None:
    """The number of a worker that has failed; None if there is none."""
    codes = [worker.poll() for worker in workers]
    return next((rank for rank, code in enumerate(codes) if code not in (None, 0, REQUEUE)), None)


def failure_code(rank: int, workers: list[subprocess.Popen]) -> int:
    """As a shell has it: 128 and the number of the signal that killed it, which is said."""
    code = workers[rank].returncode
    if code > 0:
        return code
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    name = signal.Signals(-code).name
    print(f"process {rank} of {len(workers)} was killed by {name}{hint}", file=sys.stderr, flush=True)
    return 128 - code
