"""The short form of fuzzing: a thousand mutants; `make fuzz` reads twenty times as many."""

import io
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from tests.fuzz import arrays, exchanged, kinds
from tests.fuzz.arrays import zip_bomb
from tests.fuzz.campaign import Child, campaign
from tests.fuzz.child import command, examine, problem
from tests.fuzz.kinds import KINDS

SHORT, LONG = 1_000, 20_000


def check(num_inputs: int, seed: int) -> None:
    tally = campaign(num_inputs, seed)
    assert not tally.findings, "\n".join(f"{found.kind} {found.seed}: {found.problem}" for found in tally.findings)
    assert tally.inputs == num_inputs
    for kind in KINDS:
        codes = {code: count for (of, code), count in tally.codes.items() if of == kind}
        assert len(codes) > 1, f"{kind}: every mutant ended with {codes}, so nothing was tried"


@pytest.mark.timeout(600)
def test_a_thousand_mutants() -> None:
    check(SHORT, seed=1_000_000)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_thousand_mutants() -> None:
    check(LONG, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_broken_is_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the mutants would all be refused for one and the same reason."""
    monkeypatch.chdir(tmp_path)
    for module in (kinds, exchanged):
        for name in ("mutated_value", "mutated_text", "mutated_bytes"):
            monkeypatch.setattr(module, name, lambda content, rng: content)
        monkeypatch.setattr(module, "change_array", lambda found, rng: None)
        monkeypatch.setattr(module, "npy_bytes", whole_npy)
    monkeypatch.setattr(arrays, "npy_bytes", whole_npy)
    monkeypatch.setattr(arrays, "zip_bomb", lambda: whole_npy(0))
    monkeypatch.setattr(kinds, "_override", lambda rng: ("train.steps=5",))
    monkeypatch.setattr(kinds, "_bad_safetensors", whole_safetensors)
    codes = {examine(kind, seed)["code"] for seed in range(12)}
    assert 0 in codes


def whole_npy(array: object, rng: Random | None = None) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


def whole_safetensors(tensors: object, rng: Random) -> bytes:
    header, data = kinds.safetensors(tensors)  # type: ignore[arg-type]
    return kinds._packed(json.dumps(header).encode(), data)


def test_the_same_seed_gives_the_same_mutant() -> None:
    for kind in KINDS:
        assert command(kind, 7) == command(kind, 7)
        assert len({repr(command(kind, seed)) for seed in range(20)}) > 10


@pytest.mark.parametrize(
    ("code", "said", "piece"),
    [
        (1, "crossdock: error: x", "exit code 1"),
        (80, "crossdock: error: x", "exit code 80"),
        (-1, "", "exit code -1"),
        (65, "Traceback (most recent call last)\ncrossdock: error: x", "exit code 65"),
        (65, "crossdock: error: x\ncrossdock: error: y", "2 error lines"),
        (78, "crossdock: error: " + "x" * 5000, "5018 characters"),
        (65, "crossdock: error: \x1b[31m", "control character"),
    ],
)
def test_what_counts_as_a_finding(code: int, said: str, piece: str) -> None:
    assert piece in problem(code, said)


def test_what_does_not() -> None:
    assert problem(65, "crossdock: error: bad.npz: no trace\n") == ""
    assert problem(1, "", told=1) == ""
    assert problem(1, "", told=0) != ""
    assert problem(0, "-- done\n") == ""


@pytest.mark.slow
def test_a_hang_is_found_and_the_next_input_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.campaign.CPU_LIMIT_S", -1.0)  # nothing is as fast as that
    monkeypatch.setattr("tests.fuzz.campaign._POLL_S", 0.0)
    child = Child(tmp_path)
    try:
        assert "no answer" in child.examine("config", 1)["problem"]
    finally:
        child.close()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    from crossdock.errors import BadData
    from crossdock.placement.records.trace import Trace

    path = tmp_path / "bomb.npz"
    path.write_bytes(zip_bomb())
    assert path.stat().st_size < 10 * 2**20
    with pytest.raises(BadData, match=r"6442451072.*1011-fold"):
        Trace.load(path)
    path.write_bytes(zip_bomb(40))
    with pytest.raises(BadData, match="unpack to 42949673088 bytes, and at most"):
        Trace.load(path)
