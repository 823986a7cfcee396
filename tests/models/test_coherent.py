"""The context-coherent way through the blocks gives what tokens that go home give: n ranks equal one, every gradient, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from crossdock.models.config import ModelConfig
from crossdock.models.transformer import Transformer
from crossdock.runtime.assignment import Assignment
from crossdock.runtime.context import StepContext
from crossdock.runtime.ledger import bytes_by_class
from tests.models.step import Case, check_equal, make_plan, run_step
from tests.pool import Pool, mesh_for

MODELS: dict[str, dict[str, Any]] = {
    "every": {"moe_every": 1, "num_layers": 3},
    "second": {"num_layers": 4, "activation": "gelu"},
    "mha_switch": {"moe_every": 1, "num_kv_heads": 2, "gate": {"kind": "switch", "jitter": 0.2}},
    "deepseek": {"moe_every": 1, "gate": {"kind": "deepseek_v3", "sequence_loss": 0.0, "bias_step": 0.1}},
}


def case_of(name: str, traffic: str = "home", **changes: Any) -> Case:
    return Case({"block": "top_k", "top_k": 1, "traffic": traffic, **MODELS[name]}, **changes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("world", "plan"), [((1, 1), "contiguous"), ((2, 2), "random"), ((4, 4), "copies"), ((4, 2), "uneven")])
def test_n_ranks_equal_one_at_home(ranks: Pool, name: str, world: tuple[int, int], plan: str) -> None:
    alone = run_step(0, 1, case_of(name, num_steps=2, micro_batches=2))
    coherent = case_of(name, "coherent", expert_parallel=world[1], plan=plan, num_steps=2, micro_batches=2)
    check_equal(ranks.run(world[0], run_step, coherent), alone, world[1])


@pytest.mark.parametrize("favourite", [0, 5])
def test_all_tokens_on_one_rank(ranks: Pool, favourite: int) -> None:
    """The others have no resident between the layers, and come through it all the same."""
    bias = tuple(10.0 if expert == favourite else 0.0 for expert in range(8))
    alone = run_step(0, 1, case_of("deepseek", router_bias=bias))
    assert alone.load[:, favourite].tolist() == [24.0, 24.0]
    check_equal(ranks.run(4, run_step, case_of("deepseek", "coherent", expert_parallel=4, router_bias=bias)), alone, 4)


def test_evaluation_draws_no_noise(ranks: Pool) -> None:
    alone = run_step(0, 1, case_of("every", training=False))
    check_equal(ranks.run(2, run_step, case_of("every", "coherent", expert_parallel=2, training=False)), alone, 2)


def heard_of_rank(rank: int, world_size: int, case: Case) -> list[tuple[int, list[int]]]:
    """What listeners hear on this rank: the layer and the experts of its own tokens."""
    mesh = mesh_for(rank, world_size, world_size)
    model = Transformer(case.config, mesh, make_plan(case.plan, case.config, world_size), torch.float64, seed=3)
    heard: list[tuple[int, list[int]]] = []

    def listen(layer: int, assignment: Assignment) -> None:
        assert assignment.token_A.tolist() == list(range(assignment.num_tokens))
        heard.append((layer, assignment.expert_A.tolist()))

    token_QP = torch.arange(24).view(4, 6).chunk(world_size)[rank] % 17
    model(token_QP, StepContext(0, 0, True, token_QP.flatten(), rank * token_QP.numel(), (listen,)))
    return heard


def test_listeners_at_home_hear_what_they_would_have_heard(ranks: Pool) -> None:
    (alone,) = ranks.run(1, heard_of_rank, case_of("every"))
    of_ranks = ranks.run(4, heard_of_rank, case_of("every", "coherent", plan="random"))
    joined = [(layer, [expert for heard in of_ranks for expert in heard[layer][1]]) for layer in range(3)]
    assert joined == alone


def bytes_of_rank(rank: int, world_size: int, case: Case) -> tuple[int, int, int]:
    mesh = mesh_for(rank, world_size, world_size, case.nodes)
    mesh.ledger.take()
    run_step(rank, world_size, case)
    flights = mesh.ledger.take()
    return sum(bytes_by_class(flights)), sum(bytes_by_class(flights, "keys_values")), len(flights)


def test_one_all_to_all_a_layer(ranks: Pool) -> None:
    home = np_sum(ranks.run(4, bytes_of_rank, case_of("every", expert_parallel=4)))
    coherent = np_sum(ranks.run(4, bytes_of_rank, case_of("every", "coherent", expert_parallel=4)))
    tokens, layers, width, element = 24, 3, 8, 8
    assert home[0] == 4 * tokens * layers * width * element
    assert coherent[0] == 2 * tokens * (layers + 1) * width * element  # one each way a layer, and the way home
    assert coherent[1] == 2 * tokens * layers * 4 * (2 * 4) * element  # to four ranks; keys and values of one head of width 4
    assert home[1] == 0


def np_sum(of_ranks: list[tuple[int, int, int]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*of_ranks, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "scmoe"}, "set block: top_k and top_k: 1"),
        ({"top_k": 2}, "set block: top_k and top_k: 1"),
        ({"gate": {"kind": "switch", "capacity": {"policy": "fixed"}}}, "leave gate.capacity out"),
        ({"gate": {"kind": "deepseek_v3"}}, "gate.sequence_loss"),
        ({"gathered_experts": [1]}, "gathered_experts"),
    ],
)
def test_what_it_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({"block": "top_k", "top_k": 1, "traffic": "coherent"} | changes)


def test_one_rank_is_bitwise_the_same_in_any_order() -> None:
    first, second = (run_step(0, 1, replace(case_of("every", "coherent"), num_steps=2)) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
