"""DeepSpeed as a launcher and as an engine: its real launcher, hostfiles and their mistakes, runs that go from one engine to the other."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from crossdock.launch import cli
from crossdock.launch.ranks.worker_env import Meeting, WorkerEnv, worker_env
from crossdock.launch.scripts.hostfile import Host, read_hostfile
from tests.launch import starts

pytest.importorskip("deepspeed", reason="the extra crossdock[deepspeed] is not installed")

PDSH = (
    "#!/bin/sh\n# stands in for pdsh: every host of -w is this machine, and %n its number\n"
    + r"""
while [ "$1" != -w ]; do shift; done
hosts=$(echo "$2" | tr , ' '); shift 2
number=0; pids=""
for host in $hosts; do
  sh -c "$(echo "$*" | sed "s/%n/$number/g")" & pids="$pids $!"
  number=$((number + 1))
done
code=0
for pid in $pids; do wait "$pid" || code=$?; done
exit $code
"""
)


def rows(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in rows(directory)]


def launched(arguments: list[str], path: Path) -> subprocess.CompletedProcess[str]:
    """DeepSpeed's launcher with `arguments`, the programs in `path` before others, meeting on a free port of this machine."""
    environment = starts.environment()
    command = [str(starts.DEEPSPEED), f"--master_port={starts.free_port()}", "--master_addr=127.0.0.1", *arguments]
    path_too = {**environment, "PATH": f"{path}:{environment['PATH']}"}
    return subprocess.run(command, env=path_too, capture_output=True, text=True, timeout=170, check=False)


# ---- the launcher ----------------------------------------------------------------------------------------------------


def test_its_launcher_starts_a_run_that_equals_a_local_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two ranks by the real launcher under the DeepSpeed engine; the same by local ranks under the native one."""
    train = ["train", "tiny", "train.steps=4"]  # to which the launcher adds --local_rank
    ended = starts.deepspeed([*train, "engine=deepspeed", f"run.dir={tmp_path / 'theirs'}"], 2, tmp_path / "hosts")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "FutureWarning" not in ended.stderr  # of DeepSpeed's own calls, on every rank
    assert "real_accelerator" not in ended.stderr
    result = json.loads((tmp_path / "theirs" / "result.json").read_text())
    assert (result["status"], result["reached_step"], result["world_size"]) == ("done", 4, 2)
    assert json.loads((tmp_path / "theirs" / "env.json").read_text())["launcher"] == "deepspeed"
    assert cli.run([*train, f"run.dir={tmp_path / 'ours'}"]) == 0
    capfd.readouterr()
    np.testing.assert_allclose(losses(tmp_path / "theirs"), losses(tmp_path / "ours"), rtol=2e-5)


@pytest.mark.slow
def test_the_printed_command_starts_two_hosts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`crossdock launch deepspeed` prints it; pdsh and ssh are stood in for, so that both hosts are this machine."""
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=2\n")
    (tmp_path / "pdsh").write_text(PDSH)
    (tmp_path / "pdsh").chmod(0o755)
    train = ["tiny", "train.steps=3", "train.batch_sequences=6", "parallel.expert=1", f"run.dir={tmp_path / 'run'}"]
    assert cli.run(["launch", "deepspeed", *train, "--hostfile", str(tmp_path / "hosts"), "--json"]) == 0
    command = json.loads(capfd.readouterr().out)["command"]
    assert command[0] == "deepspeed"
    arguments = [argument for argument in command[1:] if not argument.startswith("--master_port")]
    ended = launched(["--no_ssh_check", *arguments], tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["world_size"]) == ("done", 3)
    assert json.loads((tmp_path / "run" / "env.json").read_text())["node_of_rank"] == [0, 1, 1]


def test_the_environment_of_its_ranks() -> None:
    environ = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "2",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "29500",
    }
    assert worker_env(environ) == WorkerEnv(3, 4, 1, 2, 1, Meeting("listen", host="head", port=29500), "deepspeed")
    under_torchrun = {**environ, "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
    env = worker_env(under_torchrun)
    assert env is not None
    assert env.launcher == "torchrun"


# ---- hostfiles -------------------------------------------------------------------------------------------------------


def test_a_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two kinds\n\nnode-1.cluster slots=8\n  10.0.0.2\tslots=4  # older\n")
    assert read_hostfile(path) == (Host("node-1.cluster", 8), Host("10.0.0.2", 4))


@pytest.mark.parametrize(
    ("content", "code", "piece"),
    [
        (b"node1 slots=2\nnode2 slots 2\n", 65, "hosts:2: 'node2 slots 2' is not of the form `node1 slots=8`"),
        (b"node1 slots=2\n\nnode1 slots=2\n", 65, "hosts:3: node1 stands in line 1 already"),
        (b"node1 slots=0\n", 65, "hosts:1: 0 slots; a host takes 1 to 1024 ranks"),
        (b"node1 slots=99999999999999999999\n", 65, "999999999999 slots"),
        (b"-oProxyCommand=x slots=2\n", 65, "hosts:1: '-oProxyCommand=x slots=2' is not of the form"),
        (b"node1;id slots=2\n", 65, "hosts:1: "),
        (b"node1 slots=2\n\xff\n", 65, "hosts:2: a byte that is no ASCII"),
        (b"# nobody\n", 65, "names no host"),
        (b"node1 slots=3\n", 78, "3 ranks"),
        (None, 66, "cannot read the hostfile"),
    ],
)
def test_a_mistake_in_a_hostfile_is_told_with_its_line(
    tmp_path: Path, content: bytes | None, code: int, piece: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "hosts").write_bytes(content)
    assert cli.run(["launch", "deepspeed", "tiny", "--hostfile", str(tmp_path / "hosts")]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert piece in err
    assert len(err.splitlines()) == 1


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    asked = ["launch", "deepspeed", "tiny", "engine=deepspeed", "--hostfile", str(tmp_path / "hosts")]
    assert cli.run([*asked, "run.dir=/shared/run", "--address", "10.0.0.1"]) == 0
    assert capfd.readouterr().out == (
        f"deepspeed --hostfile={tmp_path / 'hosts'} --master_addr=10.0.0.1 --master_port=29500 --no_local_rank --module crossdock "
        "train tiny engine=deepspeed run.dir=/shared/run\n"
    )
    assert cli.run(asked) == 78
    assert "several hosts must all reach it" in capfd.readouterr().err


# ---- the engine, as a user asks for it -------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then"), [("native", "deepspeed"), ("deepspeed", "native")])
def test_a_run_goes_on_under_the_other_engine(tmp_path: Path, first: str, then: str, capfd: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train = ["train", "tiny", "capture.steps=0", "checkpoint.every=3", "train.eval_batches=0", "deepspeed.stage=2", "parallel.expert=1"]
    train += ["parallel.ranks=2"]
    assert cli.run([*train, "train.steps=6", "engine=native", f"run.dir={whole}"]) == 0
    assert cli.run([*train, "train.steps=6", f"engine={first}", f"run.dir={parts}"]) == 0
    (parts / "result.json").unlink()  # as if it had been killed after step 3: its checkpoint is of that step
    assert cli.run([*train, "train.steps=6", f"engine={then}", f"run.dir={parts}"]) == 0
    capfd.readouterr()
    events = [json.loads(line) for line in (parts / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [3]
    assert [row["step"] for row in rows(parts)] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=2e-5)
    np.testing.assert_allclose([row["grad_norm"] for row in rows(parts)], [row["grad_norm"] for row in rows(whole)], rtol=2e-4)


def test_a_lone_rank_trains(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train = ["train", "tiny", "parallel.expert=1", "train.steps=2", "train.eval_batches=0"]
    for engine in ("native", "deepspeed"):
        assert cli.run([*train, f"engine={engine}", f"run.dir={tmp_path / engine}"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])  # stdout holds nothing of DeepSpeed's
    assert result["world_size"] == 1
    np.testing.assert_allclose(losses(tmp_path / "deepspeed"), losses(tmp_path / "native"), rtol=2e-5)


def test_what_it_cannot_do_is_refused_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "tiny", "engine=deepspeed", "replan.at_step=20", "precision.compute=fp64"]) == 78
    (line,) = capfd.readouterr().err.splitlines()
    for piece in ("engine deepspeed cannot move experts", "replan.at_step 20", "precision.compute fp64", "or set engine: native"):
        assert piece in line
