#!/bin/sh
# Install vitlab and what it needs into .venv. `make` calls it where .venv is missing or older than pyproject.toml.
# The environment: PY, the Python to use (python3).
set -eu
cd "$(dirname "$0")"
PY=${PY:-python3}
LOG=.venv/install.log

fail() {
    echo "$1"
    exit 1
}

command -v "$PY" >/dev/null || fail "There is no $PY. Install Python 3.11 or newer, or name yours: make PY=python3.12"

version=$("$PY" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "vitlab needs Python 3.11 or newer, and $PY is $version. Name another: make PY=python3.12"

# A first installation needs room; a later one changes little.
if [ ! -e .venv/.installed ]; then
    free=$("$PY" -c 'import shutil; print(shutil.disk_usage(".").free // 10**9)')
    [ "$free" -ge 8 ] || fail "vitlab needs 8 GB of disk for .venv (torch alone 5), and here are $free GB free."
fi

echo "Installing vitlab and what it needs into .venv: 6 GB, a few minutes. pyproject.toml lists it."

# With editable_mode=compat a script beside a clone that is called vitlab finds the package, not the clone's folder.
install_with_uv() {
    uv venv -q --allow-existing --python "$PY" .venv || return 1
    uv pip install -q --compile-bytecode --python .venv/bin/python -c constraints.txt \
        --config-setting editable_mode=compat -e ".[all]" >"$LOG" 2>&1
}

install_with_pip() {
    # A killed installation may leave an environment without pip: it is made again.
    if ! [ -x .venv/bin/python ] || ! [ -x .venv/bin/pip ]; then
        "$PY" -m venv .venv || return 1
    fi
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
        --config-settings editable_mode=compat -e ".[all]" >"$LOG" 2>&1
}

if command -v uv >/dev/null; then install=install_with_uv; else install=install_with_pip; fi
if ! $install; then
    tail -n 12 "$LOG" 2>/dev/null || true
    echo
    if grep -qsiE "no space left|disk quota" "$LOG"; then
        echo "The disk is full."
    elif grep -qsiE "connection|resolve host|name resolution|timed out|unreachable|dns error|from versions: none" "$LOG"; then
        echo "The package index cannot be reached: no network, or it needs a proxy or a mirror."
    fi
    fail "Installation failed (all of it: $LOG). The same command goes on from here."
fi
# git takes notebooks without outputs, so that one that was run has no diff. Without .venv it takes them as they are.
# What is unchanged is noted before: afterwards git strips each notebook of a fresh checkout to tell.
if git rev-parse --git-dir >/dev/null 2>&1; then
    git update-index -q --refresh || true
    .venv/bin/python -m nbstripout --install && git config filter.nbstripout.required false &&
        git config filter.nbstripout.extrakeys metadata.language_info ||
        echo "git could not be told to leave out the outputs of notebooks: see nbstripout --install."
fi
touch .venv/.installed
