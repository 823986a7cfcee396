"""The forecast: which experts a token will choose, judged by its number in the vocabulary alone; learnt from a trace, kept in a small file.

For every token identity and layer it holds the few likeliest experts and the chance of each; the others, and tokens that were never seen,
are taken to choose as all tokens of the layer do. The file is an .npz without pickles:

    token int32 [V]             identities that were seen, ascending
    expert uint16 [V, L, M]     the likeliest experts, likeliest first (65535: fewer than M are likely at all)
    chance uint16 [V, L, M]     the chance of each, in units of 1/65535
    share uint16 [L, E]         the chance of each expert for any token of the layer, in the same units
    format_version, num_tokens, trace_hash, plan_hash, source, digest      what it was learnt from, and sha256 of the arrays

so that it takes 4 V (1 + L M) + 2 L E bytes. What a token costs at each home under a plan (`costs`) is a table [V + 1, R] of integers.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdock import atomic
from crossdock.errors import BadData, UsageError
from crossdock.placement.homing.homes import CopyCosts, IntArray, sums_by_sequence
from crossdock.placement.records.array_files import read_array
from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.placement.records.trace import NO_EXPERT, Trace

FORMAT_VERSION = 1
WHOLE = 65535
"""A chance of 1."""
PRIOR_TOKENS = 4.0
"""How many tokens of the layer's average each identity is taken to have been seen as, beside those that were."""
COST_STEPS = 1 << 20
"""The dearest token costs so much: sums over 2**33 tokens stay below 2**53."""
_ARRAYS = ("token", "expert", "chance", "share")
_FACTS = ("format_version", "num_tokens", "trace_hash", "plan_hash", "source", "digest")
_CHUNK_TOKENS = 1 << 15
_CHUNK_CHANCES = 1 << 21  # chances of identities x experts held in memory at once


@dataclass(frozen=True, eq=False)
class Forecast:
    """See the module. `num_tokens` were seen in the trace with hash `trace_hash`; `plan_hash` is that of the plan it was made beside."""

    token_V: NDArray[np.int32]
    expert_VLM: NDArray[np.uint16]
    chance_VLM: NDArray[np.uint16]
    share_LE: NDArray[np.uint16]
    num_tokens: int = 0
    trace_hash: str = ""
    plan_hash: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.expert_VLM.ndim != 3 or self.share_LE.ndim != 2 or 0 in (*self.expert_VLM.shape, *self.share_LE.shape):
            raise BadData(
                f"experts have shape {self.expert_VLM.shape} and shares {self.share_LE.shape}; a forecast has [V, L, M] and [L, E]"
            )
        num_seen, num_layers, _ = self.expert_VLM.shape
        if self.chance_VLM.shape != self.expert_VLM.shape or self.token_V.shape != (num_seen,) or len(self.share_LE) != num_layers:
            raise BadData("the arrays of the forecast are of different sizes; fit it again")
        if (np.diff(self.token_V) <= 0).any():
            raise BadData("the token identities of the forecast do not ascend; fit it again")
        if ((self.expert_VLM >= self.num_experts) & (self.expert_VLM != NO_EXPERT)).any():
            raise BadData(f"the forecast names an expert beyond its {self.num_experts}; fit it again")

    @property
    def num_layers(self) -> int:
        return int(self.share_LE.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.share_LE.shape[1])

    @property
    def memory_bytes(self) -> int:
        """Of all its arrays."""
        return sum(array.nbytes for array in self._arrays().values())

    @cached_property
    def digest(self) -> str:
        """sha256 of the arrays."""
        sha = hashlib.sha256(json.dumps([FORMAT_VERSION, list(self.expert_VLM.shape), list(self.share_LE.shape)]).encode())
        for array in self._arrays().values():
            sha.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
        return sha.hexdigest()

    # ---- learning ----------------------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, trace: Trace, per_token: int | None = None, prior_tokens: float = PRIOR_TOKENS) -> "Forecast":
        """Learn from a trace that knows its tokens; `per_token` experts are kept for each identity and layer, 4 K where left out.

        Raises `BadData` where the trace does not know its tokens.
        """
        if trace.token_T is None:
            raise BadData("the trace does not know its tokens, and a forecast is by token; record one with `crossdock trace capture`")
        token_V, row_T = np.unique(trace.token_T, return_inverse=True)
        row_T = row_T.reshape(-1)
        num_seen, num_experts = len(token_V), trace.num_experts
        kept = min(num_experts, per_token or 4 * trace.top_k)
        seen_V = np.bincount(row_T, minlength=num_seen)
        expert_VLM = np.full((num_seen, trace.num_layers, kept), NO_EXPERT, dtype=np.uint16)
        chance_VLM = np.zeros(expert_VLM.shape, dtype=np.uint16)
        share_LE = np.zeros((trace.num_layers, num_experts), dtype=np.uint16)
        rows_at_once = max(1, _CHUNK_CHANCES // num_experts)
        for layer in range(trace.num_layers):
            key_TK = row_T[:, None] * (num_experts + 1) + np.minimum(trace.experts_TLK[:, layer], num_experts).astype(np.int64)
            pair_P, count_P = np.unique(key_TK, return_counts=True)
            row_P, expert_P = np.divmod(pair_P, num_experts + 1)
            real_P = expert_P < num_experts
            row_P, expert_P, count_P = row_P[real_P], expert_P[real_P], count_P[real_P]
            share_E = np.bincount(expert_P, count_P, num_experts) / trace.num_tokens
            share_LE[layer] = _whole(share_E)
            for first in range(0, num_seen, rows_at_once):
                here_P = (row_P >= first) & (row_P < first + rows_at_once)
                count_VE = np.zeros((min(rows_at_once, num_seen - first), num_experts))
                count_VE[row_P[here_P] - first, expert_P[here_P]] = count_P[here_P]
                weight_V1 = (seen_V[first : first + rows_at_once] + prior_tokens)[:, None]
                chance_VE = (count_VE + prior_tokens * share_E) / weight_V1
                best_VM = np.argsort(-chance_VE, axis=1, kind="stable")[:, :kept]
                chance_VM = _whole(np.take_along_axis(chance_VE, best_VM, axis=1))
                part = slice(first, first + rows_at_once)
                chance_VLM[part, layer] = chance_VM
                expert_VLM[part, layer] = np.where(chance_VM > 0, best_VM, NO_EXPERT)
        return cls(
            token_V.astype(np.int32), expert_VLM, chance_VLM, share_LE, trace.num_tokens, trace_hash=trace.digest, source=trace.source
        )

    def beside(self, plan: Plan) -> "Forecast":
        """The same, marked as made beside a plan; it serves any plan of the model."""
        return replace(self, plan_hash=plan.digest)

    # ---- use ---------------------------------------------------------------------------------------------------------

    def costs(self, plan: Plan, costs: CopyCosts | Sequence[CopyCosts]) -> "TokenCosts":
        """What a token of each identity is expected to cost at each home, all layers together; `costs` of every layer, or of all alike.

        A device is visited unless none of its experts is chosen; choices are taken to be independent of one another, given the token.
        Raises `BadData` where plan or devices do not fit the forecast.
        """
        costs_L = [costs] * self.num_layers if isinstance(costs, CopyCosts) else costs
        num_devices = costs_L[0].num_devices
        plan.check_model(self.num_layers, self.num_experts, num_devices)
        device_LRE = choose_replica(plan, costs_L[0].node_R) // plan.slots_per_device
        num_rows = len(self.token_V) + 1  # the last stands for every token that was never seen
        cost_VH = np.zeros((num_rows, num_devices))
        rows_at_once = max(1, _CHUNK_CHANCES // self.num_experts)
        for first in range(0, num_rows, rows_at_once):
            row_X = np.arange(first, min(first + rows_at_once, num_rows))
            for layer in range(self.num_layers):
                chance_XE, of_layer = self.chances(layer, row_X), costs_L[layer]
                if not plan.has_replicas:
                    cost_VH[row_X] += of_layer.per_home(*_visits(chance_XE, device_LRE[layer, 0], of_layer))
                    continue
                for home in range(num_devices):
                    cost_VH[row_X, home] += of_layer.at_home(home, *_visits(chance_XE, device_LRE[layer, home], of_layer))
        unit = float(cost_VH.max()) / COST_STEPS or 1.0
        return TokenCosts(self.token_V, np.rint(cost_VH / unit).astype(np.int64), unit)

    def chances(self, layer: int, row_X: IntArray) -> NDArray[np.float64]:
        """float64 [X, E]: the chance of every expert for the identities in rows `row_X`; row V is that of a token never seen."""
        share_E = self.share_LE[layer] / WHOLE
        seen_X = np.flatnonzero(row_X < len(self.token_V))
        listed_XE = np.zeros((len(row_X), self.num_experts + 1))
        known_XE = np.zeros(listed_XE.shape, dtype=bool)
        column_SM = np.minimum(self.expert_VLM[row_X[seen_X], layer], self.num_experts).astype(np.int64)
        listed_XE[seen_X[:, None], column_SM] = self.chance_VLM[row_X[seen_X], layer] / WHOLE
        known_XE[seen_X[:, None], column_SM] = True
        listed_XE, known_XE = listed_XE[:, :-1], known_XE[:, :-1]
        # choices that are not listed fall on the other experts as they do in the layer as a whole
        rest_XE = np.where(known_XE, 0.0, share_E)
        rest_X1 = rest_XE.sum(axis=1, keepdims=True)
        left_X1 = np.maximum(share_E.sum() - listed_XE.sum(axis=1, keepdims=True), 0.0)
        left_X1[left_X1 < self.num_experts / WHOLE] = 0.0  # no more than rounding
        return np.minimum(listed_XE + rest_XE * (left_X1 / np.maximum(rest_X1, 1e-300)), 1.0)

    def accuracy(self, trace: Trace) -> dict[str, float]:
        """How well the forecast tells the choices of another trace, each a share of 0 to 1.

        seen: tokens whose identity was seen in the fit. recall: choices that are among the K experts forecast as likeliest for their token
        and layer; recall_by_layer: the same when nothing is known of the token. chance: the mean chance that the forecast gave to a choice
        that was made. Raises `BadData` where the trace is of another model or does not know its tokens.
        """
        if trace.token_T is None:
            raise BadData("the trace does not know its tokens, and the forecast is by token; record one with `crossdock trace capture`")
        if (trace.num_layers, trace.num_experts) != (self.num_layers, self.num_experts):
            raise BadData(
                f"the forecast is for {self.num_layers} layers x {self.num_experts} experts, and the trace has {trace.num_layers} x "
                f"{trace.num_experts}; fit a forecast for this model"
            )
        row_T = rows_of(self.token_V, trace.token_T)
        row_X, place_T = np.unique(row_T, return_inverse=True)
        unknown = np.array([len(self.token_V)])
        made = hit = hit_by_layer = 0
        chance = 0.0
        for layer in range(self.num_layers):
            chance_XE = self.chances(layer, row_X)
            choice_TK = trace.experts_TLK[:, layer].astype(np.int64)
            real_TK = choice_TK != NO_EXPERT
            choice_TK = np.where(real_TK, choice_TK, 0)
            made += int(real_TK.sum())
            hit += int((real_TK & (_order(chance_XE)[place_T.reshape(-1, 1), choice_TK] < trace.top_k)).sum())
            hit_by_layer += int((real_TK & (_order(self.chances(layer, unknown))[0][choice_TK] < trace.top_k)).sum())
            chance += float(chance_XE[place_T.reshape(-1, 1), choice_TK][real_TK].sum())
        made = max(made, 1)
        return {
            "seen": float((row_T < len(self.token_V)).mean()),
            "recall": hit / made,
            "recall_by_layer": hit_by_layer / made,
            "chance": chance / made,
        }

    # ---- file --------------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write the .npz atomically."""
        arrays: dict[str, NDArray[Any]] = dict(self._arrays())
        facts = {"format_version": FORMAT_VERSION, "num_tokens": self.num_tokens, "trace_hash": self.trace_hash}
        facts |= {"plan_hash": self.plan_hash, "source": self.source, "digest": self.digest}
        with atomic.replacing(Path(path)) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **arrays, **{name: np.array(value) for name, value in facts.items()})  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path | str) -> "Forecast":
        """Read a forecast. Raises `MissingInput` where it cannot be read, `BadData` where it is none or its hash does not fit."""
        path = Path(path)
        try:
            found = {name: read_array(path, name) for name in (*_ARRAYS, *_FACTS)}
        except BadData as error:
            raise BadData(f"{error}; a forecast is what `crossdock plan solve --homing` writes beside its plan") from error
        try:
            return cls._checked(found)
        except BadData as error:
            raise BadData(f"{path}: {error}") from error

    @classmethod
    def _checked(cls, found: dict[str, NDArray[Any]]) -> "Forecast":
        if (version := str(found["format_version"])) != str(FORMAT_VERSION):
            raise BadData(f"format_version is {version}, and this release reads {FORMAT_VERSION}; fit the forecast again")
        for name, kind in zip(_ARRAYS, ("int32", "uint16", "uint16", "uint16"), strict=True):
            if found[name].dtype != np.dtype(kind):
                raise BadData(f"{name} is of type {found[name].dtype} and must be {kind}; fit the forecast again")
        if found["num_tokens"].shape != () or found["num_tokens"].dtype.kind not in "iu":
            raise BadData("num_tokens is no integer; fit the forecast again")
        known: dict[str, Any] = {name: str(found[name]) for name in ("trace_hash", "plan_hash", "source")}
        token_V, expert_VLM, chance_VLM, share_LE = (found[name] for name in _ARRAYS)
        forecast = cls(token_V, expert_VLM, chance_VLM, share_LE, num_tokens=int(found["num_tokens"]), **known)
        if forecast.digest != str(found["digest"]):
            raise BadData("the arrays do not have the hash that the file states; it was changed or damaged: fit the forecast again")
        return forecast

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return dict(zip(_ARRAYS, (self.token_V, self.expert_VLM, self.chance_VLM, self.share_LE), strict=True))


@dataclass(frozen=True, eq=False)
class TokenCosts:
    """What a token of each identity is expected to cost at each home: `cost_VH` int64 [V + 1, R], times `unit`; see `Forecast.costs`."""

    token_V: NDArray[np.int32]
    cost_VH: IntArray
    unit: float

    def of(self, token_BQ: NDArray[np.integer[Any]]) -> IntArray:
        """int64 [B, R]: what each sequence of tokens [B, positions] is expected to cost at each home."""
        cost_BH = np.empty((len(token_BQ), self.cost_VH.shape[1]), dtype=np.int64)
        step = max(1, _CHUNK_TOKENS // max(1, token_BQ.shape[1]))
        for first in range(0, len(token_BQ), step):
            row_BQ = rows_of(self.token_V, token_BQ[first : first + step])
            cost_BH[first : first + step] = self.cost_VH[row_BQ].sum(axis=1)
        return cost_BH

    def of_trace(self, trace: Trace, sequence_T: IntArray) -> IntArray:
        """int64 [Q, R]: the same of a trace's sequences (`homing.sequences_of`)."""
        if trace.token_T is None:
            raise UsageError("the trace does not know its tokens, and the forecast is by token; record one with `crossdock trace capture`")
        kept_T = sequence_T >= 0
        cost_TH = self.cost_VH[rows_of(self.token_V, trace.token_T[kept_T])]
        return sums_by_sequence(sequence_T[kept_T], cost_TH, int(sequence_T.max()) + 1).astype(np.int64)


def rows_of(token_V: NDArray[np.int32], token_X: NDArray[np.integer[Any]]) -> IntArray:
    """The row of each token among the identities `token_V` (ascending), len(token_V) where it is not among them."""
    row_X = np.searchsorted(token_V, token_X)
    known_X = token_V[np.minimum(row_X, len(token_V) - 1)] == token_X
    return np.where(known_X, row_X, len(token_V))


def _visits(
    chance_XE: NDArray[np.float64], device_E: NDArray[np.int32], costs: CopyCosts
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Expected copies [X, R] to devices and [X, N] to nodes."""
    node_R, num_nodes = np.array(costs.node_R), max(costs.node_R) + 1
    device_XR = np.empty((len(chance_XE), costs.num_devices))
    for device in range(costs.num_devices):
        of_device_XE = chance_XE[:, device_E == device]
        device_XR[:, device] = 1.0 - np.prod(1.0 - of_device_XE, axis=1) if costs.distinct else of_device_XE.sum(axis=1)
    node_XN = np.zeros((len(chance_XE), num_nodes))
    for node in range(num_nodes if costs.node_HN is not None else 0):
        node_XN[:, node] = 1.0 - np.prod(1.0 - chance_XE[:, node_R[device_E] == node], axis=1)
    return device_XR, node_XN


def _order(chance_XE: NDArray[np.float64]) -> IntArray:
    """int64 [X, E]: the place of each expert when the likeliest stands first."""
    return np.argsort(np.argsort(-chance_XE, axis=1, kind="stable"), axis=1, kind="stable")


def _whole(chance: NDArray[np.float64]) -> NDArray[np.uint16]:
    return np.rint(np.clip(chance, 0.0, 1.0) * WHOLE).astype(np.uint16)
