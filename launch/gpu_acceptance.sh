#!/usr/bin/env bash
# Accepts a machine with NVIDIA GPUs: `python -m trainer doctor` and the tests for GPUs; prints a block for the README.
#   bash launch/gpu_acceptance.sh           sets up as launch/test.sh does
#   bash launch/gpu_acceptance.sh WHEELS    for machines without a network: uses python3 with its own torch, and installs
#                                           the other packages from the wheels in the folder WHEELS
# The numbers of the doctor go to $OUT/doctor.json; without OUT to doctor.json in the project's folder.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

[ "$(count_gpus)" != 0 ] || fail "nvidia-smi lists no GPU on this machine, so there is nothing to accept."
if [ $# -gt 0 ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    python3 -m pip install -q --no-index --no-deps --no-cache-dir --target "$packages" "$1"/*.whl ||
        fail "The wheels in $1 could not be installed, for the reason above."
    export PYTHONPATH=$packages:$root
    python() { python3 "$@"; }
else
    set_up test
fi

report=${OUT:-.}/doctor.json
failed=
python -m trainer doctor --device cuda --output "$report" || failed="the doctor"
say
python -m pytest -q -n 0 -p no:cacheprovider tests/test_gpu.py || failed=${failed:+$failed and }"tests/test_gpu.py"

say "" "---- for the README ----" "" "$(date -u +%F), commit $(git rev-parse --short HEAD 2> /dev/null || say unknown), \
$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c | sed 's/^ *//'):" ""
python -c 'import json, sys; from trainer.commands.doctor.doctor import markdown; print(markdown(json.load(open(sys.argv[1]))))' "$report"
say
if [ -n "$failed" ]; then fail "Not accepted: $failed failed."; fi
say "Accepted."
