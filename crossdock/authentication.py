"""The secret of one job: ranks sign with it what steers the others, so that nobody else can pretend to be one of them.

It is made anew for every job and handed down in a file that only its owner can read, or in the environment; it is never printed.
"""

import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from crossdock.errors import BadConfig, MissingInput

MAC_BYTES = hashlib.sha256().digest_size
LEAST_CHARACTERS = 16
_UNSIGNED = bytes(MAC_BYTES)


@dataclass(frozen=True)
class Secret:
    """What the ranks of one job know and nobody else does."""

    key: bytes = field(repr=False)

    @classmethod
    def fresh(cls) -> "Secret":
        """A new one, of 256 random bits."""
        return cls.of(secrets.token_hex(32), "a fresh secret")

    @classmethod
    def of(cls, text: str, origin: str) -> "Secret":
        """The secret spelled by `text`; `origin` stands for it in messages. Raises `BadConfig` where it is too short to be one."""
        if len(text.strip()) < LEAST_CHARACTERS:
            raise BadConfig(f"{origin} has {len(text.strip())} characters; a secret has at least {LEAST_CHARACTERS}: openssl rand -hex 32")
        return cls(text.strip().encode())

    @classmethod
    def read(cls, path: Path) -> "Secret":
        """The secret in a file. Raises `MissingInput` where there is none, `BadConfig` where others than its owner may read it."""
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if mode & 0o077:
                    raise BadConfig(f"{path} holds a secret and has mode {mode:04o}, so that others can read it; run: chmod 600 {path}")
                text = file.read(4096).decode(errors="replace")
        except OSError as failure:
            raise MissingInput(f"cannot read the secret in {path}: {failure.strerror}; every rank needs the same file") from failure
        return cls.of(text, str(path))

    def write(self, path: Path) -> None:
        """Write it to a new file of mode 0600. Raises `FileExistsError` where something stands there."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.key)


def sealed(secret: Secret | None, purpose: str, message: bytes) -> bytes:
    """`message` behind its HMAC-SHA-256 (zeros where there is no secret). The purpose is signed with it: what was meant for one place
    is worth nothing in another."""
    return (_UNSIGNED if secret is None else _mac(secret, purpose, message)) + message


def opened(secret: Secret | None, purpose: str, sealed_message: bytes) -> bytes:
    """The message that `sealed` sealed. Raises `BadConfig` where it was not sealed so with the same secret."""
    mac, message = sealed_message[:MAC_BYTES], sealed_message[MAC_BYTES:]
    if hmac.compare_digest(mac, _UNSIGNED if secret is None else _mac(secret, purpose, message)):
        return message
    if secret is None:
        problem = "is signed with a secret, and this rank has none"
    else:
        problem = "is not signed, and this job has a secret" if mac == _UNSIGNED else "is signed with another secret"
    raise BadConfig(
        f"refused: the message `{purpose}` {problem}; give all ranks of the job the same CROSSDOCK_SECRET_FILE (or CROSSDOCK_SECRET), and "
        "see that no other job uses the same address and port"
    )


def _mac(secret: Secret, purpose: str, message: bytes) -> bytes:
    return hmac.digest(secret.key, len(purpose.encode()).to_bytes(4, "big") + purpose.encode() + message, "sha256")
