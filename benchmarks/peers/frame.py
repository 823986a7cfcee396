"""The small model around the layers that are compared: embedding, attention, norms, head and loss in plain torch, the same for everyone."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrameSizes(Protocol):
    """What the frame reads of `case.Sizes`."""

    @property
    def model_width(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...


class Decoder(nn.Module):
    """A decoder-only transformer: x + attention(norm(x)), then x + experts(norm(x)), `num_layers` times; tied embedding and head.

    layers: for each block a module [T, D] -> [T, D]. values: those of `initial_values`, whose dtype is the model's.
    """

    def __init__(self, sizes: FrameSizes, layers: Sequence[nn.Module], values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Parameter(values["embedding"].clone())
        self.in_projections = nn.ParameterList(values[f"{layer}.in"].clone() for layer in range(sizes.num_layers))
        self.out_projections = nn.ParameterList(values[f"{layer}.out"].clone() for layer in range(sizes.num_layers))
        self.layers = nn.ModuleList(layers)

    @staticmethod
    def initial_values(sizes: FrameSizes, generator: torch.Generator) -> dict[str, Tensor]:
        """Normal values: embedding [V, D]; for each block the projections into [3D, D] and out of [D, D] attention."""
        width = sizes.model_width
        shapes = {"embedding": (sizes.vocabulary, width)}
        for layer in range(sizes.num_layers):
            shapes |= {f"{layer}.in": (3 * width, width), f"{layer}.out": (width, width)}
        return {name: torch.randn(shape, generator=generator) * width**-0.5 for name, shape in shapes.items()}

    def forward(self, ids_T: Tensor) -> Tensor:
        """The mean loss of predicting each next id of this rank's sequences, on ids [T]."""
        ids_QP = ids_T.view(-1, self.sizes.sequence)
        x_QPD = self.embedding[ids_QP]
        for into, out_of, experts in zip(self.in_projections, self.out_projections, self.layers, strict=True):
            x_QPD = x_QPD + self._attention(self._norm(x_QPD), into, out_of)
            x_QPD = x_QPD + experts(self._norm(x_QPD).flatten(0, 1)).view(x_QPD.shape)
        logits_QPV = self._norm(x_QPD) @ self.embedding.t()
        wide = torch.promote_types(logits_QPV.dtype, torch.float32)
        return F.cross_entropy(logits_QPV[:, :-1].flatten(0, 1).to(wide), ids_QP[:, 1:].flatten())

    def _attention(self, x_QPD: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
        heads = F.linear(x_QPD, into).unflatten(-1, (3, self.sizes.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        return F.linear(mixed.transpose(1, 2).flatten(2), out_of)

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],))
