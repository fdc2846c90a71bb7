#!/usr/bin/env bash
# The variable-binding study on several nodes of a Slurm cluster; one process a GPU, or a replica.
#
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm_variable_binding.sh --model huggyllama/llama-13b --out /shared/binding
#
# Options are those of scripts/reproduce_variable_binding.py. --out must be on a file system that all nodes see: the process
# that writes it runs on the first one. The same command goes on with a run that was cut off, by the time limit say: what was
# finished is in its journal.
#
#   PYTHON           the interpreter of the environment with patchkit (python)
#   GPUS_PER_REPLICA GPUs that one copy of the model is spread over (1)
#   PROCESSES        processes on each node (its GPUs / GPUS_PER_REPLICA; 1 where there is none)
#   MASTER_PORT      free on the first node (29500)
#
#SBATCH --job-name=variable-binding
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --requeue
# Two minutes to finish the batch in hand.
#SBATCH --signal=TERM@120
set -euo pipefail

: "${SLURM_JOB_NODELIST:?this script is for sbatch; on one machine give --num-processes to scripts/reproduce_variable_binding.py}"

PYTHON=${PYTHON:-python}
GPUS_PER_REPLICA=${GPUS_PER_REPLICA:-1}
if [[ -z ${PROCESSES:-} ]]; then
    gpus=${SLURM_GPUS_ON_NODE:-0}
    PROCESSES=$(( gpus / GPUS_PER_REPLICA ))
    (( PROCESSES >= 1 )) || PROCESSES=1
fi
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${nodes[0]:?scontrol names no node of this job}
MASTER_PORT=${MASTER_PORT:-29500}
# Slurm runs a copy of this file from its spool; the repository is where sbatch was called, or as said.
HERE=${PATCHKIT_DIR:-${SLURM_SUBMIT_DIR:-$PWD}}
SCRIPT=$HERE/scripts/reproduce_variable_binding.py
[[ -f $SCRIPT ]] || { echo "$SCRIPT is not there: call sbatch in the repository, or set PATCHKIT_DIR to it" >&2; exit 2; }

replica=()
(( GPUS_PER_REPLICA == 1 )) || replica=(--gpus-per-replica "$GPUS_PER_REPLICA")
export PYTHON PROCESSES MASTER_ADDR MASTER_PORT

# The node's number is known on the node only.
# shellcheck disable=SC2016
exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
    exec "$PYTHON" -m torch.distributed.run \
        --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$PROCESSES" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        "$@"' node "$SCRIPT" --backend accelerate ${replica[@]+"${replica[@]}"} --resume "$@"
