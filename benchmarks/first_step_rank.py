"""What `benchmarks.first_step` starts in place of a training run: ranks that do nothing, or import torch and meet, and note the time.

    python -m benchmarks.first_step_rank empty|meeting FOLDER [here|ray]

FOLDER receives one file for each rank, with the time at which it was there. Launchers that start processes run it as a rank; `here` starts
two local ranks as a training run alone would, `ray` two actors as its driver would.
"""

import os
import subprocess
import sys
import time

RANKS = 2


def act(what: str, folder: str, rank: int) -> None:
    """Be a rank."""
    if what == "meeting":
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
        dist.all_reduce(torch.ones(1))
    with open(f"{folder}/rank-{rank}", "w") as file:  # noqa: PTH123  (pathlib would be the largest import here)
        file.write(repr(time.time()))
    if what == "meeting":
        dist.destroy_process_group()  # a rank that only ends breaks the connections of the other


def main(what: str, folder: str, where: str = "") -> None:
    """Be a rank, or start them."""
    if where == "here":
        command = [sys.executable, "-m", "benchmarks.first_step_rank", what, folder]
        ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}) for rank in range(RANKS)]
        sys.exit(max(rank.wait() for rank in ranks))
    if where == "ray":
        import ray

        ray.init(address="auto", log_to_driver=False)
        ray.get([ray.remote(num_cpus=1)(act).remote(what, folder, rank) for rank in range(RANKS)])
        return
    rank = next(os.environ[name] for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ)
    act(what, folder, int(rank))


if __name__ == "__main__":
    main(*sys.argv[1:])
