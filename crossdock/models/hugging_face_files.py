"""Folders of Hugging Face transformers, written from a checkpoint and read into one: safetensors and JSON alone, no pickle.

Tensors pass one at a time, so that a model need not fit in memory.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crossdock import atomic
from crossdock.bounded import is_plain_name, json_value, read_bytes
from crossdock.errors import BadCheckpoint, BadData, MissingInput
from crossdock.models.config import ModelConfig
from crossdock.models.hugging_face import Source, Target, from_hugging_face, targets, tensors, to_hugging_face
from crossdock.runtime.checkpoints.manifest import FORMAT_VERSION, Manifest, SavedData
from crossdock.runtime.checkpoints.shards import Entry, Place, Reader, Shard, dtype_name, parts_of, write_shard

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MAX_SHARD_BYTES = 4_000_000_000
MAX_JSON_BYTES = 1 << 28
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def export(folder: Path, manifest: Manifest, config: ModelConfig, seq_len: int, out: Path, dtype: torch.dtype | None = None) -> int:
    """Write the weights of a checked checkpoint of `config` to the new folder `out`; returns how many tensors there are.

    They are of the checkpoint's precision, so that nothing is lost, or of `dtype`. Raises `BadConfig` for a model of another architecture,
    `BadCheckpoint` for a checkpoint of another model.
    """
    described = to_hugging_face(config, seq_len)
    for target in targets(config):
        place = manifest.tensors.get(f"{target.ours}/weight")
        if place is None or tuple(place.shape) != target.shape:
            held = "no such tensor" if place is None else str(place.shape)
            raise BadCheckpoint(
                f"{folder} is of another model: {target.ours} has shape {list(target.shape)} in the config, and {held} is there; "
                "give the config it was made with"
            )
    reader = Reader(folder, manifest.tensors)
    entries = [_exported(reader, source, dtype) for source in tensors(config)]
    name = dtype_name(entries[0].dtype)
    with atomic.new_folder(out) as aside:
        parts = list(parts_of(entries, MAX_SHARD_BYTES))
        shard_of: dict[str, str] = {}
        for number, part in enumerate(parts, start=1):
            file = SINGLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            write_shard(aside / file, part, {"format": "pt"})
            shard_of |= {entry.key: file for entry in part}
        if len(parts) > 1:
            size = sum(entry.num_bytes for entry in entries)
            atomic.write_json(aside / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(shard_of.items()))})
        atomic.write_json(aside / CONFIG, {**described, "dtype": name, "torch_dtype": name})
    return len(entries)


def _exported(reader: Reader, source: Source, dtype: torch.dtype | None) -> Entry:
    key = f"{source.ours}/weight"
    kept = dtype or reader.entry(key).dtype
    return Entry(source.theirs, source.shape, kept, lambda: source.take(reader.read(key)).to(kept))


class HuggingFaceFolder:
    """A folder of transformers with its model in Crossdock's terms. Raises `MissingInput` and `BadData` for anything else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        described = _read_json(folder / CONFIG)
        self.config: ModelConfig = from_hugging_face(described, str(folder / CONFIG))
        self.is_bf16 = (described.get("dtype") or described.get("torch_dtype")) == "bfloat16"
        self._file_of = self._files()
        self._dtype_of: dict[str, torch.dtype] = {}
        self._open: dict[str, Any] = {}
        self._check()

    def _files(self) -> dict[str, str]:
        if (self.folder / INDEX).exists():
            weights = _read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weights, dict) or not all(isinstance(file, str) and is_plain_name(file) for file in weights.values()):
                raise BadData(f"{self.folder / INDEX}: weight_map does not name files of this folder; download it again")
            return {str(key): file for key, file in weights.items()}
        if not (self.folder / SINGLE).exists():
            raise MissingInput(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}; pickled weights are not read: save the model with safe_serialization"
            )
        with _opened(self.folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)

    def _check(self) -> None:
        """Every tensor that the model has is there, in its shape and of floating point, and no other."""
        wanted = {source.theirs: source.shape for source in tensors(self.config)}
        ignored = {key for key in self._file_of if key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and key not in wanted)}
        if stray := sorted(self._file_of.keys() - wanted.keys() - ignored):
            raise BadData(f"{self.folder} holds {stray[0]} and {len(stray) - 1} other tensors that its {CONFIG} does not tell of")
        by_file: dict[str, list[str]] = {}
        for key in wanted:
            if key not in self._file_of:
                raise BadData(f"{self.folder} has no {key}, which its {CONFIG} tells of; download it again")
            by_file.setdefault(self._file_of[key], []).append(key)
        for name, keys in by_file.items():
            with _opened(self.folder / name) as file:
                present = set(file.keys())
                for key in keys:
                    if key not in present:
                        raise BadData(f"{self.folder / name} has no {key}; download it again")
                    part = file.get_slice(key)
                    shape, code = tuple(part.get_shape()), part.get_dtype()
                    if shape != wanted[key] or code not in FLOATS:
                        raise BadData(f"{self.folder / name}: {key} is {code} {list(shape)} where floats {list(wanted[key])} are needed")
                    self._dtype_of[key] = FLOATS[code]

    def write_checkpoint(self, folder: Path) -> Manifest:
        """Write the weights to the existing folder `folder` as a checkpoint before the first step. Raises `OSError`, `IoFailure`.

        Masters are float32, or float64 where theirs are: no bit is lost. Moments are left out: they are zeros.
        """
        shards: list[Shard] = []
        places: dict[str, Place] = {}
        for number, part in enumerate(parts_of(self._entries(), MAX_SHARD_BYTES)):
            shard, written = write_shard(folder / f"shard-{number:05d}.safetensors", part)
            shards.append(shard)
            places |= written
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            step=0,
            data=SavedData(epoch=0, position=0),
            seed=0,
            corpus_digest="",
            num_updates=0,
            world_size=1,
            expert_parallel=1,
            plan_hash=None,
            plan=None,
            shards=shards,
            tensors=places,
        )
        manifest.write(folder)
        return manifest

    def _entries(self) -> Iterator[Entry]:
        for target in targets(self.config):
            dtype = torch.float64 if self._dtype_of[target.sources[0].theirs] == torch.float64 else torch.float32
            yield Entry(f"{target.ours}/weight", target.shape, dtype, partial(self._joined, target, dtype))

    def _joined(self, target: Target, dtype: torch.dtype) -> Tensor:
        parts = []
        for source in target.sources:
            name = self._file_of[source.theirs]
            if name not in self._open:
                self._open[name] = _opened(self.folder / name)
            parts.append(self._open[name].get_tensor(source.theirs))
        return target.join(parts).to(dtype)


def _opened(path: Path) -> Any:
    if path.exists() and not path.is_file():
        raise BadData(f"{path} is not a regular file; download it again")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise BadData(f"{path} cannot be read as safetensors ({error}); download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    value = json_value(read_bytes(path, MAX_JSON_BYTES, "a file of a folder that transformers saved"), str(path))
    if not isinstance(value, dict):
        raise BadData(f"{path} holds no JSON object")
    return value
