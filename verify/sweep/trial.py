"""Trials of a sweep: training and verification of one; running all of them one by one in this process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import RunLocked, VerifyError
from ...distill import DistillError, DistillInterrupted, Progress, Run, StopFlag, distill
from ...distill.run import finished_words
from ...sam import SamError
from ...store import StoreError
from ..config import VerifyConfig
from ..run import verify
from .config import SweepConfig
from .grid import Trial

DONE, FAILED, INTERRUPTED = "done", "failed", "interrupted"
"""Values of an outcome's `status`."""

PRECISION = "float32"
"""Precision in which the students are compared with their teacher, on any device."""

Outcome = Mapping[str, Any]
"""Result of a trial as JSON values; see `run_trial`."""

_EXPECTED_ERRORS = (DistillError, StoreError, SamError, VerifyError)
"""Errors whose messages are ready for the user."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Settings for the verification of a sweep's students; see `SweepConfig`."""

    images: Path | None
    test_store: Path | None
    test_images: Path | None
    points: int
    device: str
    test_data: str | None = None
    """Digest of the test store's content."""

    @classmethod
    def of(cls, config: SweepConfig, test_data: str | None = None) -> VerifySettings:
        """Take the settings from a sweep's options.

        Args:
            config: options of the sweep.
            test_data: digest of the test store's content; None without a test store.
        """
        return cls(
            images=config.base.images,
            test_store=config.test_store,
            test_images=config.test_images,
            points=config.points,
            device=config.base.device,
            test_data=test_data,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the settings that the numbers depend on, as JSON values."""
        return {
            "precision": PRECISION,
            "points": self.points,
            "test_store": None if self.test_store is None else str(self.test_store),
            "test_data": self.test_data,
        }


def run_locally(
    trials: Sequence[Trial],
    settings: VerifySettings,
    known: Mapping[str, Outcome],
    *,
    message: Callable[[str], None],
    progress: Callable[[Progress], None] | None,
) -> Iterator[Outcome]:
    """Run trials one by one in this process, and yield their outcomes.

    Args:
        trials: trials in order; a trial that starts from another's student comes after that one.
        settings: settings for the verification.
        known: earlier outcomes by trial name.
        message: called with a line for each trial that begins.
        progress: called with the progress of training and verification.

    Raises:
        DistillInterrupted: a stop was requested; the training is saved.
    """
    outcomes: dict[str, Outcome] = {}
    for number, trial in enumerate(trials, 1):
        message(f"run {number} of {len(trials)}: {trial.name}{_finished(trial)}")
        outcome = blocked_outcome(trial, outcomes)
        if outcome is None:
            outcome = run_trial(trial, settings, known.get(trial.name), progress=progress)
        outcomes[trial.name] = outcome
        yield outcome


def blocked_outcome(trial: Trial, outcomes: Mapping[str, Outcome]) -> Outcome | None:
    """Return the failed outcome of a trial that can't begin, because the trial it starts from failed.

    Args:
        trial: trial about to begin.
        outcomes: outcomes so far by trial name, that of `trial.after` among them.

    Returns:
        The outcome; None if the trial can begin.
    """
    if trial.after is None or outcomes[trial.after]["status"] == DONE:
        return None
    return failed(trial, f"{trial.after}, which it starts from, failed")


def run_trial(
    trial: Trial,
    settings: VerifySettings,
    known: Outcome | None = None,
    *,
    stop: StopFlag | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train and verify, as far as that isn't done yet.

    Args:
        trial: trial to run.
        settings: settings for the verification.
        known: earlier outcome, whose verification is kept if student and settings are the same.
        stop: flag that requests a checkpoint and a stop.
        progress: called with the progress of training and verification.

    Returns:
        The outcome as JSON values: `name`, `run` (its folder), `options`, `status`, and

        - if it is done: `steps`, `epochs`, `images` {train, val}, `seconds` (of training), `images_per_second`;
          `too_few_steps`, `advised_epochs`, `advised_batch_size`, `no_better_than_constant` (see `run_facts`); `val`
          and, with a test store, `test`: results of `verify` without `subject`; `judged`: settings and SHA-256 of the
          student that these depend on, and `judged_seconds`; `curve`: the trainer's validation after each epoch;
        - if it failed: `error`, and nothing is raised, so that other trials continue; `locked` if another process is
          training it.

    Raises:
        DistillInterrupted: a stop was requested; the training is saved.
    """
    outcome = {**_identity(trial), "status": DONE}
    try:
        result = distill(trial.config, stop=stop, progress=progress, latest=False)
        run = Run.open(trial.config.out)
        watched = None if progress is None else _verification_progress(result, progress)
        return {**outcome, **_training(run, result), **_verification(run, settings, known or {}, watched)}
    except DistillInterrupted:
        raise
    except RunLocked as error:
        return failed(trial, str(error)) | {"locked": True}
    except _EXPECTED_ERRORS as error:
        # A sweep has no --restart, which the message suggests: the user has to move the run's folder away.
        mend = f"; in a sweep: move {trial.config.out} away and run the same command again"
        return failed(trial, f"{error}{mend if '--restart' in str(error) else ''}")
    except Exception as error:  # noqa: BLE001 - memory, a disk, a bug: reported in the outcome, the other trials continue
        return failed(trial, f"{type(error).__name__}: {error}")


def failed(trial: Trial, error: str) -> dict[str, Any]:
    """Return the outcome of a failed trial.

    Args:
        trial: the trial.
        error: reason, for the user.
    """
    return {**_identity(trial), "status": FAILED, "error": error}


def _identity(trial: Trial) -> dict[str, Any]:
    return {"name": trial.name, "run": str(trial.config.out), "options": dict(trial.options)}


def _training(run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    kept = (
        *("steps", "epochs", "seconds", "images_per_second"),
        *("too_few_steps", "advised_epochs", "advised_batch_size", "no_better_than_constant"),
    )
    # miou is present if the trainer measures masks.
    columns = ("epoch", "step", "mse_valid", "skill_valid", "miou")
    lines = [line for line in run.history() if line["kind"] == "val"]
    curve = [{name: line[name] for name in columns if name in line} for line in lines]
    return {
        **{name: result[name] for name in kept},
        "images": {"train": len(run.split.train), "val": len(run.split.val)},
        "curve": curve,
    }


def _finished(trial: Trial) -> str:
    """Return words for a trial whose training is finished already, else an empty string."""
    try:
        result = Run.open(trial.config.out).result() if trial.config.out is not None else None
    except DistillError:
        return ""  # not begun, or damaged, which its own outcome tells
    return "" if result is None else f", trained already, {finished_words(result)}"


def _verification_progress(
    result: Mapping[str, Any], progress: Callable[[Progress], None]
) -> Callable[[int, int], None]:
    """Return a callback for `verify` that reports its images as a phase after the training's last step."""
    begun = time.monotonic()

    def report(done: int, total: int) -> None:
        progress(
            Progress(
                phase="verify",
                epoch=result["epochs"],
                epochs=result["epochs"],
                step=result["steps"],
                steps=result["steps"],
                loss=None,
                images_per_second=result["images_per_second"],
                eta_seconds=(time.monotonic() - begun) * (total - done) / done if done else 0.0,
                evaluated=done,
                to_evaluate=total,
            )
        )

    return report


def _verification(
    run: Run, settings: VerifySettings, known: Outcome, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    with run.student_path.open("rb") as file:
        student = hashlib.file_digest(file, "sha256").hexdigest()
    verified_with = {"student_sha256": student, **settings.to_json()}
    # Sweeps of older versions compared in the precision of the training, and didn't record it.
    if {"precision": run.description.resolved.precision} | known.get("judged", {}) == verified_with:
        return {name: known[name] for name in ("val", "test", "judged", "judged_seconds") if name in known}
    begun = time.monotonic()
    common: dict[str, Any] = {
        "student": run.path,
        "device": settings.device,
        "precision": PRECISION,
        "points": settings.points,
    }
    numbers = {"val": _verify(VerifyConfig(**common, images=settings.images), progress)}
    if settings.test_store is not None:
        on_test = VerifyConfig(**common, store=settings.test_store, images=settings.test_images, split="all")
        numbers["test"] = _verify(on_test, progress)
    return {**numbers, "judged": verified_with, "judged_seconds": time.monotonic() - begun}


def _verify(config: VerifyConfig, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    return {name: value for name, value in verify(config, progress=progress).items() if name != "subject"}
