#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Creates .venv with the versions of constraints.txt. `make setup` calls it when it is out of date; installed packages stay.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
VENV=.venv
TRIED="python3.11 python3.12 python3.13 python3.14 python3"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo 'not there'; }

find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || die "PYTHON=$PYTHON is $(version_of "$PYTHON"); edgekd needs Python 3.11 or newer"
        echo "$PYTHON"
        return
    fi
    for name in $TRIED; do
        if new_enough "$name"; then echo "$name"; return; fi
    done
    die "no Python 3.11 or newer here (python3 is $(version_of python3)); install python3.11 with its venv module," \
        "or name one: make setup PYTHON=/path/to/python3.11"
}

pip_install() { # only versions of constraints.txt, only wheels: nothing is compiled
    "$VENV/bin/python" -m pip install --quiet --quiet --only-binary :all: --constraint constraints.txt "$@"
}

torch_due() { # prints what to install, unless the pinned version is there
    "$VENV/bin/python" - <<'PY'
import re, sys
from importlib.metadata import PackageNotFoundError, version
pin = re.search(r"^torch==(\S+)$", open("constraints.txt").read(), re.M).group(1)
try:
    due = version("torch").partition("+")[0] != pin
except PackageNotFoundError:
    due = True
if due:  # on Linux the default build includes CUDA, several GB; only the +cpu build does not
    print(f"torch=={pin}" + ("+cpu" if sys.platform == "linux" else ""))
PY
}

if ! new_enough "$VENV/bin/python"; then
    python=$(find_python)
    say "1/4 $VENV from $python ($(version_of "$python"))"
    "$python" -m venv --clear "$VENV" || die "$python cannot make an environment; install its venv module (Debian: python3-venv)"
fi
torch=$(torch_due)
if [ -n "$torch" ]; then
    say "2/4 $torch"
    pip_install "$torch" || die "pip did not get $torch, PyTorch's CPU build (its output is above); other builds bring CUDA," \
        "several GB that edgekd does not use; name an index that has it:" \
        "make setup PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
fi
say "3/4 what builds the package"
pip_install hatchling editables
say "4/4 edgekd, its exporters and runtimes, and the tools of its tests (about 100 packages)"
mapfile -t tools < <("$VENV/bin/python" -c '
import tomllib
print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"]))')
pip_install --no-build-isolation --editable '.[build]' "${tools[@]}"
touch "$VENV/.setup-stamp"
say "done: $VENV/bin/edgekd $("$VENV/bin/python" -c 'import edgekd; print(edgekd.__version__)') (took $SECONDS s)"
