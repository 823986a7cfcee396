"""What every system is given, as a file: sizes, weights, tokens and gradients, and the outputs and gradients that are right.

No system is told where tokens go: the router's rows are orthogonal, so the tokens' components along them are the logits, and tokens are
made with the logits that lead to the wanted experts. Every system then runs its own gate and decides the same.

Routing: "balanced": every expert is chosen equally often by every rank. "zipf": expert i of a shuffled order has probability ~ (i+1)^-1.2,
the second choice is drawn among the others. The right answers come from one process in float64, on inputs rounded to the case's dtype.

Imports torch alone, since ranks of every environment read these files.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.frame import Decoder

Kind = Literal["layer", "model"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ZIPF_EXPONENT = 1.2


@dataclass(frozen=True)
class Sizes:
    """Of one case. The model's frame is used by `kind` "model" alone."""

    ranks: int = 4
    tokens: int = 1024  # of one rank
    model_width: int = 512
    expert_width: int = 1376  # three matrices of 1376 are two of 2064
    num_experts: int = 16
    top_k: int = 2
    num_layers: int = 1
    num_heads: int = 8
    sequence: int = 256
    vocabulary: int = 256

    @property
    def num_slots(self) -> int:
        """Experts of one rank."""
        return self.num_experts // self.ranks


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer's weights, all experts: router [E, D]; gate, up [E, F, D]; down [E, D, F]: y = (silu(x gate^T) * (x up^T)) down^T."""

    router_ED: Tensor
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor

    def of_rank(self, rank: int, sizes: Sizes) -> "LayerWeights":
        """The router, and the experts that stand on `rank`: equally many each, in order."""
        mine = slice(rank * sizes.num_slots, (rank + 1) * sizes.num_slots)
        return LayerWeights(self.router_ED, self.gate_EFD[mine], self.up_EFD[mine], self.down_EDF[mine])


@dataclass(frozen=True, eq=False)
class Case:
    """One piece of work. x, gradient, output and input_gradient are [R, T, D]; for a model the token ids [R, T] take the place of x, the
    losses [R] that of the output, and the embedding's gradient by rank [R, V, D] that of the input gradient.

    down_gradient [E, D, F]: of the first layer's `down`, the sum over all ranks' tokens.
    """

    name: str
    kind: Kind
    dtype: str
    sizes: Sizes
    layers: tuple[LayerWeights, ...]
    frame: Mapping[str, Tensor]
    x: Tensor
    gradient: Tensor
    output: Tensor
    input_gradient: Tensor
    down_gradient_EDF: Tensor
    expert_RTK: Tensor

    @property
    def skewed(self) -> bool:
        """Whether some experts were made hot."""
        return self.name.endswith("zipf")

    def save(self, path: Path) -> None:
        """Write it as plain tensors and numbers."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["sizes"] = dataclasses.asdict(self.sizes)
        fields["layers"] = [vars(layer) for layer in self.layers]
        torch.save(fields, path)

    @staticmethod
    def load(path: Path) -> "Case":
        """Read what `save` wrote; the file is mapped, so ranks share its memory."""
        fields: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
        fields["sizes"] = Sizes(**fields["sizes"])
        fields["layers"] = tuple(LayerWeights(**layer) for layer in fields["layers"])
        return Case(**fields)


def make_case(kind: Kind, dtype: str, routing: str, sizes: Sizes, seed: int = 0) -> Case:
    """Weights, tokens and the right answers; the same numbers for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    exact = DTYPES[dtype]
    layers = tuple(_weights(sizes, generator, exact) for _ in range(sizes.num_layers))
    name = f"{kind} {dtype} {routing}"
    if kind == "layer":
        expert_RTK = choose_experts(routing, sizes, generator)
        x = _tokens(expert_RTK, layers[0].router_ED, generator).to(exact)
        gradient = torch.randn(x.shape, generator=generator).to(exact)
        output, input_gradient, down_gradient = _layer_answers(layers[0], x, gradient, sizes)
        return Case(name, kind, dtype, sizes, layers, {}, x, gradient, output, input_gradient, down_gradient, expert_RTK)
    ids = torch.randint(sizes.vocabulary, (sizes.ranks, sizes.tokens), generator=generator)
    frame = {key: value.to(exact) for key, value in Decoder.initial_values(sizes, generator).items()}
    losses, input_gradient, down_gradient = _model_answers(layers, frame, ids, sizes)
    none = torch.empty(0)
    return Case(name, kind, dtype, sizes, layers, frame, ids, none, losses, input_gradient, down_gradient, none)


def choose_experts(routing: str, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Two different experts for every token, [R, T, 2]; raises `ValueError` for an unknown routing or another number than 2."""
    if sizes.top_k != 2:
        raise ValueError(f"top_k is {sizes.top_k}; tokens are made for two experts each")
    num_tokens, num_experts = sizes.ranks * sizes.tokens, sizes.num_experts
    if routing == "balanced":
        if sizes.tokens % num_experts:
            raise ValueError(f"{sizes.tokens} tokens a rank do not spread evenly over {num_experts} experts; choose a multiple")
        blocks = num_tokens // num_experts
        first = torch.rand(blocks, num_experts, generator=generator).argsort(dim=1)
        shift = torch.randint(1, num_experts, (blocks, 1), generator=generator)
        chosen = torch.stack([first, (first + shift) % num_experts], dim=-1)
    elif routing == "zipf":
        weight = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -ZIPF_EXPONENT
        shuffled = weight[torch.randperm(num_experts, generator=generator)]
        chosen = torch.multinomial(shuffled.expand(num_tokens, -1), 2, generator=generator)
    else:
        raise ValueError(f"no routing is called {routing!r}; choose balanced or zipf")
    return chosen.view(sizes.ranks, sizes.tokens, 2)


def _weights(sizes: Sizes, generator: torch.Generator, dtype: torch.dtype) -> LayerWeights:
    width, hidden, experts = sizes.model_width, sizes.expert_width, sizes.num_experts
    orthogonal, _ = torch.linalg.qr(torch.randn(width, experts, generator=generator))

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    return LayerWeights(
        orthogonal.t().contiguous().to(dtype),
        normal(experts, hidden, width),
        normal(experts, hidden, width),
        normal(experts, width, hidden),
    )


def _tokens(expert_RTK: Tensor, router_ED: Tensor, generator: torch.Generator) -> Tensor:
    """Normal tokens [R, T, D] whose logits are near 3 for the first expert, 2 for the second and below 1 for the others."""
    ranks, tokens, _ = expert_RTK.shape
    num_experts, width = router_ED.shape
    logits = torch.rand(ranks, tokens, num_experts, generator=generator)
    wanted = torch.tensor([3.0, 2.0]) + 0.3 * torch.rand(ranks, tokens, 2, generator=generator)
    logits.scatter_(2, expert_RTK, wanted)
    noise = torch.randn(ranks, tokens, width, generator=generator)
    router = router_ED.float()
    return noise + (logits - noise @ router.t()) @ router


def moe_in_one_process(x_TD: Tensor, weights: LayerWeights, top_k: int) -> Tensor:
    """The layer on one process, expert by expert: y [T, D]; the specification of every row that has the same mathematics."""
    probability_TK, expert_TK = (x_TD @ weights.router_ED.t()).softmax(-1).topk(top_k)
    weight_TK = probability_TK / probability_TK.sum(-1, keepdim=True)
    y_TD = torch.zeros_like(x_TD)
    for expert in range(len(weights.router_ED)):
        token, choice = torch.where(expert_TK == expert)
        rows = x_TD[token]
        hidden = F.silu(rows @ weights.gate_EFD[expert].t()) * (rows @ weights.up_EFD[expert].t())
        y_TD = y_TD.index_add(0, token, (hidden @ weights.down_EDF[expert].t()) * weight_TK[token, choice, None])
    return y_TD


def _wide(weights: LayerWeights) -> LayerWeights:
    return LayerWeights(**{name: tensor.double().requires_grad_() for name, tensor in vars(weights).items()})


def _layer_answers(weights: LayerWeights, x: Tensor, gradient: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    wide, rows = _wide(weights), x.flatten(0, 1).double().requires_grad_()
    y = moe_in_one_process(rows, wide, sizes.top_k)
    y.backward(gradient.flatten(0, 1).double())
    assert rows.grad is not None
    assert wide.down_EDF.grad is not None
    return y.detach().float().view(x.shape), rows.grad.float().view(x.shape), wide.down_EDF.grad.float()


def _model_answers(
    layers: tuple[LayerWeights, ...], frame: Mapping[str, Tensor], ids: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    wide = [_wide(weights) for weights in layers]
    losses, gradients = [], []
    for ids_T in ids:
        model = Decoder(sizes, [OneProcess(weights, sizes.top_k) for weights in wide], {k: v.double() for k, v in frame.items()})
        loss = model(ids_T)
        loss.backward()
        assert model.embedding.grad is not None
        losses.append(loss.detach())
        gradients.append(model.embedding.grad)
    assert wide[0].down_EDF.grad is not None
    return torch.stack(losses).float(), torch.stack(gradients).float(), wide[0].down_EDF.grad.float()


class OneProcess(torch.nn.Module):
    """`moe_in_one_process` as a module."""

    def __init__(self, weights: LayerWeights, top_k: int) -> None:
        super().__init__()
        self.weights, self.top_k = weights, top_k

    def forward(self, x_TD: Tensor) -> Tensor:
        return moe_in_one_process(x_TD, self.weights, self.top_k)
