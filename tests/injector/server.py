"""Runs this program's scripts, each in processes forked from this one, which has torch loaded.

It is started with LD_PRELOAD=<the library of faulty_files.c> in the folder of the tree to test. A request is
a line of JSON on standard input, the answer a line on standard output: see `supervise`.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
import time

import torch

SCRIPTS = ("base_train", "adapter_train", "base_eval", "materialize", "report", "tok_train")
PATIENCE = 30.0  # seconds that torchrun gives its processes after SIGTERM
SUBREAPER = 36  # prctl's number for it
POLL = 0.01


def serve():
    """Answer requests. Returns in a forked process only: with what it is to run."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        reads, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reads)
            task = supervise(request, writes)
            if task:
                return task
            os._exit(0)
        os.close(writes)
        with open(reads, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(pid, 0)
        print(answer.decode(), flush=True)
    return None


def supervise(request, answers: int):
    """Start the request's processes, and wait for them and all that they leave behind, as torchrun does.

    request: {"module", "arguments", "environment", "output" (path; `.<rank>.out` and `.err` follow),
    "processes", "struck" (the rank that is armed with a fault; the others only count), "injector" (variables
    of faulty_files.c), "limit" (seconds)}
    Answer: {"codes": exit codes, negative for signals, "hung", "seconds", "orphans": how many outlived them}
    """
    os.setsid()
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    port = str(free_port())
    pids = []
    for rank in range(request["processes"]):
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            return request, rank, port
        pids.append(pid)
    store = None
    if len(pids) > 1:  # the place where the processes meet outlives them, as torchrun's does
        store = torch.distributed.TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
    started = time.monotonic()
    codes, hung = wait_for_all(pids, started + request["limit"])
    orphans = wait_for_orphans(started + request["limit"] + 5)
    answer = {
        "codes": [codes[pid] for pid in pids],
        "hung": hung,
        "seconds": time.monotonic() - started,
        "orphans": orphans,
    }
    os.write(answers, json.dumps(answer).encode())
    del store
    return None


def wait_for_all(pids, deadline):
    codes = {}
    hung = False
    kill_at = None
    while missing := [p for p in pids if p not in codes]:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:  # perhaps a writer's, whose training process has died: this process is its parent then
            codes[pid] = os.waitstatus_to_exitcode(status)
            continue
        now = time.monotonic()
        failed = any(codes.get(p) for p in pids)
        if failed and kill_at is None:
            kill_at = now + PATIENCE
            send(missing, signal.SIGTERM)
        if now > deadline:
            hung = True
        if hung or (kill_at and now > kill_at):
            send(missing, signal.SIGKILL)
        time.sleep(POLL)
    return codes, hung


def wait_for_orphans(deadline) -> int:
    """How many there were. What is left at the deadline is killed."""
    count = 0
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return count
        if pid:
            count += 1
            continue
        if time.monotonic() > deadline:
            with open(f"/proc/self/task/{os.getpid()}/children") as f:
                send(map(int, f.read().split()), signal.SIGKILL)
        time.sleep(POLL)


def send(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(request, rank: int, port: str):
    """The rest of this process's life: the script, as if it had been started by itself or by torchrun."""
    for descriptor, end in ((1, "out"), (2, "err")):
        file = os.open(f"{request['output']}.{rank}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # unbuffered as to lines: a process that is killed has said what it printed
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    stacks = open(f"{request['output']}.{rank}.stacks", "w")
    faulthandler.dump_traceback_later(request["limit"] - 5, file=stacks)
    environment = {**os.environ, **request["environment"], "INJECTOR_ARMED": "1", "INJECTOR_RANK": str(rank)}
    environment |= request["injector"]
    if rank != request["struck"]:
        environment["INJECTOR_AT"] = "0"
    if request["processes"] > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(request["processes"]),
            "LOCAL_WORLD_SIZE": str(request["processes"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_RUN_ID": "none",
        }
    os.environ.update(environment)
    sys.argv = [request["module"], *request["arguments"]]
    from nanochat.common import run_script

    main = importlib.import_module(request["module"]).main
    if request["injector"] and ctypes.CDLL(None).injector_arm():
        sys.exit("the injector could not be armed")
    run_script(main)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    for name in SCRIPTS:
        importlib.import_module(f"scripts.{name}")
    print("ready", flush=True)
    task = serve()
    if task:
        run(*task)
