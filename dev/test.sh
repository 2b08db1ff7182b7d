#!/usr/bin/env bash
# Set up the environment as speedrun.sh does; then check format, lint and types, and run the tests.
# With arguments, only pytest runs and gets them: bash dev/test.sh -k resume
[ -n "${BASH_VERSION:-}" ] || { echo "error: dev/test.sh is written for bash: bash dev/test.sh" >&2; exit 2; }
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
EXTRAS='[dev]' source dev/setup.sh
if [ $# -eq 0 ]; then
  for TOOL in ruff mypy; do
    command -v "$TOOL" >/dev/null || { echo "error: no $TOOL in .venv: pip install -e '.[dev]'" >&2; exit 2; }
  done
  ruff format --check
  ruff check
  mypy
fi
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE   # the many processes of the tests would each compile the same sources
# a worker more than cores: many tests wait for processes that they started
WORKERS=$(python -c "import os; print(min(8, 1 + (os.cpu_count() or 1)))")
python -m pytest -n "$WORKERS" --dist worksteal "$@"
