"""Assignment: the list of (token, expert, weight) entries that a gate decided on, the one input of every dispatcher."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Assignment:
    """A variable-length list of entries, so that fixed-k, top-p, ReLU and expert-choice gates all fit; a dropped entry is simply missing.

    Entries are sorted by token; within a token their order is the gate's (best first), and outputs are summed in that order.
    An example, three tokens of which the second lost one of its two experts to a full capacity:

        token_A  [0, 0, 1, 2, 2]    expert_A  [4, 1, 4, 0, 3]    weight_A  [.7, .3, .9, .6, .4]
        num_tokens 3            uniform_k None              num_dropped 1
    """

    token_A: Tensor
    """int64 [A], ascending: the position of the token among this rank's tokens."""
    expert_A: Tensor
    """int64 [A]: logical expert."""
    weight_A: Tensor
    """float [A]: what the expert's output is multiplied by; carries the gate's gradient."""
    num_tokens: int
    uniform_k: int | None = None
    """K where every token has exactly K entries (nothing dropped), else None."""
    num_dropped: int = 0
    """Entries that the gate chose and the capacity refused."""

    def __post_init__(self) -> None:
        num_entries = self.token_A.numel()
        shapes = [tuple(tensor.shape) for tensor in (self.token_A, self.expert_A, self.weight_A)]
        assert shapes == [(num_entries,)] * 3, f"token, expert and weight have shapes {shapes}: all must be [A]"
        assert self.token_A.dtype == self.expert_A.dtype == torch.int64, "token and expert must be int64"
        assert self.uniform_k is None or self.uniform_k * self.num_tokens == num_entries, (
            f"{num_entries} entries are not {self.uniform_k} for each of {self.num_tokens} tokens"
        )

    @classmethod
    def from_topk(cls, expert_TK: Tensor, weight_TK: Tensor, keep_TK: Tensor | None = None) -> "Assignment":
        """The assignment of a fixed-k gate.

        `expert_TK` int [T, K], `weight_TK` float [T, K], `keep_TK` bool [T, K] (False: dropped; None: all kept).

        On CUDA `keep_TK` costs one synchronisation, because the number of entries then depends on the data.
        """
        num_tokens, top_k = expert_TK.shape
        token_A = torch.arange(num_tokens, device=expert_TK.device).repeat_interleave(top_k, output_size=num_tokens * top_k)
        expert_A, weight_A = expert_TK.reshape(-1).long(), weight_TK.reshape(-1)
        if keep_TK is None:
            return cls(token_A, expert_A, weight_A, num_tokens, uniform_k=top_k)
        kept_A = keep_TK.reshape(-1).nonzero().squeeze(1)
        return cls(token_A[kept_A], expert_A[kept_A], weight_A[kept_A], num_tokens, num_dropped=num_tokens * top_k - kept_A.numel())

    @property
    def num_entries(self) -> int:
        """A, the number of (token, expert) entries that are left."""
        return self.token_A.numel()

    @cached_property
    def offset_T(self) -> Tensor:
        """int64 [T]: where each token's entries begin."""
        token_T = torch.arange(self.num_tokens, device=self.token_A.device)
        return token_T * self.uniform_k if self.uniform_k is not None else torch.searchsorted(self.token_A, token_T)
