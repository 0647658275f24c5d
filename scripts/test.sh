#!/usr/bin/env bash
# Everything that must hold before a change goes in: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh

setup_venv "test,dev"
progress "ruff check"
.venv/bin/ruff check --quiet .
progress "ruff format"
.venv/bin/ruff format --quiet --check . || fail "files are not formatted; run: .venv/bin/ruff format ."
progress "mypy"
.venv/bin/mypy --no-error-summary -p swarm
progress "pytest"
# Two at a time, a file's tests in order: most of them wait for server processes half of the time.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
