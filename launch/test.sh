#!/usr/bin/env bash
# All checks: sets up, then format, lint, types and tests; the first that fails ends it.
# Arguments are passed to pytest: bash launch/test.sh -k batching
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
set_up test

check() {
    say "== $*"
    "$@" || fail "\`$*\` failed (exit code $?), so the checks after it were not made."
}

check ruff format --check trainer tests
check ruff check trainer tests
check mypy
check python -m pytest "$@"
