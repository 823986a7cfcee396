"""Gradients summed over ranks while the backward pass still runs, in full precision and in an order that never changes.

Every parameter's gradient is a view into a flat bucket of fp32 (float64 for float64 parameters). The moment a bucket's last gradient of
the last micro-batch is there, its all-reduce starts: dense parameters over the world, experts over the ranks that hold the same slots. It
does what DistributedDataParallel does, written anew for two reasons: DDP sums bf16 gradients in bf16, and it cuts its buckets anew after
the first step of every process, so that a resumed run adds in another order and is no longer bitwise the run it continues.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crossdock.runtime.optimization.optimizer import master_dtype
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.exchange import Pending
from crossdock.runtime.transport.mesh import Group

BUCKET_BYTES = 8 << 20


class Summed(NamedTuple):
    """A parameter whose gradient is summed over `group`; None where nobody shares it.

    most_elements: of the rank that has most of it. Expert tensors have as many slots as a rank holds experts, and all ranks cut their
    buckets alike.
    """

    parameter: nn.Parameter
    group: Group | None
    most_elements: int


@dataclass(eq=False)
class Bucket:
    """A flat gradient buffer, its share of it per parameter, and the reduction in flight; `group` is None where nobody shares it."""

    group: Group | None
    flat: Tensor
    parameters: tuple[nn.Parameter, ...]
    missing: int = 0
    work: Pending[Tensor] | None = field(default=None, repr=False)


class GradientReducer:
    """Owns the gradients of a model's parameters. Order of use: backwards but the last, `arm()`, backward, `finish()`, ..., `zero()`."""

    def __init__(self, parameters: Sequence[Summed], bucket_bytes: int = BUCKET_BYTES) -> None:
        """`parameters`: in the order in which forward uses them, the same on every rank."""
        self.buckets: list[Bucket] = []
        self.gradient_of: dict[nn.Parameter, Tensor] = {}
        self._armed = False
        self._next_launch = 0
        self._removers: list[Callable[[], None]] = []
        for chunk, group in _chunks(parameters, bucket_bytes):
            self._add_bucket(chunk, group)

    def _add_bucket(self, parameters: list[nn.Parameter], group: Group | None) -> None:
        dtype = master_dtype(parameters[0].dtype)
        flat = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=dtype, device=parameters[0].device)
        bucket = Bucket(group, flat, tuple(parameters))
        views = flat.split([parameter.numel() for parameter in parameters])
        for parameter, view in zip(parameters, views, strict=True):
            gradient = view.view(parameter.shape)
            self.gradient_of[parameter] = gradient
            parameter.grad = gradient if parameter.dtype == dtype else None
            handle = parameter.register_post_accumulate_grad_hook(self._hook(bucket, gradient))
            self._removers.append(handle.remove)
        self.buckets.append(bucket)

    def _hook(self, bucket: Bucket, gradient: Tensor) -> Callable[[Tensor], None]:
        def accumulated(parameter: Tensor) -> None:
            if parameter.grad is not gradient:
                # a lower precision (or a gradient that autograd put in place of ours): add it in full precision, and let it go
                assert parameter.grad is not None
                gradient.add_(parameter.grad)
                parameter.grad = gradient if parameter.dtype == gradient.dtype else None
            if self._armed:
                bucket.missing -= 1
                self._launch_ready()

        return accumulated

    def arm(self) -> None:
        """The next backward pass is the step's last: reduce each bucket as it fills."""
        self._armed = True
        self._next_launch = 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def _launch_ready(self) -> None:
        # in order of number only, so that every rank starts the same collectives in the same order
        while self._next_launch < len(self.buckets) and self.buckets[self._next_launch].missing == 0:
            bucket = self.buckets[self._next_launch]
            if bucket.group is not None:
                bucket.work = collectives.all_reduce_start(bucket.flat, bucket.group)
            self._next_launch += 1

    def finish(self) -> None:
        """Reduce what no gradient reached, and wait for all; afterwards every gradient is the sum over its group."""
        for bucket in self.buckets:
            bucket.missing = 0
        self._launch_ready()
        self._armed = False
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None

    def zero(self) -> None:
        """Forget the gradients; keeps the memory."""
        for bucket in self.buckets:
            bucket.flat.zero_()

    def close(self) -> None:
        """Take the hooks off, give the parameters back and let the gradients go."""
        for remove in self._removers:
            remove()
        for parameter in self.gradient_of:
            parameter.grad = None
        self._removers.clear()
        self.gradient_of.clear()
        self.buckets.clear()


def _chunks(parameters: Sequence[Summed], bucket_bytes: int) -> list[tuple[list[nn.Parameter], Group | None]]:
    """Parameters of one group, precision and device together, cut at `bucket_bytes`, in the order in which the backward pass fills them."""
    closed: list[tuple[list[nn.Parameter], Group | None]] = []
    open_chunks: dict[Any, tuple[list[nn.Parameter], Group | None]] = {}
    num_elements: Counter[Any] = Counter()
    for parameter, group, most_elements in reversed(parameters):  # the backward pass meets them in reverse
        kind = (id(group), master_dtype(parameter.dtype), parameter.device)
        open_chunks.setdefault(kind, ([], group))[0].append(parameter)
        num_elements[kind] += most_elements
        if num_elements[kind] * master_dtype(parameter.dtype).itemsize >= bucket_bytes:
            closed.append(open_chunks.pop(kind))
            del num_elements[kind]
    return closed + list(open_chunks.values())
