"""The kinds of file that a user can hand in: how each is made, broken, and read by the command line."""

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import numpy as np
import yaml

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
        "good.npz": _npz(arrays()),
        "good.yaml": yaml.safe_dump(TOPOLOGY_SHORT).encode(),
        "good.json": json.dumps(PLAN).encode(),
        "run.yaml": yaml.safe_dump({**CONFIG, "plan": None, "topology": None}).encode(),
    }


def arrays() -> dict[str, np.ndarray]:
    """The arrays of a small trace of 2 layers and 4 experts."""
    rng = np.random.default_rng(0)
    return {
        "experts": np.argsort(rng.random((48, 2, 4)), axis=-1)[..., :2].astype(np.uint16),
        "weights": rng.random((48, 2, 2)).astype(np.float16),
        "sequence": np.repeat(np.arange(12, dtype=np.int32), 4),
        "home": np.tile(np.arange(2, dtype=np.int32), 24),
        "token": np.arange(48, dtype=np.int32),
        "num_experts": np.array(4),
        "format_version": np.array(1),
        "source": np.array("fuzz"),
    }


# ---- YAML and JSON


def _yaml_of(*values: Mapping[str, Any]) -> Callable[[Random], Files]:
    def make(rng: Random) -> Files:
        value = rng.choice(values)
        if rng.random() < 0.5:
            text = yaml.safe_dump(mutated_value(value, rng), allow_unicode=rng.random() < 0.5)
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
        return {"bad.npz": mutated_bytes(_npz(arrays(), compressed=rng.random() < 0.5), rng)}
    found: dict[str, Any] = dict(arrays())
    for _ in range(rng.choice((1, 1, 2))):
        _change_array(found, rng)
    return {"bad.npz": _npz(found, rng=rng, compressed=rng.random() < 0.5)}


def _npy(rng: Random) -> Files:
    array: Any = arrays()["experts"]
    data = _npy_bytes(array[:, :, 0] if rng.random() < 0.3 else array)
    if rng.random() < 0.4:
        return {"bad.npz": mutated_bytes(data, rng)}
    found = {"experts": array}
    _change_array(found, rng)
    return {"bad.npz": _npy_bytes(found.get("experts", array), rng)}


def _change_array(found: dict[str, Any], rng: Random) -> None:
    name = rng.choice(list(found)) if found else "experts"
    array = found.pop(name, np.zeros(3))
    kinds = ("<u1", "<i8", ">i4", "<f8", "<f2", "?", "<c16", "S3", "<U2", "O", "M8[s]", "<u8", "V2")
    with np.errstate(all="ignore"):
        match rng.randrange(8):
            case 0:
                try:
                    found[name] = np.asarray(array).astype(rng.choice(kinds))
                except (TypeError, ValueError):
                    found[name] = array
            case 1:
                shape = rng.choice([(0,), (), (1,), (2, 0, 2), (48,), (48, 2), (1, 1, 1, 1), (3, 1, 2), (48, 2, 1), (1, 48, 4)])
                found[name] = np.resize(array, shape)
            case 2:
                changed = np.array(array)
                if changed.size and changed.dtype.kind in "iufb":
                    changed.reshape(-1)[rng.randrange(changed.size)] = rng.choice(
                        (0, 1, 3, 4, 100, 65534, 65535 if changed.dtype != np.float16 else 1)
                    )
                found[name] = changed
            case 3:
                found[rng.choice(("expert", "experts2", "../experts", "/etc/x", "a\x1bb", "weights", name.upper()))] = array
            case 4:
                found[name] = np.array(rng.choice([value for value in NUMBERS if not isinstance(value, int) or abs(value) < 2**64]))
            case 5:
                found[name] = np.array(rng.choice([text for text in TEXTS if "\ud800" not in text]))
            case 6:
                found[name] = np.asfortranarray(array) if rng.random() < 0.5 else np.atleast_1d(array)[::-1]
            case _:
                pass  # left out


def _npy_bytes(array: Any, rng: Random | None = None) -> bytes:
    """The array as .npy; with `rng` its header is sometimes a lie."""
    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=True)
    data = file.getvalue()
    if rng is None or rng.random() > 0.05:
        return data
    (length,) = struct.unpack("<H", data[8:10])
    header = data[10 : 10 + length].rstrip()
    lies = (
        *(b"(48, 2, 2)", b"(999999999999,)", b"(-1, 2, 2)", b"(1000000000, 1000000000, 1000000000)", b"(48, 2, 2, )" * 50, b"()"),
        *(b"(48L,)", b"(True,)", b"((1,),)", b"(1e3,)", b"[48]", b"(" * 300 + b")" * 300),
    )
    start, end = header.find(b"("), header.rfind(b")") + 1
    header = header[:start] + rng.choice(lies) + header[end:] if rng.random() < 0.6 else mutated_text(header, rng)
    length = len(header) if rng.random() < 0.8 else rng.choice((0, 1, 65535))
    return data[:8] + struct.pack("<H", min(length, 65535)) + header + data[10 + length :]


def _npz(found: Mapping[str, Any], rng: Random | None = None, compressed: bool = True) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, array in found.items():
            archive.writestr(f"{name}.npy", _npy_bytes(array, rng))
        if rng is not None and rng.random() < 0.05:
            archive.writestr(rng.choice(("experts.npy", "readme.txt", "../../x.npy", "x/")), b"not an array")
    data = file.getvalue()
    return zip_bomb() if rng is not None and rng.random() < 0.01 else data


@cache
def zip_bomb(gibibytes: int = 6) -> bytes:
    """An .npz of a few MB whose `experts` would fill so many GiB; its checksum is wrong, which only who has unpacked it all can know."""
    count = gibibytes * 2**30
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (count // 4, 2, 1)})
    first = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = first.compress(header.getvalue()) + first.flush(zlib.Z_FULL_FLUSH)
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = block.compress(bytes(2**20)) + block.flush(zlib.Z_FULL_FLUSH)
    end = zlib.compressobj(9, zlib.DEFLATED, -15).flush(zlib.Z_FINISH)
    data = start + zeros * (count // 2**20) + end
    size = len(header.getvalue()) + count
    zip64 = struct.pack("<HHQQ", 1, 16, size, len(data))
    name = b"experts.npy"
    fields = struct.pack("<HHHHHIIIHH", 45, 0, 8, 0, 33, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(zip64))
    local = b"PK\x03\x04" + fields + name + zip64
    central = b"PK\x01\x02" + struct.pack("<H", 45) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name + zip64
    closing = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local) + len(data), 0)
    return local + data + central + closing


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
    "hostfile": Kind(
        lambda rng: {"bad.hosts": mutated_text(HOSTFILE, rng)},
        (("launch", "deepspeed", "run.yaml", "run.dir=/shared/x", "--hostfile", "bad.hosts", "--address", "10.0.0.1"),),
    ),
    "run": Kind(_run, (("plan", "report", "r", "--out", "out.html"), ("status", "r"))),
}
