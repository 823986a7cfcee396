"""Training data: files to one array of tokens, and keyed shuffling that can seek to any step without storing a permutation.

A corpus is two token arrays, train and held-out, split by file (by line for JSONL, by position for a single document or a `.bin` file).
Sequences are the consecutive windows of `seq_len` tokens. Epoch e visits all of them in an order that is a keyed bijection of their
numbers, so the whole state is (epoch, position), and any rank of any world computes its share of any batch at once.

`.bin` files: 32 bytes of header, little-endian, then the tokens. Header: 8 bytes `XDTOKENS`, uint32 format version (1), uint32 bytes per
token (2 or 4), uint64 vocabulary size, uint64 number of tokens. `write_bin` makes them.
"""

import glob
import hashlib
import json
import math
import struct
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pydantic

from crossdock import atomic
from crossdock.errors import BadConfig, BadData, MissingInput
from crossdock.strict_yaml import Contradiction, StrictModel

BYTE_VOCABULARY = 256
BETWEEN_DOCUMENTS = 0  # the NUL byte closes every document of a byte-level corpus; text does not contain it
BIN_MAGIC = b"XDTOKENS"
BIN_HEADER = struct.Struct("<8sIIQQ")
BIN_VERSION = 1
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"})
_FEISTEL_ROUNDS = 6

Tokens = npt.NDArray[np.unsignedinteger[Any]]


class DataConfig(StrictModel):
    """Where the text comes from and how it is cut."""

    kind: Literal["stdlib", "text", "jsonl", "bin"] = "stdlib"
    path: str | None = None
    """A file, a folder or a glob (text, jsonl, bin); not used by stdlib."""
    held_out_path: str | None = None
    """Files for evaluation; without it a share of `path` is held out."""
    field: str = "text"
    """The key of a JSONL line that holds its text."""
    held_out: float = pydantic.Field(default=0.05, gt=0.0, lt=1.0)
    seq_len: int = pydantic.Field(default=128, ge=1, le=1 << 20)
    homing: str | None = None
    """A forecast of experts, as `crossdock plan solve --homing` writes it beside the plan: the sequences of each batch go to the ranks
    where most of their experts are. Off where left out."""

    @pydantic.model_validator(mode="after")
    def _cross_check(self) -> Self:
        if self.kind != "stdlib" and self.path is None:
            wanted = "a .bin file" if self.kind == "bin" else "a file, a folder or a glob"
            raise Contradiction("kind", f"data.kind {self.kind} needs data.path: {wanted}")
        return self


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on and tokens held out; `digest` names the files, so that two runs can tell whether they read the same text."""

    train: Tokens
    held_out: Tokens
    vocab_size: int
    source: str
    digest: str


@dataclass(frozen=True)
class DataState:
    """Where the next batch begins: sequence number `position` in the order of `epoch`."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's share of a micro-batch: int64 `token_BQ` and the next tokens `target_BQ` [sequences, seq_len].

    `sequence_B` numbers each sequence in its corpus; `first_token` numbers the rank's first token among those of the whole global batch.
    `place_B` int64 [sequences] numbers the sequences in the global batch where they are not consecutive, as with homing.
    """

    token_BQ: npt.NDArray[np.int64]
    target_BQ: npt.NDArray[np.int64]
    sequence_B: npt.NDArray[np.int64]
    first_token: int
    place_B: npt.NDArray[np.int64] | None = None


# ---- order -----------------------------------------------------------------------------------------------------------


def shuffled(position_B: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The sequence numbers at places `position_B` of epoch `epoch`: a bijection of 0..size-1 keyed by (seed, epoch), O(1) per place.

    A Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway 2002, "cycle walking").
    """
    half_bits = max(1, math.ceil((max(size, 2) - 1).bit_length() / 2))
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    key_of_round = np.frombuffer(hashlib.sha512(f"order {seed} {epoch}".encode()).digest(), dtype="<u8")[:_FEISTEL_ROUNDS]
    value = position_B.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & mask
        for key in key_of_round:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        value[outside] = (left << shift) | right
        outside &= value >= np.uint64(size)
    return value.astype(np.int64)


def _mixed(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit touches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class Sampler:
    """Cuts `tokens` into sequences and hands out batches in a keyed order; it holds no position of its own."""

    tokens: Tokens
    seq_len: int
    vocab_size: int
    seed: int
    source: str

    def __post_init__(self) -> None:
        if self.num_sequences < 1:
            raise BadData(f"{self.source}: {len(self.tokens)} tokens are fewer than seq_len + 1 = {self.seq_len + 1}; give more text")

    @property
    def num_sequences(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def after(self, state: DataState, batch_sequences: int) -> DataState:
        """The state once `batch_sequences` more sequences are read."""
        epochs, position = divmod(state.position + batch_sequences, self.num_sequences)
        return DataState(state.epoch + epochs, position)

    def batch(
        self, state: DataState, batch_sequences: int, *, rank: int = 0, world_size: int = 1, micro: int = 0, accumulate: int = 1
    ) -> Batch:
        """Rank `rank`'s part of micro-batch `micro` of the `batch_sequences` sequences that follow `state`.

        Micro-batches are the same whatever the world; each is cut into `world_size` equal consecutive shares. Raises `BadConfig` where
        the batch does not divide.
        """
        share = sequences_per_rank(batch_sequences, world_size, accumulate)
        first = micro * (batch_sequences // accumulate) + rank * share
        place_B = state.position + first + np.arange(share, dtype=np.int64)
        epoch_B, position_B = np.divmod(place_B, self.num_sequences)
        sequence_B = np.empty(share, dtype=np.int64)
        for epoch in np.unique(epoch_B):
            sequence_B[epoch_B == epoch] = shuffled(position_B[epoch_B == epoch], self.num_sequences, self.seed, state.epoch + int(epoch))
        return self._read(sequence_B, first * self.seq_len)

    def evaluation(self, batches: int, batch_sequences: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """At most `batches` batches spread evenly over the tokens, always the same ones; a short corpus gives fewer, at least one."""
        share = sequences_per_rank(batch_sequences, world_size, 1)
        wanted = max(1, min(batches, self.num_sequences // batch_sequences)) * batch_sequences
        number_B = np.arange(wanted, dtype=np.int64) * max(1, self.num_sequences // wanted) % self.num_sequences
        for first in range(0, wanted, batch_sequences):
            yield self._read(number_B[first + rank * share : first + (rank + 1) * share], rank * share * self.seq_len)

    def _read(self, sequence_B: npt.NDArray[np.int64], first_token: int) -> Batch:
        place_BQ = sequence_B[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        token_BQ = self.tokens[place_BQ].astype(np.int64)
        if token_BQ.size and int(token_BQ.max()) >= self.vocab_size:
            raise BadData(f"{self.source}: token {int(token_BQ.max())} does not fit a vocabulary of {self.vocab_size}; rewrite the file")
        return Batch(token_BQ[:, :-1], token_BQ[:, 1:], sequence_B, first_token)


def sequences_per_rank(batch_sequences: int, world_size: int, accumulate: int) -> int:
    """How many sequences of every micro-batch each rank reads; raises `BadConfig` where the batch does not divide."""
    if batch_sequences % (world_size * accumulate):
        lower = batch_sequences - batch_sequences % (world_size * accumulate)
        choices = ", ".join(str(n) for n in (lower, lower + world_size * accumulate) if n)
        raise BadConfig(
            f"{batch_sequences} sequences per step do not divide over {world_size} ranks x {accumulate} micro-batches; "
            f"choose {choices}, or another multiple"
        )
    return batch_sequences // (world_size * accumulate)


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_corpus(config: DataConfig) -> Corpus:
    """Read what `config` names; raises `MissingInput` where it is absent, `BadData` where it is malformed or too short for one sequence."""
    corpus = _load_bin(config) if config.kind == "bin" else _load_documents(config)
    for name, tokens in (("train", corpus.train), ("held-out", corpus.held_out)):
        if len(tokens) < config.seq_len + 1:
            raise BadData(
                f"{corpus.source}: the {name} part has {len(tokens)} tokens, fewer than seq_len + 1 = {config.seq_len + 1}; "
                "give more text, a smaller data.seq_len, or another data.held_out"
            )
    return corpus


def vocabulary(config: DataConfig) -> int:
    """How many tokens the text that `config` names can hold, told without reading it; raises what `load_corpus` would for files that are
    not there, and for `.bin` files that are damaged."""
    paths = [path for path in (config.path, config.held_out_path) if path is not None]
    if config.kind == "bin":
        return max(read_bin(Path(path))[1] for path in paths)
    for path in paths:
        _files(path)
    return BYTE_VOCABULARY


def _load_documents(config: DataConfig) -> Corpus:
    documents = dict(_documents(config, config.path))
    source = "standard library" if config.path is None else str(config.path)
    if config.held_out_path is not None:
        train, held_out = list(documents), []
        held = dict(_documents(config, config.held_out_path))
    else:
        held_out = [name for name in documents if _share(name) < config.held_out]
        train = [name for name in documents if _share(name) >= config.held_out]
        held = {name: documents[name] for name in held_out}
    digest = hashlib.sha256()
    for name, text in [*documents.items(), *held.items()]:
        digest.update(f"{name}\0{len(text)}\0".encode())
        digest.update(text)
    tokens = _joined(documents[name] for name in train)
    held_tokens = _joined(held.values())
    if min(len(tokens), len(held_tokens)) < config.seq_len + 1 and config.held_out_path is None:
        # too few documents to split by name: the tail of the text is held out instead
        tokens, held_tokens = _tail_split(_joined(documents.values()), config.held_out)
    return Corpus(tokens, held_tokens, BYTE_VOCABULARY, source, digest.hexdigest())


def _documents(config: DataConfig, pattern: str | None) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every document, in the order of names; names do not depend on where the files lie."""
    if pattern is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(file for file in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(file.relative_to(root).parts))
        if not files:
            raise MissingInput(f"{root} holds no Python source; set data.kind to text and data.path to files of yours")
    else:
        root, files = _files(pattern)
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            content = file.read_bytes()
        except OSError as error:
            raise MissingInput(f"cannot read {file}: {error.strerror}") from error
        if config.kind == "jsonl":
            yield from _lines(file, name, content, config.field)
        elif content:
            yield name, content


def _files(pattern: str) -> tuple[Path, list[Path]]:
    path = Path(pattern)
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207  Path.glob refuses absolute patterns
    if not files:
        raise MissingInput(f"data.path {pattern}: no such file, no folder with files, and no file that matches; check the path")
    root = path if path.is_dir() else Path(*_common_parts([file.parent for file in files]))
    return root, files


def _common_parts(folders: list[Path]) -> list[str]:
    parts: list[str] = []
    for level in zip(*(folder.parts for folder in folders), strict=False):
        if len(set(level)) > 1:
            break
        parts.append(level[0])
    return parts


def _lines(file: Path, name: str, content: bytes, field: str) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadData(f"{file}:{number}: not a JSON object ({error}); one object per line is expected") from error
        if not isinstance(record, dict):
            raise BadData(f"{file}:{number}: a JSON {type(record).__name__} where an object with the key {field!r} is expected")
        text = record.get(field)
        if not isinstance(text, str):
            found = ", ".join(map(repr, list(record)[:8]))
            raise BadData(
                f"{file}:{number}: the key {field!r} is {'absent' if text is None else 'not a string'} (keys: {found}); set data.field"
            )
        if text:
            yield f"{name}:{number}", text.encode()


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little") / 2**48


def _joined(documents: Any) -> Tokens:
    separator = bytes([BETWEEN_DOCUMENTS])
    return np.frombuffer(b"".join(part for document in documents for part in (document, separator)), dtype=np.uint8)


def _tail_split(tokens: Tokens, held_out: float) -> tuple[Tokens, Tokens]:
    cut = len(tokens) - round(len(tokens) * held_out)
    return tokens[:cut], tokens[cut:]


# ---- .bin ------------------------------------------------------------------------------------------------------------


def write_bin(path: Path, token_T: npt.NDArray[Any], vocab_size: int) -> None:
    """Write tokens as a `.bin` file: uint16 where the vocabulary fits, uint32 otherwise; raises `BadData` for tokens outside it."""
    token_T = np.asarray(token_T)
    if token_T.ndim != 1 or not np.issubdtype(token_T.dtype, np.integer):
        raise BadData(f"tokens must be a flat array of integers, not {token_T.dtype} of shape {list(token_T.shape)}")
    if token_T.size and (int(token_T.min()) < 0 or int(token_T.max()) >= vocab_size):
        raise BadData(f"tokens run from {int(token_T.min())} to {int(token_T.max())}, outside a vocabulary of {vocab_size}")
    width = 2 if vocab_size <= 1 << 16 else 4
    with atomic.replacing(Path(path)) as aside, aside.open("wb") as file:
        file.write(BIN_HEADER.pack(BIN_MAGIC, BIN_VERSION, width, vocab_size, len(token_T)))
        token_T.astype(f"<u{width}").tofile(file)


def read_bin(path: Path) -> tuple[Tokens, int]:
    """Map a `.bin` file: (tokens, vocabulary size), nothing copied; raises `MissingInput` or `BadData`."""
    path = Path(path)
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(BIN_HEADER.size)
    except OSError as error:
        raise MissingInput(f"cannot read {path}: {error.strerror}") from error
    if len(header) < BIN_HEADER.size or header[: len(BIN_MAGIC)] != BIN_MAGIC:
        raise BadData(f"{path} does not begin with {BIN_MAGIC.decode()}: not a token file; crossdock.runtime.data.write_bin makes them")
    _, version, width, vocab_size, num_tokens = BIN_HEADER.unpack(header)
    if version != BIN_VERSION or width not in (2, 4):
        raise BadData(f"{path}: format version {version} with {width} bytes per token; version {BIN_VERSION} with 2 or 4 is understood")
    if size_bytes != BIN_HEADER.size + width * num_tokens:
        promised_bytes = BIN_HEADER.size + width * num_tokens
        raise BadData(f"{path} has {size_bytes} bytes where its header promises {promised_bytes}; it was cut short or overwritten")
    if num_tokens == 0 or not 0 < vocab_size <= 1 << 32:
        raise BadData(f"{path}: {num_tokens} tokens of a vocabulary of {vocab_size}; at least one of each is needed")
    return np.memmap(path, dtype=f"<u{width}", mode="r", offset=BIN_HEADER.size, shape=(num_tokens,)), vocab_size


def _load_bin(config: DataConfig) -> Corpus:
    assert config.path is not None, "its configuration was checked"
    tokens, vocab_size = read_bin(Path(config.path))
    digest = hashlib.sha256(f"{Path(config.path).name} {len(tokens)} {vocab_size}".encode())
    digest.update(np.asarray(tokens[: 1 << 16]).tobytes())
    if config.held_out_path is None:
        train, held_out = _tail_split(tokens, config.held_out)
    else:
        train = tokens
        held_out, held_vocab_size = read_bin(Path(config.held_out_path))
        if held_vocab_size != vocab_size:
            raise BadData(f"{config.held_out_path} has a vocabulary of {held_vocab_size}, {config.path} of {vocab_size}; they must agree")
        digest.update(np.asarray(held_out[: 1 << 16]).tobytes())
    return Corpus(train, held_out, vocab_size, str(config.path), digest.hexdigest())
