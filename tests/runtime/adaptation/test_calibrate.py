"""Calibration: from a window that ran exactly as the cost model says, it finds the numbers again, and the step comes out as measured."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from crossdock.placement.costs.cost import Window as Windows
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import Evaluation, evaluate
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.strategies.strategy import Strategy
from crossdock.runtime.adaptation.calibrate import calibrate
from crossdock.runtime.adaptation.windows import Measured, RankRecord, Transfer, record_of, transfer_seconds_of
from crossdock.runtime.transport.ledger import Flight, LayerProfile
from tests.runtime.tiny import random_plan

TOKENS_PER_RANK, NUM_LAYERS, STEPS = 64, 2, 3
TRUTH = Workload(
    tokens_per_rank=TOKENS_PER_RANK,
    model_width=256,
    expert_width=512,
    wire="fp32",
    window=Windows(2e-3, 1e-3, 3e-3, 4e-3),
    other_s=0.02,
    micro_batches=2,
    expert_overhead_s=5e-4,
)
AS_CONFIGURED = [Strategy("deduplicated", 0)] * NUM_LAYERS
SIZES = dataclasses.replace(TRUTH, window=Windows(), other_s=0.0, expert_overhead_s=0.0)


def machine(bytes_per_s: float, latency_s: float, devices: int = 2) -> Topology:
    speed = {"same_node_bytes_per_s": bytes_per_s, "other_node_bytes_per_s": bytes_per_s}
    latency = {"same_node_latency_s": latency_s, "other_node_latency_s": latency_s}
    return Topology.uniform(devices, 1, flop_per_s=3e9, memory_bytes=1e9, **speed, **latency)


def skewed_trace(num_devices: int, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    num_tokens = TOKENS_PER_RANK * num_devices * TRUTH.micro_batches * STEPS
    chance = np.array([8, 6, 4, 3, 2, 1, 1, 1.0])
    order_TLE = rng.gumbel(size=(num_tokens, NUM_LAYERS, 8)) + np.log(chance)
    experts_TLK = np.argsort(-order_TLE, axis=2)[:, :, :2].astype(np.uint16)
    return Trace(experts_TLK, 8, home_T=np.repeat(np.arange(num_devices), num_tokens // num_devices).astype(np.int32))


def pretend(trace: Trace, plan: Plan, topology: Topology, latency_s: float, workload: Workload = TRUTH) -> Measured:
    """The window of ranks that behave exactly as the cost model says under `workload`."""
    truth = evaluate(trace, plan, topology, workload)
    ranks = tuple(_record(rank, truth, topology, latency_s, workload) for rank in range(topology.num_devices))
    return Measured(STEPS, (trace,), (0, 0, 0), truth.step_s, 0.0, ranks)


def _record(rank: int, truth: Evaluation, topology: Topology, latency_s: float, workload: Workload) -> RankRecord:
    window, profiles, transfers = workload.window, {}, {}
    for layer in range(NUM_LAYERS):
        rows = truth.rows_LR[layer, rank] / (STEPS * TRUTH.micro_batches)
        expert_s = rows * TRUTH.row_flop / topology.flop_per_s_R[rank]
        profiles[layer] = LayerProfile(
            window.dispatch_forward_s,
            window.combine_forward_s,
            window.dispatch_backward_s,
            window.combine_backward_s,
            TRUTH.expert_overhead_s + expert_s,
            TRUTH.expert_overhead_s + 2 * expert_s,
            0.0,
        )
        block = truth.block
        for stage, direction, seconds in (
            ("dispatch", "forward", block.dispatch_s[layer]),
            ("combine", "forward", block.combine_s[layer]),
            ("combine", "backward", block.dispatch_s[layer]),
            ("dispatch", "backward", block.combine_s[layer]),
        ):
            late_s = 0.003 * rank  # ranks do not come at the same moment; those that come early wait longer
            hidden = [getattr(turn, f"{stage}_{direction}_s") for turn in workload.windows]
            found = [Transfer(max(seconds, hidden_s) + late_s, max(seconds, hidden_s) + late_s - hidden_s) for hidden_s in hidden]
            transfers[layer, stage, direction] = found * (STEPS * workload.micro_batches // len(found))
    return RankRecord(profiles, transfers, [latency_s + 0.001 * rank] * 5)


@pytest.mark.parametrize(("devices", "bytes_per_s"), [(2, 1e7), (4, 5e6)])
def test_the_numbers_are_found_again_and_predict_another_plan(devices: int, bytes_per_s: float) -> None:
    latency_s = 2e-4
    true_machine, guess = (
        machine(bytes_per_s, latency_s, devices),
        dataclasses.replace(machine(8e9, 0.0, devices), flop_per_s_R=np.ones(devices)),
    )
    trace, plan = skewed_trace(devices), Plan.contiguous(NUM_LAYERS, 8, devices)
    measured = pretend(trace, plan, true_machine, latency_s)
    found = calibrate(measured, plan, guess, SIZES, AS_CONFIGURED)
    assert found.evaluation.step_s == pytest.approx(measured.step_s, rel=1e-9)
    assert found.workload.expert_overhead_s == pytest.approx(TRUTH.expert_overhead_s, rel=1e-6)
    np.testing.assert_allclose(found.topology.flop_per_s_R, true_machine.flop_per_s_R, rtol=1e-6)
    assert dataclasses.asdict(found.workload.window) == pytest.approx(dataclasses.asdict(TRUTH.window))
    assert found.workload.other_s == pytest.approx(TRUTH.other_s, rel=0.02)
    apart = ~np.eye(devices, dtype=bool)
    np.testing.assert_allclose(found.topology.bytes_per_s_RR[apart], bytes_per_s, rtol=0.02)
    for seed in range(4):
        other = random_plan(devices, seed)
        predicted = evaluate(trace, other, found.topology, found.workload).step_s
        assert predicted == pytest.approx(evaluate(trace, other, true_machine, TRUTH).step_s, rel=0.01)


def test_turns_of_a_block_have_windows_of_their_own() -> None:
    """DGMoE: what one turn sends is hidden, what the other sends is not, and halving the traffic saves half of the latter alone."""
    turns = (Windows(0.2, 0.2, 0.2, 0.2), Windows())
    truth = dataclasses.replace(TRUTH, window=Windows(0.1, 0.1, 0.1, 0.1), turn_windows=turns)
    machine_, trace, plan = machine(1.5e6, 1e-4), skewed_trace(2), Plan.contiguous(NUM_LAYERS, 8, 2)
    measured = pretend(trace, plan, machine_, 1e-4, truth)
    sizes = dataclasses.replace(SIZES, turn_windows=(Windows(),) * 2)
    found = calibrate(measured, plan, dataclasses.replace(machine_, measured=True), sizes, AS_CONFIGURED)
    for window, true in zip(found.workload.turn_windows, turns, strict=True):
        assert dataclasses.asdict(window) == pytest.approx(dataclasses.asdict(true), abs=1e-12)
    fast = machine(3e6, 1e-4)
    true_saving = measured.step_s - evaluate(trace, plan, fast, truth).step_s
    halved = dataclasses.replace(fast, flop_per_s_R=found.topology.flop_per_s_R)
    assert measured.step_s - evaluate(trace, plan, halved, found.workload).step_s == pytest.approx(true_saving, rel=0.01)
    as_one = calibrate(measured, plan, dataclasses.replace(machine_, measured=True), SIZES, AS_CONFIGURED)
    assert measured.step_s - evaluate(trace, plan, halved, as_one.workload).step_s < 0.5 * true_saving


def test_measured_links_are_kept() -> None:
    measured_machine = dataclasses.replace(machine(1e7, 1e-4), measured=True)
    trace, plan = skewed_trace(2), Plan.contiguous(NUM_LAYERS, 8, 2)
    found = calibrate(pretend(trace, plan, machine(3e7, 1e-4), 1e-4), plan, measured_machine, SIZES, AS_CONFIGURED)
    np.testing.assert_array_equal(found.topology.bytes_per_s_RR, measured_machine.bytes_per_s_RR)


def test_measured_links_are_followed_where_that_is_asked_for() -> None:
    before = dataclasses.replace(machine(1e7, 1e-4), measured=True)
    trace, plan = skewed_trace(2), Plan.contiguous(NUM_LAYERS, 8, 2)
    measured = pretend(trace, plan, machine(2.5e6, 1e-4), 1e-4)  # a quarter of what they were
    found = calibrate(measured, plan, before, SIZES, AS_CONFIGURED, follow_links=True)
    assert found.topology.bytes_per_s_RR[0, 1] == pytest.approx(2.5e6, rel=0.02)
    np.testing.assert_array_equal(found.topology.latency_s_RR, before.latency_s_RR)
    hidden = tuple(
        dataclasses.replace(rank, transfers={way: [Transfer(one.flight_s, 0.0) for one in found] for way, found in rank.transfers.items()})
        for rank in measured.ranks
    )
    unseen = calibrate(dataclasses.replace(measured, ranks=hidden), plan, before, SIZES, AS_CONFIGURED, follow_links=True)
    np.testing.assert_array_equal(unseen.topology.bytes_per_s_RR, before.bytes_per_s_RR)


def test_chunks_that_queue_do_not_make_links_seem_slow() -> None:
    guess = machine(8e9, 0.0)
    trace, plan = skewed_trace(2), Plan.contiguous(NUM_LAYERS, 8, 2)
    measured = pretend(trace, plan, machine(1e7, 1e-4), 1e-4)
    chunked = [dataclasses.replace(strategy, forward_chunks=4, backward_chunks=4) for strategy in AS_CONFIGURED]

    def queued(whole: Transfer) -> list[Transfer]:
        return [Transfer((whole.flight_s - 1e-4) * (chunk + 1) / 4 + 1e-4, whole.wait_s) for chunk in range(4)]

    ranks = tuple(
        dataclasses.replace(rank, transfers={way: [part for one in found for part in queued(one)] for way, found in rank.transfers.items()})
        for rank in measured.ranks
    )
    found = calibrate(dataclasses.replace(measured, ranks=ranks), plan, guess, SIZES, chunked)
    whole = calibrate(measured, plan, guess, SIZES, AS_CONFIGURED)
    assert found.topology.bytes_per_s_RR[0, 1] == pytest.approx(whole.topology.bytes_per_s_RR[0, 1], rel=0.1)


def test_a_device_that_is_slower_is_seen() -> None:
    uneven = dataclasses.replace(machine(1e7, 1e-4), flop_per_s_R=np.array([3e9, 1.5e9]))
    trace, plan = skewed_trace(2), Plan.contiguous(NUM_LAYERS, 8, 2)
    found = calibrate(pretend(trace, plan, uneven, 1e-4), plan, machine(1e7, 1e-4), SIZES, AS_CONFIGURED)
    slow, fast = sorted(found.topology.flop_per_s_R)
    assert found.topology.flop_per_s_R[1] == slow
    assert 1.5 < fast / slow < 2.6


def test_a_window_tells_transfers_of_tokens_from_exchanges_of_counts() -> None:
    flights = [
        Flight(0, "dispatch", "forward", "counts", (0, 0, 16), 0.0, 0.0, 0.5, 1),
        Flight(0, "dispatch", "forward", "metadata", (0, 0, 32), 0.5, 0.6, 0.7, 1),
        Flight(0, "dispatch", "forward", "tokens", (0, 0, 64), 1.0, 3.0, 4.0, 1),
        Flight(0, "combine", "forward", "tokens", (0, 0, 64), 6.0, 6.5, 7.0, 1),
    ]
    record = record_of(flights)
    assert record.count_flights_s == [0.5]
    assert record.transfers == {(0, "dispatch", "forward"): [Transfer(3.0, 1.0)], (0, "combine", "forward"): [Transfer(1.0, 0.5)]}
    assert record.profile_of_layer[0].dispatch_forward_s == 2.0
    assert record.profile_of_layer[0].expert_forward_s == 2.0


def test_a_transfer_takes_what_the_last_rank_saw() -> None:
    def rank(flights: Sequence[tuple[float, float]]) -> RankRecord:
        return RankRecord({}, {(0, "dispatch", "forward"): [Transfer(*flight) for flight in flights]}, [])

    exposed = transfer_seconds_of([rank([(5.0, 4.0), (1.0, 0.9), (2.5, 2.0)]), rank([(2.0, 1.0), (6.0, 5.0), (7.0, 6.0)])])
    assert exposed == {(0, "dispatch", "forward"): (2.0, True)}
    hidden = transfer_seconds_of([rank([(3.0, 0.0), (4.0, 0.1)])])
    assert hidden == {(0, "dispatch", "forward"): (3.5, False)}


def timed(measured: Measured, other_s: float = TRUTH.other_s) -> Measured:
    """The same, with ranks that know how long their other work took: `other_s` and the windows."""
    windows_s = TRUTH.micro_batches * NUM_LAYERS * sum(dataclasses.asdict(TRUTH.window).values())
    ranks = tuple(dataclasses.replace(rank, rest_s=other_s + windows_s) for rank in measured.ranks)
    return dataclasses.replace(measured, ranks=ranks)


@pytest.mark.parametrize("faster", [0.8, 1.0, 1.25])
def test_steps_say_how_fast_links_are_where_other_work_is_known(faster: float) -> None:
    """What ranks hide of transfers because they are no lockstep is not booked as less other work, which other plans need as well."""
    before, seen = dataclasses.replace(machine(1e7, 1e-4), measured=True), machine(faster * 1e7, 1e-4)
    trace, plan = skewed_trace(2), Plan.contiguous(NUM_LAYERS, 8, 2)
    found = calibrate(timed(pretend(trace, plan, seen, 1e-4)), plan, before, SIZES, AS_CONFIGURED)
    assert found.topology.bytes_per_s_RR[0, 1] == pytest.approx(faster * 1e7, rel=2e-3)
    assert found.workload.other_s == pytest.approx(TRUTH.other_s, rel=2e-2)
    for seed in range(4):
        other = random_plan(2, seed)
        predicted = evaluate(trace, other, found.topology, found.workload).step_s
        assert predicted == pytest.approx(evaluate(trace, other, seen, TRUTH).step_s, rel=0.01)


def test_links_stay_where_they_cannot_be_what_the_step_is_off_by() -> None:
    before = dataclasses.replace(machine(1e9, 1e-5), measured=True)  # nothing is waited for: windows hide all of it
    trace, plan = skewed_trace(2), Plan.contiguous(NUM_LAYERS, 8, 2)
    measured = pretend(trace, plan, before, 1e-5)
    found = calibrate(timed(measured, other_s=0.5 * TRUTH.other_s), plan, before, SIZES, AS_CONFIGURED)
    np.testing.assert_array_equal(found.topology.bytes_per_s_RR, before.bytes_per_s_RR)
    assert found.evaluation.step_s == pytest.approx(measured.step_s, rel=1e-9)


def test_a_window_of_timed_steps_tells_how_long_other_work_took() -> None:
    flights = [
        Flight(0, "dispatch", "forward", "tokens", (0, 0, 64), 1.0, 3.0, 4.0, 1),
        Flight(0, "combine", "forward", "tokens", (0, 0, 64), 6.0, 6.5, 7.0, 1),
    ]
    assert record_of(flights, [10.0, 8.0]).rest_s == pytest.approx((18.0 - 1.0 - 0.5 - 2.0) / 2)
    assert record_of(flights).rest_s is None
