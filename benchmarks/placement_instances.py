"""Generated routing for `benchmarks.placement`: tokens with a hidden state that drifts through the layers, and experts that look for it.

A token's state is a unit Gaussian of `width` numbers that keeps the share `memory` of itself from layer to layer. Every expert of every
layer has a random direction; a token's score is the product of the two, less a bias that evens the load as an auxiliary loss would,
`balance` of the way. 256 experts with width 16 and memory 0.95 have 1.5 nats of mutual information between first choices of
consecutive layers (gpt-oss-20b: 1.0 with 32 experts).
"""

import numpy as np

from crossdock.placement.records.trace import NO_EXPERT, Trace

_CHUNK = 8192
BIAS_ROUNDS = 12


def drifting_trace(
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    top_k: int = 1,
    *,
    seed: int = 0,
    width: int = 24,
    memory: float = 0.97,
    balance: float = 0.8,
) -> Trace:
    """A trace of the given size; the same arguments give the same trace."""
    rng = np.random.default_rng(seed)
    state_TD = rng.standard_normal((num_tokens, width), dtype=np.float32)
    experts_TLK = np.empty((num_tokens, num_layers, top_k), dtype=np.uint16)
    for layer in range(num_layers):
        direction_ED = rng.standard_normal((num_experts, width), dtype=np.float32)
        bias_E = _evening_bias(state_TD[: min(num_tokens, _CHUNK)] @ direction_ED.T, top_k, balance)
        for first in range(0, num_tokens, _CHUNK):
            score_TE = state_TD[first : first + _CHUNK] @ direction_ED.T - bias_E
            experts_TLK[first : first + _CHUNK, layer] = _best(score_TE, top_k)
        noise_TD = rng.standard_normal((num_tokens, width), dtype=np.float32)
        state_TD = np.float32(memory) * state_TD + np.float32(np.sqrt(1.0 - memory**2)) * noise_TD
    return Trace(experts_TLK, num_experts, source=f"drifting states, {width} wide, memory {memory}, seed {seed}")


def joined_pairs(trace: Trace) -> Trace:
    """Every two consecutive layers as one of twice as many experts and twice as many choices; a last layer without a partner is left out.

    A stand-in for recorded routing of larger models: the choices are real, and those of consecutive layers hang together.
    """
    even, odd = trace.experts_TLK[:, 0 : trace.num_layers // 2 * 2 : 2], trace.experts_TLK[:, 1::2]
    shifted = np.where(odd == NO_EXPERT, NO_EXPERT, odd + np.uint16(trace.num_experts))
    return Trace(np.concatenate([even, shifted], axis=2), 2 * trace.num_experts, source=f"pairs of layers of {trace.source}")


def _best(score_TE: np.ndarray, top_k: int) -> np.ndarray:
    """[T, K]: the highest scores first."""
    if top_k == 1:
        return score_TE.argmax(axis=1)[:, None]
    best_TK = np.argpartition(-score_TE, top_k - 1, axis=1)[:, :top_k]
    order_TK = np.argsort(-np.take_along_axis(score_TE, best_TK, axis=1), axis=1)
    return np.take_along_axis(best_TK, order_TK, axis=1)


def _evening_bias(score_TE: np.ndarray, top_k: int, balance: float) -> np.ndarray:
    """[E]: what is taken off every expert's score so that loads come closer to even."""
    num_experts = score_TE.shape[1]
    bias_E = np.zeros(num_experts, dtype=np.float32)
    for _ in range(BIAS_ROUNDS):
        load_E = np.bincount(_best(score_TE - bias_E, top_k).ravel(), minlength=num_experts) / (len(score_TE) * top_k / num_experts)
        bias_E += np.float32(0.1 * balance * score_TE.std()) * np.clip(load_E - 1.0, -1.0, 2.0).astype(np.float32)
    return bias_E
