"""The kinds of file that a user can hand in: how each is made, broken, and read by the command line."""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import yaml

from tests.fuzz import exchanged
from tests.fuzz.arrays import arrays, change_array, npy_bytes, npz_bytes
from tests.fuzz.mutations import NUMBERS, TEXTS, json_text, mutated_bytes, mutated_text, mutated_value
from tests.fuzz.seeds import (
    CHECKPOINT_TENSORS,
    CONFIG,
    HOSTFILE,
    HUGGING_FACE,
    PLAN,
    RESULT,
    SHARD,
    TOPOLOGY_LONG,
    TOPOLOGY_SHORT,
    WORKLOAD,
)

Files = dict[str, bytes]


@dataclass(frozen=True)
class Kind:
    """One kind of input: `make` draws the files of one mutant, and one of `commands` reads them."""

    make: Callable[[Random], Files]
    commands: tuple[tuple[str, ...], ...]
    arguments: Callable[[Random], tuple[str, ...]] = lambda rng: ()


def good_files() -> Files:
    """What lies beside every mutant, and is as it should be."""
    return {
        "good.npz": npz_bytes(arrays()),
        "good.yaml": yaml.safe_dump(TOPOLOGY_SHORT).encode(),
        "good.json": json.dumps(PLAN).encode(),
        "run.yaml": yaml.safe_dump({**CONFIG, "plan": None, "topology": None}).encode(),
    }


# ---- YAML and JSON


def _yaml_of(*values: Mapping[str, Any]) -> Callable[[Random], Files]:
    def make(rng: Random) -> Files:
        value = rng.choice(values)
        if rng.random() < 0.5:
            broken, allow_unicode = mutated_value(value, rng), rng.random() < 0.5
            try:
                text = yaml.safe_dump(broken, allow_unicode=allow_unicode)
            except RecursionError:  # PyYAML nests less deep than JSON, which is YAML as well
                text = json.dumps(broken)
            data = text.encode("utf-8", "surrogatepass")
        else:
            data = mutated_text(yaml.safe_dump(value, default_flow_style=rng.random() < 0.3).encode(), rng)
        return {"bad.yaml": mutated_bytes(data, rng) if rng.random() < 0.1 else data}

    return make


def _json_of(name: str, value: Mapping[str, Any]) -> Callable[[Random], Files]:
    return lambda rng: {name: _bad_json(value, rng)}


def _bad_json(value: Mapping[str, Any], rng: Random) -> bytes:
    if rng.random() < 0.7:
        return json_text(mutated_value(value, rng), rng)
    return mutated_text(json.dumps(value).encode(), rng)


def _override(rng: Random) -> tuple[str, ...]:
    section = rng.choice(list(CONFIG))
    inside = CONFIG[section]
    key = section if not isinstance(inside, dict) or rng.random() < 0.1 else f"{section}.{rng.choice(list(inside))}"
    value = rng.choice((str(rng.choice(NUMBERS)), rng.choice(TEXTS), "[1, 2]", "{a: 1}", "[" * 40))
    text = (
        mutated_text(f"{key}={value}".encode("utf-8", "surrogatepass"), rng)
        if rng.random() < 0.3
        else f"{key}={value}".encode("utf-8", "ignore")
    )
    return (text.replace(b"\x00", b"").decode("utf-8", "surrogateescape"),)


# ---- traces


def _trace(rng: Random) -> Files:
    if rng.random() < 0.25:
        return {"bad.npz": mutated_bytes(npz_bytes(arrays(), compressed=rng.random() < 0.5), rng)}
    found: dict[str, Any] = dict(arrays())
    for _ in range(rng.choice((1, 1, 2))):
        change_array(found, rng)
    return {"bad.npz": npz_bytes(found, rng=rng, compressed=rng.random() < 0.5)}


def _npy(rng: Random) -> Files:
    array: Any = arrays()["experts"]
    data = npy_bytes(array[:, :, 0] if rng.random() < 0.3 else array)
    if rng.random() < 0.4:
        return {"bad.npz": mutated_bytes(data, rng)}
    found = {"experts": array}
    change_array(found, rng)
    return {"bad.npz": npy_bytes(found.get("experts", array), rng)}


# ---- checkpoints and folders of models


def safetensors(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """(header, data) of float32 tensors."""
    header: dict[str, Any] = {}
    offset = 0
    for key, array in tensors.items():
        header[key] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    return header, b"".join(array.tobytes() for array in tensors.values())


def _packed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _bad_safetensors(tensors: Mapping[str, np.ndarray], rng: Random) -> bytes:
    header, data = safetensors(tensors)
    whole = _packed(json.dumps(header).encode(), data)
    match rng.randrange(4):
        case 0:
            return mutated_bytes(whole, rng)
        case 1:
            return _packed(json_text(mutated_value(header, rng), rng), data)
        case 2:
            length = rng.choice((0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, len(whole)))
            return struct.pack("<Q", length) + whole[8:]
        case _:
            return whole


def _manifest(shard: bytes) -> dict[str, Any]:
    from crossdock.placement.records.plan import Plan

    plan = Plan(np.array([[[0], [1]]]), 2, method="hand")
    return {
        "format_version": 1,
        "step": 2,
        "data": {"epoch": 0, "position": 16},
        "seed": 1,
        "corpus_digest": "x",
        "num_updates": 2,
        "world_size": 2,
        "expert_parallel": 2,
        "plan_hash": plan.digest,
        "plan": {"num_experts": 2, "method": "hand", "slots": [[[0], [1]]]},
        "shards": [{"file": SHARD, "bytes": len(shard), "sha256": hashlib.sha256(shard).hexdigest()}],
        "tensors": {key: {"shard": SHARD, "shape": list(array.shape), "dtype": "float32"} for key, array in CHECKPOINT_TENSORS.items()},
    }


def _checkpoint(rng: Random) -> Files:
    """A manifest that is broken before it signs itself (so that its checks are reached), or after; or a broken shard."""
    header, data = safetensors(CHECKPOINT_TENSORS)
    shard = _packed(json.dumps(header).encode(), data)
    which = rng.random()
    if which < 0.3:
        shard = _bad_safetensors(CHECKPOINT_TENSORS, rng)
    manifest: Any = _manifest(shard)
    if which >= 0.3:
        manifest = mutated_value(manifest, rng)
    if isinstance(manifest, dict):
        try:
            text = json.dumps(manifest, sort_keys=True, allow_nan=False)
        except ValueError:
            text = json.dumps(manifest, sort_keys=True)
        manifest = {**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    raw = json.dumps(manifest).encode()
    if which > 0.85:
        raw = mutated_text(raw, rng)
    return {"ck/step-00000002/manifest.json": raw, f"ck/step-00000002/{SHARD}": shard}


def _hugging_face_tensors() -> dict[str, np.ndarray]:
    layer, expert = "model.layers.0", "model.layers.0.block_sparse_moe"
    ones = {f"{expert}.experts.{number}.w{part}.weight": np.ones((8, 8), np.float32) for number in range(2) for part in (1, 2, 3)}
    heads = {f"{layer}.self_attn.{name}_proj.weight": np.ones((4 if name in "kv" else 8, 8), np.float32) for name in "qkvo"}
    norms = {f"{layer}.{name}_layernorm.weight": np.ones(8, np.float32) for name in ("input", "post_attention")}
    ends = {"model.embed_tokens.weight": np.ones((16, 8), np.float32), "lm_head.weight": np.ones((16, 8), np.float32)}
    return {
        **ones,
        **heads,
        **norms,
        **ends,
        "model.norm.weight": np.ones(8, np.float32),
        f"{expert}.gate.weight": np.ones((2, 8), np.float32),
    }


def _hugging_face(rng: Random) -> Files:
    tensors = _hugging_face_tensors()
    header, data = safetensors(tensors)
    files = {"hf/config.json": json.dumps(HUGGING_FACE).encode(), "hf/model.safetensors": _packed(json.dumps(header).encode(), data)}
    match rng.randrange(4):
        case 0 | 1:
            files["hf/config.json"] = _bad_json(HUGGING_FACE, rng)
        case 2:
            files["hf/model.safetensors"] = _bad_safetensors(tensors, rng)
        case _:
            index = {"metadata": {"total_size": len(data)}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
            files["hf/model.safetensors.index.json"] = _bad_json(index, rng)
    return files


def _hugging_face_index(rng: Random) -> Files:
    """Two files and the index that says what is in which; one of the three is broken."""
    tensors = _hugging_face_tensors()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
        "weight_map": {name: file for file, held in parts.items() for name in held},
    }
    bad = rng.choice(("index", "index", *parts))
    files = {"hf/config.json": json.dumps(HUGGING_FACE).encode()}
    for file, held in parts.items():
        part = {name: tensors[name] for name in held}
        header, data = safetensors(part)
        files[f"hf/{file}"] = _bad_safetensors(part, rng) if file == bad else _packed(json.dumps(header).encode(), data)
    files["hf/model.safetensors.index.json"] = _bad_json(index, rng) if bad == "index" else json.dumps(index).encode()
    return files


# ---- run directories


def _run(rng: Random) -> Files:
    rows = [{"step": step, "loss": 3.0 - step, "tokens_per_s": 10.0, "step_s": 0.1, "exposed_s": 0.0} for step in (1, 2, 3)]
    events = [{"time": 1.0, "event": "rank_started", "rank": 0, "pid": 1, "node": 0}, {"time": 2.0, "event": "finished", "step": 3}]
    files: dict[str, Any] = {"result.json": RESULT, "metrics.jsonl": rows, "events.jsonl": events, "plan.json": PLAN}
    bad = rng.choice(list(files))
    found = {}
    for name, value in files.items():
        lines = value if isinstance(value, list) else [value]
        encoded = [json.dumps(line).encode() for line in lines]
        if name == bad:
            at = rng.randrange(len(lines))
            encoded[at] = _bad_json(lines[at], rng)
        found[f"r/{name}"] = b"\n".join(encoded) + b"\n"
    return found


def _import_map(name: str) -> tuple[tuple[str, ...], ...]:
    command = ("plan", "import", name, "out.json")
    return ((*command, "--devices", "2"), (*command, "--devices", "2", "--layers", "2"), command, (*command, "--devices", "3"))


def _import_trace(name: str) -> tuple[tuple[str, ...], ...]:
    return (("trace", "import", name, "out.npz"), ("trace", "import", name, "out.npz", "--num-experts", "4"))


KINDS: dict[str, Kind] = {
    "config": Kind(
        _yaml_of(CONFIG, {**CONFIG, "plan": None, "topology": None}),
        (
            ("config", "check", "bad.yaml"),
            ("config", "show", "bad.yaml"),
            ("train", "bad.yaml", "--dry-run"),
            ("launch", "slurm", "bad.yaml"),
        ),
    ),
    "override": Kind(lambda rng: {}, (("config", "check", "run.yaml"), ("train", "run.yaml", "--dry-run")), _override),
    "trace": Kind(_trace, (("trace", "show", "bad.npz"), ("trace", "import", "bad.npz", "out.npz", "--num-experts", "4"))),
    "npy": Kind(_npy, (("trace", "show", "bad.npz", "--json"), ("trace", "import", "bad.npz", "out.npz"))),
    "topology": Kind(
        _yaml_of(TOPOLOGY_SHORT, TOPOLOGY_LONG),
        (
            ("plan", "solve", "--trace", "good.npz", "--topology", "bad.yaml", "--method", "contiguous", "--out", "out.json"),
            ("train", "run.yaml", "topology=bad.yaml", "--dry-run"),
        ),
    ),
    "workload": Kind(
        _yaml_of(WORKLOAD, CONFIG),
        (
            (
                "plan",
                "solve",
                "--trace",
                "good.npz",
                "--topology",
                "2x1-local",
                "--method",
                "contiguous",
                "--workload",
                "bad.yaml",
                "--out",
                "out.json",
            ),
        ),
    ),
    "plan": Kind(
        _json_of("bad.json", PLAN),
        (
            ("plan", "check", "bad.json", "--trace", "good.npz", "--topology", "good.yaml"),
            ("plan", "show", "bad.json"),
            ("plan", "diff", "good.json", "bad.json"),
            ("train", "run.yaml", "plan=bad.json", "--dry-run"),
        ),
    ),
    "checkpoint": Kind(
        _checkpoint, (("checkpoint", "verify", "ck"), ("checkpoint", "ls", "ck"), ("checkpoint", "reshard", "ck", "out", "--shards", "2"))
    ),
    "hugging_face": Kind(_hugging_face, (("checkpoint", "import-hf", "hf", "out"),)),
    "hugging_face_index": Kind(_hugging_face_index, (("checkpoint", "import-hf", "hf", "out"),)),
    "map": Kind(exchanged.as_json(exchanged.MAPS), _import_map("bad.json")),
    "map_line": Kind(exchanged.as_json(exchanged.MAPS, "bad.jsonl"), _import_map("bad.jsonl")),
    "map_pt": Kind(exchanged.as_torch(exchanged.MAPS), _import_map("bad.pt")),
    "map_array": Kind(exchanged.map_array, _import_map("bad.npz")),
    "recorder": Kind(exchanged.as_json(exchanged.DUMPS), _import_trace("bad.json")),
    "recorder_pt": Kind(exchanged.as_torch(exchanged.DUMPS), _import_trace("bad.pt")),
    "recorder_csv": Kind(exchanged.recorded_text, _import_trace("bad.csv")),
    "forecast": Kind(exchanged.forecast_of(lambda: npz_bytes(arrays())), (("train", "run.yaml", "data.homing=bad.npz", "--dry-run"),)),
    "hostfile": Kind(
        lambda rng: {"bad.hosts": mutated_text(HOSTFILE, rng)},
        (("launch", "deepspeed", "run.yaml", "run.dir=/shared/x", "--hostfile", "bad.hosts", "--address", "10.0.0.1"),),
    ),
    "run": Kind(_run, (("plan", "report", "r", "--out", "out.html"), ("status", "r"))),
}
