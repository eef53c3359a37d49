# shellcheck shell=bash
# Makes and activates the project's virtual environment. Sourced, not run, by
# test.sh and quickstart.sh:
#
#   . launch/environment.sh
#
# PYTHON              the interpreter to use (default: the first good one found)
# SPEC_STREAM_VENV    where the environment lies (default: .venv in the root)
# SPEC_STREAM_EXTRAS  extras of setup.py (default: dev; "dev,parity,quant" adds
#                     what the tests against transformers need, 1 GB)
#
# A stamp in the environment holds a hash of setup.py: while that is unchanged,
# nothing is installed again. Leaves the caller in the repository root, with
# $PYTHON set to the interpreter of the environment.

fail() { echo "error: $*" >&2; exit 1; }

is_good_python() {  # Python 3.11 or later that really runs (shims may not)
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13; do
    if is_good_python "$name"; then command -v "$name"; return; fi
    if [ "$name" = "${PYTHON:-}" ]; then
      fail "PYTHON=$PYTHON is not a Python 3.11 or later"
    fi
  done
  return 1
}

can_use_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_install() {
  echo "installing Debian packages: $*"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq "$@"; } >/dev/null ||
    fail "apt-get install $* did not work"
}

make_venv() {
  local python package
  if ! python=$(find_python); then
    [ -n "${PYTHON:-}" ] && exit 1  # find_python has said why
    can_use_apt && apt_install python3 python3-venv
    python=$(find_python) || fail "no Python 3.11 or later was found;" \
      "install one (Debian: apt-get install python3 python3-venv) or set PYTHON"
  fi
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    package=$("$python" -c \
      'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    can_use_apt && apt_install "$package"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$python cannot make virtual environments;" \
        "as root: apt-get install $package"
  fi
  echo "making $VENV with $("$python" --version)"
  "$python" -m venv --clear "$VENV" || fail "could not make $VENV"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || fail "the repository root is gone"
VENV=${SPEC_STREAM_VENV:-$PWD/.venv}
is_good_python "$VENV/bin/python" || make_venv
PYTHON=$VENV/bin/python
export PATH=$VENV/bin:$PATH

# setup.py decides what is installed, this folder where it is installed from.
extras=${SPEC_STREAM_EXTRAS:-dev}
stamp=$({ echo "$PWD $extras"; cat setup.py; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$VENV/spec_stream.stamp" 2>/dev/null)" != "$stamp" ]; then
  echo "installing the packages of setup.py (a minute or two the first time)"
  "$PYTHON" -m pip install -qq --disable-pip-version-check -e ".[$extras]" ||
    fail "pip could not install the packages of setup.py"
  echo "$stamp" >"$VENV/spec_stream.stamp"
fi
"$PYTHON" - <<'END'
import platform
from importlib.metadata import version

names = "jax jaxlib flax optax orbax-checkpoint grain tensorflow-datasets"
versions = " ".join(f"{name} {version(name)}" for name in names.split())
print(f"python {platform.python_version()} {versions}")
END
