"""Runs scripts one after the other in one process on the null GPU.

    run.sh tests/null_gpu_scripts.py 'base_eval --model-tag TAG' 'generate --model-tag TAG' …

A tensor on the wrong device, or an operator that a GPU lacks, ends the process with the error. The stub
has no singular values and no FFT.
"""

import shlex
import sys
import time
from importlib import import_module

for line in sys.argv[1:]:
    script, *flags = shlex.split(line)
    started = time.perf_counter()
    import_module(f"scripts.{script}").main(flags)
    print(f"{script}: done in {time.perf_counter() - started:.1f} s", flush=True)
