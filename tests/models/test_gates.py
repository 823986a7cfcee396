"""Gates against their papers' formulas written out token by token, worked examples, and invariants."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from crossdock.errors import BadConfig
from crossdock.models.gates.base import Gate, Routing, reduce_statistics
from crossdock.models.gates.noise import GOLDEN, _mix, _mix_integer, _signed, normal_TC, uniform_TC
from crossdock.models.gates.noisy_topk import MIN_NOISE
from crossdock.models.gates.table import GATES, AnyGateConfig, build_gate
from crossdock.models.initial import named_fill
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.mesh import Mesh

D = 6
CPU = torch.device("cpu")


def context_of(step: int = 0, training: bool = True, first_token: int = 0, num_tokens: int = 0) -> StepContext:
    return StepContext(3, step, training, torch.zeros(num_tokens, dtype=torch.int64), first_token)


def gate_of(kind: str, num_experts: int, top_k: int, std: float = 1.0, dtype: torch.dtype = torch.float64, **options: Any) -> Gate:
    config = TypeAdapter(AnyGateConfig).validate_python({"kind": kind, **options})
    gate = build_gate(config, 0, D, num_experts, top_k, dtype)
    gate.reset_parameters(named_fill(1), std)
    return gate


def tokens(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def losses_of(gate: Gate, routing: Routing, training: bool = True) -> dict[str, float]:
    (sums,) = reduce_statistics([routing.statistics], Mesh.single())
    return {name: loss.item() for name, loss in gate.balance(sums, training).losses.items()}


def table(routing: Routing, top_k: int) -> tuple[Tensor, Tensor]:
    """(expert [T, K], weight [T, K]) where nothing was dropped."""
    assert routing.assignment.uniform_k == top_k
    return routing.assignment.expert_A.view(-1, top_k), routing.assignment.weight_A.view(-1, top_k)


# ---- numbers ---------------------------------------------------------------------------------------------------------------


def test_the_mixer_is_splitmix64() -> None:
    # The first outputs of SplitMix64 from seed 0, as published with its reference implementation.
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [_mix_integer(GOLDEN * n) for n in (1, 2, 3)] == outputs
    states = torch.tensor([_signed((GOLDEN * n) % 2**64) for n in (1, 2, 3)])
    assert _mix(states).tolist() == [_signed(output) for output in outputs]


def test_draws_do_not_depend_on_how_the_batch_is_cut() -> None:
    whole = uniform_TC(context_of(), 2, 1, 0, (12, 4), CPU)
    halves = [uniform_TC(context_of(first_token=first), 2, 1, 0, (6, 4), CPU) for first in (0, 6)]
    assert torch.equal(whole, torch.cat(halves))
    assert torch.equal(whole[:, :2], uniform_TC(context_of(), 2, 1, 0, (12, 2), CPU))


def test_draws_differ_by_seed_step_layer_purpose_and_turn() -> None:
    base = StepContext(3, 0, True, torch.zeros(0, dtype=torch.int64), 0)
    others = [
        uniform_TC(StepContext(4, 0, True, base.token_T, 0), 2, 1, 0, (8, 4), CPU),
        uniform_TC(StepContext(3, 1, True, base.token_T, 0), 2, 1, 0, (8, 4), CPU),
        uniform_TC(base, 3, 1, 0, (8, 4), CPU),
        uniform_TC(base, 2, 2, 0, (8, 4), CPU),
        *(uniform_TC(base, 2, purpose, turn, (8, 4), CPU) for purpose in (1, 2) for turn in (1, 2, 3)),
    ]
    values = torch.cat([uniform_TC(base, 2, 1, 0, (8, 4), CPU), *others]).flatten()
    assert len(values.unique()) == len(values)


def test_draws_have_their_distributions() -> None:
    uniform = uniform_TC(context_of(), 0, 1, 0, (20_000, 8), CPU)
    assert 0 < uniform.min() < 1e-4 < 1 - 1e-4 < uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.005)
    assert torch.corrcoef(uniform.T).fill_diagonal_(0).abs().max() < 0.03
    assert torch.corrcoef(torch.stack((uniform[:-1, 0], uniform[1:, 0])))[0, 1].abs() < 0.03
    normal = normal_TC(context_of(), 0, 1, 0, (20_000, 8), CPU)
    assert normal.mean().item() == pytest.approx(0, abs=0.01)
    assert normal.std().item() == pytest.approx(1, abs=0.01)
    assert (normal.abs() < 1.96).double().mean().item() == pytest.approx(0.95, abs=0.005)


# ---- the gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GATES)
def test_z_loss(kind: str) -> None:
    gate = gate_of(kind, 4, 1 if kind == "switch" else 2, z_loss=0.5)
    x_TD = tokens(7)
    logits_TE = x_TD @ gate.weight_ED.T
    expected = 0.5 * sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits_TE.tolist()) / 7
    assert losses_of(gate, gate(x_TD, context_of(), 7))["z"] == pytest.approx(expected)


def test_switch_by_formula() -> None:
    gate, x_TD = gate_of("switch", 4, 1, balance_loss=0.1, z_loss=0.0), tokens(9)
    routing = gate(x_TD, context_of(training=False), 9)
    expert_TK, weight_TK = table(routing, 1)
    probability_TE = (x_TD @ gate.weight_ED.T).softmax(-1)
    assert expert_TK[:, 0].tolist() == probability_TE.argmax(-1).tolist()
    assert weight_TK[:, 0].tolist() == pytest.approx(probability_TE.max(-1).values.tolist())
    fractions = [expert_TK.eq(expert).double().mean().item() for expert in range(4)]
    expected = 0.1 * 4 * sum(f * p for f, p in zip(fractions, probability_TE.mean(0).tolist(), strict=True))
    assert losses_of(gate, routing) == {"balance": pytest.approx(expected)}


@pytest.mark.parametrize("normalise", [True, False])
def test_softmax_top_k_by_formula(normalise: bool) -> None:
    gate, x_TD = gate_of("softmax_topk", 5, 3, balance_loss=0.1, normalise=normalise), tokens(11)
    routing = gate(x_TD, context_of(), 11)
    expert_TK, weight_TK = table(routing, 3)
    probability_TE = (x_TD @ gate.weight_ED.T).softmax(-1)
    for t in range(11):
        probability = probability_TE[t].tolist()
        chosen = sorted(range(5), key=lambda e: -probability[e])[:3]
        assert expert_TK[t].tolist() == chosen
        total = sum(probability[e] for e in chosen) if normalise else 1.0
        assert weight_TK[t].tolist() == pytest.approx([probability[e] / total for e in chosen])
    parts = [expert_TK.eq(expert).sum().item() / 33 for expert in range(5)]
    expected = 0.1 * 5 * sum(f * p for f, p in zip(parts, probability_TE.mean(0).tolist(), strict=True))
    assert losses_of(gate, routing) == {"balance": pytest.approx(expected)}


def test_switch_jitter_stays_within_its_bounds_and_in_training() -> None:
    gate, x_TD = gate_of("switch", 4, 1, jitter=0.3), tokens(50)
    logits_TE = x_TD @ gate.weight_ED.T
    uniform_TE = uniform_TC(context_of(), 0, 2, 0, (50, 4), CPU)
    jittered_TE = (logits_TE * (0.7 + 0.6 * uniform_TE)).softmax(-1)
    _, weight_TK = table(gate(x_TD, context_of(), 50), 1)
    torch.testing.assert_close(weight_TK[:, 0], jittered_TE.max(-1).values)
    assert gate_of("switch", 4, 1).config.jitter == 0.01


def test_gshard_by_formula() -> None:
    gate, x_TD = gate_of("gshard", 5, 2, balance_loss=0.1, z_loss=0.0), tokens(4000)
    routing = gate(x_TD, context_of(), 4000)
    probability_TE = (x_TD @ gate.weight_ED.T).softmax(-1)
    top_T2, expert_T2 = probability_TE.topk(2)
    weight_T2 = top_T2 / top_T2.sum(-1, keepdim=True)
    has_second_T = torch.bincount(routing.assignment.token_A, minlength=4000) == 2
    # Kept where 2 x weight beats the token's own uniform draw: always from weight 1/2 on, half of the time at 1/4.
    chance_T = (2 * weight_T2[:, 1]).clamp(max=1)
    expected_kept, spread = chance_T.sum().item(), (chance_T * (1 - chance_T)).sum().sqrt().item()
    assert has_second_T.sum().item() == pytest.approx(expected_kept, abs=4 * spread)
    first = routing.assignment.offset_T
    assert torch.equal(routing.assignment.expert_A[first], expert_T2[:, 0])
    torch.testing.assert_close(routing.assignment.weight_A[first], weight_T2[:, 0])  # normalised although the second may be missing
    share_E = torch.bincount(expert_T2[:, 0], minlength=5) / 4000
    mean_of_products = (share_E * probability_TE.mean(0)).mean().item()
    assert losses_of(gate, routing)["balance"] == pytest.approx(0.1 * 25 * mean_of_products)
    assert routing.assignment.num_dropped == 0
    evaluated = gate(x_TD, context_of(training=False), 4000)
    assert evaluated.assignment.num_entries == 8000


def test_noisy_top_k_by_formula() -> None:
    top_k, num_experts, num_tokens = 2, 5, 12
    gate, x_TD = gate_of("noisy_topk", num_experts, top_k, importance_loss=1.0, load_loss=1.0, z_loss=0.0), tokens(12)
    with torch.no_grad():
        gate.noise_weight_ED.copy_(torch.randn(num_experts, D, generator=torch.Generator().manual_seed(5)))
    clean_TE = x_TD @ gate.weight_ED.T
    deviation_TE = torch.nn.functional.softplus(x_TD @ gate.noise_weight_ED.T) + MIN_NOISE
    noisy_TE = clean_TE + normal_TC(context_of(), 0, 3, 0, (num_tokens, num_experts), CPU) * deviation_TE
    importance, load = [0.0] * num_experts, [0.0] * num_experts
    routing = gate(x_TD, context_of(), num_tokens)
    expert_TK, weight_TK = table(routing, top_k)
    for t in range(num_tokens):
        noisy = noisy_TE[t].tolist()
        chosen = sorted(range(num_experts), key=lambda e: -noisy[e])[:top_k]
        assert expert_TK[t].tolist() == chosen
        total = sum(math.exp(noisy[e]) for e in chosen)
        for place, expert in enumerate(chosen):
            assert weight_TK[t, place].item() == pytest.approx(math.exp(noisy[expert]) / total)
            importance[expert] += math.exp(noisy[expert]) / total
        for expert in range(num_experts):
            others = sorted((noisy[e] for e in range(num_experts) if e != expert), reverse=True)
            distance = (clean_TE[t, expert].item() - others[top_k - 1]) / deviation_TE[t, expert].item()
            load[expert] += 0.5 * (1 + math.erf(distance / 2**0.5))

    def variation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / len(values) / mean**2

    assert losses_of(gate, routing) == {"importance": pytest.approx(variation(importance)), "load": pytest.approx(variation(load))}


def test_noisy_top_1_gives_the_router_a_gradient_from_the_task() -> None:
    gate = gate_of("noisy_topk", 4, 1)
    gate(tokens(6), context_of(), 6).assignment.weight_A.sum().backward()
    assert gate.weight_ED.grad is not None
    assert gate.weight_ED.grad.abs().max() > 0


def test_deepseek_choice_by_brute_force() -> None:
    gate, x_TD = gate_of("deepseek_v3", 12, 3, num_groups=4, top_groups=2, scaling=1.5), tokens(40)
    gate.bias_E.copy_(torch.linspace(-0.3, 0.3, 12))
    expert_TK, weight_TK = table(gate(x_TD, context_of(training=False), 40), 3)
    score_TE = (x_TD @ gate.weight_ED.T).sigmoid()
    for t in range(40):
        biased = (score_TE[t] + gate.bias_E).tolist()
        groups = sorted(range(4), key=lambda g: -sum(sorted(biased[3 * g : 3 * g + 3])[-2:]))[:2]
        allowed = [e for e in range(12) if e // 3 in groups]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:3]
        assert expert_TK[t].tolist() == chosen
        total = sum(score_TE[t, e].item() for e in chosen)
        assert weight_TK[t].tolist() == pytest.approx([1.5 * score_TE[t, e].item() / total for e in chosen])


def test_deepseek_bias_moves_once_a_step_by_the_load_of_all_its_micro_batches() -> None:
    gate = gate_of("deepseek_v3", 4, 1, bias_step=0.01)

    def micro_batch(step: int, seed: int, training: bool = True) -> Tensor:
        routing = gate(tokens(20, seed), context_of(step, training), 20)
        losses_of(gate, routing, training)
        return torch.bincount(routing.assignment.expert_A, minlength=4).double()

    load_E = micro_batch(0, 1) + micro_batch(0, 2)
    assert not gate.bias_E.any()
    micro_batch(0, 3, training=False)  # evaluation neither counts nor moves
    resumed = gate_of("deepseek_v3", 4, 1, bias_step=0.01)
    resumed.load_state_dict(gate.state_dict())
    micro_batch(1, 4)
    expected = 0.01 * torch.sign(load_E.mean() - load_E)
    assert expected.any()
    torch.testing.assert_close(gate.bias_E, expected)
    resumed(tokens(20, 4), context_of(1), 20)
    assert torch.equal(resumed.bias_E, gate.bias_E)  # the load of the step before the checkpoint is part of the state


def test_deepseek_bias_evens_the_load() -> None:
    gate = gate_of("deepseek_v3", 4, 1, std=0.3, bias_step=0.01)
    x_TD = tokens(400) + 1.0

    def spread(step: int) -> float:
        routing = gate(x_TD, context_of(step), 400)
        losses_of(gate, routing)
        load_E = torch.bincount(routing.assignment.expert_A, minlength=4).double()
        return (load_E.max() / load_E.mean()).item()

    before = spread(0)
    after = [spread(step) for step in range(1, 80)][-1]
    assert before > 1.8
    assert after < 1.2


def test_deepseek_sequence_loss_by_formula() -> None:
    gate, x_TD = gate_of("deepseek_v3", 4, 2, sequence_loss=0.3), tokens(10)
    routing = gate(x_TD, context_of(), 5)
    expert_TK, _ = table(routing, 2)
    score_TE = (x_TD @ gate.weight_ED.T).sigmoid()
    share_TE = score_TE / score_TE.sum(-1, keepdim=True)
    total = 0.0
    for sequence in (slice(0, 5), slice(5, 10)):
        for expert in range(4):
            f = 4 / (2 * 5) * expert_TK[sequence].eq(expert).sum().item()
            total += f * share_TE[sequence, expert].mean().item()
    assert losses_of(gate, routing) == {"balance": pytest.approx(0.3 * total / 2)}


@pytest.mark.parametrize(("kind", "top_k"), [("noisy_topk", 2), ("softmax_topk", 2), ("switch", 1), ("gshard", 2), ("deepseek_v3", 2)])
def test_routers_compute_in_float32_where_the_model_is_bf16(kind: str, top_k: int) -> None:
    gate = gate_of(kind, 4, top_k, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = gate(tokens(8).bfloat16(), context_of(), 8)
    assert routing.assignment.weight_A.dtype == torch.float32
    assert routing.statistics["z"].dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "num_experts", "top_k", "options", "message"),
    [
        ("noisy_topk", 4, 5, {}, "top_k 5 is more than num_experts 4"),
        ("switch", 4, 2, {}, "switch chooses 1 expert per token, top_k is 2"),
        ("gshard", 4, 1, {}, "gshard chooses 2 experts per token, top_k is 1"),
        ("deepseek_v3", 6, 2, {"num_groups": 4}, "6 experts do not divide into 4 groups; choose gate.num_groups from 1, 2, 3, 6"),
        ("deepseek_v3", 6, 2, {"num_groups": 2, "top_groups": 3}, "top_groups 3 is more than gate.num_groups 2"),
        ("deepseek_v3", 8, 3, {"num_groups": 4, "top_groups": 1}, "top_k 3 is more than the 2 experts of gate.top_groups 1"),
    ],
)
def test_impossible_choices_are_refused(kind: str, num_experts: int, top_k: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        gate_of(kind, num_experts, top_k, **options)
