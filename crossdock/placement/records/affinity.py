"""Affinity: what solvers read instead of a trace. Counts of chosen expert sets, loads, co-activations and transitions; they add up.

A trace of millions of tokens shrinks to its distinct expert sets. All counts are exact integers over the whole trace, so the affinity of
two traces together is the sum of their affinities.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from crossdock.errors import BadData
from crossdock.placement.records.trace import NO_EXPERT, Trace


@dataclass(frozen=True, eq=False)
class ExpertSets:
    """The distinct sets of experts that tokens chose in one layer, and how many tokens chose each.

    `experts_UK` uint16 [U, K]: experts ascending, padded with NO_EXPERT, rows in lexicographic order. `count_U` int64 [U].
    """

    experts_UK: NDArray[np.uint16]
    count_U: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Leaps:
    """How tokens with one choice a layer go past layers that dropped them: from place to place, int64 [P] each, and how many tokens do.

    Place 0 is home before the first layer, 1 + l * E + e expert e of layer l, and 1 + L * E home behind the last layer. Steps to the very
    next layer are not among them: `transitions_LEE` and `load_LE` count those.
    """

    from_P: NDArray[np.int64]
    to_P: NDArray[np.int64]
    count_P: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Affinity:
    """Counts over `num_tokens` tokens.

    sets              per layer, the distinct expert sets
    load_LE           int64 [L, E]: tokens that chose the expert
    coactivation_LEE  int64 [L, E, E], symmetric: tokens that chose both; the diagonal is the load
    transitions_LEE   int64 [L-1, E, E]: tokens whose first choice was the row's expert in layer l and the column's in layer l + 1
    sequence_counts   int64 sparse [Q, L * E], column l * E + e: choices of the expert by the tokens of each sequence, sequences in
                      ascending order; None where the trace names no sequences
    leaps             of a trace with one choice per token, else None
    """

    num_tokens: int
    num_experts: int
    num_layers: int
    top_k: int
    sets: tuple[ExpertSets, ...]
    load_LE: NDArray[np.int64]
    coactivation_LEE: NDArray[np.int64]
    transitions_LEE: NDArray[np.int64]
    sequence_counts: sparse.csr_array | None
    leaps: Leaps | None
    trace_digest: str

    @classmethod
    def from_trace(cls, trace: Trace) -> "Affinity":
        """Count a trace once, layer by layer."""
        sets = tuple(_expert_sets(trace.experts_TLK[:, layer], trace.num_experts) for layer in range(trace.num_layers))
        coactivation_LEE = np.stack([_coactivation(layer_sets, trace.num_experts) for layer_sets in sets])
        return cls(
            num_tokens=trace.num_tokens,
            num_experts=trace.num_experts,
            num_layers=trace.num_layers,
            top_k=trace.top_k,
            sets=sets,
            load_LE=np.diagonal(coactivation_LEE, axis1=1, axis2=2).copy(),
            coactivation_LEE=coactivation_LEE,
            transitions_LEE=_transitions(trace),
            sequence_counts=_sequence_counts(trace),
            leaps=_leaps(trace) if trace.top_k == 1 else None,
            trace_digest=trace.digest,
        )

    def __add__(self, other: "Affinity") -> "Affinity":
        """The affinity of both traces together; sequences of the two stay apart, and are dropped where one of them has none.

        Raises `BadData` where the models differ. The digest is that of the two digests, in order.
        """
        mine, theirs = (self.num_layers, self.num_experts), (other.num_layers, other.num_experts)
        if mine != theirs:
            raise BadData(f"affinities of different models: {mine} and {theirs} (layers, experts); add those of one model")
        both = None
        if self.sequence_counts is not None and other.sequence_counts is not None:
            both = sparse.csr_array(sparse.vstack([self.sequence_counts, other.sequence_counts], format="csr"))
        leaps = None
        if self.leaps is not None and other.leaps is not None:
            pairs = [np.concatenate(parts) for parts in zip(*(vars(of).values() for of in (self.leaps, other.leaps)), strict=True)]
            leaps = _counted(*pairs)
        return Affinity(
            num_tokens=self.num_tokens + other.num_tokens,
            num_experts=self.num_experts,
            num_layers=self.num_layers,
            top_k=max(self.top_k, other.top_k),
            sets=tuple(_merged(a, b, self.num_experts) for a, b in zip(self.sets, other.sets, strict=True)),
            load_LE=self.load_LE + other.load_LE,
            coactivation_LEE=self.coactivation_LEE + other.coactivation_LEE,
            transitions_LEE=self.transitions_LEE + other.transitions_LEE,
            sequence_counts=both,
            leaps=leaps,
            trace_digest=hashlib.sha256(f"{self.trace_digest}+{other.trace_digest}".encode()).hexdigest(),
        )


def _expert_sets(experts_TK: NDArray[np.uint16], num_experts: int) -> ExpertSets:
    sorted_TK = np.sort(experts_TK, axis=1)
    return _distinct(sorted_TK, np.ones(len(sorted_TK), dtype=np.int64), num_experts)


def _distinct(sorted_TK: NDArray[np.uint16], count_T: NDArray[np.int64], num_experts: int) -> ExpertSets:
    """Distinct rows with the sums of their counts. Rows are packed into as few 63-bit numbers as hold them, which sort fast."""
    num_tokens, top_k = sorted_TK.shape
    base = num_experts + 1
    per_key = max(1, int(63 / np.log2(base)))
    digits_TK = np.minimum(sorted_TK, num_experts).astype(np.int64)
    keys = []
    for first in range(0, top_k, per_key):
        key_T = np.zeros(num_tokens, dtype=np.int64)
        for column in range(first, min(first + per_key, top_k)):
            key_T = key_T * base + digits_TK[:, column]
        keys.append(key_T)
    order_T = np.argsort(keys[0], kind="stable") if len(keys) == 1 else np.lexsort(keys[::-1])
    starts_T = np.ones(num_tokens, dtype=bool)
    starts_T[1:] = np.any([key_T[order_T][1:] != key_T[order_T][:-1] for key_T in keys], axis=0)
    first_U = np.flatnonzero(starts_T)
    return ExpertSets(sorted_TK[order_T[first_U]], np.add.reduceat(count_T[order_T], first_U))


def _merged(a: ExpertSets, b: ExpertSets, num_experts: int) -> ExpertSets:
    top_k = max(a.experts_UK.shape[1], b.experts_UK.shape[1])
    experts_UK = np.concatenate([_padded(a.experts_UK, top_k), _padded(b.experts_UK, top_k)])
    return _distinct(experts_UK, np.concatenate([a.count_U, b.count_U]), num_experts)


def _padded(experts_UK: NDArray[np.uint16], top_k: int) -> NDArray[np.uint16]:
    return np.pad(experts_UK, ((0, 0), (0, top_k - experts_UK.shape[1])), constant_values=NO_EXPERT)


def _coactivation(sets: ExpertSets, num_experts: int) -> NDArray[np.int64]:
    """int64 [E, E] from the distinct sets. Column E gathers absent choices and is cut off."""
    side = num_experts + 1
    columns_KU = np.minimum(sets.experts_UK.T, num_experts).astype(np.int64)
    upper = np.zeros(side * side)
    for first in range(len(columns_KU)):
        for second in range(first, len(columns_KU)):
            # float64 sums of counts are exact below 2**53 tokens
            upper += np.bincount(columns_KU[first] * side + columns_KU[second], weights=sets.count_U, minlength=side * side)
    upper_EE = upper.reshape(side, side)[:num_experts, :num_experts]
    return np.asarray(upper_EE + np.triu(upper_EE, 1).T, dtype=np.int64)


def _transitions(trace: Trace) -> NDArray[np.int64]:
    side = trace.num_experts + 1
    first_LT = np.minimum(trace.first_choice_TL.T, trace.num_experts).astype(np.int64)
    transitions_LEE = np.zeros((trace.num_layers - 1, trace.num_experts, trace.num_experts), dtype=np.int64)
    for layer in range(trace.num_layers - 1):
        pairs = np.bincount(first_LT[layer] * side + first_LT[layer + 1], minlength=side * side).reshape(side, side)
        transitions_LEE[layer] = pairs[: trace.num_experts, : trace.num_experts]
    return transitions_LEE


def _leaps(trace: Trace) -> Leaps:
    place_T, layer_T = np.zeros(trace.num_tokens, dtype=np.int64), np.full(trace.num_tokens, -1)
    from_, to = [], []
    for layer in range(trace.num_layers + 1):
        if layer < trace.num_layers:
            expert_T = trace.first_choice_TL[:, layer]
            goes_T, next_T = expert_T != NO_EXPERT, 1 + layer * trace.num_experts + expert_T.astype(np.int64)
        else:
            goes_T, next_T = np.ones(trace.num_tokens, dtype=bool), np.full(trace.num_tokens, 1 + layer * trace.num_experts)
        leaps_T = goes_T & (layer_T < layer - 1)
        from_.append(place_T[leaps_T])
        to.append(next_T[leaps_T])
        place_T, layer_T = np.where(goes_T, next_T, place_T), np.where(goes_T, layer, layer_T)
    from_P, to_P = np.concatenate(from_), np.concatenate(to)
    return _counted(from_P, to_P, np.ones(len(from_P), dtype=np.int64))


def _counted(from_P: NDArray[np.int64], to_P: NDArray[np.int64], count_P: NDArray[np.int64]) -> Leaps:
    """Every pair of places once, in order."""
    pairs_2P, which_P = np.unique(np.stack([from_P, to_P]), axis=1, return_inverse=True)
    total_P = np.zeros(pairs_2P.shape[1], dtype=np.int64)
    np.add.at(total_P, which_P.reshape(-1), count_P)
    return Leaps(pairs_2P[0], pairs_2P[1], total_P)


def _sequence_counts(trace: Trace) -> sparse.csr_array | None:
    if trace.sequence_T is None:
        return None
    row_of_T = np.unique(trace.sequence_T, return_inverse=True)[1].reshape(-1)
    num_sequences, num_columns = int(row_of_T.max()) + 1, trace.num_layers * trace.num_experts
    total = sparse.csr_array((num_sequences, num_columns), dtype=np.int64)
    for layer in range(trace.num_layers):
        experts_TK = trace.experts_TLK[:, layer]
        token_A, choice_A = np.nonzero(experts_TK != NO_EXPERT)
        column_A = layer * trace.num_experts + experts_TK[token_A, choice_A].astype(np.int64)
        ones_A = np.ones(len(token_A), dtype=np.int64)
        total = total + sparse.csr_array((ones_A, (row_of_T[token_A], column_A)), shape=total.shape)
    return sparse.csr_array(total)
