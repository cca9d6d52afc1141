#!/usr/bin/env bash
# One machine of a run whose machines come and go, on torchrun's elastic agent. On each machine, with one and the same
# first argument and arguments of the run, of which --output_dir must be a folder that all of them share:
#
#     bash launch/elastic.sh node1:29400 --ds_config ds_configs/strong.json --output_dir /shared/run
#
# When a machine joins or leaves, the ranks stop and go on from the last checkpoint at the new number of ranks, to the
# same bits: at once with a checkpoint of their own where they were asked, from the last regular one where a machine
# is gone (trainer.checkpoint.every_steps). The machine of the address (here node1) keeps the list of all: it has to
# stay. A number of ranks that the config cannot have (more than micro-batches) ends the run.
#
# NODES=1:4        from how many to how many machines
# RANKS=4          ranks on this machine: without it one a GPU, or 1
# MAX_RESTARTS=100 after how many failures to give up; machines that join or leave in peace do not count
# JOIN_S=15        seconds to wait for further machines before each start
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then PATH=$PWD/.venv/bin:$PATH; fi

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

case ${1:-} in
    -h | --help | "" | -*) fail "the first argument is the address at which the machines meet, as in node1:29400" ;;
esac
address=$1
shift
output_dir=
resume=(--resume auto)
for argument in "$@"; do
    case $argument in
        --output_dir | --output_dir=*) output_dir=given ;;
        --resume | --resume=*) resume=() ;;
    esac
done
[ -n "$output_dir" ] || fail "--output_dir is missing: a folder that all machines share, where the run goes on"

gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU ' || true)
if [ "$gpus" = 0 ]; then export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} gpus=1; fi
# One thread a rank, as trainer.cpu_threads says; without it torchrun prints a warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Each start gets a store of its own: in the agent's, ranks would find the addresses of those before them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec python -m torch.distributed.run \
    --nnodes "${NODES:-1:4}" --nproc_per_node "${RANKS:-$gpus}" --max_restarts "${MAX_RESTARTS:-100}" \
    --rdzv_backend c10d --rdzv_endpoint "$address" --rdzv_id "${RUN_ID:-trainer}" \
    --rdzv_conf "last_call_timeout=${JOIN_S:-15}" --monitor_interval 1 \
    trainer/main.py "${resume[@]}" "$@"
