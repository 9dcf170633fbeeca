"""Results of a sweep on disk: results.json, rewritten whenever a run ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.durable import write_atomic
from ...common.errors import VerifyError
from ...distill.run_folder import LOCK_FILE
from .grid import RUNS
from .trial import DONE, FAILED

logger = logging.getLogger(__name__)

RESULTS_FILE, PAGE_FILE, MARKDOWN_FILE = "results.json", "report.html", "tables.md"
FORMAT = 1


class Results:
    """Outcomes by the names of their trials, as `run_trial` returns them.

    The runs' own folders are the truth: outcomes lost here are found or measured again.

    Args:
        folder: of the sweep.
        known: outcomes so far, by name.
    """

    def __init__(self, folder: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
        self.path = folder / RESULTS_FILE
        self.outcomes: dict[str, Mapping[str, Any]] = dict(known)

    @classmethod
    def open(cls, folder: Path) -> Results:
        """Read the results in a sweep's folder; there are none where the file is missing or damaged."""
        path = folder / RESULTS_FILE
        try:
            value = json.loads(path.read_bytes())
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']}, this version's is {FORMAT}")
            return cls(folder, {outcome["name"]: outcome for outcome in value["runs"]})
        except FileNotFoundError:
            return cls(folder, {})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("%s is damaged (%s): rebuilt from the runs", path, error)
            return cls(folder, {})

    def add(self, outcome: Mapping[str, Any]) -> None:
        """Put an outcome in the place of the trial's earlier one, and write the file.

        The numbers of a run aren't lost when it fails later, for instance because its photos are away: the earlier
        outcome stays, with the failure as `error`.
        """
        name, earlier = outcome["name"], self.outcomes.get(outcome["name"])
        if outcome["status"] == FAILED and earlier is not None and earlier["status"] == DONE:
            outcome = {**earlier, "error": outcome["error"]}
        self.outcomes[name] = outcome
        self._write()

    def of(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        """Return the outcomes of these trials, in this order; a trial without one is left out."""
        return [self.outcomes[name] for name in names if name in self.outcomes]

    def _write(self) -> None:
        value = {"format": FORMAT, "runs": list(self.outcomes.values())}
        write_atomic(self.path, json.dumps(value, indent=1).encode() + b"\n")


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something other than a sweep. Raises VerifyError."""
    if folder.exists() and not folder.is_dir():
        raise VerifyError(f"{folder} is a file; give another --out")
    if not folder.exists() or (folder / RESULTS_FILE).exists():
        return
    ours = (RUNS, LOCK_FILE, PAGE_FILE, MARKDOWN_FILE)
    others = [path.name for path in folder.iterdir() if path.name not in ours]
    others = [name for name in others if not name.endswith(".partial")]
    if others:
        raise VerifyError(f"{folder} holds {len(others)} other file(s) and no sweep; give another --out")
