#!/usr/bin/env bash
# The same set-up as speedrun.sh, then the whole test suite. Arguments go to pytest: bash dev/test.sh -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
source dev/setup.sh
export OMP_NUM_THREADS=1  # a core for each of as many tests at once as there are cores
python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
