"""Clock shift for one process: a library for LD_PRELOAD that adds seconds to the system's time."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* CLOCK_SHIFT: seconds. CLOCK_SWITCH: once this file exists, as many in the other direction. */
static long long shift(void) {
    const char *seconds = getenv("CLOCK_SHIFT"), *file = getenv("CLOCK_SWITCH");
    long long by = seconds ? atoll(seconds) : 0;
    return file && access(file, F_OK) == 0 ? -by : by;
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
    """Return the path of a C compiler, None if none is installed."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build_shim(folder: Path) -> Path:
    """Compile the library in a folder and return its path."""
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(_SOURCE)
    command = [str(compiler()), "-shared", "-fPIC", "-O1", "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return library


def shifted(library: Path, years: float, switch: Path | None = None) -> dict[str, str]:
    """Return environment variables that set a clock `years` ahead (negative: behind).

    Once the file `switch` exists, the clock is wrong by as many years in the other direction.
    """
    return {
        "LD_PRELOAD": str(library),
        "CLOCK_SHIFT": str(round(years * 365.25 * 86400)),
        "CLOCK_SWITCH": str(switch or ""),
    }
