#!/usr/bin/env bash
# One machine of a run whose machines may join and leave, with torchrun's elastic agent. Start it on each machine with the
# same arguments. --output_dir must be a folder that all machines share:
#
#     bash launch/elastic.sh node1:29400 --ds_config ds_configs/strong.json --output_dir /shared/run
#
# When a machine joins or leaves, the ranks stop and continue with the new number of ranks, to the same bits. If they were
# asked to stop, they write a checkpoint first. If a machine is lost, they continue from the last regular checkpoint
# (trainer.checkpoint.every_steps). The machine of the address (here node1) keeps the list of all machines, so it must
# stay. There cannot be more ranks than micro-batches: that ends the run.
#
# NODES=1:4        the least and the most machines
# RANKS=4          ranks on this machine; default: one a GPU, or 1
# MAX_RESTARTS=100 give up after this many failures; machines that join or leave normally do not count
# JOIN_S=15        seconds to wait for more machines before each start
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
[ -n "$output_dir" ] || fail "--output_dir is missing: a folder that all machines share, in which the run continues"

gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU ' || true)
if [ "$gpus" = 0 ]; then export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} gpus=1; fi
# One thread per rank, the default of trainer.cpu_threads. Without this, torchrun prints a warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Each start gets a store of its own. In the agent's store, ranks would find the addresses of ranks of earlier starts.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec python -m torch.distributed.run \
    --nnodes "${NODES:-1:4}" --nproc_per_node "${RANKS:-$gpus}" --max_restarts "${MAX_RESTARTS:-100}" \
    --rdzv_backend c10d --rdzv_endpoint "$address" --rdzv_id "${RUN_ID:-trainer}" \
    --rdzv_conf "last_call_timeout=${JOIN_S:-15}" --monitor_interval 1 \
    trainer/main.py "${resume[@]}" "$@"
