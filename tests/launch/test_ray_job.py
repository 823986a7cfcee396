"""`ray job submit --working-dir . -- crossdock train CONFIG` for real: the run, what is uploaded, who may submit, what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ray_head import Head, ray_head
from crossdock.launch import cli

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
RUN = ("train.steps=6", "capture.steps=0", "train.eval_batches=0")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory as it looks after some work, with the ignore files of this repository."""
    folder = tmp_path / "project"
    for name in (".venv/lib", "venv/lib", "runs/tiny/checkpoints", ".git", "__pycache__", "configs"):
        (folder / name).mkdir(parents=True)
        (folder / name / "large").write_bytes(bytes(1000))
    (folder / "trace.npz").write_bytes(bytes(1000))
    shutil.copy(ROOT / "configs" / "tiny.yaml", folder / "configs")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, folder)
    return folder


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_job_on_an_open_cluster(project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("train", str(project / "configs" / "tiny.yaml"), *RUN)
    assert cli.run([*arguments, f"run.dir={tmp_path / 'local'}"]) == 0
    capfd.readouterr()
    with ray_head(4, with_token=False) as head:
        ended = head.submit(project, "crossdock", "train", "configs/tiny.yaml", *RUN, f"run.dir={tmp_path / 'job'}")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert losses(tmp_path / "job") == losses(tmp_path / "local")
        result = next(json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"status"'))
        assert (result["status"], result["reached_step"], result["world_size"]) == ("done", 6, 2)
        assert json.loads((tmp_path / "job" / "env.json").read_text())["launcher"] == "ray"
        assert head.uploaded() >= {"configs"}
        assert head.uploaded() <= {"configs", ".gitignore", ".rayignore"}, "environments, runs and traces stay at home"


def launch(head: Head, directory: Path, **changed: str | None) -> subprocess.CompletedProcess[str]:
    """`crossdock launch ray` for more ranks than there are cores, with variables of the head's environment changed, or left out."""
    environment = {name: value for name, value in {**head.environment, **changed}.items() if value is not None}
    command = [
        sys.executable,
        "-m",
        "crossdock",
        "launch",
        "ray",
        "tiny",
        "parallel.ranks=8",
        f"run.dir={directory}",
        "--address",
        head.cluster,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("with_token", [False, True], ids=["open to all", "with a token"])
def test_a_dashboard_on_all_addresses(tmp_path: Path, with_token: bool) -> None:
    """It is named to every driver, unless it asks for a token; and a driver without one is told so."""
    with ray_head(4, with_token=with_token, dashboard_host="0.0.0.0") as head:
        ended = launch(head, tmp_path / "run")
        assert "8 ranks each need 8 cores a node" in ended.stderr
        assert ("asks for no token: whoever reaches it can run code as you" in ended.stderr) == (not with_token)
        if with_token:
            stranger = launch(head, tmp_path / "stranger", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN_PATH=None)
            assert stranger.returncode == 69
            assert "Traceback" not in stranger.stderr
            assert "RAY_AUTH_MODE" in stranger.stderr


def test_who_may_submit_and_what_is_refused(project: Path, tmp_path: Path) -> None:
    train = ("crossdock", "train", "configs/tiny.yaml", *RUN)
    with ray_head(4, with_token=True) as head:
        stranger = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
        refused = head.submit(project, *train, f"run.dir={tmp_path / 'stranger'}", environment=stranger)
        assert refused.returncode != 0
        assert "Authentication required" in refused.stdout + refused.stderr
        assert not (tmp_path / "stranger").exists()

        wide = ("parallel.ranks=8", f"run.dir={tmp_path / 'wide'}")
        refused = head.submit(project, *train, *wide)
        assert refused.returncode == 1  # Ray flattens exit codes
        assert "1 nodes with 8 ranks each need 8 cores a node" in refused.stdout
        result = json.loads((tmp_path / "wide" / "result.json").read_text())
        assert (result["status"], result["exit_code"], result["world_size"]) == ("failed", 69, 8)

        relative = head.submit(project, *train)
        assert "set run.dir to an absolute path that every node reaches" in relative.stdout

        driver = ("--entrypoint-num-cpus", "3")
        refused = head.submit(project, *train, f"run.dir={tmp_path / 'driver'}", options=driver)
        assert "1 nodes with 2 ranks each need 2 cores a node" in refused.stdout
        assert "the driver of this job holds 3 cores of" in refused.stdout
        assert json.loads((tmp_path / "driver" / "result.json").read_text())["exit_code"] == 69

        ended = head.submit(project, *train, f"run.dir={tmp_path / 'run'}")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert json.loads((tmp_path / "run" / "result.json").read_text())["reached_step"] == 6
