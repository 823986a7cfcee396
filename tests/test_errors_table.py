"""The table of bad input: each malformed config, trace, topology and plan gives one clear line, its exit code, and no traceback."""

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from crossdock.launch.cli import run
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace

Content = str | bytes

TRAIN = ("train", "bad.yaml", "--dry-run")
SHOW = ("trace", "show", "bad.npz")
SOLVE = ("plan", "solve", "--trace", "good.npz", "--topology", "bad.yaml", "--seconds", "1")
CHECK = ("plan", "check", "bad.json")


@dataclass(frozen=True)
class Case:
    """One bad file (`content` goes where the arguments look for it) or one bad command line."""

    name: str
    arguments: tuple[str, ...]
    content: Content | Callable[[], bytes] | None
    exit_code: int
    pieces: tuple[str, ...]


def npz(**arrays: object) -> Callable[[], bytes]:
    def written() -> bytes:
        file = io.BytesIO()
        np.savez(file, **{name: np.asarray(values) for name, values in arrays.items()})
        return file.getvalue()

    return written


def choices(value: int = 0, shape: tuple[int, ...] = (4, 2, 2), dtype: str = "int64") -> np.ndarray:
    table = np.zeros(shape, dtype=dtype)
    table[..., 1:] = 1
    table.flat[0] = value
    return table


def truncated() -> bytes:
    return npz(experts=choices(shape=(4096, 2, 2)))()[:-3000]


def plan_json(**changes: object) -> str:
    plan = {
        "format_version": 1,
        "num_layers": 1,
        "num_experts": 4,
        "topology_hash": "",
        "trace_hash": "",
        "mode": "home",
        "objective": "seconds",
        "method": "hand",
        "seed": 0,
        "slots": [[[0, 1], [2, 3]]],
        "cost": None,
        "bound": None,
    }
    return json.dumps({key: value for key, value in (plan | changes).items() if value != "leave out"})


UNIFORM = """nodes: 2
devices_per_node: 1
device: {flop_per_s: 1e12, memory_bytes: 1e9}
links:
  other_node: {bytes_per_s: 1e9, latency_s: 1e-5, shared_by_node: false}
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

CASES = [
    # ---- configurations
    Case("unknown key", TRAIN, "train:\n  stepz: 3\n", 78, ("bad.yaml:2", "`train.stepz`", "did you mean `train.steps`?")),
    Case("unknown section", TRAIN, "trian:\n  steps: 3\n", 78, ("bad.yaml:1", "`trian`", "did you mean `train`?")),
    Case("unknown key of the gate", TRAIN, "model:\n  gate: {kind: switch, nois: 1}\n", 78, ("bad.yaml:2", "nois")),
    Case("unknown gate", TRAIN, "model:\n  gate: {kind: swich}\n", 78, ("bad.yaml:2", "swich", "switch")),
    Case("text for a number", TRAIN, "train:\n  steps: many\n", 78, ("bad.yaml:2", "`train.steps`", '"many"', "integer")),
    Case("1e-4 where an integer stands", TRAIN, "train: {steps: 1e-4}\n", 78, ("bad.yaml:1", "0.0001 (float)", "integer")),
    Case("quoted 1e-4", TRAIN, "train: {optimizer: {lr: '1e-4'}}\n", 78, ("`train.optimizer.lr`", '"1e-4" (string)', "without quotes")),
    Case("quoted number", TRAIN, "train: {steps: '3'}\n", 78, ('"3" (string)', "without quotes")),
    Case("number with separators", TRAIN, "train: {steps: 1_000}\n", 78, ('"1_000"', "without quotes, units or separators")),
    Case("number with a unit", TRAIN, "train: {steps: 3k}\n", 78, ('"3k"', "integer")),
    Case("no for false", TRAIN, "checkpoint: {at_end: no}\n", 78, ("bad.yaml:1", '"no"', "true or false")),
    Case("negative", TRAIN, "train: {steps: -3}\n", 78, ("`train.steps` is -3", "greater than or equal to 1")),
    Case("NaN", TRAIN, "train: {optimizer: {lr: .nan}}\n", 78, ("bad.yaml:1", ".nan", "finite")),
    Case("infinity", TRAIN, "train: {optimizer: {lr: .inf}}\n", 78, ("`train.optimizer.lr` is inf", "finite")),
    Case("too large for a float", TRAIN, "train: {optimizer: {lr: 1e999}}\n", 78, ("1e999", "1.8e308")),
    Case("duplicate key", TRAIN, "train:\n  steps: 3\n  steps: 4\n", 78, ("bad.yaml:3", "`train.steps`", "line 2", "keep one")),
    Case("cyclic alias", TRAIN, "train: &t\n  steps: *t\n", 78, ("bad.yaml:1", "&t", "write the value out")),
    Case("alias bomb", TRAIN, BOMB, 78, ("bad.yaml:1", "&a", "write the value out")),
    Case("tag", TRAIN, "train: !!python/object/apply:os.system [id]\n", 78, ("bad.yaml:1", "tag", "python")),
    Case("tab", TRAIN, "train:\n\tsteps: 3\n", 78, ("bad.yaml:2", "tab", "spaces")),
    Case("binary", TRAIN, b"\x80\x81\xff", 78, ("bad.yaml:1", "0x80", "binary")),
    Case("deeper than anything", TRAIN, "[" * 5000, 78, ("bad.yaml:1", "32 levels")),
    Case("unclosed bracket", TRAIN, "train: {steps: 3\n", 78, ("bad.yaml:", "flow mapping")),
    Case("a list", TRAIN, "- train\n", 78, ("bad.yaml:1", "found a list", "run, train, parallel")),
    Case("a number for a section", TRAIN, "train: 3\n", 78, ("bad.yaml:1", "`train` is 3", "mapping")),
    Case("two documents", TRAIN, "train: {steps: 3}\n---\ntrain: {}\n", 78, ("bad.yaml:2", "second document")),
    Case("experts that do not divide", TRAIN, "parallel: {expert: 3}\n", 78, ("8 experts", "3 ranks", "1, 2, 4, 8")),
    Case("ranks that do not divide", TRAIN, "parallel: {expert: 2, ranks: 3}\n", 78, ("3 ranks", "groups of 2", "1, 3")),
    Case(
        "batch that does not divide",
        TRAIN,
        "parallel: {expert: 4}\ntrain: {batch_sequences: 30}\n",
        78,
        ("30 sequences", "4 ranks", "28, 32"),
    ),
    Case("heads that do not divide", TRAIN, "model: {model_width: 100, num_heads: 3}\n", 78, ("100", "num_heads 3", "multiple of 3")),
    Case("top-k above the experts", TRAIN, "model: {num_experts: 2, top_k: 3}\n", 78, ("top_k", "3", "2")),
    Case(
        "shortcut of another block", TRAIN, "model: {block: top_k, shortcut: {position: 2}}\n", 78, ("shortcut", "block is top_k", "scmoe")
    ),
    Case(
        "position that the pairing has not", TRAIN, "model: {moe_every: 1, shortcut: {position: 3}}\n", 78, ("position 3", "moe_every: 2")
    ),
    Case("no such config", ("train", "absent.yaml"), None, 66, ("absent.yaml does not exist",)),
    Case("a folder", ("train", "."), None, 66, (". is a directory",)),
    Case("no such plan", ("train", "run.yaml", "plan=absent.json", "--dry-run"), None, 66, ("absent.json",)),
    Case("no such topology", ("train", "run.yaml", "topology=absent", "--dry-run"), None, 66, ("absent", "2x8-nvlink-ib")),
    Case(
        "topology of another size",
        ("train", "run.yaml", "topology=2x8-nvlink-ib", "--dry-run"),
        None,
        78,
        ("16 devices", "parallel.expert is 2"),
    ),
    Case(
        "plan of another model",
        ("train", "run.yaml", "plan=other.json", "--dry-run"),
        None,
        65,
        ("other.json", "3 MoE layers x 8 experts", "4 experts"),
    ),
    Case("no such text", ("train", "run.yaml", "data.kind=text", "data.path=absent.txt", "parallel.expert=1"), None, 66, ("absent.txt",)),
    Case("malformed override", ("train", "run.yaml", "train.steps"), None, 2, ("'train.steps'", "a.b=c")),
    Case("wrong type in an override", ("train", "run.yaml", "train.steps=x"), None, 78, ("override train.steps=x", "integer")),
    # ---- traces
    Case("no such trace", ("trace", "show", "absent.npz"), None, 66, ("absent.npz",)),
    Case("text as a trace", SHOW, "not a trace", 65, ("bad.npz",)),
    Case("empty file", SHOW, b"", 65, ("bad.npz",)),
    Case("truncated", SHOW, truncated, 65, ("bad.npz",)),
    Case("object array", SHOW, npz(experts=np.array([[{}]], dtype=object)), 65, ("bad.npz", "Object arrays", "plain integer arrays")),
    Case("no experts", SHOW, npz(expert=choices()), 65, ("bad.npz", "experts")),
    Case("floats", SHOW, npz(experts=choices().astype(float)), 65, ("bad.npz", "float64", "integer")),
    Case("one dimension", SHOW, npz(experts=np.zeros(4, int)), 65, ("bad.npz", "(4,)")),
    Case("negative expert", SHOW, npz(experts=choices(-2)), 65, ("bad.npz", "-2")),
    Case("expert out of range", SHOW, npz(experts=choices(9), num_experts=4), 65, ("bad.npz", "9", "4")),
    Case("expert twice", SHOW, npz(experts=choices(1)), 65, ("bad.npz", "twice")),
    Case(
        "weights of another shape",
        SHOW,
        npz(experts=choices(), weights=np.ones((4, 2, 1), np.float16)),
        65,
        ("bad.npz", "weights", "(4, 2, 1)"),
    ),
    Case("NaN weight", SHOW, npz(experts=choices(), weights=np.full((4, 2, 2), np.nan, np.float16)), 65, ("bad.npz", "weights", "finite")),
    Case("home for too few tokens", SHOW, npz(experts=choices(), home=np.zeros(3, int)), 65, ("bad.npz", "home", "4")),
    Case("zero experts", SHOW, npz(experts=choices(), num_experts=0), 65, ("bad.npz", "num_experts")),
    Case("another format version", SHOW, npz(experts=choices(), format_version=99), 65, ("bad.npz", "99", "1")),
    Case("zip with something else", SHOW, lambda: _zip("readme.txt"), 65, ("bad.npz",)),
    Case("fewer experts than asked for", ("trace", "show", "good.npz", "--num-experts", "3"), None, 65, ("good.npz", "3")),
    # ---- topologies
    Case("topology: unknown key", SOLVE, UNIFORM + "nods: 3\n", 65, ("bad.yaml:6", "`nods`", "did you mean `nodes`?")),
    Case("topology: zero bandwidth", SOLVE, UNIFORM.replace("1e9, latency", "0, latency"), 65, ("bad.yaml", "bytes_per_s", "0")),
    Case("topology: negative latency", SOLVE, UNIFORM.replace("1e-5", "-1e-5"), 65, ("bad.yaml", "latency_s", "-1e-05")),
    Case("topology: NaN", SOLVE, UNIFORM.replace("1e-5", ".nan"), 65, ("bad.yaml:5", ".nan")),
    Case("topology: text for a number", SOLVE, UNIFORM.replace("1e12", "fast"), 65, ("bad.yaml:3", '"fast"')),
    Case("topology: duplicate key", SOLVE, UNIFORM + "nodes: 3\n", 65, ("bad.yaml:6", "`nodes`", "line 1")),
    Case("topology: too many devices", SOLVE, UNIFORM.replace("nodes: 2", "nodes: 1000000"), 65, ("bad.yaml", "4096")),
    Case(
        "topology: matrix that is not square",
        SOLVE,
        "devices: [{node: 0, flop_per_s: 1e9, memory_bytes: 1e9}]\nbytes_per_s: [[1, 2]]\nlatency_s: [[0]]\n",
        65,
        ("bad.yaml", "bytes_per_s"),
    ),
    Case("topology: empty", SOLVE, "", 65, ("bad.yaml",)),
    Case("topology: alias bomb", SOLVE, BOMB, 65, ("bad.yaml:1", "&a")),
    Case("topology: binary", SOLVE, b"\xff\xfe\x00", 65, ("bad.yaml:1", "0xff")),
    # ---- plans
    Case("no such plan to check", ("plan", "check", "absent.json"), None, 66, ("absent.json",)),
    Case("plan: not JSON", CHECK, "{", 65, ("bad.json",)),
    Case("plan: a list", CHECK, "[]", 65, ("bad.json",)),
    Case("plan: NaN", CHECK, plan_json().replace('"cost": null', '"cost": NaN'), 65, ("bad.json", "NaN")),
    Case("plan: duplicate key", CHECK, plan_json()[:-1] + ', "seed": 1}', 65, ("bad.json", "seed")),
    Case("plan: deep", CHECK, "[" * 100_000, 65, ("bad.json",)),
    Case("plan: key missing", CHECK, plan_json(slots="leave out"), 65, ("bad.json", "slots")),
    Case("plan: expert out of range", CHECK, plan_json(slots=[[[0, 1], [2, 4]]]), 65, ("bad.json", "4")),
    Case("plan: negative expert", CHECK, plan_json(slots=[[[0, 1], [2, -3]]]), 65, ("bad.json", "-3")),
    Case("plan: expert nowhere", CHECK, plan_json(slots=[[[0, 1], [2, 2]]]), 65, ("bad.json", "2")),
    Case("plan: ragged slots", CHECK, plan_json(slots=[[[0, 1], [2]]]), 65, ("bad.json", "slots")),
    Case("plan: fraction as expert", CHECK, plan_json(slots=[[[0, 1], [2, 3.5]]]), 65, ("bad.json", "3.5")),
    Case("plan: layers that do not agree", CHECK, plan_json(num_layers=2), 65, ("bad.json", "2", "1")),
    Case("plan: another format version", CHECK, plan_json(format_version=99), 65, ("bad.json", "99")),
    Case("plan for another trace", ("plan", "check", "other.json", "--trace", "good.npz"), None, 65, ("3 MoE layers x 8 experts")),
    # ---- command lines
    Case("no such command", ("trian",), None, 2, ("trian",)),
    Case("no such option", ("train", "run.yaml", "--fast"), None, 2, ("--fast",)),
    Case("option missing", ("plan", "solve", "--trace", "good.npz"), None, 2, ("--topology",)),
    Case(
        "no such method",
        ("plan", "solve", "--trace", "good.npz", "--topology", "2x1-local", "--method", "aneal"),
        None,
        2,
        ("aneal", "anneal"),
    ),
    Case(
        "no such objective",
        ("plan", "solve", "--trace", "good.npz", "--topology", "2x1-local", "--objective", "time"),
        None,
        2,
        ("time", "seconds"),
    ),
    Case(
        "load cap below 1",
        ("plan", "solve", "--trace", "good.npz", "--topology", "2x1-local", "--load-cap", "0.5"),
        None,
        2,
        ("0.5", "1.0"),
    ),
    Case(
        "too few slots",
        ("plan", "solve", "--trace", "good.npz", "--topology", "2x1-local", "--slots", "1"),
        None,
        3,
        ("4 experts", "2 slots"),
    ),
    Case("no checkpoint", ("checkpoint", "verify", "."), None, 66, ("no checkpoint",)),
    Case("import to another suffix", ("trace", "import", "good.npz", "out.txt"), None, 2, ("out.txt", "out.npz")),
    Case("run without a checkpoint to resume", ("train", "run.yaml", "run.resume=always"), None, 66, ("runs/run", "no checkpoint")),
]


def _zip(member: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, "hello")
    return file.getvalue()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one good file of every kind, as the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((64, 1, 4)), axis=-1)[..., :2].astype(np.uint16)
    Trace(experts, 4).save(tmp_path / "good.npz")
    Topology.uniform(2, 1).save(tmp_path / "good.yaml")
    Plan.contiguous(3, 8, 2).save(tmp_path / "other.json")
    (tmp_path / "run.yaml").write_text("parallel: {expert: 2}\nmodel: {num_layers: 2, num_experts: 4}\ntrain: {steps: 1}\n")
    return tmp_path


def write(case: Case, folder: Path) -> None:
    if case.content is not None:
        content = case.content() if callable(case.content) else case.content
        name = next(argument for argument in case.arguments if argument.startswith("bad."))
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_gives_one_line_and_its_exit_code(case: Case, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(case, place)
    before = sorted(place.rglob("*"))
    code = run(case.arguments)
    printed = capsys.readouterr()
    assert code == case.exit_code, printed.err
    assert "Traceback" not in printed.err
    errors = [line for line in printed.err.splitlines() if line.startswith("crossdock: error: ")]
    assert len(errors) == 1
    assert printed.err.splitlines()[-1] == errors[0]
    for piece in case.pieces:
        assert piece in errors[0]
    assert len(errors[0]) < 600
    assert not set(place.rglob("*.npz")) - set(before), "nothing is written for bad input"
    assert not set(place.rglob("plan.json")) - set(before)


@pytest.mark.parametrize("name", ["duplicate key", "truncated", "plan of another model", "no such command"])
def test_the_same_through_a_process_of_its_own(name: str, place: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    write(case, place)
    ended = subprocess.run([sys.executable, "-m", "crossdock", *case.arguments], capture_output=True, text=True, cwd=place, timeout=120)
    assert ended.returncode == case.exit_code
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    assert line.startswith("crossdock: error: ")
    for piece in case.pieces:
        assert piece in line


def test_the_good_files_of_the_table_are_good(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "run.yaml", "--dry-run"]) == 0
    assert run(["trace", "show", "good.npz", "--json"]) == 0
    assert run(["plan", "solve", "--trace", "good.npz", "--topology", "good.yaml", "--method", "balance", "--json"]) == 0
    assert run(["plan", "check", "plan.json", "--trace", "good.npz", "--topology", "good.yaml"]) == 0
    (place / "hand.json").write_text(plan_json())
    assert run(["plan", "check", "hand.json", "--trace", "good.npz"]) == 0
