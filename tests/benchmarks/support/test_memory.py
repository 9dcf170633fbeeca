from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

CODE = """
import numpy as np
from benchmarks.support.memory import allocated, forget_peak, peak_resident
mib = 2**20
before = allocated()
block = np.ones(50 * mib, np.uint8)
assert 49 * mib < allocated() - before < 51 * mib
high = peak_resident()
del block
assert abs(allocated() - before) < mib
assert abs(peak_resident() - high) < mib
forget_peak()
assert 45 * mib < high - peak_resident() < 55 * mib
"""


def test_the_peak_can_be_reset_and_allocated_bytes_follow_at_once() -> None:
    """In a process of its own: another thread's memory would be counted, too."""
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
