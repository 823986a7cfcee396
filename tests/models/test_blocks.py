"""Blocks against their equations (arXiv 2404.05019, section 3), written out with the slow reference of the routed experts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.models.attention import Attention, rotate, rotation
from crossdock.models.blocks import MoEBlock
from crossdock.models.config import ModelConfig
from crossdock.models.gates.base import Turn
from crossdock.models.gates.table import GATES
from crossdock.models.transformer import Transformer
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.training.context import StepContext

NAMES = ["attention_0", "mlp_0", "attention_1", "shared_0"]


def model_of(**options: Any) -> Transformer:
    base = {"vocab_size": 11, "num_layers": 2, "model_width": 8, "num_heads": 2, "num_experts": 4, "initial_std": 0.3}
    return Transformer(ModelConfig.model_validate(base | options), dtype=torch.float64)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def routed(block: MoEBlock, x_QPD: Tensor, weight: Tensor, context: StepContext) -> Tensor:
    """sum_i G(x)_i E_i(x), one token and one expert at a time."""
    x_TD = rms_norm(x_QPD, weight).flatten(0, 1)
    return routed_by(block, x_QPD, block.moe.gate(x_TD, context, x_QPD.shape[1]).assignment, x_TD)


def routed_by(block: MoEBlock, x_QPD: Tensor, assignment: Assignment, x_TD: Tensor) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    for token, expert, scale in zip(assignment.token_A.tolist(), assignment.expert_A.tolist(), assignment.weight_A, strict=True):
        gate, up = (block.moe.bank.inner[expert] @ x_TD[token]).chunk(2)
        y_TD[token] += scale * ((F.silu(gate) * up) @ block.moe.bank.outer[expert])
    return y_TD.view_as(x_QPD)


def swiglu(ffn: Any, x: Tensor) -> Tensor:
    gate, up = (x @ ffn.gate_up.weight.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ ffn.down.weight.T


@pytest.fixture
def hidden_QPD() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


CONTEXT = StepContext(0, 0, True, torch.zeros(10, dtype=torch.int64), 0)


@pytest.mark.parametrize("coefficient", ["direct", "cg1", "cg2"])
@pytest.mark.parametrize("position", [1, 2, 3])
def test_scmoe_pair(hidden_QPD: Tensor, position: int, coefficient: str) -> None:
    block = model_of(shortcut={"position": position, "coefficient": coefficient}).blocks[0]
    assert isinstance(block, MoEBlock)
    parts = dict(block.named_children())
    attention_0, mlp, attention_1, shared = (parts[name] for name in NAMES)
    after_attention = attention_0(hidden_QPD)  # H^MH_l
    after_mlp = after_attention + swiglu(mlp.ffn, rms_norm(after_attention, mlp.norm.weight))  # H^MLP_l
    last = attention_1(after_mlp)  # H^MH_(l+1)
    source = {1: after_mlp, 2: after_attention, 3: hidden_QPD}[position]
    normed = rms_norm(last, shared.norm.weight)
    shared_scale, routed_scale = 1.0, 1.0
    if coefficient == "cg1":
        shared_scale = (normed @ shared.scale.weight.T).sigmoid()
    if coefficient == "cg2":
        shared_scale, routed_scale = (normed @ shared.scale.weight.T).softmax(-1).split(1, dim=-1)
    expected = last + shared_scale * swiglu(shared.ffn, normed)
    expected = expected + routed_scale * routed(block, source, block.routed_norm.weight, CONTEXT)
    torch.testing.assert_close(block(hidden_QPD, CONTEXT)[0], expected, rtol=1e-12, atol=1e-12)


def test_scmoe_in_every_layer_reads_the_layers_input(hidden_QPD: Tensor) -> None:
    block = model_of(moe_every=1, shortcut={"position": 1, "coefficient": "direct"}).blocks[1]
    parts = dict(block.named_children())
    last = parts["attention_0"](hidden_QPD)
    shared = parts["shared_0"]
    expected = last + swiglu(shared.ffn, rms_norm(last, shared.norm.weight)) + routed(block, hidden_QPD, block.routed_norm.weight, CONTEXT)
    torch.testing.assert_close(block(hidden_QPD, CONTEXT)[0], expected, rtol=1e-12, atol=1e-12)


def second_choices(logits_TE: Tensor, first_T: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 of the softmax where it is not the token's expert of the previous layer's half, and else its second choice; and its weight."""
    probability_TE = logits_TE.softmax(-1)
    best_T2 = probability_TE.argsort(-1, descending=True)[:, :2]
    expert_T = torch.where(best_T2[:, 0] == first_T, best_T2[:, 1], best_T2[:, 0])
    return expert_T, probability_TE.gather(1, expert_T[:, None])[:, 0]


@pytest.mark.parametrize("moe_every", [1, 2])
@pytest.mark.parametrize("block", ["dgmoe", "dgmoe_share"])
def test_dgmoe(hidden_QPD: Tensor, block: str, moe_every: int) -> None:
    """H + sum of one expert of the previous layer's representation and another one of the current layer's, by one gate."""
    model = model_of(
        block=block, num_layers=2 * moe_every, moe_every=moe_every, top_k=1, num_experts=3, gate={"kind": "switch", "jitter": 0}
    )
    blocks = [block for block in model.blocks if isinstance(block, MoEBlock)]
    assert (blocks[0].moe is blocks[1].moe) == (block == "dgmoe_share")
    assert {name.split(".moe")[0] for name in model.state_dict() if ".moe" in name} == (
        {"blocks.0"} if block == "dgmoe_share" else {"blocks.0", "blocks.1"}  # nothing is counted or saved twice
    )
    collisions = 0
    for here in blocks:
        parts = dict(here.named_children())
        last = parts["attention_0"](hidden_QPD)
        source = last if moe_every == 2 else hidden_QPD
        if moe_every == 2:
            last = parts["attention_1"](last + swiglu(parts["mlp_0"].ffn, rms_norm(last, parts["mlp_0"].norm.weight)))
        half_TD = rms_norm(source, here.routed_norm.weight).flatten(0, 1)
        first = here.moe.gate(half_TD, CONTEXT, 5).assignment
        current_TD = rms_norm(last, parts["current_0"].norm.weight).flatten(0, 1)
        expert_T, weight_T = second_choices(current_TD @ here.moe.gate.weight_ED.T, first.expert_A)
        second = Assignment(torch.arange(10), expert_T, weight_T, 10, uniform_k=1)
        collisions += int((here.moe.gate(current_TD, CONTEXT, 5).assignment.expert_A == first.expert_A).sum())
        assert not (expert_T == first.expert_A).any()
        expected = last + routed_by(here, last, first, half_TD) + routed_by(here, last, second, current_TD)
        output, routings = here(hidden_QPD, CONTEXT)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        assert [routing.assignment.expert_A.tolist() for routing in routings] == [first.expert_A.tolist(), expert_T.tolist()]
    assert collisions > 0  # else the second choice was never put to the test


@pytest.mark.parametrize("kind", GATES)
def test_no_token_gets_an_expert_twice_and_noise_differs_by_turn(hidden_QPD: Tensor, kind: str) -> None:
    model = model_of(block="dgmoe_share", num_layers=4, top_k=1 if kind == "switch" else 2, num_experts=5, gate={"kind": kind})
    for block in model.blocks:
        _, (first, second) = block(hidden_QPD, CONTEXT)
        assert not (first.expert_TK[:, :, None] == second.expert_TK[:, None, :]).any()
    gate, x_TD = model.moe_layers[0].gate, hidden_QPD.flatten(0, 1)
    turns = [gate(x_TD, CONTEXT, 5, Turn(number)).assignment for number in range(4)]
    is_random = kind not in ("deepseek_v3", "softmax_topk")
    distinct = {(tuple(turn.expert_A.tolist()), tuple(turn.weight_A.tolist())) for turn in turns}
    assert len(distinct) == (4 if is_random else 1)


@pytest.mark.parametrize("moe_every", [1, 2])
@pytest.mark.parametrize("kind", ["top_k", "shared_expert"])
def test_ordinary_blocks(hidden_QPD: Tensor, kind: str, moe_every: int) -> None:
    block = model_of(block=kind, moe_every=moe_every).blocks[0]
    parts = dict(block.named_children())
    last = parts["attention_0"](hidden_QPD)
    if moe_every == 2:
        last = parts["attention_1"](last + swiglu(parts["mlp_0"].ffn, rms_norm(last, parts["mlp_0"].norm.weight)))
    if kind == "top_k":
        expected = last + routed(block, last, block.routed_norm.weight, CONTEXT)
    else:
        shared = parts["shared_0"]  # one norm for both
        weight = shared.norm.weight
        expected = last + swiglu(shared.ffn, rms_norm(last, weight)) + routed(block, last, weight, CONTEXT)
    torch.testing.assert_close(block(hidden_QPD, CONTEXT)[0], expected, rtol=1e-12, atol=1e-12)


def test_dropped_tokens_pass_on_by_their_residual(hidden_QPD: Tensor) -> None:
    gate = {"kind": "switch", "capacity": {"policy": "fixed", "factor": 0.4}, "jitter": 0.0}
    block = model_of(block="top_k", moe_every=1, top_k=1, gate=gate).blocks[0]
    output, (routing,) = block(hidden_QPD, CONTEXT)
    kept = set(routing.assignment.token_A.tolist())
    assert 0 < len(kept) < 10
    after_attention = dict(block.named_children())["attention_0"](hidden_QPD).flatten(0, 1)
    for token, row in enumerate(output.flatten(0, 1)):
        assert torch.equal(row, after_attention[token]) == (token not in kept)


def attention_of(num_heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> Attention:
    config = ModelConfig(model_width=16, num_heads=num_heads, num_kv_heads=kv_heads)
    torch.manual_seed(0)
    return Attention(config, dtype)


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(4, 4), (4, 2), (2, 1)])
def test_attention_by_hand(num_heads: int, kv_heads: int) -> None:
    attention, width = attention_of(num_heads, kv_heads), 16 // num_heads
    x_PD = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heads = (rms_norm(x_PD, attention.norm.weight) @ attention.qkv.weight.T).view(5, num_heads + 2 * kv_heads, width)
    mixed = torch.zeros(5, num_heads, width, dtype=torch.float64)

    def turned(vector: Tensor, position: int) -> Tensor:
        left, right = torch.view_as_complex(torch.stack(vector.chunk(2), -1)), width // 2
        angle = torch.tensor([position * 10_000 ** (-2 * i / width) for i in range(right)], dtype=torch.float64)
        return torch.view_as_real(left * torch.polar(torch.ones_like(angle), angle)).T.flatten()

    for head in range(num_heads):
        shared = head // (num_heads // kv_heads)
        for now in range(5):
            query = turned(heads[now, head], now)
            scores = [query @ turned(heads[past, num_heads + shared], past) / width**0.5 for past in range(now + 1)]
            for weight, past in zip(torch.stack(scores).softmax(0), range(now + 1), strict=True):
                mixed[now, head] += weight * heads[past, num_heads + kv_heads + shared]
    expected = x_PD + mixed.flatten(1) @ attention.out.weight.T
    torch.testing.assert_close(attention(x_PD[None])[0], expected, rtol=1e-12, atol=1e-12)


def test_rotation_depends_on_distance_alone() -> None:
    cos, sin = rotation(30, 8, 10_000.0, torch.device("cpu"), torch.float64)
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def score(at: int, distance: int) -> Tensor:
        rows = rotate(torch.stack((query, key)).view(2, 1, 8), cos[[at + distance, at]], sin[[at + distance, at]])
        return rows[0, 0] @ rows[1, 0]

    torch.testing.assert_close(score(0, 4), score(25, 4))
    assert not torch.isclose(score(0, 4), score(0, 5))


def test_rotation_made_in_inference_mode_serves_training() -> None:
    attention = attention_of(2, 1, torch.float32)
    with torch.inference_mode():
        attention(torch.ones(1, 23, 16))  # a length that no other test asks for
    attention(torch.ones(1, 23, 16)).sum().backward()


@pytest.mark.parametrize("block", ["dense", "top_k", "scmoe", "dgmoe", "dgmoe_share"])
def test_the_future_does_not_leak(block: str) -> None:
    model = model_of(block=block, num_layers=4)
    token_QP = torch.arange(8)[None]
    changed_QP = token_QP.clone()
    changed_QP[0, 5] = 9

    def logits(token: Tensor) -> Tensor:
        return model(token, StepContext(0, 0, True, token.reshape(-1), 0)).logits_QPV[0]

    torch.testing.assert_close(logits(token_QP)[:5], logits(changed_QP)[:5], rtol=1e-12, atol=1e-12)
    assert not torch.isclose(logits(token_QP)[5:], logits(changed_QP)[5:]).any()


@pytest.mark.parametrize("kind", GATES)
def test_gradients_are_slopes_and_nothing_casts_float64_down(kind: str) -> None:
    # A value rounded to float32 anywhere on the way would put an error of 1e-7 / 1e-5 into the slope.
    model = model_of(gate={"kind": kind}, top_k=1 if kind == "switch" else 2, shortcut={"position": 3, "coefficient": "cg2"})
    token_QP = torch.arange(8)[None]
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in model.parameters()]

    def loss_at(distance: float) -> Tensor:
        with torch.no_grad():
            for parameter, step in zip(model.parameters(), direction, strict=True):
                parameter += distance * step
        output = model(token_QP, StepContext(0, 0, True, token_QP[0], 0))
        return F.cross_entropy(output.logits_QPV[0, :-1], token_QP[0, 1:]) + sum(output.losses.values())

    loss_at(0.0).backward()
    slope = sum((p.grad * step).sum() for p, step in zip(model.parameters(), direction, strict=True) if p.grad is not None)
    ahead, behind = loss_at(1e-5), loss_at(-2e-5)
    assert ((ahead - behind) / 2e-5).item() == pytest.approx(slope.item(), rel=1e-6)
