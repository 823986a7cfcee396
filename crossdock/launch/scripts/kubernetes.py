"""Manifests of a run on Kubernetes: a JobSet (torchrun in every pod) or a RayJob of KubeRay. Plain mappings; the caller writes YAML."""

import re
from typing import Any

from crossdock.authentication import Secret
from crossdock.errors import UsageError
from crossdock.launch.scripts.allocation import Run, Shape, final_codes, shell, torchrun

_PORT = 29_500
MOUNT = "/runs"
"""Where pods find the shared volume."""
_GRACE_S = 120
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_MAX_NAME = 253
_VERSION = re.compile(r"\d+\.\d+\.\d+\w*", re.ASCII)
_IMAGE = re.compile(
    r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:\d+)?/)?"  # a registry and its port
    r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*"
    r"(:\w[\w.-]{0,127})?(@[a-z0-9]+([+._-][a-z0-9]+)*:[0-9a-f]{32,})?",  # a tag, a digest
    re.ASCII,
)

# sh is process 1 of the pod and passes SIGTERM on; torchrun ends with 1 whatever happened, so the run's own code is asked for, unless what
# stands there is an earlier run's: rank 0 could not begin
_POD_SCRIPT = """\
trap 'kill -TERM "$child"' TERM
earlier=$(stat -c %i.%y {result} 2> /dev/null)
{command} & child=$!
wait "$child" || {{ wait "$child"; test -n "$earlier" -a "$(stat -c %i.%y {result} 2> /dev/null)" = "$earlier" && exit 1
exec crossdock status {directory} --otherwise 76; }}
"""


def check_names(image: str, claim: str, ray_version: str) -> None:
    """Raise `UsageError` where `claim` is no DNS subdomain (RFC 1123), as the names of claims are, `image` refers to no image, or
    `ray_version` is no version."""
    if not claim:
        raise UsageError("pods forget their files: name a claim of a volume that every node can write (--claim), for runs and checkpoints")
    if len(claim) > _MAX_NAME or not _NAME.fullmatch(claim):
        raise UsageError(
            f"--claim {claim!r} is no name of Kubernetes'; it has at most {_MAX_NAME} small letters, digits, '-' and '.', and a letter or "
            "digit at both ends"
        )
    if not _IMAGE.fullmatch(image):
        raise UsageError(f"--image {image!r} is no reference of an image; write it like registry.example/team/crossdock:1.0")
    if not _VERSION.fullmatch(ray_version):
        raise UsageError(f"--ray-version {ray_version!r} is no version; write it like 2.60.0")


def job_set(shape: Shape, run: Run, image: str, claim: str, restarts: int) -> dict[str, Any]:
    """A JobSet (jobset.x-k8s.io/v1alpha2) with one pod per node. `claim` is a volume that all nodes can write: the runs go there.

    A rank that fails for good fails the whole at once; after anything else all pods start again, at most `restarts` times, and go on from
    the newest checkpoint.
    """
    head = f"{run.name}-workers-0-0.{run.name}"
    script = _POD_SCRIPT.format(
        command=shell(torchrun(shape, run, head, _PORT, restarts=0)),
        directory=shell((str(run.directory),)),
        result=shell((str(run.result),)),
    )
    container = _container(shape, image) | {
        "command": ["sh", "-c", script],
        "ports": [{"containerPort": _PORT}],
        "env": [_secret(run)],
    }
    fails_for_good = {"containerName": "crossdock", "operator": "In", "values": list(final_codes())}
    job = {
        "parallelism": shape.nodes,
        "completions": shape.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": fails_for_good}]},
        "template": {"spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": _GRACE_S, **_pod(container, claim)}},
    }
    final = {"name": "failed-for-good", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": run.name},
        "spec": {
            "failurePolicy": {"maxRestarts": restarts, "rules": [final]},
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": job}}],
        },
    }


def with_secret(manifest: dict[str, Any], run: Run, secret: Secret) -> dict[str, Any]:
    """The manifest of a JobSet behind the Secret that its ranks sign their messages with, as one List for `kubectl apply`."""
    held = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{run.name}-secret"},
        "type": "Opaque",
        "stringData": {"secret": secret.key.decode()},
    }
    return {"apiVersion": "v1", "kind": "List", "items": [held, manifest]}


def ray_job(shape: Shape, run: Run, image: str, claim: str, restarts: int, ray_version: str) -> dict[str, Any]:
    """A RayJob (ray.io/v1): a head that only drives, one worker pod per node, token authentication on.

    Lost nodes are the launcher's own affair (`crossdock launch ray`); `restarts` counts new clusters.
    """
    command = ("crossdock", "launch", "ray", run.config, *run.overrides)
    sizes = ("--nodes", str(shape.nodes), "--ranks-per-node", str(shape.ranks_per_node), "--cores-per-rank", str(shape.cores_per_rank))
    no_reports = {"env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]}
    head = {"name": "ray-head", "image": image, "resources": {"limits": {"cpu": "2", "memory": "4Gi"}}, **no_reports, **_mounts()}
    worker = _container(shape, image) | {"name": "ray-worker", **no_reports}
    group = {"groupName": "workers", "replicas": shape.nodes, "minReplicas": shape.nodes, "maxReplicas": shape.nodes}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": run.name},
        "spec": {
            "entrypoint": shell((*command, *sizes, *(("--gpus",) if shape.gpus else ()))),
            "backoffLimit": restarts,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 3600,
            "rayClusterSpec": {
                "rayVersion": ray_version,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": {"spec": _pod(head, claim)}},
                "workerGroupSpecs": [{**group, "rayStartParams": {}, "template": {"spec": _pod(worker, claim)}}],
            },
        },
    }


def _secret(run: Run) -> dict[str, Any]:
    """What the ranks sign their messages with; without it no pod starts."""
    reference = {"name": f"{run.name}-secret", "key": "secret"}
    return {"name": "CROSSDOCK_SECRET", "valueFrom": {"secretKeyRef": reference}}


def _container(shape: Shape, image: str) -> dict[str, Any]:
    limits: dict[str, str] = {"cpu": str(shape.cores_per_rank * shape.ranks_per_node)}
    if shape.gpus:
        limits["nvidia.com/gpu"] = str(shape.ranks_per_node)
    return {"name": "crossdock", "image": image, "resources": {"limits": limits}, **_mounts()}


def _mounts() -> dict[str, Any]:
    shared = {"name": "runs", "mountPath": MOUNT}
    return {"volumeMounts": [shared, {"name": "shm", "mountPath": "/dev/shm"}]}


def _pod(container: dict[str, Any], claim: str) -> dict[str, Any]:
    volumes = [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    return {"containers": [container], "volumes": volumes}
