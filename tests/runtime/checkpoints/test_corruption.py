"""Damaged checkpoints: a seeded injector, and manifests that somebody forged. Whatever is loaded is what was saved, or nothing is."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import BadCheckpoint
from crossdock.launch.cli import run as crossdock
from crossdock.runtime.checkpoints import checkpoint
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig, RunState
from crossdock.runtime.checkpoints.manifest import MANIFEST, Manifest, checked, digest_of
from crossdock.runtime.checkpoints.reshard import reshard
from crossdock.runtime.checkpoints.saver import Saver
from crossdock.runtime.data import DataState
from crossdock.runtime.training.steps import Stepper
from crossdock.runtime.transport.mesh import Mesh
from tests.runtime import tiny

MODEL = tiny.MODEL.model_copy(update={"num_layers": 2, "model_width": 8, "vocab_size": 256})
SHARDS = 3
OLDER, NEWER = "step-00000001", "step-00000002"


class Bench:
    """Two whole checkpoints of one run, what they hold, and an engine to load them into."""

    def __init__(self, folder: str) -> None:
        self.run: Stepper = tiny.stepper(0, 1, folder, tiny.random_plan(1, 1, num_layers=1), model=MODEL, dtype=torch.float32)
        self.root = Path(folder) / "checkpoints"
        self.census: dict[str, dict[str, np.ndarray]] = {}
        saver = Saver(Path(folder) / "saved", self.run.engine, self.run.mesh, CheckpointConfig())
        for step, name in ((1, OLDER), (2, NEWER)):
            tiny.run_steps(self.run, step - 1, step)
            saved = saver.save(RunState(step, DataState(0, 8 * step), 0, "d"))
            assert saved is not None
            reshard(saved.folder, Manifest.read(saved.folder), self.root / name, SHARDS)
            self.census[name] = tiny.census(self.run.engine)

    def load(self, root: Path) -> str | None:
        """The name of the checkpoint that is loaded, every value compared with what was saved; None where all are refused."""
        for name, values in self.run.model.named_parameters():
            assert isinstance(name, str)
            values.detach().fill_(torch.nan)
        try:
            found, manifest, _ = checkpoint.latest(root, Mesh.single())
        except BadCheckpoint:
            return None
        loaded = checkpoint.restore(found, manifest, self.run.engine)
        wanted = self.census[found.name]
        for key, values in tiny.census(self.run.engine).items():
            assert np.array_equal(values, wanted[key]), f"{found.name} was loaded with another {key}"
        assert f"step-{loaded.state.step:08d}" == found.name
        return found.name


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "text").write_bytes(tiny.text())
    return Bench(str(folder))


# ---- the injector ----------------------------------------------------------------------------------------------


def flip_bits(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    content = bytearray(path.read_bytes())
    for place in draw.sample(range(8 * len(content)), draw.choice((1, 1, 2, 16))):
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def truncate(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def append(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 64)))


def overwrite_a_block(folder: Path, draw: random.Random) -> None:
    """As a lost page: zeros, or what stood elsewhere in the file."""
    path = any_file(folder, draw)
    content = bytearray(path.read_bytes())
    size = min(draw.choice((1, 64, 512)), len(content) // 2)
    place, other = draw.randrange(len(content) - size), draw.randrange(len(content) - size)
    block = bytes(size) if draw.random() < 0.5 else content[other : other + size]
    content[place : place + size] = block
    path.write_bytes(content)


def swap_shards(folder: Path, draw: random.Random) -> None:
    first, second = draw.sample(sorted(folder.glob("shard-*")), 2)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def take_from_the_other(folder: Path, draw: random.Random) -> None:
    """One file, or all, of another step of the same run."""
    other = folder.with_name(OLDER if folder.name == NEWER else NEWER)
    names = sorted(path.name for path in other.iterdir())
    for name in names if draw.random() < 0.2 else [draw.choice(names)]:
        shutil.copy(other / name, folder / name)


def remove(folder: Path, draw: random.Random) -> None:
    any_file(folder, draw).unlink()


def any_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.iterdir()))


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    flip_bits, flip_bits, truncate, append, overwrite_a_block, swap_shards, take_from_the_other, remove,
]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(bench: Bench, root: Path, seed: int) -> tuple[str, bool, bool]:
    """A copy of both checkpoints with the newer damaged, sometimes both: (by what, whether the newer, the older are changed at all)."""
    draw = random.Random(seed)
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(bench.root, root)
    damage = draw.choice(DAMAGES)
    damage(root / NEWER, draw)
    if draw.random() < 0.2:
        draw.choice(DAMAGES)(root / OLDER, draw)
    newer, older = (contents(root / name) != contents(bench.root / name) for name in (NEWER, OLDER))
    return damage.__name__, newer, older


def inject(bench: Bench, root: Path, seeds: range) -> dict[str, int]:
    """Damage and load once a seed; how often each checkpoint was loaded."""
    loaded = {NEWER: 0, OLDER: 0, "none": 0}
    for seed in seeds:
        name, newer, older = damaged(bench, root, seed)
        found = bench.load(root)
        wanted = NEWER if not newer else OLDER if not older else None
        assert found == wanted, f"seed {seed}, {name}: {found} was loaded"
        loaded[found or "none"] += 1
    return loaded


def test_a_hundred_damaged_checkpoints_and_no_silent_load(bench: Bench, tmp_path: Path) -> None:
    assert bench.load(bench.root) == NEWER
    loaded = inject(bench, tmp_path / "damaged", range(100))
    assert loaded[OLDER] > 60
    assert loaded["none"] > 5


@pytest.mark.slow
def test_a_thousand_damaged_checkpoints_and_no_silent_load(bench: Bench, tmp_path: Path) -> None:
    loaded = inject(bench, tmp_path / "damaged", range(1000, 2000))
    assert loaded[OLDER] + loaded["none"] > 950


# ---- manifests -------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places_in(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.fixture(scope="module")
def forge(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], Path]:
    """Puts a manifest of those bytes into a folder with whole shards."""
    folder = tmp_path_factory.mktemp("forged") / NEWER
    shutil.copytree(bench.root / NEWER, folder)

    def write(data: bytes) -> Path:
        (folder / MANIFEST).write_bytes(data)
        return folder

    return write


def survives(bench: Bench, folder: Path) -> None:
    """Nothing but `BadCheckpoint`, and no value that was not saved."""
    problem, manifest = checked(folder)
    assert (problem is None) == (manifest is not None)
    if manifest is None:
        return
    try:
        checkpoint.restore(folder, manifest, bench.run.engine)
    except BadCheckpoint:
        return
    for key, values in tiny.census(bench.run.engine).items():
        assert np.array_equal(values, bench.census[NEWER][key]), key


@given(data=st.binary(max_size=200) | st.text(max_size=80).map(str.encode) | json_values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=200)
def test_anything_may_stand_where_a_manifest_should(bench: Bench, forge: Callable[[bytes], Path], data: bytes) -> None:
    problem, manifest = checked(forge(data))
    assert manifest is None
    assert problem is not None
    assert problem.startswith(MANIFEST)


@given(draw=st.randoms(use_true_random=False), new=json_values, count=st.integers(1, 3))
@settings(max_examples=300)
def test_forged_manifests_load_nothing_that_was_not_saved(
    bench: Bench, forge: Callable[[bytes], Path], draw: random.Random, new: Any, count: int
) -> None:
    value = json.loads((bench.root / NEWER / MANIFEST).read_bytes())
    value.pop("sha256")
    for _ in range(count):
        path = draw.choice(places_in(value)[1:])
        other = draw.choice([new, *(place for place in (value["shards"], value["plan"], value["tensors"]) if draw.random() < 0.3)])
        value = replaced(value, path, other)
        if not all(name in value and isinstance(value[name], dict | list) and value[name] for name in ("shards", "plan", "tensors")):
            break
    try:
        digest = digest_of(value)
    except ValueError:  # NaN
        digest = ""
    survives(bench, forge(json.dumps({**value, "sha256": digest}).encode()))


def test_swapped_places_and_bombs_are_noticed(bench: Bench, forge: Callable[[bytes], Path]) -> None:
    value = json.loads((bench.root / NEWER / MANIFEST).read_bytes())
    value.pop("sha256")

    def forged(**changes: Any) -> str:
        changed = {**value, **changes}
        return checked(forge(json.dumps({**changed, "sha256": digest_of(changed)}).encode()))[0] or ""

    assert forged() == ""
    assert "that of step 7" in forged(step=7)
    assert "format version 2" in forged(format_version=2)
    assert "no plain names" in forged(shards=[{**value["shards"][0], "file": "../shard-00000.safetensors"}, *value["shards"][1:]])
    assert "not among its shards" in forged(shards=value["shards"][1:])
    assert "slots a layer for 2147483647 experts" in forged(plan={**value["plan"], "num_experts": 2**31 - 1})
    assert "does not match plan_hash" in forged(plan_hash="0" * 64)
    assert "no tensor is of type 'manual_seed'" in forged(
        tensors={key: {**place, "dtype": "manual_seed"} for key, place in value["tensors"].items()}
    )
    assert "nested deeper than 64 levels" in (checked(forge(b"[" * 200_000))[0] or "")
    first, second = sorted(key for key, place in value["tensors"].items() if "norm.weight/exp_avg" in key)[:2]
    place = value["tensors"][first]
    for name, wrong, told in (("shape", [1], "float32 [1] is promised"), ("dtype", "float16", "float16 [8] is promised")):
        assert told in forged(tensors={**value["tensors"], first: {**place, name: wrong}})
    other = next(shard["file"] for shard in value["shards"] if shard["file"] != place["shard"])
    assert f"whether it holds {first}" in forged(tensors={**value["tensors"], first: {**place, "shard": other}})
    assert f"whether it holds {second}" in forged(tensors={key: place for key, place in value["tensors"].items() if key != second})


@pytest.mark.parametrize("kind", ["a device without end", "a pipe", "a folder"])
def test_a_shard_is_a_regular_file(bench: Bench, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / NEWER
    shutil.copytree(bench.root / NEWER, folder)
    value = json.loads((folder / MANIFEST).read_bytes())
    value.pop("sha256")
    shard = folder / value["shards"][0]["file"]
    shard.unlink()
    value["shards"][0]["bytes"] = 0  # which is what the system says of the size of a device
    (folder / MANIFEST).write_text(json.dumps({**value, "sha256": digest_of(value)}))
    if kind == "a device without end":
        shard.symlink_to("/dev/zero")
    elif kind == "a pipe":
        os.mkfifo(shard)
    else:
        shard.mkdir()
    assert checkpoint.verify(folder) == f"{shard.name} is not a regular file"


def test_the_command_says_so_in_one_line(forge: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str]) -> None:
    for data in (b"", b"{}", b"null", b"\xff\xfe", b'{"sha256": 1, "sha256": 2}', b"[" * 100_000, b"9" * 5000):
        folder = forge(data)
        for command, code in (("verify", BadCheckpoint.exit_code), ("ls", 0)):
            assert crossdock(["checkpoint", command, str(folder)]) == code
            out, err = capsys.readouterr()
            assert out.count("\n") == 1
            assert MANIFEST in out
            assert err == ""
