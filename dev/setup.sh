# speedrun.sh and dev/test.sh source this file. It makes an environment in .venv, once, with the package and,
# for dev/test.sh, the tools of EXTRAS=[dev]. If several nodes share this folder, the first node installs. The
# others wait for it, at most ten minutes.
EXTRAS=${EXTRAS:-}
installed() {
  [ -f ".venv/installed$EXTRAS.toml" ] && [ "$(<pyproject.toml)" = "$(<".venv/installed$EXTRAS.toml")" ]
}
for ((i = 0; i < 120 && ${NODE_RANK:-0} > 0; i++)); do
  installed && break
  sleep 5
done
if [ ! -x .venv/bin/python ]; then
  for PYTHON in python3 python; do
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
  done
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: no python3 >= 3.10 on the PATH" >&2
    exit 2
  fi
  "$PYTHON" -m venv .venv
fi
source .venv/bin/activate
# install again only when the dependencies change
if ! installed; then
  python -m pip install --quiet --disable-pip-version-check -e ".$EXTRAS"
  for MARK in installed "installed$EXTRAS"; do cat pyproject.toml > ".venv/$MARK.toml"; done
fi
