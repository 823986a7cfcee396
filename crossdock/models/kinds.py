"""The kinds of block, as data: what runs on the shared stream, where the routed experts read, and who shares them (docs/blocks.md)."""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["attention", "mlp", "shared", "current"]
"""attention, mlp and the shared expert; current: DGMoE's routed experts on the representation of the current layer."""

BlockName = Literal["dense", "top_k", "shared_expert", "scmoe", "dgmoe", "dgmoe_share"]


@dataclass(frozen=True)
class BlockKind:
    """One architecture.

    own             stages of the layer that has the experts, on the shared stream; in pairs, attention and mlp run before them
    shortcut        whether the routed experts read before the layer's own attention, at `shortcut.position`; else right behind it
    blocks_per_moe  consecutive blocks that use one MoE layer (gate and experts); norms are each block's own
    """

    own: tuple[Stage, ...]
    shortcut: bool = False
    blocks_per_moe: int = 1

    @property
    def turns_per_block(self) -> int:
        """How often a block routes each token: DGMoE does it once before the stages and once as one of them."""
        return 1 + self.own.count("current")


BLOCKS: dict[BlockName, BlockKind] = {
    "dense": BlockKind(("attention", "mlp")),
    "top_k": BlockKind(("attention",)),
    "shared_expert": BlockKind(("attention", "shared")),
    "scmoe": BlockKind(("attention", "shared"), shortcut=True),
    "dgmoe": BlockKind(("attention", "current"), shortcut=True),
    "dgmoe_share": BlockKind(("attention", "current"), shortcut=True, blocks_per_moe=2),
}
SHORTCUT_BLOCKS = tuple(name for name, kind in BLOCKS.items() if kind.shortcut)
