"""CUDA without a GPU: programs run under a stub of the CUDA driver that computes nothing.

The stub is no part of this repository: it lies beside it, in ../shared/nullgpu, with a README that says what
to believe. Memory, launches, compilation and collectives are real; values are garbage and times mean nothing.

    pytestmark = null_gpu.marks
    lines = null_gpu.run_source("print(torch.cuda.max_memory_allocated())", tmp_path)

Without the stub, tests that have the marks are skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUB = ROOT.parent / "shared/nullgpu"
INSTALLED = Path(os.environ.get("NULLGPU_DIR", "/tmp/nullgpu"))  # by the stub's setup.sh
HOOK = Path(__file__).with_name("null_gpu_hook.py")

marks = [
    pytest.mark.cuda_stub,
    pytest.mark.skipif(
        not (STUB / "run.sh").is_file() or not (INSTALLED / "venv/bin/python").exists(),
        reason="needs ../shared/nullgpu, set up by its setup.sh",
    ),
]


def run(*args, gib: float = 79.1, processes: int = 1, timeout: float = 300, **environment: str):
    """FILE.py ARGS… or -m MODULE ARGS… on imaginary GPUs of `gib` GiB. Returns the completed process.

    processes > 1: under torchrun, a GPU for each.
    """
    command = ["bash", str(STUB / "run.sh")]
    if processes > 1:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
        command += [*launcher, str(INSTALLED / "nullgpu.py")]
    removed = ("LD_PRELOAD", "NANOCHAT_DTYPE", "PYTHONDONTWRITEBYTECODE")
    settings = {name: value for name, value in os.environ.items() if name not in removed}
    settings |= {
        "NULLGPU_HOOK": str(HOOK),
        "NULLGPU_GIB": str(gib),
        "NULLGPU_COUNT": str(processes),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'dev/bench'}",
        **environment,
    }
    return subprocess.run(
        [*command, *map(str, args)], cwd=ROOT, env=settings, text=True, capture_output=True, timeout=timeout
    )


def run_source(source: str, folder: Path, **options) -> list[str]:
    """Run a program that is given as text. Returns the lines it prints; it must end well.

    It may `import nullgpu`: nullgpu.log(path) starts a log of every launch, copy and collective,
    nullgpu.mark(text) writes a line into it, nullgpu.launches() counts them.
    """
    program = folder / "program.py"
    program.write_text(source, "utf-8")
    result = run(program, **options)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    print(result.stderr, file=sys.stderr)
    return result.stdout.splitlines()
