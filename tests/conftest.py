"""Before anything else is imported: how many threads torch computes with."""

from __future__ import annotations

import os

# xdist's processes share the cores. Where each has as many threads as the machine has cores, they wait for each
# other at every small step, spinning: three times the processor time, and more where the machine is busy. What the
# tests start inherits it.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _processes = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // _processes)))
