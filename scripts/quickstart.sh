#!/usr/bin/env bash
# From a clean clone to a running swarm: makes .venv, installs the pinned versions, runs `swarm demo`.
# Arguments go to the demo: ./scripts/quickstart.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh

setup_venv ""
exec .venv/bin/swarm demo "$@"
