"""SGLang's expert distribution recorder: what its four modes and its older versions write, as traces.

    per_token              records with `topk_ids_of_layer` [layers, tokens, choices] of physical slots, -1 for none: a whole trace
    per_pass               records with `global_physical_count` [layers, slots]: loads alone
    stat, stat_approx      `logical_count` [steps, layers, experts]: loads alone; so is the JSON that `--init-expert-location` takes
    CSV of early versions  lines of layer_id, expert_id, count: loads alone

Slots become experts through `last_physical_to_logical_map` [layers, slots]; layers in which nobody chose anything are dense and left out.
Loads alone make a trace of one choice per token: every expert is chosen as often as it was counted, and the choices of one layer say
nothing about those of the next. It serves methods that balance load, and promises no savings of traffic, because none can be known.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import BadData
from crossdock.placement.records.trace import MAX_EXPERTS, NO_EXPERT, Trace

IntArray = NDArray[np.int64]

MAX_LOAD_TOKENS = 100_000  # tokens of a trace made from loads; larger counts are scaled down, to within one token for each expert
MAX_COUNTS = 1 << 22
"""Layers x experts of loads that are read: a hundred layers of forty thousand experts."""
MAX_CHOICES = 1 << 27
"""Tokens x layers of a trace made from loads; of more than a thousand layers fewer tokens are made."""
_MOST = 1 << 46  # of one expert; a layer's sum stays below 2**62
CSV_HEAD = ["layer_id", "expert_id", "count"]
ONLY_LOADS = "loads alone: choices of a token, or of one layer and the next, are not known to belong together"


def trace_of(dump: Any, name: str, num_experts: int | None = None) -> Trace:
    """The trace of a dump whose tensors have become arrays. `name` goes into its source. Raises `BadData` for what is no dump."""
    if not isinstance(dump, Mapping):
        raise BadData(
            f"a {type(dump).__name__} is no dump of the expert distribution recorder; give an object with records or logical_count"
        )
    if "records" in dump:
        return _of_records(dump, name, num_experts)
    if "logical_count" in dump:
        count = _integers(dump["logical_count"], "logical_count", (2, 3))
        return trace_of_loads(count.sum(axis=0) if count.ndim == 3 else count, name, num_experts)
    raise BadData(
        f"neither records nor logical_count among {', '.join(map(str, list(dump)[:8])) or 'no keys'}; is it a dump of the expert "
        "distribution recorder? A placement map is read by `crossdock plan import`"
    )


def trace_of_csv(text: str, name: str, num_experts: int | None = None) -> Trace:
    """The trace of the CSV that SGLang wrote before its recorder had modes."""
    rows = _rows(text)
    if (head := next(rows, None)) != CSV_HEAD:
        raise BadData(
            f"the first line is {'absent' if head is None else ','.join(head)[:60]!r}; an expert distribution has {','.join(CSV_HEAD)}"
        )
    count_of: dict[tuple[int, int], int] = {}  # by layer and expert
    for line, row in enumerate(rows, 2):
        if len(row) != 3 or not all(cell.strip().isdecimal() for cell in row) or max(map(len, row)) > 15:
            raise BadData(f"line {line} is {','.join(row)[:60]!r}; give three whole numbers: layer, expert, count")
        layer, expert, count = map(int, row)
        if max(layer, expert) >= MAX_EXPERTS:
            raise BadData(f"line {line} counts expert {expert} of layer {layer}; give layers and experts below {MAX_EXPERTS}")
        count_of[layer, expert] = count_of.get((layer, expert), 0) + count
        if len(count_of) > MAX_COUNTS:
            raise BadData(f"line {line}: more than {MAX_COUNTS} counts of different experts; give the layers that you need")
    if not count_of:
        raise BadData("0 lines of counts; give at least one")
    row_of = {layer: row for row, layer in enumerate(sorted({layer for layer, _ in count_of}))}
    count_LE = _zero_counts(len(row_of), max(expert for _, expert in count_of) + 1)
    for (layer, expert), count in count_of.items():
        count_LE[row_of[layer], expert] = min(count, 1 << 62)  # refused as such
    return trace_of_loads(count_LE, name, num_experts)


def _rows(text: str) -> Iterator[list[str]]:
    """The lines' cells, one line at a time: a text of a gigabyte would be tens of them as lists."""
    reader = csv.reader(_lines(text))
    try:
        yield from reader
    except csv.Error as error:
        raise BadData(f"line {reader.line_num} is no line of a CSV ({error}); write it again") from error


def _lines(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def _zero_counts(num_layers: int, num_experts: int) -> IntArray:
    if num_layers * num_experts > MAX_COUNTS:
        raise BadData(
            f"{num_layers} layers of experts up to {num_experts - 1} are {num_layers * num_experts} counts, and at most {MAX_COUNTS} are "
            "read; number experts from 0 without gaps, or give the layers that you need"
        )
    return np.zeros((num_layers, num_experts), dtype=np.int64)


def trace_of_loads(count_LE: IntArray, name: str, num_experts: int | None = None) -> Trace:
    """A trace of one choice per token in which every expert is chosen in proportion to `count_LE` [layers, experts]."""
    if int(count_LE.min()) < 0 or int(count_LE.max()) > _MOST:
        layer, expert = np.argwhere((count_LE < 0) | (count_LE > _MOST))[0]
        raise BadData(f"layer {layer}, expert {expert} was chosen {count_LE[layer, expert]} times; give counts from 0 to {_MOST}")
    if count_LE.shape[1] > MAX_EXPERTS:
        raise BadData(f"counts of {count_LE.shape[1]} experts; a layer has at most {MAX_EXPERTS}")
    count_LE = count_LE[count_LE.any(axis=1)]
    if not len(count_LE):
        raise BadData("no expert was chosen at all; record while requests are served")
    most = int(count_LE.sum(axis=1).max())
    num_tokens = max(1, min(most, MAX_LOAD_TOKENS, MAX_CHOICES // len(count_LE)))
    rng = np.random.default_rng(0)
    experts_TL1 = np.full((num_tokens, len(count_LE), 1), NO_EXPERT, dtype=np.uint16)
    for layer, count_E in enumerate(count_LE):
        choices = np.repeat(np.arange(len(count_E)), _apportioned(count_E, num_tokens, most))
        experts_TL1[: len(choices), layer, 0] = choices
        rng.shuffle(experts_TL1[:, layer, 0])
    known = count_LE.shape[1] if num_experts is None else num_experts
    return Trace(experts_TL1, known, source=f"{name}: {ONLY_LOADS}")


def _of_records(dump: Mapping[str, Any], name: str, num_experts: int | None) -> Trace:
    records = dump["records"]
    if not isinstance(records, Sequence) or not records or not all(isinstance(record, Mapping) for record in records):
        raise BadData("records is empty or no list of objects; record while requests are served, and dump once")
    logical_LP = _integers(dump.get("last_physical_to_logical_map"), "last_physical_to_logical_map", (2,))
    if int(logical_LP.min()) < 0 or int(logical_LP.max()) >= MAX_EXPERTS:
        raise BadData(f"last_physical_to_logical_map ranges over {logical_LP.min()}..{logical_LP.max()}; give experts from 0")
    known = int(logical_LP.max()) + 1 if num_experts is None else num_experts
    if not all("topk_ids_of_layer" in record for record in records):
        return trace_of_loads(_counted(records, logical_LP), name, known)
    experts_TLK = np.concatenate([_choices(record, number, logical_LP) for number, record in enumerate(records)])
    chosen_TLK = experts_TLK != NO_EXPERT
    kept_T, kept_L, kept_K = chosen_TLK.any(axis=(1, 2)), chosen_TLK.any(axis=(0, 2)), chosen_TLK.any(axis=(0, 1))
    if not kept_T.any():
        raise BadData("no token chose an expert in any layer; record while requests are served")
    token_T, sequence_T = _tokens(records), _sequences(records)
    return Trace(
        experts_TLK[kept_T][:, kept_L][:, :, kept_K],
        known,
        sequence_T=None if sequence_T is None else sequence_T[kept_T],
        token_T=None if token_T is None else token_T[kept_T],
        source=f"{name}: {len(records)} forward passes recorded by SGLang",
    )


def _choices(record: Mapping[str, Any], number: int, logical_LP: IntArray) -> NDArray[np.uint16]:
    """uint16 [T, L, K]: the experts of one forward pass."""
    name = f"topk_ids_of_layer of record {number}"
    slot_LTK = _integers(record["topk_ids_of_layer"], name, (3,))
    num_layers, num_slots = logical_LP.shape
    if len(slot_LTK) != num_layers:
        raise BadData(f"{name} has {len(slot_LTK)} layers, and last_physical_to_logical_map {num_layers}; the dump is damaged")
    outside = np.argwhere((slot_LTK < -1) | (slot_LTK >= num_slots))
    if len(outside):
        layer, token, choice = outside[0]
        raise BadData(
            f"{name}: layer {layer}, token {token} chose slot {slot_LTK[layer, token, choice]} of {num_slots}; "
            "shared experts must not be fused while recording (--disable-shared-experts-fusion)"
        )
    expert_LTK = np.take_along_axis(logical_LP, slot_LTK.clip(0).reshape(num_layers, -1), axis=1).reshape(slot_LTK.shape)
    return np.where(slot_LTK < 0, NO_EXPERT, expert_LTK).astype(np.uint16).swapaxes(0, 1)


def _counted(records: Sequence[Mapping[str, Any]], logical_LP: IntArray) -> IntArray:
    """[L, E]: choices of all passes."""
    physical_LP = np.zeros(logical_LP.shape, dtype=np.int64)
    for number, record in enumerate(records):
        count_LP = _integers(record.get("global_physical_count"), f"global_physical_count of record {number}", (2,))
        if count_LP.shape != physical_LP.shape:
            raise BadData(f"global_physical_count of record {number} has shape {count_LP.shape}, and the map {physical_LP.shape}")
        physical_LP += count_LP
    count_LE = _zero_counts(len(logical_LP), int(logical_LP.max()) + 1)
    np.add.at(count_LE, (np.arange(len(logical_LP))[:, None], logical_LP), physical_LP)
    return count_LE


def _tokens(records: Sequence[Mapping[str, Any]]) -> IntArray | None:
    """[T]: every token's number in the vocabulary, or None where a record does not say."""
    if not all("input_ids" in record for record in records):
        return None
    parts = [_integers(record["input_ids"], f"input_ids of record {number}", (1,)) for number, record in enumerate(records)]
    return _as_long_as_choices(parts, records, "input_ids")


def _sequences(records: Sequence[Mapping[str, Any]]) -> IntArray | None:
    """[T]: runs of tokens that were prefilled together; None where tokens were decoded, whose requests the recorder does not name."""
    if not all(isinstance(record.get("extend_seq_lens"), list) for record in records):
        return None
    lengths = [_integers(record["extend_seq_lens"], f"extend_seq_lens of record {n}", (1,)) for n, record in enumerate(records)]
    for number, (part, record) in enumerate(zip(lengths, records, strict=True)):
        num_tokens = np.shape(record["topk_ids_of_layer"])[1]
        if int(part.min()) < 0 or int(part.max()) > num_tokens or int(part.sum()) != num_tokens:
            raise BadData(
                f"extend_seq_lens of record {number} are {len(part)} lengths from {part.min()} to {part.max()}, and {num_tokens} tokens "
                "chose experts; the dump is damaged"
            )
    first = np.cumsum([0, *(len(part) for part in lengths)])
    parts = [np.repeat(np.arange(len(part)) + start, part) for start, part in zip(first, lengths, strict=False)]
    return _as_long_as_choices(parts, records, "extend_seq_lens")


def _as_long_as_choices(parts: list[IntArray], records: Sequence[Mapping[str, Any]], name: str) -> IntArray:
    for number, (part, record) in enumerate(zip(parts, records, strict=True)):
        num_tokens = np.shape(record["topk_ids_of_layer"])[1]
        if len(part) != num_tokens:
            raise BadData(f"{name} of record {number} is for {len(part)} tokens, and {num_tokens} chose experts; the dump is damaged")
    return np.concatenate(parts)


def _apportioned(count_E: IntArray, num_tokens: int, most: int) -> IntArray:
    """Counts scaled by num_tokens / most, whole again by largest remainder."""
    exact_E = count_E.astype(np.float64) * (num_tokens / most)
    whole_E = np.floor(exact_E + 1e-9).astype(np.int64)
    missing = min(round(exact_E.sum()), num_tokens) - int(whole_E.sum())
    whole_E[np.argsort(whole_E - exact_E, kind="stable")[: max(missing, 0)]] += 1
    return whole_E


def _integers(value: Any, name: str, dimensions: tuple[int, ...]) -> IntArray:
    """An array of integers of one of the given numbers of dimensions, none of them 0."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise BadData(f"{name} is ragged; the dump is damaged") from error
    if array.dtype.kind not in "iu" or array.ndim not in dimensions or array.size == 0:
        wanted = " or ".join(map(str, dimensions))
        raise BadData(
            f"{name} has shape {array.shape} and type {array.dtype}; it must be integers with {wanted} dimensions, none of them 0"
        )
    return array.astype(np.int64)
