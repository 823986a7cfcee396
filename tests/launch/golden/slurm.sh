#!/bin/bash
#SBATCH --job-name=small
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --partition=long
#SBATCH --account=moe
#SBATCH --output=small-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# 120 s before the time is over the ranks get SIGTERM: they save a checkpoint and end with exit code 75
#SBATCH --signal=TERM@120

# what the ranks of this job sign their messages with; srun hands it down, and nothing prints it
CROSSDOCK_SECRET="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
export CROSSDOCK_SECRET

earlier=$(stat -c %i.%y /runs/small/result.json 2> /dev/null)
# a rank's death is noticed by the others, which report it; srun ends what is left after a minute
srun --wait=60 --kill-on-bad-exit=0 crossdock train configs/small.yaml run.dir=/runs/small parallel.expert=16 train.batch_sequences=32
code=$?
# srun gives the highest exit code of all ranks; the run's own is in its result.json, unless rank 0 was killed (137), or could not begin
# and has left an earlier run's there
if [ "$code" -ne 0 ] && { [ -z "$earlier" ] || [ "$(stat -c %i.%y /runs/small/result.json 2> /dev/null)" != "$earlier" ]; }; then
  crossdock status /runs/small --otherwise "$code"; code=$?
fi
case "$code" in
  75 | 76 | 137)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then scontrol requeue "$SLURM_JOB_ID"; fi ;;
esac
exit "$code"
