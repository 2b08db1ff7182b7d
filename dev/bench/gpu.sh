#!/usr/bin/env bash
# What only a graphics card can tell, in two calls of at most six minutes each:
#
#     bash dev/bench/gpu.sh 1      # correctness, times and memory of d20, dense and low rank
#     bash dev/bench/gpu.sh 2      # kill and resume, and real training
#     bash dev/bench/gpu.sh prepare --data FOLDER      # beforehand, for call 2: makes gpu_data (README.md)
#
# Writes call1.md, call1.json and call1.log, or those of call 2, to gpu_bench, or to $OUT. The files are
# rewritten after each item, so what was measured is there even if the call is cut off.
#
#     OUT=elsewhere PYTHON=python3.12 bash dev/bench/gpu.sh 1
#     bash dev/bench/gpu.sh 1 --tiny --device-type cpu      # tries the program itself where there is no GPU
#     LIMIT=3600 bash dev/bench/gpu.sh 1 --seconds 3500     # on a slow machine
#
# Needs Python >= 3.10 with torch >= 2.11 (with its Triton), numpy, tqdm and tiktoken, for call 2 also pyarrow,
# and a C compiler for Triton. No network, no installation: a bare checkout will do.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/dev/bench${PYTHONPATH:+:$PYTHONPATH}"
if [ "${1:-}" = prepare ]; then
  exec "${PYTHON:-python3}" -m gpu.prepare "${@:2}"
fi
timeout "${LIMIT:-358}" "${PYTHON:-python3}" -m gpu "$@" --out "${OUT:-gpu_bench}"
