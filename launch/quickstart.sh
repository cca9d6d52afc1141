#!/usr/bin/env bash
# From a fresh checkout to a trained model: sets up, then trains the digits task on two ranks, on GPUs or CPUs.
# Arguments are passed to the trainer: bash launch/quickstart.sh --epochs 5
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
set_up

ranks=2
if [ "$(count_gpus)" = 1 ]; then
    ranks=1
    say "This machine has one GPU, so one rank is started: NCCL allows only one rank per GPU. The model is the same."
fi
command=(deepspeed --num_gpus "$ranks" trainer/main.py --ds_config ds_configs/strong.json "$@")
printf '$'
printf ' %q' "${command[@]}"
printf '\n\n'
"${command[@]}"

say
say "To see its curves: bash launch/tensorboard.sh (tensorboard --logdir runs), then open http://localhost:6006"
say "on this machine. Other machines cannot open it."
if [ "$(command -v deepspeed)" = "$root/.venv/bin/deepspeed" ] && [ -z "${VIRTUAL_ENV:-}" ]; then
    say "To use deepspeed and python -m trainer yourself: source .venv/bin/activate"
fi
