"""Capture: what was routed is what the trace says, whatever the gate's shape, and homes are those of the expert group."""

import numpy as np
import torch

from crossdock.models.gates.capacity import Dropless, Fixed
from crossdock.models.gates.switch import SwitchConfig
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.trace import NO_EXPERT, Trace, concatenate
from crossdock.runtime.adaptation.capture import Capture, dense_TK
from crossdock.runtime.data import DataState
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.transport.mesh import Mesh
from tests.pool import Pool
from tests.runtime import tiny

NONE = NO_EXPERT


def assignment(entries: list[tuple[int, int, float]], num_tokens: int, uniform_k: int | None = None) -> Assignment:
    tokens, experts, weights = zip(*entries, strict=True) if entries else ((), (), ())
    return Assignment(
        torch.tensor(tokens, dtype=torch.int64), torch.tensor(experts, dtype=torch.int64), torch.tensor(weights), num_tokens, uniform_k
    )


def test_a_list_becomes_a_padded_table() -> None:
    ragged = assignment([(0, 4, 0.75), (0, 1, 0.25), (2, 3, 1.0)], num_tokens=4)
    expert_TK, weight_TK = dense_TK(ragged, 3)
    assert expert_TK.tolist() == [[4, 1, NONE], [NONE] * 3, [3, NONE, NONE], [NONE] * 3]
    assert weight_TK.tolist() == [[0.75, 0.25, 0], [0] * 3, [1, 0, 0], [0] * 3]
    even = assignment([(0, 4, 0.5), (0, 1, 0.5), (1, 2, 0.5), (1, 0, 0.5)], num_tokens=2, uniform_k=2)
    assert dense_TK(even, 2)[0].tolist() == [[4, 1], [2, 0]]
    assert dense_TK(even, 3)[0].tolist() == [[4, 1, NONE], [2, 0, NONE]]


def test_micro_batches_and_layers_of_unequal_width_make_one_trace() -> None:
    capture = Capture(num_layers=2, num_experts=6, weights=True, source="by hand")
    capture.begin(torch.tensor([10, 11]), torch.tensor([7, 7]))
    capture.listener(0, assignment([(0, 5, 1.0), (1, 3, 1.0)], 2, uniform_k=1))
    capture.listener(1, assignment([(0, 2, 0.5), (0, 1, 0.25), (0, 0, 0.25)], 2))
    capture.begin(torch.tensor([12]), torch.tensor([9]))
    capture.listener(1, assignment([], 1))
    capture.listener(0, assignment([(0, 4, 1.0)], 1, uniform_k=1))
    assert capture.num_tokens == 3
    (trace,) = capture.gather(Mesh.single())
    assert trace.experts_TLK.tolist() == [
        [[5, NONE, NONE], [2, 1, 0]],
        [[3, NONE, NONE], [NONE, NONE, NONE]],
        [[4, NONE, NONE], [NONE, NONE, NONE]],
    ]
    assert trace.weights_TLK is not None
    assert trace.weights_TLK[0, 1].tolist() == [0.5, 0.25, 0.25]
    for values, wanted in ((trace.token_T, [10, 11, 12]), (trace.sequence_T, [7, 7, 9]), (trace.home_T, [0, 0, 0])):
        assert values is not None
        assert values.tolist() == wanted
    assert (trace.num_experts, trace.source, capture.num_tokens) == (6, "by hand", 0)


def test_recording_keeps_no_graph() -> None:
    capture = Capture(1, 4)
    weight_A = torch.tensor([1.0], requires_grad=True) * 2
    capture.begin(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    capture.listener(0, Assignment(torch.tensor([0]), torch.tensor([1]), weight_A, 1))
    assert not capture._records[0].turns_of_layer[0][0].weight_A.requires_grad


def capture_some(rank: int, world_size: int, folder: str, plan: Plan, capacity_factor: float | None) -> list[Trace]:
    gate = SwitchConfig(jitter=0.0, capacity=Dropless() if capacity_factor is None else Fixed(factor=capacity_factor))
    model = tiny.MODEL.model_copy(update={"gate": gate, "top_k": 1})
    config = tiny.TRAIN.model_copy(update={"accumulate": 2})
    steps = tiny.stepper(rank, world_size, folder, plan, config, model=model)
    capture = Capture(model.num_moe_layers, tiny.NUM_EXPERTS, weights=True)
    state = DataState()
    for number in range(2):
        steps.run(number, state, [capture], stop_asked=False)
        state = steps.after(state)
    return capture.gather(steps.mesh)


def by_token(traces: list[Trace]) -> list[tuple[object, ...]]:
    """The rows of a trace in an order that does not depend on ranks."""
    whole = concatenate(traces)
    assert whole.token_T is not None
    rows = zip(whole.token_T.tolist(), whole.experts_TLK.reshape(whole.num_tokens, -1).tolist(), strict=True)
    return sorted((token, tuple(experts)) for token, experts in rows)


def test_every_world_records_the_same_routing(ranks: Pool, folder: str) -> None:
    for capacity_factor in (None, 0.75):
        wanted = ranks.run(1, capture_some, folder, tiny.random_plan(1, 0), capacity_factor)[0]
        assert (wanted[0].experts_TLK == NONE).any() == (capacity_factor is not None)
        for world_size, expert_parallel in ((2, 2), (4, 2)):
            found = ranks.run(world_size, capture_some, folder, tiny.random_plan(expert_parallel, 3), capacity_factor)
            assert [len(traces) for traces in found] == [world_size // expert_parallel] + [0] * (world_size - 1)
            assert by_token(found[0]) == by_token(wanted)
            for trace in found[0]:
                assert trace.home_T is not None
                share = trace.num_tokens // expert_parallel
                assert trace.home_T.tolist() == np.repeat(np.arange(expert_parallel), share).tolist()
                assert trace.sequence_T is not None
                assert all(count == tiny.SEQ_LEN for count in np.unique(trace.sequence_T, return_counts=True)[1])
