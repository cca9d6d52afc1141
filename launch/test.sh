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
# Two tests at a time, or more on a larger machine: most of a run's start-up keeps one core busy.
check python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
