"""One JSON line for every fault: what was done where, whether it fired, and what it cost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

PLACE = "MOBILESAM_FAULTS"
DEFAULT = Path(__file__).parents[3] / ".faults" / "faults.jsonl"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    `call` is the system call that it was injected into, with the error's name behind a colon where it was made to
    fail ("fsync:EIO"), else the action ("flip", "truncate", "clock", ...); `ordinal` the place in a row of such
    calls or bytes; `file` what it hit; `phase` where in the job; `role` whose process. `lost` counts embeddings or
    training steps that were lost beyond the promise, `wrong` reads that gave other bytes without an error: both
    found by comparing with an undisturbed run. `kill` says that a process was killed.
    """

    call: str
    ordinal: int
    file: str
    phase: str
    role: str = "store"
    fired: bool
    lost: int
    wrong: int
    kill: bool = False
    test: str


class FaultLog:
    """Appends faults to a file that several processes may share."""

    def __init__(self, path: Path, test: str) -> None:
        self.path = path
        self._test = test

    def record(
        self,
        *,
        call: str,
        ordinal: int,
        file: str | Path,
        phase: str,
        fired: bool,
        lost: int,
        wrong: int,
        role: str = "store",
        kill: bool = False,
        test: str | None = None,
    ) -> Fault:
        """Write one line (in a single write, so that lines of several processes never mix); the fault written."""
        fault = Fault(
            call=call,
            ordinal=ordinal,
            file=str(file),
            phase=phase,
            role=role,
            fired=fired,
            lost=lost,
            wrong=wrong,
            kill=kill,
            test=test or self._test,
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(asdict(fault)).encode() + b"\n")
        finally:
            os.close(descriptor)
        return fault


def log_path() -> Path:
    """Where faults are written: $MOBILESAM_FAULTS, else .faults/faults.jsonl at the root."""
    return Path(os.environ.get(PLACE) or DEFAULT)


def read_faults(path: Path) -> Iterator[Fault]:
    """The faults in a file, in order."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield Fault(**json.loads(line))
