"""Files that are exchanged with serving systems, and forecasts: how each is made and broken."""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from crossdock.errors import CrossdockError
from crossdock.placement.homing.forecast import Forecast
from crossdock.placement.records.trace import Trace
from tests.fuzz.arrays import change_array, npy_bytes, npz_bytes
from tests.fuzz.mutations import json_text, mutated_bytes, mutated_text, mutated_value

Files = dict[str, bytes]

MAP: list[list[int]] = [[0, 1, 2, 3, 0, 2], [3, 1, 0, 2, 1, 3]]
"""Two layers of four experts in six slots."""
MAPS: tuple[Any, ...] = (
    {"physical_to_logical_map": MAP},
    MAP,
    MAP[0],
    {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": 2,
        "num_slots": 6,
        "initial_global_assignments": {"0": MAP[0], "1": MAP[1]},
    },
    {
        "moe_layer_count": 1,
        "layer_list": [
            {
                "layer_id": 0,
                "device_count": 2,
                "device_list": [{"device_id": 0, "device_expert": [0, 1, 2]}, {"device_id": 1, "device_expert": [3, 0, 2]}],
            }
        ],
    },
    {"expert_to_ep_rank": [0, 0, 1, 1]},
)
LOADS: dict[str, Any] = {"rank": 0, "logical_count": [[[3, 1, 0, 2], [1, 1, 1, 3]], [[1, 0, 0, 2], [0, 0, 5, 1]]]}
PER_PASS: dict[str, Any] = {
    "records": [{"forward_pass_id": number, "global_physical_count": [[number, 1, 2, 3, 0, 1]] * 2} for number in range(2)],
    "last_physical_to_logical_map": MAP,
}
PER_TOKEN: dict[str, Any] = {
    "records": [
        {
            "forward_pass_id": number,
            "rank": 0,
            "input_ids": [5, 6, 7],
            "positions": [0, 1, 0],
            "extend_seq_lens": [2, 1],
            "forward_mode": 1,
            "topk_ids_of_layer": [[[0, 1], [2, 5], [3, -1]], [[5, 2], [0, 1], [1, -1]]],
        }
        for number in range(2)
    ],
    "last_physical_to_logical_map": MAP,
}
DUMPS = (LOADS, PER_PASS, PER_TOKEN)
CSV = b"layer_id,expert_id,count\n" + b"".join(b"%d,%d,%d\n" % (layer, expert, layer + expert) for layer in range(2) for expert in range(4))


def as_json(values: Sequence[Any], name: str = "bad.json") -> Callable[[Random], Files]:
    """One of the values as JSON; its tree is broken, or its text."""

    def make(rng: Random) -> Files:
        value = rng.choice(values)
        if rng.random() < 0.7:
            return {name: json_text(mutated_value(value, rng), rng)}
        return {name: mutated_text(json.dumps(value).encode(), rng)}

    return make


def as_torch(values: Sequence[Any]) -> Callable[[Random], Files]:
    """One of the values as torch.save writes it, lists as tensors; its tree is broken, its tensors or its bytes."""

    def make(rng: Random) -> Files:
        value, which, file = rng.choice(values), rng.random(), io.BytesIO()
        torch.save(_tensors(mutated_value(value, rng) if which < 0.7 else value, rng, strange=which < 0.8), file)
        return {"bad.pt": file.getvalue() if which < 0.8 else mutated_bytes(file.getvalue(), rng)}

    return make


def map_array(rng: Random) -> Files:
    """A map as an .npz or an .npy, whose array is broken or whose bytes are."""
    found: dict[str, Any] = {"physical_to_logical_map": np.array(MAP)}
    change_array(found, rng)
    if rng.random() < 0.5:
        return {"bad.npz": npz_bytes(found, rng)}
    data = npy_bytes(next(iter(found.values()), np.array(MAP)), rng)
    return {"bad.npz": mutated_bytes(data, rng) if rng.random() < 0.4 else data}


def recorded_text(rng: Random) -> Files:
    """The loads of early versions of SGLang, as lines."""
    return {"bad.csv": mutated_text(CSV, rng)}


def _tensors(value: Any, rng: Random, strange: bool) -> Any:
    """Lists of numbers as tensors where that can be, `strange` ones now and then."""
    if isinstance(value, dict):
        return {key: _tensors(item, rng, strange) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    try:
        tensor = torch.tensor(value)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        return [_tensors(item, rng, strange) for item in value]
    return _strange(tensor, rng) if strange and tensor.numel() and rng.random() < 0.2 else tensor


def _strange(tensor: torch.Tensor, rng: Random) -> torch.Tensor:
    """The tensor in a form that is rarely seen."""
    return rng.choice(
        (
            lambda: tensor.to(torch.bfloat16),
            lambda: tensor.to(torch.float64) * float("nan"),
            lambda: tensor.to(torch.complex64),
            lambda: tensor.to(torch.float8_e4m3fn),
            lambda: tensor.reshape(-1)[:1].expand(1 << 30),
            lambda: tensor.reshape(-1)[:0],
            lambda: tensor.to_sparse() if tensor.is_floating_point() else tensor.float().to_sparse(),
            lambda: tensor.bool(),
            lambda: tensor.to(torch.uint8),
        )
    )()


# ---- forecasts


@cache
def forecast(trace: bytes) -> tuple[Forecast, bytes]:
    """That of a trace, and its file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.npz"
        path.write_bytes(trace)
        whole = Forecast.fit(Trace.load(path))
        whole.save(path)
        return whole, path.read_bytes()


def forecast_of(trace: Callable[[], bytes]) -> Callable[[Random], Files]:
    """A forecast whose arrays are broken before it is hashed or after, or whose bytes are."""

    def make(rng: Random) -> Files:
        whole, data = forecast(trace())
        if rng.random() < 0.3:
            return {"bad.npz": mutated_bytes(data, rng)}
        with np.load(io.BytesIO(data)) as archive:
            found: dict[str, Any] = dict(archive)
        change_array(found, rng)
        if rng.random() < 0.8:
            found["digest"] = np.array(_digest(whole, found))
        return {"bad.npz": npz_bytes(found, rng)}

    return make


def _digest(whole: Forecast, found: Mapping[str, Any]) -> str:
    """What a file with these arrays would have to state; the whole one's where they make no forecast."""
    fields = {"token": "token_V", "expert": "expert_VLM", "chance": "chance_VLM", "share": "share_LE"}
    try:
        return dataclasses.replace(whole, **{field: found[name] for name, field in fields.items() if name in found}).digest
    except (CrossdockError, ValueError, TypeError, IndexError):
        return whole.digest
