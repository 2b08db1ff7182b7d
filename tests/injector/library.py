"""Compile the library of faults, and talk to a server that runs scripts under it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TREE = HERE.parents[1]


def missing() -> str:
    """Why this machine cannot inject faults; '' if it can."""
    if sys.platform != "linux":
        return "faults are injected on Linux only"
    return "" if compiler() else "there is no C compiler (cc)"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc"))


def build(folder: Path) -> Path:
    """The library, compiled into a folder."""
    library = folder / "faulty_files.so"
    command = [compiler(), "-O1", "-Wall", "-Wextra", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
    subprocess.run([*command, "-o", library, HERE / "faulty_files.c", "-ldl"], check=True)
    return library


class Server:
    """server.py on a tree of this program. One request at a time."""

    def __init__(self, tree: Path, library: Path, log: Path):
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "NANOCHAT_DTYPE": "float32",
            "WANDB_MODE": "offline",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for name in ("NANOCHAT_BASE_DIR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "INJECTOR_ARMED"):
            environment.pop(name, None)
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, HERE / "server.py"],
                cwd=tree,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.log = log

    def __call__(self, **request) -> dict:
        """The answer to a request: see server.supervise."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the server has ended: {self.log.read_text()[-2000:]}")

    def close(self):
        self.process.stdin.close()
        self.process.wait()
