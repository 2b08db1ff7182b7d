"""Processes as torchrun starts them, forked from one that has loaded torch: each starts seconds sooner."""

import glob
import os
import socket
import time
from multiprocessing import get_context

from nanochat.common import run_script

WAIT = 240  # seconds until a run counts as hung
fork_server = get_context("forkserver")  # an interpreter of its own that loads torch once
fork_server.set_forkserver_preload(["torch", "scripts.base_train"])


class Launched:
    """function(*arguments) in `count` processes, which end as a script does; output: what they print."""

    def __init__(self, count, output, function, *arguments):
        self.output = output
        group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        places = [{"RANK": rank, "LOCAL_RANK": rank, **group} for rank in range(count)] if count > 1 else [{}]
        self.processes = [
            fork_server.Process(target=as_script, args=(output, environment(**place), function, arguments))
            for place in places
        ]
        for process in self.processes:
            process.start()

    def codes(self):
        """Their exit codes, once all have ended. As torchrun does, it stops the others when one fails."""
        deadline = time.monotonic() + WAIT
        while any(p.exitcode is None for p in self.processes):
            failed = any(p.exitcode for p in self.processes) or time.monotonic() > deadline
            for process in self.processes:
                process.kill() if failed else process.join(0.02)
        return [p.exitcode for p in self.processes]


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in changes.items()}}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def alive(words: str) -> list[int]:
    """Processes with these words in their command line, without ours. Where there is no
    /proc, none are seen.
    """
    pids = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as f:
                command = f.read().decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if words in command and int(path.split("/")[2]) != os.getpid():
            pids.append(int(path.split("/")[2]))
    return pids


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- in the forked process


def as_script(output, environment, function, arguments):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    run_script(lambda: function(*arguments))
