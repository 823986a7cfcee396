"""The routing trace: which experts every token chose in every MoE layer, and where known its weights, sequence, home and identity.

The file is an .npz without pickles: `experts` uint16 [T, L, K] (65535: dropped, or fewer than K choices), `num_experts`, `format_version`,
`source`, and optionally `weights` float16 [T, L, K], `sequence`, `home` and `token` int32 [T]. Read as well: an .npz that holds `experts`
alone, of any integer type, and an .npy of shape [T, L] (as ExFlow's published tool writes) or [T, L, K]; -1 is no choice in these.
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossdock import atomic
from crossdock.errors import BadData, MissingInput, UsageError
from crossdock.placement.records.array_files import MAX_RATIO, SUSPICIOUS_BYTES, check_header, check_room
from crossdock.strict_yaml import nearest

FORMAT_VERSION = 1
NO_EXPERT = 65535
MAX_EXPERTS = NO_EXPERT

_PER_TOKEN = ("sequence", "home", "token")
_KNOWN = ("experts", "weights", *_PER_TOKEN, "num_experts", "format_version", "source")
_NPZ_MAGIC = b"PK"
_NPY_MAGIC = b"\x93NUMPY"
_CHUNK_CHOICES = 1 << 18  # choices checked at a time: small enough for the cache, so that checks cost no memory
_FASTEST_DEFLATE = 1  # seven times as fast as the default level on real routing, for a tenth more bytes


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing of T tokens through L MoE layers with at most K choices each.

    experts_TLK   uint16 [T, L, K], NO_EXPERT where there is no choice; no token names an expert twice in a layer
    num_experts   E; every choice is below it
    weights_TLK   float16 [T, L, K], finite, or None
    sequence_T    int32 [T], the sequence that a token belongs to; equal numbers are one sequence; or None
    home_T        int32 [T], the device of the expert-parallel group on which the token lives, or None
    token_T       int32 [T], the token's number in the vocabulary, or None
    source        where the trace comes from, in words
    num_experts_known   False where `load` had to take num_experts from the largest choice

    Arrays of other integer or float types are converted. Raises `BadData`, with the position and the remedy, where a rule is broken.
    """

    experts_TLK: NDArray[np.uint16]
    num_experts: int
    weights_TLK: NDArray[np.float16] | None = None
    sequence_T: NDArray[np.int32] | None = None
    home_T: NDArray[np.int32] | None = None
    token_T: NDArray[np.int32] | None = None
    source: str = ""
    num_experts_known: bool = True

    def __post_init__(self) -> None:
        experts_TLK = np.asarray(self.experts_TLK)
        if experts_TLK.ndim != 3 or 0 in experts_TLK.shape:
            raise BadData(f"experts have shape {experts_TLK.shape}; give [tokens, layers, choices], none of them 0")
        if experts_TLK.dtype.kind not in "iu":
            raise BadData(f"experts are of type {experts_TLK.dtype}; give integers")
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise BadData(f"num_experts is {self.num_experts}; give 1 to {MAX_EXPERTS}")
        object.__setattr__(self, "experts_TLK", _read_only(_checked_choices(experts_TLK, self.num_experts)))
        if self.weights_TLK is not None:
            object.__setattr__(self, "weights_TLK", _read_only(_checked_weights(np.asarray(self.weights_TLK), experts_TLK.shape)))
        for name in _PER_TOKEN:
            values = getattr(self, f"{name}_T")
            if values is not None:
                object.__setattr__(self, f"{name}_T", _read_only(_checked_per_token(name, np.asarray(values), len(experts_TLK))))

    @property
    def num_tokens(self) -> int:
        return int(self.experts_TLK.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.experts_TLK.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.experts_TLK.shape[2])

    @cached_property
    def digest(self) -> str:
        """sha256 of the routing and all that is known of the tokens; the source does not count."""
        sha = hashlib.sha256(json.dumps([FORMAT_VERSION, self.num_experts, list(self.experts_TLK.shape)]).encode())
        for name, array in self._arrays().items():
            sha.update(name.encode())
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    @cached_property
    def first_choice_TL(self) -> NDArray[np.uint16]:
        """uint16 [T, L]: the choice with the largest weight where weights are known, else the first one listed; NO_EXPERT where none."""
        if self.weights_TLK is None:
            return self.experts_TLK[:, :, 0]
        weights_TLK = np.where(self.experts_TLK == NO_EXPERT, np.float16(-np.inf), self.weights_TLK)
        largest_TL1 = weights_TLK.argmax(axis=2)[:, :, None]
        return np.take_along_axis(self.experts_TLK, largest_TL1, axis=2)[:, :, 0]

    def select(self, tokens: slice | ArrayLike) -> "Trace":
        """The trace of some tokens: a slice, a boolean mask [T] or positions. Raises `BadData` where none is left."""
        chosen: Any = tokens if isinstance(tokens, slice) else np.asarray(tokens)
        parts = {name: array[chosen] for name, array in self._arrays().items()}
        return _trace_of(parts, self.num_experts, self.source, self.num_experts_known)

    def save(self, path: Path | str) -> None:
        """Write the .npz atomically, compressed."""
        arrays: dict[str, NDArray[Any]] = dict(self._arrays())
        arrays |= {"num_experts": np.array(self.num_experts), "format_version": np.array(FORMAT_VERSION), "source": np.array(self.source)}
        with (
            atomic.replacing(Path(path)) as aside,
            zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED, compresslevel=_FASTEST_DEFLATE) as archive,
        ):
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)

    @classmethod
    def load(cls, path: Path | str, num_experts: int | None = None) -> "Trace":
        """Read a trace file of one of the forms in the module's docstring.

        `num_experts` overrides what the file says. Where neither says it, it is the largest choice + 1, rounded up to nothing: the last
        experts, if no token chose them, are then missing. Raises `MissingInput` where the file cannot be read, and `BadData`
        where it is no trace; both name the file and the remedy.
        """
        path = Path(path)
        try:
            return _load(path, num_experts)
        except BadData as error:
            raise BadData(f"{path}: {error}") from error

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """What is known, by its name in the file."""
        known = {"experts": self.experts_TLK, "weights": self.weights_TLK}
        known |= {name: getattr(self, f"{name}_T") for name in _PER_TOKEN}
        return {name: array for name, array in known.items() if array is not None}


def in_pieces(trace: Trace, number: int) -> tuple[Trace, ...]:
    """The trace cut into `number` consecutive pieces, as equal as whole tokens allow: 5 tokens in 2 pieces are 3 and 2.

    Raises `UsageError` where it has fewer tokens.
    """
    if not 1 <= number <= trace.num_tokens:
        raise UsageError(f"{number} pieces of a trace of {trace.num_tokens} tokens; give 1 to {trace.num_tokens}")
    piece_T = np.arange(trace.num_tokens) * number // trace.num_tokens
    return tuple(trace.select(piece_T == piece) for piece in range(number))


def concatenate(traces: Sequence[Trace]) -> Trace:
    """One trace of the tokens of all, in order; for traces of one model.

    Sequences of different traces stay apart: later ones are renumbered. Fewer choices than the widest trace has are padded with NO_EXPERT.
    What one trace does not know, the whole does not know. Raises `BadData` where there is no trace or the models differ.
    """
    if not traces:
        raise BadData("no trace to concatenate; give at least one")
    models = {(trace.num_layers, trace.num_experts) for trace in traces}
    if len(models) > 1:
        raise BadData(f"traces of different models: (layers, experts) are {sorted(models)}; concatenate traces of one model")
    top_k = max(trace.top_k for trace in traces)
    parts: dict[str, NDArray[Any]] = {"experts": np.concatenate([_widened(trace.experts_TLK, top_k, NO_EXPERT) for trace in traces])}
    shared = set.intersection(*(set(trace._arrays()) for trace in traces))
    if "weights" in shared:
        parts["weights"] = np.concatenate([_widened(trace._arrays()["weights"], top_k, 0) for trace in traces])
    for name in sorted(shared & {"home", "token"}):
        parts[name] = np.concatenate([trace._arrays()[name] for trace in traces])
    if "sequence" in shared:
        parts["sequence"] = _renumbered([trace._arrays()["sequence"] for trace in traces])
    sources = dict.fromkeys(trace.source for trace in traces if trace.source)
    return _trace_of(parts, traces[0].num_experts, "; ".join(sources), all(trace.num_experts_known for trace in traces))


def _trace_of(parts: dict[str, NDArray[Any]], num_experts: int, source: str, num_experts_known: bool) -> Trace:
    per_token = {f"{name}_T": parts.get(name) for name in _PER_TOKEN}
    return Trace(parts["experts"], num_experts, parts.get("weights"), source=source, num_experts_known=num_experts_known, **per_token)


def _load(path: Path, num_experts: int | None) -> Trace:
    arrays = _read_file(path)
    if arrays["experts"].ndim == 2:
        arrays["experts"] = arrays["experts"][:, :, None]
    if "format_version" not in arrays and arrays["experts"].dtype.kind == "i" and (arrays["experts"] == -1).any():
        arrays["experts"] = np.where(arrays["experts"] == -1, NO_EXPERT, arrays["experts"].astype(np.int64))  # as other systems write it
    stated = num_experts if num_experts is not None else _stated_num_experts(arrays)
    source = str(arrays["source"]) if "source" in arrays else path.name
    return _trace_of(arrays, _largest_choice(arrays["experts"]) + 1 if stated is None else stated, source, stated is not None)


def _read_file(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a trace file by name; one named `experts` is always among them."""
    try:
        with path.open("rb") as file:
            magic = file.read(6)
    except FileNotFoundError as error:
        raise MissingInput(f"{path}: no such trace; check the path, or record one with `crossdock trace capture`") from error
    except OSError as error:
        raise MissingInput(f"{path}: cannot read the trace: {error.strerror}; give a readable file") from error
    try:
        if magic.startswith(_NPZ_MAGIC):
            return _read_npz(path)
        if magic == _NPY_MAGIC:
            with path.open("rb") as file:
                check_header(file, path.stat().st_size, "the array")
            return {"experts": np.load(path, allow_pickle=False)}
    except (BadData, MemoryError):
        raise
    except Exception as error:  # of damaged bytes the readers of zip and numpy raise anything, from zlib.error to tokenize.TokenError
        why = " ".join(str(error).split())[:200]
        raise BadData(
            f"damaged, truncated or holding pickled objects ({why}); copy or record it again, with plain integer arrays"
        ) from error
    what = f"it begins with {magic!r}" if magic else "it is empty"
    raise BadData(f"neither .npz nor .npy: {what}; give what `crossdock trace capture` wrote, an .npz with `experts`, or an .npy")


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    _check_sizes(path)
    with np.load(path, allow_pickle=False) as archive:
        names = list(archive.files)
        if "experts" not in names:
            raise BadData(f"no array named experts among {', '.join(names[:10]) or 'none'}; name the [tokens, layers, choices] array so")
        if "format_version" in names:
            for name in names:
                if name not in _KNOWN:
                    raise BadData(f"unknown array {name!r}{_perhaps(name)}; the arrays of a trace are {', '.join(_KNOWN)}")
        arrays = {}
        for name in (name for name in names if name in _KNOWN):
            array = archive[name]
            assert isinstance(array, np.ndarray)
            arrays[name] = array
    if "format_version" in arrays and (version := _integer(arrays["format_version"], "format_version")) != FORMAT_VERSION:
        raise BadData(f"format_version is {version}, and this release reads {FORMAT_VERSION}; record the trace again")
    return arrays


def _check_sizes(path: Path) -> None:
    """Raise `BadData` unless what the archive's arrays unpack to is what their headers say, and fits this machine."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.filename.removesuffix(".npy") in _KNOWN]
        if repeated := len(members) - len({member.filename.removesuffix(".npy") for member in members}):
            raise BadData(f"{repeated} of its arrays stand twice; write the file with numpy.savez")
        unpacked, packed = sum(member.file_size for member in members), max(1, sum(member.compress_size for member in members))
        check_room(unpacked)
        if unpacked > SUSPICIOUS_BYTES and unpacked > MAX_RATIO * packed:
            raise BadData(
                f"{packed} bytes unpack to {unpacked}; routing does not compress {unpacked // packed}-fold: this is no recorded trace, and "
                "not read"
            )
        for member in members:
            with archive.open(member) as file:
                check_header(file, member.file_size, member.filename)


def _stated_num_experts(arrays: dict[str, NDArray[Any]]) -> int | None:
    return _integer(arrays["num_experts"], "num_experts") if "num_experts" in arrays else None


def _integer(array: NDArray[Any], name: str) -> int:
    if array.shape not in ((), (1,)) or array.dtype.kind not in "iu":
        raise BadData(f"{name} has shape {array.shape} and type {array.dtype}; give one integer")
    return int(array.reshape(()))


def _largest_choice(experts: NDArray[Any]) -> int:
    """The largest expert that any token chose; the checks of `Trace` name choices that cannot be."""
    if experts.dtype.kind not in "iu" or experts.size == 0:
        return 0
    largest = int(experts.max())
    if largest >= NO_EXPERT:
        chosen = experts[experts < NO_EXPERT]
        if not chosen.size:
            raise BadData(f"no token chose an expert below {NO_EXPERT}, so the number of experts is unknown; state num_experts")
        largest = int(chosen.max())
    return max(largest, 0)


def _checked_choices(experts_TLK: NDArray[Any], num_experts: int) -> NDArray[np.uint16]:
    num_tokens, num_layers, top_k = experts_TLK.shape
    step = max(1, _CHUNK_CHOICES // (num_layers * top_k))
    for first in range(0, num_tokens, step):
        chunk_TLK = experts_TLK[first : first + step]
        outside = ((chunk_TLK < 0) | (chunk_TLK >= num_experts)) & (chunk_TLK != NO_EXPERT)
        if outside.any():
            token, layer, choice = np.argwhere(outside)[0]
            raise BadData(
                f"token {first + token}, layer {layer}, choice {choice} is expert {chunk_TLK[token, layer, choice]}; with "
                f"{num_experts} experts it must be 0..{num_experts - 1}, or {NO_EXPERT} for none; state the right number of experts "
                "or mend the trace"
            )
        _refuse_repeated(chunk_TLK, first)
    return experts_TLK.astype(np.uint16, copy=False)


def _refuse_repeated(chunk_TLK: NDArray[Any], first_token: int) -> None:
    """Compare the choices of every token pairwise; one contiguous row per choice keeps that at memory speed."""
    num_layers, top_k = chunk_TLK.shape[1:]
    choices_KC = np.ascontiguousarray(chunk_TLK.reshape(-1, top_k).T)
    for later in range(1, top_k):
        for earlier in range(later):
            equal_C = choices_KC[earlier] == choices_KC[later]
            if equal_C.any() and (equal_C := equal_C & (choices_KC[later] != NO_EXPERT)).any():
                token, layer = divmod(int(np.flatnonzero(equal_C)[0]), num_layers)
                raise BadData(
                    f"token {first_token + token}, layer {layer} names expert {chunk_TLK[token, layer, later]} twice (choices {earlier} "
                    f"and {later}); put {NO_EXPERT} for a choice that was dropped"
                )


def _checked_weights(weights_TLK: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float16]:
    if weights_TLK.shape != shape:
        raise BadData(f"weights have shape {weights_TLK.shape} and experts {shape}; give one weight for every choice")
    if weights_TLK.dtype.kind not in "fiu":
        raise BadData(f"weights are of type {weights_TLK.dtype}; give floating-point numbers")
    with np.errstate(over="ignore"):
        weights_TLK = weights_TLK.astype(np.float16, copy=False)
    finite = np.isfinite(weights_TLK)
    if not finite.all():
        token, layer, choice = np.argwhere(~finite)[0]
        raise BadData(
            f"the weight of token {token}, layer {layer}, choice {choice} is {weights_TLK[token, layer, choice]} in float16; "
            "give finite weights, or leave them out"
        )
    return weights_TLK


def _checked_per_token(name: str, values_T: NDArray[Any], num_tokens: int) -> NDArray[np.int32]:
    if values_T.shape != (num_tokens,):
        raise BadData(f"{name} has shape {values_T.shape}, and there are {num_tokens} tokens; give one {name} for every token")
    if values_T.dtype.kind not in "iu":
        raise BadData(f"{name} is of type {values_T.dtype}; give integers")
    outside_T = (values_T < 0) | (values_T > np.iinfo(np.int32).max)
    if outside_T.any():
        token = int(np.flatnonzero(outside_T)[0])
        raise BadData(f"{name} of token {token} is {values_T[token]}; give 0..{np.iinfo(np.int32).max}")
    return values_T.astype(np.int32, copy=False)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.setflags(write=False)
    return view


def _widened(array_TLK: NDArray[Any], top_k: int, fill: int) -> NDArray[Any]:
    return np.pad(array_TLK, ((0, 0), (0, 0), (0, top_k - array_TLK.shape[2])), constant_values=fill)


def _renumbered(sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """Shift later traces' sequences past the earlier ones', which keeps their order."""
    first, shifted = 0, []
    for sequence_T in sequences:
        shifted.append(sequence_T.astype(np.int64) + first)
        first = int(shifted[-1].max()) + 1
    return np.concatenate(shifted)


def _perhaps(name: str) -> str:
    meant = nearest(name, _KNOWN)
    return f" (did you mean {meant!r}?)" if meant else ""
