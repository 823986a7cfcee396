"""Chunks of a routed strand: tokens and their assignment cut into runs of consecutive tokens, each of which travels by itself.

Chunk c of n holds tokens c * T // n up to (c + 1) * T // n: sizes differ by one at most, and where T < n some are empty. Every rank cuts
into the same number of chunks, so that all of them make the same collective calls, whatever their T.

A token goes to its experts with one chunk, so chunks carry the same rows as the whole, and the same bytes: flat dispatch sends a row for
each (token, expert), de-duplicated dispatch one for each (token, device), and neither ever joins two tokens.
"""

import itertools

import torch
from torch import Tensor

from crossdock.runtime.dispatch.assignment import Assignment


def chunk_bounds(num_tokens: int, num_chunks: int) -> tuple[int, ...]:
    """Where the chunks of `num_tokens` tokens begin, and behind the last one where it ends: `num_chunks` + 1 ascending numbers."""
    return tuple(chunk * num_tokens // num_chunks for chunk in range(num_chunks + 1))


def cut(x_TD: Tensor, assignment: Assignment, num_chunks: int) -> list[tuple[Tensor, Assignment]]:
    """The tokens [T, D] and the entries of each chunk; gradients of both flow back into the whole.

    On CUDA this waits for the device once where the entries of a chunk cannot be told from its tokens (`uniform_k` is None).
    """
    if num_chunks == 1:
        return [(x_TD, assignment)]
    bounds = chunk_bounds(assignment.num_tokens, num_chunks)
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    entries = _entry_bounds(assignment, bounds)
    num_entries = [end - begin for begin, end in itertools.pairwise(entries)]
    parts = zip(
        x_TD.split(sizes),
        bounds,
        sizes,
        assignment.token_A.split(num_entries),
        assignment.expert_A.split(num_entries),
        assignment.weight_A.split(num_entries),
        strict=False,  # one bound more than chunks
    )
    return [
        (x, Assignment(token_A - begin, expert_A, weight_A, size, assignment.uniform_k))
        for x, begin, size, token_A, expert_A, weight_A in parts
    ]


def _entry_bounds(assignment: Assignment, bounds: tuple[int, ...]) -> list[int]:
    if assignment.uniform_k is not None:
        return [bound * assignment.uniform_k for bound in bounds]
    begin = torch.tensor(bounds, device=assignment.token_A.device)
    offsets: list[int] = torch.searchsorted(assignment.token_A, begin).tolist()
    return offsets
