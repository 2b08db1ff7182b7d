#!/usr/bin/env bash
# The same set-up as speedrun.sh, then the whole test suite. Arguments go to pytest: bash dev/test.sh -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
source dev/setup.sh
python -m pytest "$@"
