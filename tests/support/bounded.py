"""Reading files in a subprocess with a limit on memory beyond its imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from mobilesam.distill import DistillError, load_student
from mobilesam.common.errors import SamError
from mobilesam.common.errors import ForeignObjects
from mobilesam.sam.weights.checkpoint import read_state

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(1)
read = {"state": read_state, "student": load_student}[sys.argv[1]]
more = int(sys.argv[2])
limit = memory("VmSize") + more
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name in sys.argv[3:]:
    try:
        read(Path(name))
        outcome = "read"
    except (SamError, DistillError) as error:
        outcome = str(error)
    print(json.dumps(outcome), flush=True)
"""


def read_bounded(kind: str, files: Sequence[Path], more: int) -> list[str]:
    """Read files in one subprocess; return "read" or the error's message for each.

    Args:
        kind: "state" for a checkpoint's state, "student" for a student's file.
        files: Files to read.
        more: Bytes of address space that the reads may add.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, kind, str(more), *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
