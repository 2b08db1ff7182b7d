#!/usr/bin/env bash
# The same set-up as speedrun.sh, then the whole test suite. Arguments go to pytest: bash dev/test.sh -k resume
[ -n "${BASH_VERSION:-}" ] || { echo "error: dev/test.sh is written for bash: bash dev/test.sh" >&2; exit 2; }
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
source dev/setup.sh
export OMP_NUM_THREADS=1  # a core for each of as many tests at once as there are cores
python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
