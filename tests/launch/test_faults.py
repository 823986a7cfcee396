"""Scripted faults on real runs: what is promised of a lost rank, and when a run is given up."""

from pathlib import Path

import pytest

from benchmarks import netlab
from benchmarks.chaos import local_faults, node_faults, ray_faults, saving_faults
from benchmarks.chaos.__main__ import impossible
from benchmarks.chaos.runs import Row, Workshop, answers, result_of
from benchmarks.netlab import Lab
from crossdock.errors import BadData
from crossdock.launch import cli
from crossdock.launch.local.children import Outcome
from crossdock.launch.ranks.faults import Fault, Script
from crossdock.launch.restarts import Endurance, is_worth_another
from crossdock.runtime import phases
from crossdock.runtime.phases import PHASES, reached

OTHERS = ("stops", "hangs", "crashes", "terminations", "poisons", "exhaustions", "writes", "full_disks", "crash_loops", "clocks", "plans")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("chaos"))


def check(rows: list[Row]) -> None:
    assert rows
    broken = {row.fault: [trial for trial in row.trials if trial.note] or row.trials for row in rows if not row.is_kept}
    assert not broken, str(broken)  # whole: pytest shortens all but strings


@pytest.mark.timeout(600)
def test_twenty_kills_in_all_phases_are_named_and_cost_no_bit(workshop: Workshop) -> None:
    rows = local_faults.kills(workshop, 20, seed=1)
    check(rows)
    assert {row.fault.rpartition(": ")[2] for row in rows} == set(PHASES)
    assert sum(len(row.trials) for row in rows) == 20


@pytest.mark.timeout(300)
def test_ranks_that_stop_hang_and_crash_in_one_run_are_named_with_the_stacks_of_all(workshop: Workshop) -> None:
    faults = [Fault("stop", 1, "dispatch", 6), Fault("hang", 0, "backward", 14, seconds=100.0), Fault("crash", 1, "optimizer", 19)]
    directory, code = workshop.suffer(faults, "fault.max_restarts=3", "parallel.timeout_s=2")
    assert code == 0
    assert workshop.is_undisturbed(directory)
    found = [(blow["act"], blow["rank"], restart and restart["rank"]) for blow, restart, _ in answers(directory)]
    assert found == [("stop", 1, 1), ("hang", 0, 0), ("crash", 1, 1)]
    causes = [str(restart and restart["cause"]) for _, restart, _ in answers(directory)]
    assert "is stopped, by SIGSTOP" in causes[0]
    assert "is alive and hangs" in causes[1]
    assert "SIGSEGV" in causes[2]
    assert local_faults.has_all_stacks(directory)
    stacks = directory / "stacks"
    assert "kernel at" in (stacks / "rank-00001.system.txt").read_text(), "of the stopped rank"
    assert "in _hang" in (stacks / "rank-00000.txt").read_text(), "of the one that hung, by itself"
    assert "PeerLost" in (stacks / "rank-00001.txt").read_text(), "of the one that waited for it"


@pytest.mark.timeout(300)
def test_one_run_through_everything_that_ends_a_run_says_so_each_time_and_loses_no_bit(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in the undisturbed run
    disasters = [
        (Fault("poison", 1, "loss", 6), 79, "not finite on rank 1"),
        (Fault("exhaust_device", 0, "backward", 10), 80, "rank 0"),
        (Fault("fill_disk", 1, "checkpoint_write", 12), 74, "the checkpoint was not written"),
        (Fault("terminate", 0, "backward", 14), 75, "the state is saved"),
        (Fault("kill", 1, "optimizer", 19, times=3), 76, "rank 1"),
    ]
    directory = workshop.directory()
    script = workshop.script(directory, [fault for fault, _, _ in disasters])
    for fault, exit_code, words in disasters:
        code, result = cli.run(workshop.arguments(directory, script, "fault.max_restarts=1")), result_of(directory)
        assert (code, result["exit_code"]) == (exit_code, exit_code), (fault, result)
        assert result["status"] == ("preempted" if exit_code == 75 else "failed")
        assert words in result["message"] or f"rank {result['rank']}" == words, (fault, result)
        assert result["reached_step"] in (fault.step, fault.step + 1) if exit_code == 75 else result["reached_step"] <= fault.step
    assert "given up after 1 restarts" in result["message"]
    assert cli.run(workshop.arguments(directory, script)) == 0
    assert workshop.is_undisturbed(directory)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("suffer", OTHERS)
def test_every_other_fault_keeps_its_promise(workshop: Workshop, suffer: str) -> None:
    if (reason := impossible({"full_disks": "disk", "clocks": "clock"}.get(suffer, ""))) is not None:
        pytest.skip(reason)
    check(getattr(local_faults, suffer)(workshop, 2, seed=1))


@pytest.mark.timeout(300)
def test_kills_while_a_checkpoint_is_written_behind_training_leave_whole_ones(workshop: Workshop) -> None:
    rows = saving_faults.kills_while_saving(workshop, 4, seed=1)
    check(rows)
    assert sum(len(row.trials) for row in rows) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_and_stops_under_torchrun_are_named(workshop: Workshop) -> None:
    check(node_faults.kills_under_torchrun(workshop, 4, seed=1))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("suffer", ["full_disks", "clocks"])
def test_a_full_file_system_and_a_clock_that_jumps_cost_no_bit(workshop: Workshop, suffer: str) -> None:
    if (reason := impossible({"full_disks": "disk", "clocks": "clock"}[suffer])) is not None:
        pytest.skip(reason)
    check(getattr(local_faults, suffer)(workshop, 1, seed=2))


@pytest.mark.netns
@pytest.mark.timeout(400)
@pytest.mark.skipif(netlab.unavailable_reason() is not None, reason=f"no emulated hosts: {netlab.unavailable_reason()}")
@pytest.mark.parametrize("suffer", ["node_losses", "slow_links"])
def test_faults_of_emulated_nodes_keep_their_promises(workshop: Workshop, suffer: str) -> None:
    with Lab(node_faults.NODES) as lab:
        check(getattr(node_faults, suffer)(workshop, lab, 1, seed=1))


@pytest.mark.netns
@pytest.mark.timeout(400)
@pytest.mark.skipif(netlab.unavailable_reason() is not None, reason=f"no emulated hosts: {netlab.unavailable_reason()}")
def test_a_run_survives_a_network_cut_in_two(workshop: Workshop) -> None:
    """Who is told as lost depends on which side speaks first, and so on the machine's load: the long form looks at that."""
    with Lab(node_faults.NODES) as lab:
        (row,) = node_faults.partitions(workshop, lab, 1, seed=1)
    (trial,) = row.trials
    assert trial.survived, trial.note
    assert trial.bitwise
    assert "cut off" in trial.note or trial.named


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_is_lost_under_ray_is_replaced_also_the_one_with_the_store(workshop: Workshop, rank: int) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    check(ray_faults.node_losses(workshop, 1, seed=rank))


def test_nobody_listens_in_an_ordinary_run() -> None:
    heard: list[str] = []

    def listener(phase: str, what: object) -> None:
        heard.append(phase)

    reached("loss")
    phases.listen(listener)
    reached("dispatch")
    phases.forget(listener)
    reached("combine")
    assert heard == ["dispatch"]


def test_a_script_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    script = Script((Fault("kill", 1, "backward", 3), Fault("hang", 0, "loss", seconds=2.0)))
    script.save(tmp_path / "script.json")
    assert Script.load(tmp_path / "script.json") == script
    with pytest.raises(BadData, match="no fault 'explode'"):
        Fault("explode", 0, "loss")


def test_restarts_are_counted_since_the_newest_checkpoint() -> None:
    once = Endurance(1).after_loss(0)
    assert not once.is_over
    assert once.after_loss(0).is_over
    assert not once.after_loss(4).is_over
    assert "given up after 1 restarts" in once.after_loss(0).given_up(Outcome(1, 76, "lost")).message
    assert is_worth_another(Outcome(1, 76))
    assert not is_worth_another(Outcome(1, 79))
