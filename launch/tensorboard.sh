#!/usr/bin/env bash
# TensorBoard over all runs, at http://localhost:6006, for this machine only. Arguments are passed to it.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
set_up
exec tensorboard --logdir runs "$@"
