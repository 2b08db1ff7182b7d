#!/usr/bin/env bash
# What a training step costs on this machine's GPU, dense and low rank, in under 8 minutes:
#
#     bash dev/bench/gpu.sh                               # writes gpu_bench/gpu.json and gpu_bench/gpu.md
#     OUT=elsewhere PYTHON=python3.12 bash dev/bench/gpu.sh
#     bash dev/bench/gpu.sh --device-type cpu --tiny      # tries the program itself where there is no GPU
#
# Needs Python >= 3.10 with torch >= 2.11 (with its Triton), numpy and tqdm, and a C compiler for Triton. It
# needs no network, no installation, no NANOCHAT_BASE_DIR: a bare checkout will do. Arguments go to gpu.py.
# Batch sizes are found by trying. It begins no comparison that would end after 7 minutes, and is stopped
# before 8; the files then hold what was measured until then.
set -euo pipefail
cd "$(dirname "$0")/../.."
timeout 470 "${PYTHON:-python3}" dev/bench/gpu.py --out "${OUT:-gpu_bench}" "$@"
