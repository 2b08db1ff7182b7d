#!/usr/bin/env bash
# Set up the environment as speedrun.sh does, then run the whole test suite.
# Arguments go to pytest: bash dev/test.sh -k resume
[ -n "${BASH_VERSION:-}" ] || { echo "error: dev/test.sh is written for bash: bash dev/test.sh" >&2; exit 2; }
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
source dev/setup.sh
export OMP_NUM_THREADS=1
# one worker more than cores: many tests wait for processes that they started
WORKERS=$(python -c "import os; print(min(8, 1 + (os.cpu_count() or 1)))")
python -m pytest -n "$WORKERS" --dist worksteal "$@"
