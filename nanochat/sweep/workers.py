"""A run of several processes on this machine: they are started together, and they end together.

torchrun gives its workers sessions of their own, and its exit code is 1 whatever theirs were. Who started it
can neither reach them all nor learn how they ended. A sweep needs both, so it starts the workers itself, with
the variables that torchrun would set.
"""

import os
import signal
import socket
import subprocess
import sys
import time

from nanochat.signals import REQUEUE

WORKER_POLL = 0.2  # seconds between two looks at the workers
# seconds from a request to stop: to finish a step or an evaluation, and to write a checkpoint
SECONDS_TO_SAVE = 600
# seconds after one has failed, in which the others end: without it they can do nothing
SECONDS_TO_FOLLOW = 30


def run_workers(command: list[str], count: int, stop) -> int:
    """Run `command` in `count` processes as one run, until all have ended.

    stop: an event that asks them to save and stop. Returns 0, signals.REQUEUE if they stopped as asked, or
    the exit code of the first that failed. None of them outlives this call. If this process is killed, they
    notice it (`processes.stop_without_launcher`), save, and stop.
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
    """Append the started processes to `workers`, one by one. They inherit this process's locks."""
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
    """The exit code of the run. Workers are asked once to stop, and killed when their time is over."""
    stopping = False
    failed = None
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers):
        time.sleep(WORKER_POLL)
        if stop.is_set() and not stopping:
            stopping = True
            deadline = min(deadline, time.monotonic() + SECONDS_TO_SAVE)
            send(workers, signal.SIGTERM)
        if failed is None and (failed := first_failed(workers)) is not None:
            deadline = min(deadline, time.monotonic() + SECONDS_TO_FOLLOW)
            if not stopping:
                send(workers, signal.SIGTERM)
        if time.monotonic() > deadline:
            send(workers, signal.SIGKILL)
    if failed is None:
        failed = first_failed(workers)
    was_starting = failed is not None and stopping and workers[failed].returncode == -signal.SIGTERM
    if failed is None or was_starting:  # a worker that was still starting had nothing to save
        stopped = stopping or any(worker.returncode for worker in workers)
        return REQUEUE if stopped else 0
    return failure_code(failed, workers)


def send(workers: list[subprocess.Popen], number: int):
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def first_failed(workers: list[subprocess.Popen]) -> int | None:
    """The rank of the first worker that has failed; None if there is none."""
    codes = [worker.poll() for worker in workers]
    return next((rank for rank, code in enumerate(codes) if code not in (None, 0, REQUEUE)), None)


def failure_code(rank: int, workers: list[subprocess.Popen]) -> int:
    """The exit code of a failed worker: as in shells, 128 + the signal that killed it. Prints that signal."""
    code = workers[rank].returncode
    if code > 0:
        return code
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    name = signal.Signals(-code).name
    print(f"process {rank} of {len(workers)} was killed by {name}{hint}", file=sys.stderr, flush=True)
    return 128 - code
