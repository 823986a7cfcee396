"""Secrets and what is signed with them."""

import pickle
from pathlib import Path

import pytest

from crossdock.authentication import MAC_BYTES, Secret, opened, sealed
from crossdock.errors import BadConfig, MissingInput

OURS, THEIRS = Secret.fresh(), Secret.fresh()


def test_what_was_sealed_is_opened() -> None:
    assert opened(OURS, "node/1", sealed(OURS, "node/1", b"3")) == b"3"
    assert opened(None, "node/1", sealed(None, "node/1", b"3")) == b"3"
    assert opened(OURS, "", sealed(OURS, "", b"")) == b""


@pytest.mark.parametrize(
    ("secret", "message", "piece"),
    [
        (OURS, sealed(THEIRS, "node/1", b"3"), "signed with another secret"),
        (OURS, sealed(None, "node/1", b"3"), "is not signed, and this job has a secret"),
        (None, sealed(OURS, "node/1", b"3"), "this rank has none"),
        (OURS, sealed(OURS, "node/2", b"3"), "`node/1` is signed with another"),
        (OURS, sealed(OURS, "node/1", b"3")[:MAC_BYTES] + b"4", "another secret"),
        (OURS, b"3", "refused"),
        (OURS, b"", "refused"),
    ],
    ids=["another secret", "unsigned", "signed for nobody", "another purpose", "changed", "too short", "empty"],
)
def test_what_was_sealed_otherwise_is_refused(secret: Secret | None, message: bytes, piece: str) -> None:
    with pytest.raises(BadConfig, match=piece) as refused:
        opened(secret, "node/1", message)
    assert OURS.key.decode() not in str(refused.value)


def test_purpose_and_message_do_not_run_together() -> None:
    assert sealed(OURS, "ab", b"c")[:MAC_BYTES] != sealed(OURS, "a", b"bc")[:MAC_BYTES]


def test_a_secret_is_never_shown() -> None:
    text = OURS.key.decode()
    assert text not in repr(OURS)
    assert text not in str({"secret": OURS})
    assert pickle.loads(pickle.dumps(OURS)) == OURS


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    OURS.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Secret.read(path) == OURS
    path.chmod(0o640)
    with pytest.raises(BadConfig, match=r"mode 0640.*chmod 600"):
        Secret.read(path)
    with pytest.raises(FileExistsError):
        THEIRS.write(path)
    with pytest.raises(MissingInput, match="every rank needs the same file"):
        Secret.read(tmp_path / "absent")
    short = tmp_path / "short"
    short.touch(mode=0o600)
    with pytest.raises(BadConfig, match="0 characters; a secret has at least 16"):
        Secret.read(short)
