#!/usr/bin/env bash
# Lint and tests on a bare machine, in one command:
#
#   launch/test.sh [pytest arguments]      e.g. launch/test.sh -k tree --slow
#
# Makes the environment when it is missing (see launch/environment.sh), then
# runs ruff and pytest. Exits with pytest's status.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --diff --quiet . ||
  fail "some files are not formatted: run 'ruff format .'"
# Compiling takes most of the time and one core: a file of tests on each of two.
# In the order of their names: else files of few tests, each of minutes, come
# last, and one core waits for the other.
exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
