#!/usr/bin/env bash
# The checks of CI: format, lint, types, tests. `scripts/check.sh fast` leaves the tests out.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
pyright
[ "${1:-}" = fast ] || pytest
