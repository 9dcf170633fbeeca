"""One run of a sweep: trained, then verified."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import RunLocked, VerifyError
from ...distill import DistillError, DistillInterrupted, Progress, Run, StopFlag, distill
from ...sam import SamError
from ...store import StoreError
from ..config import VerifyConfig
from ..run import verify
from .config import SweepConfig
from .grid import Trial

DONE, FAILED, INTERRUPTED = "done", "failed", "interrupted"
_TOLD = (DistillError, StoreError, SamError, VerifyError)
"""Their messages are for the user as they are."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How the students of a sweep are verified: see SweepConfig."""

    images: Path | None
    test_store: Path | None
    test_images: Path | None
    points: int
    device: str
    test_data: str | None = None
    """Digest of what the test store holds."""

    @classmethod
    def of(cls, config: SweepConfig, test_data: str | None = None) -> Judging:
        """What a sweep says of it."""
        return cls(
            images=config.base.images,
            test_store=config.test_store,
            test_images=config.test_images,
            points=config.points,
            device=config.base.device,
            test_data=test_data,
        )

    def to_json(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return {
            "points": self.points,
            "test_store": None if self.test_store is None else str(self.test_store),
            "test_data": self.test_data,
        }


def run_trial(
    trial: Trial,
    judging: Judging,
    known: Mapping[str, Any] | None = None,
    *,
    stop: StopFlag | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Trains and verifies, or finds that done, and tells the outcome as JSON values.

    The keys: `name`, `run` (its folder), `options`, `status`; of one that is done also `steps`, `epochs`, `images`
    {train, val}, `seconds` (of training), `images_per_second`, `val` and, with a test store, `test` (what verify
    says, without its subject), `judged` (what these are of), `curve` (what the trainer measured after each epoch).
    One that failed has `error`, and raises nothing: the others of the sweep go on; `locked` where another process is
    training it. `known` is an earlier outcome, whose numbers are taken over if they are of the same student.

    Raises DistillInterrupted once the training is saved, when it was asked to stop.
    """
    outcome = {**_named(trial), "status": DONE}
    try:
        result = distill(trial.config, stop=stop, progress=progress, latest=False)
        run = Run.open(trial.config.out)
        return {**outcome, **_training(run, result), **_judgement(run, judging, known or {})}
    except DistillInterrupted:
        raise
    except RunLocked as error:
        return failed(trial, str(error)) | {"locked": True}
    except _TOLD as error:
        # A sweep has no --restart of its own: what the message of a single run asks for is done to its folder.
        mend = f"; in a sweep: move {trial.config.out} away and run the same command again"
        return failed(trial, f"{error}{mend if '--restart' in str(error) else ''}")
    except Exception as error:  # noqa: BLE001 - memory, a disk, a bug: the outcome says it, the other runs go on
        return failed(trial, f"{type(error).__name__}: {error}")


def failed(trial: Trial, error: str) -> dict[str, Any]:
    """The outcome of a trial that came to nothing."""
    return {**_named(trial), "status": FAILED, "error": error}


def _named(trial: Trial) -> dict[str, Any]:
    return {"name": trial.name, "run": str(trial.config.out), "options": dict(trial.options)}


def _training(run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("steps", "epochs", "seconds", "images_per_second")
    # The masks' IoU is there where the trainer looks at masks.
    columns = ("epoch", "step", "mse_valid", "skill_valid", "miou")
    lines = [line for line in run.history() if line["kind"] == "val"]
    curve = [{name: line[name] for name in columns if name in line} for line in lines]
    return {
        **{name: result[name] for name in kept},
        "images": {"train": len(run.split.train), "val": len(run.split.val)},
        "curve": curve,
    }


def _judgement(run: Run, judging: Judging, known: Mapping[str, Any]) -> dict[str, Any]:
    with run.student_path.open("rb") as file:
        student = hashlib.file_digest(file, "sha256").hexdigest()
    judged = {"student_sha256": student, **judging.to_json()}
    if known.get("judged") == judged:
        return {name: known[name] for name in ("val", "test", "judged", "judged_seconds") if name in known}
    begun = time.monotonic()
    common: dict[str, Any] = {"student": run.path, "device": judging.device, "points": judging.points}
    numbers = {"val": _numbers(VerifyConfig(**common, images=judging.images))}
    if judging.test_store is not None:
        tested = VerifyConfig(**common, store=judging.test_store, images=judging.test_images, split="all")
        numbers["test"] = _numbers(tested)
    return {**numbers, "judged": judged, "judged_seconds": time.monotonic() - begun}


def _numbers(config: VerifyConfig) -> dict[str, Any]:
    result = verify(config)
    return {name: value for name, value in result.items() if name != "subject"}


# --- The runs of a sweep, one after another in this process.

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
