"""n ranks equal one rank: outputs, balance, and every gradient, in float64 to 1e-10, for every block and gate."""

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch

from crossdock.errors import BadData
from crossdock.models.config import ModelConfig
from crossdock.models.transformer import Transformer
from crossdock.placement.records.plan import Plan
from crossdock.runtime.training.context import StepContext
from tests.models.step import Case, Outcome, check_equal, run_step
from tests.pool import Pool

WORLDS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # ranks, expert_parallel

BLOCKS: dict[str, dict[str, Any]] = {
    "dense": {"block": "dense"},
    "top1_every": {"block": "top_k", "moe_every": 1, "top_k": 1},
    "top2_second": {"block": "top_k", "top_k": 2},
    "shared_every": {"block": "shared_expert", "moe_every": 1, "top_k": 2},
    "shared_second": {"block": "shared_expert", "top_k": 1, "tied_head": True},
    "dgmoe_every": {"block": "dgmoe", "moe_every": 1, "top_k": 1},
    "dgmoe2_pos3": {"block": "dgmoe", "top_k": 2, "activation": "gelu", "shortcut": {"position": 3}},
    "dgmoe_share": {"block": "dgmoe_share", "num_layers": 4, "top_k": 1},
    "dgmoe_share_every": {"block": "dgmoe_share", "moe_every": 1, "top_k": 2},
    "scmoe_every": {"block": "scmoe", "moe_every": 1, "top_k": 1},
    "scmoe2_every": {"block": "scmoe", "moe_every": 1, "top_k": 2, "shortcut": {"position": 1, "coefficient": "cg2"}},
} | {
    f"scmoe{top_k}_pos{position}_{coefficient}": {
        "block": "scmoe",
        "top_k": top_k,
        "activation": activation,
        "shortcut": {"position": position, "coefficient": coefficient},
    }
    for position, coefficient, top_k, activation in [
        (1, "direct", 1, "swiglu"),
        (1, "cg1", 2, "gelu"),
        (1, "cg2", 1, "gelu"),
        (2, "direct", 2, "swiglu"),
        (2, "cg1", 1, "swiglu"),
        (2, "cg2", 2, "gelu"),
        (3, "direct", 1, "gelu"),
        (3, "cg1", 2, "swiglu"),
        (3, "cg2", 1, "swiglu"),
    ]
}

GATES: dict[str, dict[str, Any]] = {
    "noisy_top1": {"top_k": 1, "gate": {"kind": "noisy_topk", "importance_loss": 0.1, "load_loss": 0.1}},
    "noisy_top3": {"top_k": 3, "gate": {"kind": "noisy_topk"}},
    "dgmoe_noisy_capacity": {
        "block": "dgmoe",
        "top_k": 2,
        "gate": {"kind": "noisy_topk", "capacity": {"policy": "batch_max", "factor": 0.6, "order": "probability"}},
    },
    "dgmoe_deepseek": {"block": "dgmoe_share", "num_layers": 4, "top_k": 1, "gate": {"kind": "deepseek_v3", "bias_step": 0.1}},
    "noisy_capacity": {"top_k": 2, "gate": {"kind": "noisy_topk", "capacity": {"policy": "fixed", "factor": 0.75, "group_tokens": 3}}},
    "switch": {"top_k": 1, "gate": {"kind": "switch", "jitter": 0.2}},
    "switch_capacity": {"top_k": 1, "gate": {"kind": "switch", "capacity": {"policy": "fixed", "factor": 0.5}}},
    "gshard": {"top_k": 2, "gate": {"kind": "gshard"}},
    "gshard_capacity": {"top_k": 2, "gate": {"kind": "gshard", "capacity": {"policy": "fixed", "factor": 0.5}}},
    "deepseek_top1": {"top_k": 1, "gate": {"kind": "deepseek_v3", "bias_step": 0.1}},
    "deepseek_groups": {
        "top_k": 3,
        "gate": {"kind": "deepseek_v3", "bias_step": 0.1, "num_groups": 4, "top_groups": 2, "sequence_loss": 0.1, "z_loss": 0.01},
    },
    "deepseek_capacity": {"top_k": 2, "gate": {"kind": "deepseek_v3", "bias_step": 0.1, "capacity": {"policy": "fixed", "factor": 0.5}}},
}


ONE_RANK: dict[str, Outcome] = {}


def check(ranks: Pool, world_size: int, case: Case) -> Outcome:
    """Compare a world with one rank, whose outcome is computed once for all worlds, and return the latter."""
    alone = replace(case, expert_parallel=1, plan="contiguous", dispatch="flat")
    if repr(alone) not in ONE_RANK:
        ONE_RANK[repr(alone)] = run_step(0, 1, alone)
    reference = ONE_RANK[repr(alone)]
    check_equal(ranks.run(world_size, run_step, case), reference, case.expert_parallel)
    return reference


def _covering(names: list[str]) -> list[Any]:
    """Every name in every world, with plans and dispatchers taken in turn, so that every pair of them occurs."""
    plans, dispatchers = cycle(["contiguous", "random", "uneven", "copies", "random"]), cycle(["flat", "deduplicated"])
    return [
        pytest.param(name, world_size, expert_parallel, next(plans), next(dispatchers), id=f"{name}-{world_size}ranks-ep{expert_parallel}")
        for name in names
        for world_size, expert_parallel in WORLDS
    ]


@pytest.mark.parametrize(("block", "world_size", "expert_parallel", "plan", "dispatch"), _covering(list(BLOCKS)))
def test_every_block(ranks: Pool, block: str, world_size: int, expert_parallel: int, plan: str, dispatch: str) -> None:
    reference = check(ranks, world_size, Case(BLOCKS[block], expert_parallel, plan, dispatch))
    assert all(gradient.any() for gradient in reference.dense.values())


@pytest.mark.parametrize(("gate", "world_size", "expert_parallel", "plan", "dispatch"), _covering(list(GATES)))
def test_every_gate(ranks: Pool, gate: str, world_size: int, expert_parallel: int, plan: str, dispatch: str) -> None:
    model = GATES[gate] | {"shortcut": {"position": 2}}
    reference = check(ranks, world_size, Case(model, expert_parallel, plan, dispatch, num_steps=2, micro_batches=2))
    assert (reference.dropped > 0) == ("capacity" in gate)


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated"])
@pytest.mark.parametrize(("world_size", "expert_parallel"), WORLDS)
def test_one_token_per_rank(ranks: Pool, world_size: int, expert_parallel: int, dispatch: str) -> None:
    check(ranks, world_size, Case({"top_k": 2}, expert_parallel, "random", dispatch, sequences=world_size, positions=1))


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated"])
@pytest.mark.parametrize(("world_size", "expert_parallel"), WORLDS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_all_tokens_on_the_same_experts(ranks: Pool, top_k: int, world_size: int, expert_parallel: int, dispatch: str) -> None:
    model = {"top_k": top_k, "gate": {"kind": "deepseek_v3"}}
    bias = (0.0, 0.0, 0.0, 9.0, 9.0 if top_k == 2 else 0.0, 0.0, 0.0, 0.0)
    reference = check(ranks, world_size, Case(model, expert_parallel, "random", dispatch, router_bias=bias))
    tokens = 4.0 * 6
    assert reference.load.tolist() == [[tokens if value else 0.0 for value in bias]]


def test_outside_training_nothing_is_random(ranks: Pool) -> None:
    model = {"top_k": 2, "gate": {"kind": "noisy_topk", "eval_capacity": {"policy": "fixed", "factor": 0.5}}}
    reference = check(ranks, 2, Case(model, 2, "random", training=False))
    assert reference.dropped > 0
    again = run_step(0, 1, replace(Case(model, training=False), num_steps=1))
    assert torch.equal(again.logits, reference.logits)


def test_initial_values_depend_on_the_seed_alone() -> None:
    config = Case({"top_k": 2}).config
    one, same, other = (dict(Transformer(config, seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name, parameter in one.items() if parameter.std() > 0]
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    assert sum(len({one[name].flatten()[0].item() for name in drawn}) for _ in range(1)) == len(drawn)  # no two tensors share their draws


def test_initial_spread() -> None:
    config = ModelConfig(vocab_size=300, num_layers=8, model_width=64, expert_width=64)
    model = dict(Transformer(config).named_parameters())
    residual = 0.02 / 16**0.5
    expected = {"embedding.weight": 0.02, "blocks.0.attention_1.qkv.weight": 0.02, "blocks.0.attention_1.out.weight": residual}
    expected |= {"blocks.3.mlp_0.ffn.down.weight": residual, "blocks.3.moe.bank.inner": 0.02, "blocks.3.moe.bank.outer": residual}
    for name, std in expected.items():
        assert model[name].std().item() == pytest.approx(std, rel=0.05), name
        assert abs(model[name].mean().item()) < std / 10, name


def test_low_precision_keeps_router_wide_and_comes_close() -> None:
    config = Case({"top_k": 2, "model_width": 16, "initial_std": 0.05}).config
    token_QP = torch.randint(0, config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    context = StepContext(0, 0, False, token_QP.reshape(-1), 0)
    wide, narrow = Transformer(config), Transformer(config, dtype=torch.bfloat16)
    assert {p.dtype for name, p in narrow.named_parameters() if "gate.w" in name or "noise_weight" in name} == {torch.float32}
    assert {p.dtype for name, p in narrow.named_parameters() if "moe.gate" not in name} == {torch.bfloat16}
    logits = narrow(token_QP, context).logits_QPV
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), wide(token_QP, context).logits_QPV, rtol=0.1, atol=0.02)


def test_a_plan_for_another_model_is_refused() -> None:
    config = Case({}).config
    with pytest.raises(BadData, match=r"3.*8|8.*3"):
        Transformer(config, plan=Plan.contiguous(3, config.num_experts, 1))


def test_listeners_see_every_layer_once() -> None:
    config = Case({"num_layers": 4}).config
    token_QP = torch.zeros((1, 3), dtype=torch.int64)
    seen: list[tuple[int, int]] = []
    context = StepContext(0, 0, True, token_QP[0], 0, (lambda layer, assignment: seen.append((layer, assignment.num_entries)),))
    Transformer(config)(token_QP, context)
    assert seen == [(0, 6), (1, 6)]
