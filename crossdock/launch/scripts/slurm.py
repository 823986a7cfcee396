"""The batch script of a run under Slurm: one task per rank, started by srun, which `worker_env` reads."""

import re
import signal

from crossdock.errors import UsageError
from crossdock.launch.scripts.allocation import RETRY_CODES, Run, Shape, shell

_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.ASCII)
_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={ranks_per_node}
#SBATCH --cpus-per-task={cores_per_rank}
{gpus}#SBATCH --time={time_limit}
{options}#SBATCH --output={name}-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# {grace_s} s before the time is over the ranks get SIGTERM: they save a checkpoint and end with exit code 75
#SBATCH --signal=TERM@{grace_s}

# what the ranks of this job sign their messages with; srun hands it down, and nothing prints it
CROSSDOCK_SECRET="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"
export CROSSDOCK_SECRET

earlier=$(stat -c %i.%y {result} 2> /dev/null)
# a rank's death is noticed by the others, which report it; srun ends what is left after a minute
srun --wait=60 --kill-on-bad-exit=0 {command}
code=$?
# srun gives the highest exit code of all ranks; the run's own is in its result.json, unless rank 0 was killed (137), or could not begin
# and has left an earlier run's there
if [ "$code" -ne 0 ] && {{ [ -z "$earlier" ] || [ "$(stat -c %i.%y {result} 2> /dev/null)" != "$earlier" ]; }}; then
  crossdock status {directory} --otherwise "$code"; code=$?
fi
case "$code" in
  {retry})
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then scontrol requeue "$SLURM_JOB_ID"; fi ;;
esac
exit "$code"
"""


def batch_script(shape: Shape, run: Run, time_limit: str, grace_s: int, restarts: int, options: tuple[str, ...]) -> str:
    """The script for sbatch. `time_limit` in Slurm's form; `options` are further ones of sbatch, such as `--partition=long`.

    Raises `UsageError` for a time that is none and for an option that is not one.
    """
    if not _TIME.fullmatch(time_limit):
        raise UsageError(f"--time {time_limit!r} is no time of Slurm's; write minutes, hours:minutes:seconds or days-hours, as in 24:00:00")
    for option in options:
        if not option.startswith("--") or "\n" in option:
            raise UsageError(f"{option!r} is not an option of sbatch; write it like --partition=long")
    return _SCRIPT.format(
        name=run.name,
        nodes=shape.nodes,
        ranks_per_node=shape.ranks_per_node,
        cores_per_rank=shape.cores_per_rank,
        gpus=f"#SBATCH --gpus-per-node={shape.ranks_per_node}\n" if shape.gpus else "",
        time_limit=time_limit,
        options="".join(f"#SBATCH {option}\n" for option in options),
        grace_s=grace_s,
        command=shell(("crossdock", *run.train)),
        directory=shell((str(run.directory),)),
        result=shell((str(run.result),)),
        retry=" | ".join(str(code) for code in (*RETRY_CODES, 128 + signal.SIGKILL)),
        restarts=restarts,
    )
