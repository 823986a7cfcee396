"""What the nodes of a living Ray cluster hold, and what the driver of our own job holds of it."""

import functools
from collections.abc import Mapping
from typing import Any

from crossdock.launch.ranks.worker_env import ray_submission_id
from crossdock.launch.ray.cluster import Node
from crossdock.launch.ray.connection import first_line, say


def living_nodes(ray: Any) -> list[Node]:
    """The nodes that Ray takes to be alive."""
    submission_id = ray_submission_id()
    driver = {} if submission_id is None else held_by_driver(ray, submission_id)
    here = ray.get_runtime_context().get_node_id()
    found = []
    for entry in ray.nodes():
        if entry["Alive"]:
            has, held = entry["Resources"], driver if entry["NodeID"] == here else {}
            cores, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
            found.append(Node(entry["NodeID"], entry["NodeManagerAddress"], cores, gpus, held.get("CPU", 0.0), held.get("GPU", 0.0)))
    return found


@functools.cache
def held_by_driver(ray: Any, submission_id: str) -> Mapping[str, float]:
    """What `ray job submit --entrypoint-num-cpus ...` has reserved on this node until the job ends: ranks would wait for it for ever.

    The dashboard knows, and takes a second to say; it is not asked where nothing of the cluster is reserved by anybody.
    """
    total, free = ray.cluster_resources(), ray.available_resources()
    if all(free.get(kind, 0.0) >= total.get(kind, 0.0) for kind in ("CPU", "GPU")):
        return {}
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException

    alive: list[Any] = [("class_name", "=", "JobSupervisor"), ("state", "=", "ALIVE")]
    try:
        supervisors = list_actors(filters=alive, detail=True, limit=10_000)
    except RayStateApiException as failure:  # nodes that it fills are then found busy, after --wait-s
        say(f"warning: what the driver of this job holds is not known ({first_line(failure)})")
        return {}
    ours = [actor for actor in supervisors if (actor.name or "").endswith(submission_id)]
    return (ours[0].required_resources or {}) if ours else {}
