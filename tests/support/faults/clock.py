"""A process's clock set wrong: a library loaded before all others that shifts what the system says the time is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* CLOCK_SHIFT: seconds. CLOCK_PERIOD: milliseconds after which the shift changes its sign, again and again. */
static long long shift(void) {
    const char *seconds = getenv("CLOCK_SHIFT"), *period = getenv("CLOCK_PERIOD");
    long long by = seconds ? atoll(seconds) : 0, every = period ? atoll(period) : 0;
    if (every > 0) {
        struct timespec now;
        syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
        if ((now.tv_sec * 1000LL + now.tv_nsec / 1000000) / every % 2) by = -by;
    }
    return by;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE || clock == CLOCK_TAI))
        now->tv_sec += shift();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int result = syscall(SYS_gettimeofday, now, zone);
    if (result == 0 && now) now->tv_sec += shift();
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


def compiler() -> str | None:
    """A C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build_shim(folder: Path) -> Path:
    """Compile the library."""
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(_SOURCE)
    command = [str(compiler()), "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def shifted(library: Path, years: float, period: int = 0) -> dict[str, str]:
    """Environment for a clock that goes `years` ahead (below 0: behind), changing sides every `period` ms if any."""
    return {
        "LD_PRELOAD": str(library),
        "CLOCK_SHIFT": str(round(years * 365.25 * 86400)),
        "CLOCK_PERIOD": str(period),
    }
