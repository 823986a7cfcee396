"""Data: the order is a permutation, shares of ranks make up the batch of one rank, and every malformed file has its own message."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from crossdock.errors import BadConfig, BadData, CrossdockError, MissingInput
from crossdock.runtime.data import (
    BIN_HEADER,
    BIN_MAGIC,
    DataConfig,
    DataState,
    Sampler,
    load_corpus,
    read_bin,
    shuffled,
    vocabulary,
    write_bin,
)


def sampler(num_tokens: int = 1001, seq_len: int = 10, seed: int = 3) -> Sampler:
    return Sampler(np.arange(num_tokens, dtype=np.uint16), seq_len, vocab_size=num_tokens, seed=seed, source="numbers")


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_every_epoch_visits_every_sequence_once(size: int, seed: int, epoch: int) -> None:
    order = shuffled(np.arange(size), size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))


def test_orders_differ_between_seeds_and_epochs_and_look_shuffled() -> None:
    orders = [shuffled(np.arange(1000), 1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for number, order in enumerate(orders):
        assert abs(np.corrcoef(np.arange(1000), order)[0, 1]) < 0.15
        for other in orders[:number]:
            assert (order == other).mean() < 0.02


def test_a_place_does_not_depend_on_what_else_is_asked() -> None:
    whole = shuffled(np.arange(777), 777, 5, 2)
    assert [int(shuffled(np.array([place]), 777, 5, 2)[0]) for place in range(0, 777, 50)] == whole[::50].tolist()


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 3)])
def test_the_shares_of_all_ranks_are_the_global_batch(world_size: int, accumulate: int) -> None:
    source, state, size = sampler(), DataState(epoch=1, position=93), 24  # runs over the end of the epoch of 100
    whole = source.batch(state, size)
    parts, numbers = [], []
    for micro in range(accumulate):
        for rank in range(world_size):
            part = source.batch(state, size, rank=rank, world_size=world_size, micro=micro, accumulate=accumulate)
            parts.append(part)
            numbers.append(part.first_token)
    assert np.array_equal(np.concatenate([part.token_BQ for part in parts]), whole.token_BQ)
    assert np.array_equal(np.concatenate([part.sequence_B for part in parts]), whole.sequence_B)
    assert numbers == [number * 10 * size // (world_size * accumulate) for number in range(world_size * accumulate)]
    assert np.array_equal(whole.target_BQ, whole.token_BQ + 1)


def test_seeking_is_the_same_as_reading_on() -> None:
    source, state = sampler(), DataState()
    for _ in range(17):
        state = source.after(state, 24)
    assert state == source.after(DataState(), 17 * 24) == DataState(epoch=4, position=8)


def test_evaluation_is_the_same_for_every_world_and_covers_the_text() -> None:
    source = sampler()
    whole = np.concatenate([batch.sequence_B for batch in source.evaluation(5, 4)])
    assert whole.tolist() == list(range(0, 100, 5))
    ranks = [list(source.evaluation(5, 4, rank=rank, world_size=2)) for rank in range(2)]
    together = [number for pair in zip(*ranks, strict=True) for batch in pair for number in batch.sequence_B.tolist()]
    assert together == whole.tolist()
    assert len(list(sampler(31).evaluation(9, 4))) == 1  # three sequences: one batch, some twice


def test_a_batch_that_does_not_divide_is_refused_with_numbers() -> None:
    with pytest.raises(BadConfig, match=r"10 sequences per step do not divide over 4 ranks x 1 micro-batches; choose 8, 12"):
        sampler().batch(DataState(), 10, world_size=4)


def test_the_standard_library_is_the_default_corpus() -> None:
    corpus = load_corpus(DataConfig())
    assert len(corpus.train) > 4_000_000
    assert 0.01 < len(corpus.held_out) / len(corpus.train) < 0.15
    assert corpus.vocab_size == 256
    assert b"class TestCase" in bytes(corpus.train) + bytes(corpus.held_out)  # unittest stays, test folders go
    assert corpus.digest == load_corpus(DataConfig()).digest


def test_files_are_split_by_name_wherever_the_folder_stands(tmp_path: Path) -> None:
    held = []
    for place in ("here", "there/deeper"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        for number in range(40):
            (folder / f"{number}.txt").write_text(f"file {number} " * 20)
        held.append(load_corpus(DataConfig(kind="text", path=str(folder), held_out=0.2, seq_len=16)))
        assert np.array_equal(
            held[-1].held_out, load_corpus(DataConfig(kind="text", path=f"{folder}/*.txt", held_out=0.2, seq_len=16)).held_out
        )
    assert held[0].digest == held[1].digest
    train, held_out = bytes(held[0].train).decode(), bytes(held[0].held_out).decode()
    names = {f"file {number} " for number in range(40)}
    assert {name for name in names if name in train}.isdisjoint(name for name in names if name in held_out)
    assert all(name in train or name in held_out for name in names)


def test_one_file_is_split_by_position(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("abcdefghij" * 100)
    corpus = load_corpus(DataConfig(kind="text", path=str(tmp_path / "one.txt"), held_out=0.1, seq_len=16))
    assert (len(corpus.train), len(corpus.held_out)) == (901, 100)


def test_jsonl_reads_its_field(tmp_path: Path) -> None:
    lines = [json.dumps({"id": number, "body": f"text {number} " * 10}) for number in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    corpus = load_corpus(DataConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"), field="body", held_out=0.2, seq_len=16))
    assert b"text 7 text 7" in bytes(corpus.train) + bytes(corpus.held_out)
    assert b"id" not in bytes(corpus.train)


@pytest.mark.parametrize(("vocab_size", "width"), [(300, 2), (1 << 16, 2), (70_000, 4)])
def test_bin_files_come_back_mapped(tmp_path: Path, vocab_size: int, width: int) -> None:
    token_T = np.random.default_rng(0).integers(0, vocab_size, 500)
    write_bin(tmp_path / "t.bin", token_T, vocab_size)
    tokens, read_size = read_bin(tmp_path / "t.bin")
    assert np.array_equal(tokens, token_T)
    assert (read_size, tokens.dtype.itemsize) == (vocab_size, width)
    assert isinstance(tokens, np.memmap)
    corpus = load_corpus(DataConfig(kind="bin", path=str(tmp_path / "t.bin"), held_out=0.2, seq_len=8))
    assert (len(corpus.train), len(corpus.held_out), corpus.vocab_size) == (400, 100, vocab_size)


def header(magic: bytes = BIN_MAGIC, version: int = 1, width: int = 2, vocab_size: int = 300, num_tokens: int = 3) -> bytes:
    return BIN_HEADER.pack(magic, version, width, vocab_size, num_tokens)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("bin", b"", "does not begin with XDTOKENS"),
        ("bin", b"PK\x03\x04" + b"\0" * 60, "does not begin with XDTOKENS"),
        ("bin", header() + b"\0" * 5, "has 37 bytes where its header promises 38"),
        ("bin", header(num_tokens=1 << 60) + b"\0" * 6, "header promises"),
        ("bin", header(version=9) + b"\0" * 6, "format version 9"),
        ("bin", header(width=3) + b"\0" * 9, "with 3 bytes per token"),
        ("bin", header(vocab_size=0) + b"\0" * 6, "vocabulary of 0"),
        ("bin", header() + b"\0" * 6, "fewer than seq_len"),
        ("jsonl", b'{"text": "a"}\n{"text": ', "input:2: not a JSON object"),
        ("jsonl", b"[1, 2]\n", "input:1: a JSON list where an object"),
        ("jsonl", b'{"body": "a"}\n', r"the key 'text' is absent \(keys: 'body'\); set data.field"),
        ("jsonl", b'{"text": 5}\n', "the key 'text' is not a string"),
        ("jsonl", b"[" * 100_000, "input:1: not a JSON object"),
        ("jsonl", b"\xff\xfe\n", "input:1: not a JSON object"),
        ("text", b"", "fewer than seq_len"),
        ("text", b"short", "fewer than seq_len"),
    ],
)
def test_malformed_files_have_one_clear_message(tmp_path: Path, kind: str, content: bytes, message: str) -> None:
    (tmp_path / "input").write_bytes(content)
    with pytest.raises(BadData, match=message):
        load_corpus(DataConfig(kind=kind, path=str(tmp_path / "input")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (DataConfig(kind="text", path="/nonexistent/*.txt"), MissingInput, "no such file"),
        (DataConfig(kind="bin", path="/nonexistent/t.bin"), MissingInput, "cannot read /nonexistent/t.bin"),
    ],
)
def test_absent_files(config: DataConfig, error: type[CrossdockError], message: str) -> None:
    for reader in (load_corpus, vocabulary):
        with pytest.raises(error, match=message):
            reader(config)


@pytest.mark.parametrize("kind", ["text", "jsonl", "bin"])
def test_a_kind_that_needs_a_path_is_refused_without_one(kind: str) -> None:
    with pytest.raises(ValidationError, match=f"data.kind {kind} needs data.path"):
        DataConfig(kind=kind)  # type: ignore[arg-type]


def test_the_vocabulary_is_told_without_reading_the_text(tmp_path: Path) -> None:
    write_bin(tmp_path / "t.bin", np.arange(20), 300)
    write_bin(tmp_path / "held.bin", np.arange(20), 400)
    assert vocabulary(DataConfig()) == 256
    assert vocabulary(DataConfig(kind="bin", path=str(tmp_path / "t.bin"))) == 300
    assert vocabulary(DataConfig(kind="bin", path=str(tmp_path / "t.bin"), held_out_path=str(tmp_path / "held.bin"))) == 400


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="outside a vocabulary of 10"):
        write_bin(tmp_path / "t.bin", np.array([1, 10]), 10)
    with pytest.raises(BadData, match="flat array of integers"):
        write_bin(tmp_path / "t.bin", np.array([0.5]), 10)
    with pytest.raises(BadData, match="token 1000 does not fit a vocabulary of 300"):
        Sampler(np.arange(1001, dtype=np.uint16), 10, 300, 0, "numbers").batch(DataState(), 100)
