"""Log of injected faults: one JSON line each, with its place, whether it fired and what it cost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PATH_VARIABLE = "MOBILESAM_FAULTS"
DEFAULT_PATH = Path(__file__).parents[3] / ".faults" / "faults.jsonl"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One injected fault."""

    call: str
    """System call that was hit, with the error's name after a colon where it failed ("fsync:EIO"); else the action
    ("flip", "truncate", "clock", ...)."""
    ordinal: int
    """Number of the call, or of the bit or byte that was changed."""
    file: str
    """File, or kind of file, that was hit."""
    phase: str
    """Phase of the job."""
    role: str = "store"
    """Process that was hit, such as "coordinator" or "worker"; "store" for damage to its files."""
    fired: bool
    """False if the fault did not happen, for example because the process ended first."""
    lost: int
    """Embeddings or training steps lost beyond the promise, by comparison with an undisturbed run."""
    wrong: int
    """Reads that returned other bytes without an error, by comparison with an undisturbed run."""
    kill: bool = False
    """True if a process was killed."""
    test: str
    """Name of the test."""


class FaultLog:
    """Writer that appends faults to a file; several processes may share the file."""

    def __init__(self, path: Path, test: str) -> None:
        self.path = path
        self._test = test

    def record(self, *, file: str | Path, **fields: Any) -> Fault:
        """Append one line and return the fault; a single write keeps lines of several processes apart.

        Args:
            file: File, or kind of file, that was hit.
            **fields: The other fields of Fault; `test` is this log's test unless given.
        """
        fault = Fault(**({"file": str(file), "test": self._test} | fields))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(asdict(fault)).encode() + b"\n")
        finally:
            os.close(descriptor)
        return fault


def log_path() -> Path:
    """Return the log's path: $MOBILESAM_FAULTS, else .faults/faults.jsonl at the repository's root."""
    return Path(os.environ.get(PATH_VARIABLE) or DEFAULT_PATH)


def read_faults(path: Path) -> Iterator[Fault]:
    """Read the faults of a log, in order."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield Fault(**json.loads(line))
