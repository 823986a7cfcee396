"""Ranks that hold different numbers of experts, some none: they equal one rank, count predicted bytes, keep their own experts alone, and
equal ones read their checkpoints."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from crossdock.models.transformer import Transformer
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.problem import Constraints, Problem
from crossdock.runtime.adaptation import migrate as migration
from crossdock.runtime.adaptation.capture import Capture
from crossdock.runtime.checkpoints import checkpoint
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig, RunState
from crossdock.runtime.checkpoints.saver import Saver
from crossdock.runtime.data import DataState
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.ledger import bytes_by_class
from tests.models.step import Case, check_equal, run_step
from tests.models.test_memory import Storages
from tests.placement.conftest import random_trace
from tests.pool import Pool, mesh_for
from tests.runtime import tiny

IN_TURN = {"schedule": {"overlap": False}}
STANDARD = {"block": "top_k", "num_layers": 2, "moe_every": 1, "top_k": 3}
BLOCKS: dict[str, dict[str, Any]] = {
    "standard in turn": STANDARD | IN_TURN,
    "standard": STANDARD,
    "standard gathered": STANDARD | {"gathered_experts": [1, 6]},
    "scmoe in turn": {"num_layers": 4} | IN_TURN,
    "scmoe": {"num_layers": 4},
    "scmoe in chunks": {"num_layers": 4, "schedule": {"forward_chunks": 2, "backward_chunks": 3}},
}


@pytest.mark.parametrize(
    ("world_size", "expert_parallel", "plan", "dispatch"),
    [
        (2, 2, "lopsided", "deduplicated"),
        (4, 2, "lopsided_copies", "flat"),
        (4, 4, "lopsided", "flat"),
        (4, 4, "lopsided_copies", "deduplicated"),
        (4, 4, "lopsided_copies", "hierarchical"),
    ],
)
@pytest.mark.parametrize("block", BLOCKS)
def test_they_equal_one_rank(ranks: Pool, block: str, world_size: int, expert_parallel: int, plan: str, dispatch: str) -> None:
    case = Case(BLOCKS[block], expert_parallel, plan, dispatch, nodes=tuple(rank // 2 for rank in range(world_size)))
    assert case.config.num_moe_layers == 2
    check_equal(ranks.run(world_size, run_step, case), run_step(0, 1, case), expert_parallel)


def counted_step(rank: int, world_size: int, plan: Plan, dispatch: str) -> tuple[tuple[int, ...], list[Trace]]:
    """This rank's bytes of tokens, there and back in both directions, and (on rank 0) the trace."""
    mesh = mesh_for(rank, world_size, world_size, (0, 0, 1, 1))
    model, capture = tiny.build(mesh, plan, torch.float32, dispatch=dispatch), Capture(plan.num_layers, plan.num_experts)
    token_QP = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(rank))
    capture.begin(token_QP.flatten(), torch.arange(2).repeat_interleave(8))
    mesh.ledger.take()
    context = StepContext(1, 0, True, token_QP.flatten(), rank * 16, (capture.listener,))
    model(token_QP, context).logits_QPV.square().sum().backward()
    return bytes_by_class(mesh.ledger.take()), capture.gather(mesh)


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated", "hierarchical"])
def test_counted_bytes_equal_predicted_bytes(ranks: Pool, dispatch: str) -> None:
    plan = tiny.lopsided_plan(4, copies=True)
    answers = ranks.run(4, counted_step, plan, dispatch)
    (trace,) = answers[0][1]
    workload = Workload(model_width=tiny.MODEL.model_width, wire="fp32", dispatch=dispatch)  # type: ignore[arg-type]
    predicted = evaluate(trace, plan, Topology.uniform(nodes=2, devices_per_node=2), workload).bytes_by_class
    assert tuple(np.sum([counted for counted, _ in answers], axis=0)) == predicted
    assert all(predicted)


# ---- what a rank keeps, and moves --------------------------------------------------------------------------------


def held(steps: Any) -> list[int]:
    """Experts' worth of parameters, of gradients and of each optimizer state on this rank, over all layers."""
    model: Transformer = steps.model
    expert = next(iter(model.moe_layers)).bank
    size = sum(tensor.shape[1:].numel() for tensor in expert.expert_tensors().values())
    names = [name for names in steps.engine.expert_names.values() for name in names]
    states = [steps.engine.states()[name] for name in names]
    kept = [sum(state[key].untyped_storage().nbytes() // 8 for state in states) for key in ("weight", "exp_avg", "exp_avg_sq")]
    parameters = sum(moe.bank.expert_tensors()[name].numel() for moe in model.moe_layers for name in ("inner", "outer"))
    dense = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in names)
    gradients = sum(bucket.flat.numel() for bucket in steps.engine.reducer.buckets) - dense
    assert all(number % size == 0 for number in (parameters, gradients, *kept))
    return [number // size for number in (parameters, gradients, *kept)]


def through(rank: int, world_size: int, folder: str, plans: Sequence[Plan]) -> tuple[list[list[int]], dict[str, np.ndarray], Any]:
    """Two steps under each of the plans: what is held under it, the state at the end, losses and norms."""
    steps = tiny.stepper(rank, world_size, folder, plans[0])
    sizes, seen = [], []
    for number, plan in enumerate(plans):
        if number:
            migration.migrate(steps.engine, steps.model.moe_layers, plan, steps.mesh)  # type: ignore[arg-type]
        sizes.append(held(steps))
        seen += tiny.run_steps(steps, 2 * number, 2 * number + 2)
    return sizes, tiny.census(steps.engine), seen


@pytest.mark.parametrize(("world_size", "expert_parallel", "copies"), [(2, 2, False), (4, 2, True), (4, 4, True)])
def test_moves_to_unequal_ranks_and_back(ranks: Pool, folder: str, world_size: int, expert_parallel: int, copies: bool) -> None:
    equal, unequal = Plan.contiguous(2, 8, expert_parallel), tiny.lopsided_plan(expert_parallel, copies)
    plans = [equal, unequal, equal]
    alone = through(0, 1, folder, [Plan.contiguous(2, 8, 1)] * 3)
    found = ranks.run(world_size, through, folder, plans)
    tiny.assert_close(tiny.merged([census for _, census, _ in found]), alone[1], 1e-10)
    np.testing.assert_allclose(found[0][2], alone[2], rtol=1e-10)
    for rank, (sizes, *_) in enumerate(found):
        assert sizes == [[int(plan.held_LR[:, rank % expert_parallel].sum())] * 5 for plan in plans]


def test_a_solved_plan_fits_the_memory_that_it_was_solved_for(ranks: Pool, folder: str) -> None:
    model = tiny.MODEL
    workload = Workload(model_width=model.model_width, expert_width=model.routed_width, state_bytes_per_parameter=32.0)  # all in float64
    memory_R = np.array([7.5, 2.5]) * model.num_moe_layers * workload.expert_state_bytes
    topology = dataclasses.replace(Topology.local(2), memory_bytes_R=memory_R)
    affinity = Affinity.from_trace(random_trace(num_layers=model.num_moe_layers, num_experts=8, num_homes=2))
    plan = solve(Problem(affinity, topology, workload, constraints=Constraints(slots=8, memory_fraction=1.0)), "anneal", 1.0, 0).plan
    found = [parts[0] for parts, _, _ in ranks.run(2, through, folder, [plan])]
    for (parameters, gradients, _, *moments), memory_bytes in zip(found, memory_R, strict=True):
        assert 8 * (parameters + gradients + sum(moments)) * workload.expert_parameters <= memory_bytes
    assert found[1][0] < found[0][0]


def saved_behind(
    rank: int, world_size: int, folder: str, plan: Plan, read: str, name: str, dtype: str
) -> tuple[dict[str, np.ndarray], int]:
    """The state read from checkpoint `read` (or made by two steps), saved as `name` while a further step is made; experts held here."""
    run = tiny.stepper(rank, world_size, folder, plan, dtype=getattr(torch, dtype))
    tiny.run_steps(run, 0, 2)
    if read:
        found, manifest, passed_over = checkpoint.latest(Path(folder) / read, run.mesh)
        assert checkpoint.restore(found, manifest, run.engine, passed_over).plan is not None
    saver = Saver(Path(folder) / name, run.engine, run.mesh, CheckpointConfig(asynchronous=True))
    state = tiny.census(run.engine)
    assert saver.save(RunState(2, DataState(0, 16), 0, "d")) is None
    tiny.run_steps(run, 2, 3)
    assert saver.finish() is not None
    return state, sum(len(moe.bank.inner) for moe in run.model.moe_layers)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_of_unequal_ranks_are_read_by_equal_ones_and_back(ranks: Pool, folder: str, dtype: str) -> None:
    empty = tiny.lopsided_plan(2).slots_LRS.copy()
    empty[:] = -1
    empty[:, 0] = np.arange(8)
    worlds = [
        (4, tiny.lopsided_plan(2, copies=True)),
        (2, Plan.contiguous(2, 8, 2)),
        (4, tiny.lopsided_plan(4)),
        (1, Plan.contiguous(2, 8, 1)),
        (2, Plan(empty, 8)),
        (4, Plan.contiguous(2, 8, 4)),
    ]
    first, read = None, ""
    for number, (world_size, plan) in enumerate(worlds):
        found = ranks.run(world_size, saved_behind, folder, plan, read, f"saved {number}", dtype)
        assert [held for _, held in found] == [int(plan.held_LR[:, rank % plan.num_devices].sum()) for rank in range(world_size)]
        state = tiny.merged([census for census, _ in found])
        first, read = first or state, f"saved {number}"
        tiny.assert_close(state, first, 0.0)
    assert first is not None
    assert {key.split("/")[-1] for key in first if key.startswith("expert/")} == {"weight", "exp_avg", "exp_avg_sq"}


def peak(rank: int, world_size: int, folder: str, before: Plan, after: Plan) -> tuple[int, int, int]:
    """float64 values that lived at most during a move, of what the engine kept before and after, and of a layer's weights."""
    steps = tiny.stepper(rank, world_size, folder, before)
    tiny.run_steps(steps, 0, 1)
    engine = steps.engine

    def storages() -> dict[int, tuple[StorageWeakRef, int]]:
        tensors = [values for state in engine.states().values() for values in state.values()]
        tensors += [bucket.flat for bucket in engine.reducer.buckets]
        return {t.untyped_storage()._cdata: (StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes() // 8) for t in tensors}

    old, highest = storages(), 0
    kept_before = sum(size for _, size in old.values())
    with Storages() as made:

        def sample(_phase: str) -> None:
            nonlocal highest
            living = sum(size for reference, size in old.values() if not reference.expired())
            highest = max(highest, living + made.live_bytes(set(old)) // 8)

        reached, migration.reached = migration.reached, sample  # type: ignore[attr-defined]
        try:
            migration.migrate(engine, steps.model.moe_layers, after, steps.mesh)  # type: ignore[arg-type]
        finally:
            migration.reached = reached  # type: ignore[attr-defined]
    kept_after = sum(size for _, size in storages().values())
    layer = max(sum(t.numel() for t in moe.bank.expert_tensors().values()) for moe in steps.model.moe_layers)
    return highest, max(kept_before, kept_after), layer


def test_a_move_takes_less_than_training_itself(ranks: Pool, folder: str) -> None:
    """Gradients have gone, and old state goes tensor by tensor, so a rank that can train under both plans can move between them."""
    for highest, kept, layer in ranks.run(2, peak, folder, Plan.contiguous(2, 8, 2), tiny.random_plan(2, seed=4)):
        assert layer < highest < kept
