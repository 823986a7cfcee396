"""The bytes that the runtime counts equal the bytes that the evaluator predicts, exactly, on every class of link; they share no code."""

import dataclasses

import numpy as np
import pytest
import torch

from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import NO_EXPERT, Trace
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.collectives import all_gather_objects
from crossdock.runtime.transport.ledger import bytes_by_class, bytes_by_way
from tests.pool import Pool, mesh_for
from tests.runtime.movement_cases import WIDTH, Case, as_slots, inputs, random_slots, run_layer

NODES = (0, 0, 1, 1)


def random_case(seed: int, num_experts: int, num_slots: int, copies: int, wire: str | None = None) -> Case:
    """Uneven numbers of tokens and of experts per token, some tokens without any."""
    rng = np.random.default_rng(seed)
    chosen = tuple(
        tuple(tuple(int(e) for e in rng.permutation(num_experts)[: rng.integers(0, 4)]) for _ in range(rng.integers(0, 30)))
        for _ in range(4)
    )
    slots = as_slots(random_slots(rng, num_experts, 4, num_slots, copies))
    return Case(4, num_experts, slots, chosen, NODES, seed, wire=wire, dtype=torch.float32)


def trace_of(case: Case) -> Trace:
    experts_TLK = np.array(
        [[list(experts) + [NO_EXPERT] * (3 - len(experts))] for chosen in case.chosen for experts in chosen], dtype=np.uint16
    )
    home_T = np.array([home for home, chosen in enumerate(case.chosen) for _ in chosen], dtype=np.int32)
    return Trace(experts_TLK, case.num_experts, home_T=home_T)


@pytest.mark.parametrize("name", sorted(DISPATCHERS))
@pytest.mark.parametrize(("seed", "copies"), [(0, 0), (1, 0), (2, 3), (3, 5)])
@pytest.mark.parametrize("wire", [None, "bf16", "int8"])
def test_counted_bytes_equal_predicted_bytes(ranks: Pool, name: str, seed: int, copies: int, wire: str | None) -> None:
    case = random_case(seed, num_experts=7, num_slots=3, copies=copies, wire=wire)
    workload = Workload(model_width=WIDTH, wire=wire or "fp32", dispatch=name)  # type: ignore[arg-type]
    predicted = evaluate(trace_of(case), case.plan, Topology.uniform(nodes=2, devices_per_node=2), workload)
    outcomes = ranks.run(4, run_layer, name, case)
    counted = np.sum([bytes_by_class(outcome.flights) for outcome in outcomes], axis=0)
    assert predicted.exact
    assert tuple(counted) == predicted.bytes_by_class
    assert counted.min() > 0
    for outcome in outcomes:
        ways = bytes_by_way(outcome.flights)
        assert np.array_equal(np.sum(list(ways.values()), axis=0), bytes_by_class(outcome.flights))
        # What a rank sends out it gets back, so dispatch forward and combine backward are the same rows, and so are the other two ways.
        assert ways["dispatch", "forward"] == ways["combine", "backward"]
        assert ways["combine", "forward"] == ways["dispatch", "backward"]


def capture_layer(rank: int, world_size: int, name: str, case: Case) -> tuple[tuple[int, int, int], list[tuple[list[int], list[int]]]]:
    """One forward pass with a listener, as capture does it: this rank's bytes, and every rank's (token, expert) lists."""
    mesh = mesh_for(rank, world_size, 4, NODES)
    heard: list[tuple[list[int], list[int]]] = []
    context = StepContext(0, 0, True, torch.zeros(0), 0, listeners=(lambda _, a: heard.append((a.token_A.tolist(), a.expert_A.tolist())),))
    x, assignment, _ = inputs(case, rank)
    for listener in context.listeners:
        listener(0, assignment)
    dispatcher = DISPATCHERS[name](mesh, ExpertLayout.from_plan(case.plan, 0, mesh), None)
    mesh.ledger.take()
    with torch.no_grad():
        rows, _, handle = dispatcher.dispatch_start(x, assignment).wait()
        dispatcher.combine_start(rows, handle).wait()
    return bytes_by_class(mesh.ledger.take()), all_gather_objects(heard[0], mesh)


@pytest.mark.parametrize("name", sorted(DISPATCHERS))
def test_bytes_of_a_captured_step_without_backward(ranks: Pool, name: str) -> None:
    case = random_case(11, num_experts=8, num_slots=4, copies=4)
    answers = ranks.run(4, capture_layer, name, case)
    choices, homes = [], []
    for home, (tokens, experts) in enumerate(answers[0][1]):
        for token in sorted(set(tokens)):
            mine = [e for t, e in zip(tokens, experts, strict=True) if t == token]
            choices.append([mine + [NO_EXPERT] * (3 - len(mine))])
            homes.append(home)
    trace = Trace(np.array(choices, dtype=np.uint16), 8, home_T=np.array(homes, dtype=np.int32))
    workload = Workload(model_width=WIDTH, wire="fp32", dispatch=name)  # type: ignore[arg-type]
    predicted = evaluate(trace, case.plan, Topology.uniform(nodes=2, devices_per_node=2), workload)
    counted = np.sum([counted for counted, _ in answers], axis=0)
    assert tuple(2 * counted) == predicted.bytes_by_class  # two of the four ways


def test_deduplication_sends_less_and_metadata_stands_apart(ranks: Pool) -> None:
    case = dataclasses.replace(random_case(5, num_experts=4, num_slots=1, copies=0), slots_RS=((0, 1), (2, 3), (-1, -1), (-1, -1)))
    flat, shared = (ranks.run(4, run_layer, name, case) for name in ("flat", "deduplicated"))
    sent_flat, sent_shared = (sum(sum(bytes_by_class(o.flights)) for o in outcomes) for outcomes in (flat, shared))
    assert sent_shared < sent_flat
    assert all(sum(bytes_by_class(o.flights, "metadata")) == 0 for o in flat)
    entries = sum(len(experts) for chosen in case.chosen for experts in chosen)
    # Slot codes (int32) and weights (fp32) go out, the weights' gradients (fp32) come back.
    assert sum(sum(bytes_by_class(o.flights, "metadata")) for o in shared) == entries * 12


def test_expert_groups_do_not_send_to_each_other(ranks: Pool) -> None:
    slots = ((0, 1), (2, 3))
    chosen = tuple(((0, 2), (1, 3), (2, 3)) for _ in range(4))
    outcomes = ranks.run(4, run_layer, "flat", Case(2, 4, slots, chosen, NODES, dtype=torch.float32))
    predicted = evaluate(
        Trace(np.array([[[0, 2]], [[1, 3]], [[2, 3]]] * 2), 4, home_T=np.repeat([0, 1], 3)),
        Plan(np.array([slots]), 4),
        Topology.uniform(nodes=1, devices_per_node=2),
        Workload(model_width=WIDTH, wire="fp32", dispatch="flat"),
    )
    for first in (0, 2):
        group = np.sum([bytes_by_class(o.flights) for o in outcomes[first : first + 2]], axis=0)
        assert tuple(group) == predicted.bytes_by_class
