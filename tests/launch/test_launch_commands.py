"""Scripts and manifests for other launchers: golden files, and the scripts really run, with stand-ins for the cluster's commands."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from crossdock.authentication import Secret
from crossdock.launch import cli
from crossdock.launch.scripts import allocation as cluster
from crossdock.launch.scripts import kubernetes
from crossdock.strict_yaml import parse

GOLDEN = Path(__file__).parent / "golden"
RUN = ["configs/small.yaml", "run.dir=/runs/small", "parallel.expert=16", "train.batch_sequences=32"]
COMMANDS = {
    "torchrun.txt": ["torchrun", *RUN, "--nodes", "2", "--ranks-per-node", "8", "--head", "10.0.0.1"],
    "torchrun-one-node.txt": ["torchrun", *RUN, "--ranks-per-node", "16", "--restarts", "0"],
    "mpirun.txt": ["mpi", *RUN, "--nodes", "2", "--ranks-per-node", "8", "--hosts", "node1,node2"],
    "slurm.sh": ["slurm", *RUN, "--nodes", "2", "--sbatch=--partition=long", "--sbatch=--account=moe"],
    "slurm-cpu.sh": ["slurm", *RUN, "--nodes", "4", "--ranks-per-node", "4", "--no-gpus", "--time", "1:00:00", "--grace-s", "60"],
    "jobset.yaml": ["kubernetes", *RUN, "--nodes", "2", "--image", "registry/moe:1"],
    "rayjob.yaml": ["kubernetes", *RUN, "--nodes", "2", "--kind", "rayjob", "--claim", "shared"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_golden(name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossdock.authentication.secrets.token_hex", lambda size: "0123456789abcdef" * (size // 8))
    assert cli.run(["launch", *COMMANDS[name]]) == 0
    assert capfd.readouterr().out == (GOLDEN / name).read_text()


def test_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    for name, key in (("torchrun.txt", "command"), ("mpirun.txt", "command"), ("slurm.sh", "script"), ("rayjob.yaml", "spec")):
        assert cli.run(["launch", *COMMANDS[name], "--json"]) == 0
        assert key in json.loads(capfd.readouterr().out)


def test_out_writes_the_same(tmp_path: Path) -> None:
    assert cli.run(["launch", *COMMANDS["slurm.sh"], "--out", str(tmp_path / "job.sh")]) == 0
    assert (tmp_path / "job.sh").read_text() == (GOLDEN / "slurm.sh").read_text()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "piece"),
    [
        (["torchrun", "tiny", "--nodes", "2"], 2, "--head"),
        (["torchrun", "tiny", "--nodes", "2", "--ranks-per-node", "1", "--head", "h"], 78, "absolute path"),
        (["slurm", "tiny", "--nodes", "2", "--ranks-per-node", "1", "--no-gpus"], 78, "absolute path"),
        (["mpi", "tiny", "run.dir=/runs/tiny", "--nodes", "2", "--hosts", "one"], 2, "1 hosts and --nodes 2"),
        (["slurm", "tiny", "--ranks-per-node", "3"], 78, "3 ranks"),
        (["slurm", "tiny", "--ranks-per-node", "2", "--sbatch", "partition=long"], 2, "--partition=long"),
        (["slurm", "tiny", "--ranks-per-node", "2", "--time", "5minutes"], 2, "24:00:00"),
        (["kubernetes", "tiny", "--ranks-per-node", "2"], 2, "run.dir=/runs/tiny"),
        (["kubernetes", "tiny", "run.dir=/runs/tiny", "--ranks-per-node", "2", "--kind", "pod"], 2, "jobset or rayjob"),
        (["kubernetes", "tiny", "run.dir=/runs/tiny", "--ranks-per-node", "2", "--claim", ""], 2, "--claim"),
        (["kubernetes", "tiny", "run.dir=/runs/tiny", "--ranks-per-node", "2", "--claim", "Bad_Name"], 2, "--claim 'Bad_Name' is no name"),
        (["kubernetes", "tiny", "run.dir=/runs/tiny", "--ranks-per-node", "2", "--image", ""], 2, "--image '' is no reference"),
        (
            ["kubernetes", "tiny", "run.dir=/runs/tiny", "--ranks-per-node", "2", "--ray-version", "new"],
            2,
            "--ray-version 'new' is no version",
        ),
        (["kubernetes", "tiny", "run.dir=/runs", "--ranks-per-node", "2"], 2, "set run.dir=/runs/NAME"),
        (["kubernetes", "tiny", "run.dir=/runs/../tiny", "--ranks-per-node", "2"], 2, "set run.dir=/runs/tiny"),
        (
            ["slurm", "nothing.yaml"],
            66,
            "nothing.yaml does not exist, and is no shipped run; give the path of a YAML file, or one of demo,",
        ),
        (["slurm", "there/nothing.yaml"], 66, "there/nothing.yaml does not exist"),
        (["slurm", "tinny"], 66, "did you mean tiny?"),
    ],
)
def test_what_cannot_run_is_refused(arguments: list[str], exit_code: int, piece: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["launch", *arguments]) == exit_code
    out, err = capfd.readouterr()
    assert out == ""
    assert piece in err
    assert len(err.splitlines()) == 1


def test_every_exit_code_is_final_or_retried_but_not_both() -> None:
    assert cluster.final_codes() == (2, 3, 65, 66, 67, 69, 74, 78, 79, 80)
    assert cluster.RETRY_CODES == (75, 76)


@pytest.mark.parametrize("claim", ["runs", "team.runs-2", "0", "a" * 253])
@pytest.mark.parametrize("image", ["x", "crossdock:latest", "host:5000/team/cross_dock:V1.0-a", "ghcr.io/a/b-c@sha256:" + "0a" * 32])
def test_names_that_kubernetes_takes(claim: str, image: str) -> None:
    kubernetes.check_names(image, claim, "2.60.0")


@pytest.mark.parametrize("claim", ["Runs", "a_b", "-a", "a-", "a..b", ".a", "a b", "a\n", "a" * 254])
def test_claims_that_kubernetes_refuses(claim: str) -> None:
    with pytest.raises(cluster.UsageError, match="--claim"):
        kubernetes.check_names("x", claim, "2.60.0")


@pytest.mark.parametrize("image", ["", " x", "Crossdock", "a:", "a:b:c", "a/", "/a", "a//b", "x@sha256:12", "a:" + "t" * 129])
def test_images_that_kubernetes_refuses(image: str) -> None:
    with pytest.raises(cluster.UsageError, match="--image"):
        kubernetes.check_names(image, "runs", "2.60.0")


def test_names_are_labels() -> None:
    assert cluster.scheduler_name("Run_7 (big)") == "run-7-big"
    assert cluster.scheduler_name("x" * 80) == "x" * 40
    with pytest.raises(cluster.UsageError, match="set run"):
        cluster.scheduler_name("__")


@pytest.fixture
def stand_ins(tmp_path: Path) -> Callable[[str, dict[str, str]], subprocess.CompletedProcess[str]]:
    """Runs a shell script in which the named commands are the given bodies, and every other is the system's."""

    def run(script: str, bodies: dict[str, str]) -> subprocess.CompletedProcess[str]:
        for name, body in bodies.items():
            path = tmp_path / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
        return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30, check=False)

    return run


@pytest.mark.parametrize(
    ("srun", "status", "expected", "requeued"),
    [
        ("exit 0", "exit 99", 0, False),
        ("exit 137", "exit $4", 137, True),  # rank 0 killed: no result, so $4, that of --otherwise
        ("exit 137", "exit 76", 76, True),
        ("exit 75", "exit 75", 75, True),
        ("exit 79", "exit 79", 79, False),
        ("exit 78", "exit $4", 78, False),
    ],
)
def test_slurm_requeues_what_can_go_on(
    stand_ins: Callable[..., subprocess.CompletedProcess[str]], srun: str, status: str, expected: int, requeued: bool
) -> None:
    bodies = {"srun": srun, "crossdock": status, "scontrol": 'echo "$@"'}
    ended = stand_ins((GOLDEN / "slurm.sh").read_text(), bodies)
    assert ended.returncode == expected
    assert (ended.stdout == "requeue 7\n") == requeued


def pod_script() -> str:
    shape = cluster.Shape(2, 8, gpus=True, cores_per_rank=8)
    manifest = kubernetes.job_set(shape, cluster.Run("small", Path("/runs/small"), "small", ()), "image", "runs", 3)
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"][2]


def test_a_pod_ends_with_the_code_of_the_run(stand_ins: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert stand_ins(pod_script(), {"torchrun": "exit 0", "crossdock": "exit 99"}).returncode == 0
    assert stand_ins(pod_script(), {"torchrun": "exit 1", "crossdock": "exit 79"}).returncode == 79
    assert stand_ins(pod_script(), {"torchrun": "exit 1", "crossdock": "exit $4"}).returncode == 76


@pytest.mark.parametrize(("began", "slurm_code", "pod_code"), [("", 74, 1), ("rm {0}; echo {{}} > {0};", 79, 79), ("rm {0};", 79, 79)])
def test_the_result_of_an_earlier_run_says_nothing_of_this_one(
    stand_ins: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, began: str, slurm_code: int, pod_code: int
) -> None:
    """Rank 0 that cannot move a finished run aside leaves its result there; one that has begun takes it away."""
    result = tmp_path / "small" / "result.json"
    result.parent.mkdir()
    result.write_text('{"status": "done", "exit_code": 0}')
    start = f"{began.format(result)} exit 74"
    bodies = {"srun": start, "torchrun": start, "scontrol": "", "crossdock": "exit 79"}
    slurm = (GOLDEN / "slurm.sh").read_text().replace("/runs/small/result.json", str(result))
    assert stand_ins(slurm, bodies).returncode == slurm_code
    result.write_text('{"status": "done", "exit_code": 0}')
    assert stand_ins(pod_script().replace("/runs/small/result.json", str(result)), bodies).returncode == pod_code


def test_a_pod_passes_sigterm_on_and_waits(stand_ins: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    saving = "trap 'sleep 0.3; echo saved; exit 1' TERM; kill -TERM $PPID; for i in $(seq 100); do sleep 0.1; done"
    ended = stand_ins(pod_script(), {"torchrun": saving, "crossdock": "echo asked; exit 75"})
    assert (ended.returncode, ended.stdout) == (75, "saved\nasked\n")


def test_manifests_are_plain_yaml() -> None:
    manifest = parse((GOLDEN / "jobset.yaml").read_text(), "jobset.yaml").value
    policy = manifest["items"][1]["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]
    assert policy["onExitCodes"]["values"] == list(cluster.final_codes())


def test_status_gives_the_exit_code_of_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["status", str(tmp_path)]) == 66
    assert cli.run(["status", str(tmp_path / "nothing")]) == 66
    assert "is not a folder" in capfd.readouterr().err
    assert cli.run(["status", str(tmp_path), "--otherwise", "76"]) == 76
    assert cli.run(["status", str(tmp_path), "--otherwise", "300"]) == 2
    (tmp_path / "result.json").write_text(
        '{"status": "preempted", "exit_code": 75, "reached_step": 3, "target_step": 9, "message": "asked to stop"}'
    )
    capfd.readouterr()
    assert cli.run(["status", str(tmp_path)]) == 75
    assert capfd.readouterr().out == "preempted at step 3 of 9: asked to stop\n"


def test_a_manifest_carries_a_fresh_secret_that_its_pods_ask_for(capfd: pytest.CaptureFixture[str]) -> None:
    found = set()
    for _ in range(2):
        assert cli.run(["launch", *COMMANDS["jobset.yaml"], "--json"]) == 0
        secret, job_set = json.loads(capfd.readouterr().out)["items"]
        container = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
        assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": secret["metadata"]["name"], "key": "secret"}
        found.add(secret["stringData"]["secret"])
    assert len(found) == 2
    assert all(len(text) == 64 for text in found)
    assert cli.run(["launch", *COMMANDS["jobset.yaml"], "--json", "--no-secret"]) == 0
    assert json.loads(capfd.readouterr().out)["kind"] == "JobSet"


def test_several_hosts_are_told_of_one_secret_and_how_to_make_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = ["configs/small.yaml", f"run.dir={tmp_path / 'small'}", "parallel.expert=16", "train.batch_sequences=32"]
    assert cli.run(["launch", "torchrun", *run, "--nodes", "2", "--ranks-per-node", "8", "--head", "h"]) == 0
    out, err = capfd.readouterr()
    assert f"CROSSDOCK_SECRET_FILE={tmp_path}/small.secret" in out.split()
    making = err.partition("once: ")[2].strip()
    for _ in range(2):  # the second time it changes nothing
        subprocess.run(["sh", "-c", making], check=True)
    assert len(Secret.read(tmp_path / "small.secret").key) == 64
    assert cli.run(["launch", "torchrun", *run, "--ranks-per-node", "16"]) == 0
    assert "SECRET" not in "".join(capfd.readouterr())
