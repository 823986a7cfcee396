"""A store whose values are signed: a rank believes what ranks of its job have written, the addresses of process groups included."""

import datetime
from typing import Any

import torch.distributed as dist

from crossdock.authentication import Secret, opened, sealed


class SignedStore(dist.Store):
    """`inner` with every value signed by `secret` under its key and `start`, a name that no other start of the job has.

    Counters (`add`) are the inner store's own: nothing is read from them that steers a rank. Reading raises `BadConfig` for a value that
    somebody else has written.
    """

    def __init__(self, inner: dist.Store, secret: Secret | None, start: str = "") -> None:
        super().__init__()
        self.inner, self.secret, self.start = inner, secret, start

    def set(self, key: str, value: str | bytes) -> None:
        self.inner.set(key, sealed(self.secret, self._purpose(key), value.encode() if isinstance(value, str) else value))  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        return opened(self.secret, self._purpose(key), self.inner.get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def add(self, key: str, amount: int) -> int:
        return self.inner.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        return self.inner.check(keys)

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        self.inner.wait(keys) if timeout is None else self.inner.wait(keys, timeout)

    def delete_key(self, key: str) -> bool:
        return self.inner.delete_key(key)

    def num_keys(self) -> int:
        return self.inner.num_keys()

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self.inner.set_timeout(timeout)

    @property
    def timeout(self) -> Any:
        return self.inner.timeout  # type: ignore[attr-defined]

    def _purpose(self, key: str) -> str:
        return f"{self.start}/{key}" if self.start else key
