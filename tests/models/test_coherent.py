"""The context-coherent way through the blocks gives what tokens that go home give: n ranks equal one, every gradient, in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crossdock.models.config import ModelConfig
from crossdock.models.transformer import Transformer
from crossdock.placement.costs.coherent import Context, evaluate_coherent
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.ledger import bytes_by_class
from tests.models.step import Case, check_equal, make_plan, run_step
from tests.pool import Pool, mesh_for

WAYS = ("home", "coherent")
MODELS: dict[str, dict[str, Any]] = {
    "every": {"moe_every": 1, "num_layers": 3},
    "second": {"num_layers": 4, "activation": "gelu"},
    "mha_switch": {"moe_every": 1, "num_kv_heads": 2, "gate": {"kind": "switch", "jitter": 0.2}},
    "qwen": {"moe_every": 1, "num_kv_heads": 2, "head_dim": 6, "qk_norm": True, "gate": {"kind": "softmax_topk", "normalise": False}},
    "deepseek": {"moe_every": 1, "gate": {"kind": "deepseek_v3", "sequence_loss": 0.0, "bias_step": 0.1}},
}


def case_of(name: str, traffic: str = "home", **changes: Any) -> Case:
    return Case({"block": "top_k", "top_k": 1, "traffic": traffic, **MODELS[name]}, **changes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("world", "plan"),
    [((1, 1), "contiguous"), ((2, 2), "random"), ((4, 4), "copies"), ((4, 2), "uneven"), ((4, 4), "lopsided"), ((4, 2), "lopsided_copies")],
)
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


def bytes_of_rank(rank: int, world_size: int, case: Case) -> tuple[tuple[int, ...], ...]:
    """Bytes of one step by link class: of tokens, and of keys and values."""
    mesh = mesh_for(rank, world_size, case.expert_parallel, case.nodes)
    mesh.ledger.take()
    run_step(rank, world_size, case)
    flights = mesh.ledger.take()
    return bytes_by_class(flights), bytes_by_class(flights, "keys_values")


def experts_of_step(case: Case) -> NDArray[np.int64]:
    """[T, L]: the choices of the step's tokens, from one rank that keeps them at home."""
    heard: dict[int, list[int]] = {}
    config = ModelConfig.model_validate(case.config.model_dump() | {"traffic": "home"})
    model = Transformer(config, None, None, torch.float64, seed=3)
    batch_QP = torch.randint(0, config.vocab_size, (case.sequences, case.positions + 1), generator=torch.Generator().manual_seed(11))
    token_QP = batch_QP[:, :-1]
    model(token_QP, StepContext(7, 0, True, token_QP.flatten(), 0, (lambda layer, a: heard.update({layer: a.expert_A.tolist()}),)))
    return np.array([heard[layer] for layer in sorted(heard)]).T


@pytest.mark.parametrize("plan", ["contiguous", "random", "copies"])
@pytest.mark.parametrize("name", ["every", "second"])
def test_counted_bytes_equal_predicted_bytes(ranks: Pool, name: str, plan: str) -> None:
    case = case_of(name, "coherent", expert_parallel=4, plan=plan, nodes=(0, 0, 1, 1), sequences=8)
    counted = np.sum(ranks.run(4, bytes_of_rank, case), axis=0)
    config = case.config
    trace = Trace(experts_of_step(case)[:, :, None].astype(np.uint16), config.num_experts, home_T=np.repeat(np.arange(4), 12))
    placed = make_plan(plan, config, 4) or Plan.contiguous(config.num_moe_layers, config.num_experts, 4)
    context = Context(2 * config.kv_heads * config.head_width * 8, attentions=config.stages.count("attention"))
    workload = Workload(model_width=config.model_width, wire="fp64")
    predicted = evaluate_coherent(trace, placed, Topology.uniform(nodes=2, devices_per_node=2), workload, context)
    assert tuple(counted[0]) == predicted.token_bytes
    assert tuple(counted[1]) == predicted.key_value_bytes
    assert counted.min() > 0


def test_one_all_to_all_a_layer(ranks: Pool) -> None:
    home, coherent = (np.sum(ranks.run(4, bytes_of_rank, case_of("every", traffic, expert_parallel=4)), axis=(0, 2)) for traffic in WAYS)
    row_bytes, tokens, layers = 8 * 8, 24, 3
    assert home.tolist() == [4 * tokens * layers * row_bytes, 0]
    assert coherent[0] == 2 * tokens * (layers + 1) * row_bytes  # one each way a layer, and the way home


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
