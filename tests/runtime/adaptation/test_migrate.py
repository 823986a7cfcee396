"""Migration: nothing changes but the place; training goes on as if nothing had happened."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.errors import BadData
from crossdock.placement.records.plan import EMPTY, Plan
from crossdock.runtime.adaptation.migrate import Migration, exchange_of, migrate
from crossdock.runtime.data import DataState
from tests.pool import Pool
from tests.runtime import tiny

Census = dict[str, np.ndarray]


@given(
    num_devices=st.sampled_from([1, 2, 4]),
    extra=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_every_new_slot_gets_its_expert_from_the_nearest_holder(num_devices: int, extra: tuple[int, int], seeds: tuple[int, int]) -> None:
    before, after = (tiny.random_plan(num_devices, seed, min(more, 8 - 8 // num_devices)) for seed, more in zip(seeds, extra, strict=True))
    nodes = [0, 0, 1, 1][:num_devices]
    for layer in range(before.num_layers):
        parts = [exchange_of(before, after, layer, rank, nodes) for rank in range(num_devices)]
        old, new = before.slots_LRS[layer], after.slots_LRS[layer]
        mailbox = {}
        for rank, part in enumerate(parts):
            experts = old[rank][part.send_slot_A]
            for target, sent in enumerate(np.split(experts, np.cumsum(part.send_count_R)[:-1])):
                mailbox[rank, target] = sent
        for rank, part in enumerate(parts):
            arriving = [mailbox[source, rank] for source in range(num_devices)]
            assert [len(sent) for sent in arriving] == part.receive_count_R.tolist()
            found = np.full(new.shape[1], EMPTY)
            found[part.receive_slot_A] = np.concatenate(arriving)
            assert found.tolist() == new[rank].tolist()
            for source, sent in enumerate(arriving):
                for expert in sent:
                    holders = [device for device in range(num_devices) if expert in old[device]]
                    nearest = min(holders, key=lambda holder: (holder != rank, nodes[holder] != nodes[rank]))
                    assert (source == rank) == (nearest == rank)
                    assert (nodes[source] == nodes[rank]) == (nodes[nearest] == nodes[rank])


def move_and_train(
    rank: int, world_size: int, folder: str, before: Plan, after: Plan | None
) -> tuple[Census, Census, Migration | None, list[tuple[float, float]]]:
    """Three steps under `before`, a migration to `after` (None: stay), three steps more."""
    steps = tiny.stepper(rank, world_size, folder, before)
    tiny.run_steps(steps, 0, 3)
    done = migrate(steps.engine, steps.model.moe_layers, after, steps.mesh) if after is not None else None  # type: ignore[arg-type]
    moved = tiny.census(steps.engine)
    assert after is None or steps.engine.plan is after
    seen = tiny.run_steps(steps, 3, 6)
    return moved, tiny.census(steps.engine), done, seen


@pytest.mark.parametrize(
    ("world_size", "expert_parallel", "extra_before", "extra_after"),
    [(2, 2, 0, 0), (2, 2, 0, 3), (2, 1, 0, 0), (4, 2, 0, 0), (4, 4, 0, 0), (4, 4, 3, 1), (4, 2, 2, 3)],
)
def test_training_goes_on_as_if_nothing_had_happened(
    ranks: Pool, folder: str, world_size: int, expert_parallel: int, extra_before: int, extra_after: int
) -> None:
    before = tiny.random_plan(expert_parallel, 1, extra_before)
    after = tiny.random_plan(expert_parallel, 2, extra_after)
    stayed = ranks.run(world_size, move_and_train, folder, before, None)
    moved = ranks.run(world_size, move_and_train, folder, before, after)
    tiny.assert_close(tiny.merged([m[0] for m in moved]), tiny.merged([s[0] for s in stayed]), 0.0)
    tiny.assert_close(tiny.merged([m[1] for m in moved]), tiny.merged([s[1] for s in stayed]), 1e-10)
    np.testing.assert_allclose(moved[0][3], stayed[0][3], rtol=1e-10)
    done = moved[0][2]
    assert done is not None
    assert done.moves == len(before.moves_to(after))
    layer_bytes = 8 * 3 * sum(values[0].size for values in _one_expert(stayed[0][0]))
    assert done.bytes == done.moves * layer_bytes * (world_size // expert_parallel)


def _one_expert(census: Census) -> list[list[np.ndarray]]:
    """The weights of one expert of one layer."""
    first = next(key for key in census if key.startswith("expert/")).rsplit("/", 2)[0]
    return [[values] for key, values in census.items() if key.startswith(first + "/") and key.endswith("/weight")]


def refuse(rank: int, world_size: int, folder: str, after: Plan) -> str:
    steps = tiny.stepper(rank, world_size, folder, tiny.random_plan(2, 1))
    with pytest.raises(BadData) as caught:
        migrate(steps.engine, steps.model.moe_layers, after, steps.mesh)  # type: ignore[arg-type]
    steps.run(0, DataState(), (), stop_asked=False)  # still whole
    return str(caught.value)


def test_a_plan_of_another_model_is_refused_with_both_shapes(ranks: Pool, folder: str) -> None:
    for message in ranks.run(2, refuse, folder, Plan.contiguous(3, 8, 2)):
        assert "3 MoE layers x 8 experts on 2 devices" in message
        assert "2 layers x 8 experts on 2 devices" in message


def bf16_masters(rank: int, world_size: int, folder: str, before: Plan, after: Plan) -> tuple[Census, Census]:
    import torch

    steps = tiny.stepper(rank, world_size, folder, before, dtype=torch.bfloat16)
    tiny.run_steps(steps, 0, 2)
    first = tiny.census(steps.engine)
    migrate(steps.engine, steps.model.moe_layers, after, steps.mesh)  # type: ignore[arg-type]
    for name, parameter in steps.model.named_parameters():
        assert torch.equal(parameter, steps.engine.states()[name]["weight"].to(parameter.dtype)), name
    return first, tiny.census(steps.engine)


def test_bf16_parameters_take_their_value_from_the_masters_that_moved(ranks: Pool, folder: str) -> None:
    results = ranks.run(2, bf16_masters, folder, tiny.random_plan(2, 1), tiny.random_plan(2, 2))
    first = tiny.merged([one for one, _ in results])
    assert any(values.dtype == np.float32 for values in first.values())
    tiny.assert_close(tiny.merged([two for _, two in results]), first, 0.0)
