"""Summary of a fault log: `python -m faults.summary [--full] [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from faults.fault_log import Fault, log_path, read_faults

PAIRS = 100
KILLS = 300


@dataclass(frozen=True)
class Summary:
    """Counts over the faults that fired."""

    fired: int
    silent: int
    lost: int
    wrong: int
    pairs: int
    kills: int

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> Summary:
        """Count faults; `pairs` are distinct (call, phase), `silent` faults that did not fire."""
        everything = list(faults)
        fired = [fault for fault in everything if fault.fired]
        return cls(
            fired=len(fired),
            silent=len(everything) - len(fired),
            lost=sum(fault.lost for fault in fired),
            wrong=sum(fault.wrong for fault in fired),
            pairs=len({(fault.call, fault.phase) for fault in fired}),
            kills=sum(fault.kill for fault in fired),
        )

    def lines(self) -> list[str]:
        """Return the printed lines, the result last."""
        return [
            f"{self.kills} kills; {self.pairs} distinct pairs of call and phase; {self.silent} faults that did "
            "not fire",
            f"{self.fired} faults fired, {self.lost} embeddings lost, {self.wrong} wrong reads",
        ]

    def shortcomings(self, *, full: bool) -> list[str]:
        """Return reasons to fail; `full` requires as many faults as the full suite injects."""
        found = []
        if self.lost or self.wrong:
            found.append(f"{self.lost} embeddings lost and {self.wrong} wrong reads instead of none")
        if not self.fired:
            found.append("no fault fired")
        if full and self.pairs < PAIRS:
            found.append(f"{self.pairs} distinct pairs of call and phase instead of at least {PAIRS}")
        if full and self.kills < KILLS:
            found.append(f"{self.kills} kill points instead of at least {KILLS}")
        return found


def main(arguments: list[str]) -> int:
    """Print the summary; return 1 if there is a reason to fail."""
    full = "--full" in arguments
    files = [argument for argument in arguments if not argument.startswith("--")]
    summary = Summary.of(read_faults(Path(files[0]) if files else log_path()))
    shortcomings = summary.shortcomings(full=full)
    lines = [*(f"short: {line}" for line in shortcomings), *summary.lines()]
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 1 if shortcomings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
