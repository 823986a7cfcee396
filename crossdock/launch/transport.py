"""Whether MPI can carry a run's all-to-alls: said before any rank starts as far as the configuration and the launcher tell."""

from crossdock.errors import BadConfig
from crossdock.launch.config import RunConfig

MPI_REMEDY = "set parallel.transport: auto, or start the run by mpirun on the CPU"


def why_not_mpi(config: RunConfig, launcher: str | None) -> str:
    """Why MPI cannot carry the all-to-alls of a run that `launcher` starts (None: any may); empty where nothing speaks against it."""
    if launcher not in ("mpi", None):
        return f"the ranks are not started by mpirun ({launcher}), and MPI reaches no others"
    if config.device == "cuda":
        return "tokens are on GPUs (device: cuda), and this transport carries rows of the host's memory"
    if config.model.num_moe_layers == 0 or config.parallel.expert == 1:
        return "tokens stay on their rank: the model has no experts, or parallel.expert is 1"
    return ""


def check_transport(config: RunConfig, launcher: str | None) -> None:
    """Raise `BadConfig` where MPI was asked for and cannot carry this run."""
    if config.parallel.transport == "mpi" and (why := why_not_mpi(config, launcher)):
        raise BadConfig(f"parallel.transport mpi: {why}; {MPI_REMEDY}")
