"""A clock that jumps: a library to preload that moves the wall clock of one process by an hour, to and fro."""

import shutil
import subprocess
from pathlib import Path

from crossdock.errors import Unavailable

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static int real(clockid_t id, struct timespec *t) {
    static int (*next)(clockid_t, struct timespec *);
    if (!next) next = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    return next(id, t);
}
static time_t jump(void) {
    static const time_t jumps[] = {0, 3600, -3600, 7200};
    struct timespec t;
    real(CLOCK_MONOTONIC, &t);
    return jumps[(t.tv_sec * 4 + t.tv_nsec / 250000000) % 4];
}
int clock_gettime(clockid_t id, struct timespec *t) {
    int failed = real(id, t);
    if (!failed && id == CLOCK_REALTIME) t->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *restrict v, void *restrict zone) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    v->tv_sec = t.tv_sec;
    v->tv_usec = t.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *where) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (where) *where = t.tv_sec;
    return t.tv_sec;
}
"""


def unavailable_reason() -> str | None:
    """Why no such library can be made here, or None."""
    return None if shutil.which("cc") else "no C compiler (cc) for the library that moves the clock"


def unsteady_clock(folder: Path) -> Path:
    """The library, built in `folder`. Raises `Unavailable` without a C compiler."""
    if (reason := unavailable_reason()) is not None:
        raise Unavailable(reason)
    source, library = folder / "clock.c", folder / "clock.so"
    if not library.exists():
        source.write_text(SOURCE)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library
