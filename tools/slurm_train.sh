#!/usr/bin/env bash
# Train on machines of a Slurm cluster: one torchrun a machine, started by srun. Arguments are those of torchrun behind
# its own options; options of sbatch stand before this file. All machines must see --exp-dir under the same path.
#
#   sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00 tools/slurm_train.sh \
#       -m valle.bin.trainer_audiolm --manifest-dir data/tokenized --exp-dir exp/large --parallel fsdp \
#       --checkpoint-format sharded --dtype bfloat16 --optimizer-name AdamW --base-lr 5e-4
#
# Five minutes before the time is over, the training is asked to end: it finishes its step, writes a checkpoint, and the
# job is put into the queue again, until the training is done. A job that fails is not.
#
#   PROCESSES_PER_NODE  processes on each machine (default: one a GPU)
#   PYTHON              the interpreter that has valle (default: python)
#   PORT                on the first machine, for all to meet at (default: from the job's number)
#
#SBATCH --job-name=valle
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300

set -euo pipefail

if [[ $# -eq 0 || $1 == --help || $1 == -h ]]; then
    sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$0"
    exit 0
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: not in a Slurm job; start it with: sbatch $0 $*" >&2
    exit 2
fi

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")  # into head it might break the pipe, and end the job
first=${hosts%%$'\n'*}
again=no

# scancel signals the job's steps, not this script.
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# Asked to end, processes are given 280 s for their step and the checkpoint.
srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first:${PORT:-$((20000 + SLURM_JOB_ID % 10000))}" \
    --shutdown-timeout 280 "$@" &
step=$!

code=0
wait "$step" || code=$?
# A signal interrupts `wait`, and the step goes on.
while kill -0 "$step" 2>/dev/null; do
    code=0
    wait "$step" || code=$?
done

if [[ $again == yes && $code -ne 0 ]]; then
    echo "time is over: job $SLURM_JOB_ID goes into the queue again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
