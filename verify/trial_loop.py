"""The runs of a sweep, one after another in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..distill import Progress
from .trial import DONE, Judging, failed, run_trial
from .trials import Trial

Outcome = Mapping[str, Any]


def one_after_another(
    trials: Sequence[Trial],
    judging: Judging,
    known: Mapping[str, Outcome],
    *,
    message: Callable[[str], None],
    progress: Callable[[Progress], None] | None,
) -> Iterator[Outcome]:
    """Each trial's outcome, in order. Raises DistillInterrupted as `run_trial`."""
    outcomes: dict[str, Outcome] = {}
    for number, trial in enumerate(trials, 1):
        message(f"run {number} of {len(trials)}: {trial.name}")
        outcome = without_start(trial, outcomes)
        if outcome is None:
            outcome = run_trial(trial, judging, known.get(trial.name), progress=progress)
        outcomes[trial.name] = outcome
        yield outcome


def without_start(trial: Trial, outcomes: Mapping[str, Outcome]) -> Outcome | None:
    """The outcome of a trial that can't begin, since the one whose student it begins with has failed; else None."""
    if trial.after is None or outcomes[trial.after]["status"] == DONE:
        return None
    return failed(trial, f"{trial.after}, whose student it begins with, failed")
