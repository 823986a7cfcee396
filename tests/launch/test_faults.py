"""Scripted faults on real runs: what is promised of a lost rank, and when a run is given up."""

from pathlib import Path

import pytest

from benchmarks import netlab
from benchmarks.chaos import local_faults, node_faults, ray_faults
from benchmarks.chaos.runs import Row, Workshop
from benchmarks.netlab import Lab
from crossdock.errors import BadData
from crossdock.launch.local.children import Outcome
from crossdock.launch.ranks.faults import Fault, Script
from crossdock.launch.restarts import Endurance, is_worth_another
from crossdock.runtime import phases
from crossdock.runtime.phases import PHASES, reached

OTHERS = ("stops", "hangs", "crashes", "terminations", "poisons", "exhaustions", "writes", "crash_loops", "plans")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("chaos"))


def check(rows: list[Row]) -> None:
    assert rows
    assert all(row.is_kept for row in rows), [row.as_json() for row in rows if not row.is_kept]


@pytest.mark.timeout(600)
def test_twenty_kills_in_all_phases_are_named_and_cost_no_bit(workshop: Workshop) -> None:
    rows = local_faults.kills(workshop, 20, seed=1)
    check(rows)
    assert {row.fault.rpartition(": ")[2] for row in rows} == set(PHASES)
    assert sum(len(row.trials) for row in rows) == 20


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("suffer", OTHERS)
def test_every_other_fault_keeps_its_promise(workshop: Workshop, suffer: str) -> None:
    check(getattr(local_faults, suffer)(workshop, 2, seed=1))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_and_stops_under_torchrun_are_named(workshop: Workshop) -> None:
    check(node_faults.kills_under_torchrun(workshop, 4, seed=1))


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.timeout(900)
@pytest.mark.skipif(netlab.unavailable_reason() is not None, reason=f"no emulated hosts: {netlab.unavailable_reason()}")
@pytest.mark.parametrize("suffer", ["node_losses", "partitions", "slow_links"])
def test_faults_of_emulated_nodes_keep_their_promises(workshop: Workshop, suffer: str) -> None:
    with Lab(node_faults.NODES) as lab:
        check(getattr(node_faults, suffer)(workshop, lab, 1, seed=1))


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
