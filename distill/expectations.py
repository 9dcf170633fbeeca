"""Expectations of a training: steps that are enough, the length that follows from them, its time, and a verdict.

`resolve_length` makes numbers of `--epochs auto` and of a batch size that isn't given, before a run is described;
`tell_length` and its `Outlook` tell what is about to happen; `tell_facts` judges what came of it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from ..common.errors import counted
from .config import AUTO, BATCH_SIZE, DistillConfig
from .distributed import ProcessGroup
from .run_folder import Run
from .train_log import Progress
from .trainer import TRAIN_EVAL_ROWS

logger = logging.getLogger(__name__)

ENOUGH_STEPS = 500
"""Optimizer steps from which a student of random weights has learned something of its teacher: fewer are called too
few, batches are halved to reach them, and `--epochs auto` makes as many. In docs/RECIPE.md's miniature the default
recipe has a skill of 0.86 after as many."""
LEAST_BATCH_SIZE = 2
"""Smallest batch that is chosen: batches of 1 overfit more. On seven photos at 256 pixels, 24 epochs of
`mobilesam-2026` gave skills of 0.93 (-0.19 on another photo) with batches of 1, of 0.89 (-0.06) with 2."""
LEAST_AUTO_EPOCHS = 8
"""Fewest passes over the images that `--epochs auto` takes: the default, which is the paper's."""
MEASURED_STEPS = 3
"""Steps by which the time of the others is estimated; the first one, in which a machine warms up, isn't timed."""
MEASURED_SECONDS = 10.0
"""Seconds after which the time is told even if there were fewer steps, and the first epoch hasn't ended."""
FORWARD_SHARE = 1 / 3
"""Time of evaluating an image relative to training on it: the backward pass takes about twice the forward pass."""


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the optimizer steps of one pass over the images.

    Args:
        images: images to train on.
        batch_size: images per step; the last one of a pass may have fewer.
    """
    return ceil(images / batch_size)


def enough_epochs(images: int, batch_size: int) -> int:
    """Return the epochs that make ENOUGH_STEPS steps with this batch size, at least LEAST_AUTO_EPOCHS."""
    return max(LEAST_AUTO_EPOCHS, ceil(ENOUGH_STEPS / steps_per_epoch(images, batch_size)))


def batch_size_for(images: int, epochs: int, least: int = LEAST_BATCH_SIZE) -> int:
    """Return BATCH_SIZE, halved as often as it takes to make ENOUGH_STEPS steps, as far as `least` allows.

    On few images, more steps of fewer images learn more for the same computing.

    Args:
        images: images to train on.
        epochs: passes over them.
        least: smallest batch size; the micro-batch, where the user gave one.
    """
    batch_size = BATCH_SIZE
    while batch_size // 2 >= least and epochs * steps_per_epoch(images, batch_size) < ENOUGH_STEPS:
        batch_size //= 2
    return batch_size


def resolve_length(config: DistillConfig, images: int) -> DistillConfig:
    """Return the options with numbers for epochs and batch size.

    `--epochs auto` and the number that it becomes give the same batch size, and with it the same run.

    Args:
        config: options as given.
        images: images to train on.
    """
    least = max(LEAST_BATCH_SIZE, config.micro_batch or 1)
    epochs, batch_size = config.epochs, config.batch_size
    if epochs == AUTO:
        epochs = enough_epochs(images, batch_size) if batch_size else auto_length(images, least)[0]
    batch_size = batch_size or batch_size_for(images, int(epochs), least)
    return dataclasses.replace(config, epochs=epochs, batch_size=batch_size)


def auto_length(images: int, least: int = LEAST_BATCH_SIZE) -> tuple[int, int]:
    """Return the epochs and the batch size that make enough steps of the fewest images.

    Args:
        images: images to train on.
        least: smallest batch size.
    """
    # With one epoch: the smallest batch size that any number of epochs leads to.
    epochs = enough_epochs(images, batch_size_for(images, 1, least))
    return epochs, batch_size_for(images, epochs, least)


@dataclass(frozen=True, kw_only=True)
class Length:
    """Length of a training."""

    images: int
    """Images to train on."""
    held_out: int
    """Images to validate on."""
    batch_size: int
    epochs: int
    least_batch_size: int = LEAST_BATCH_SIZE
    """Smallest batch to advise: LEAST_BATCH_SIZE, or the micro-batch that was given."""
    needs_enough: bool = True
    """False for a student that begins with all weights of a finished one: it may need few steps."""

    @classmethod
    def of(cls, run: Run) -> Length:
        """Return the length of a run, finished or not."""
        options, init = run.description.options, run.description.init
        whole = init is not None and not init["left_new"] and not init["resized"]
        micro_batch = options.get("micro_batch")
        return cls(
            images=len(run.split.train),
            held_out=len(run.split.val),
            batch_size=options["batch_size"],
            epochs=options["epochs"],
            least_batch_size=max(LEAST_BATCH_SIZE, min(micro_batch or 1, BATCH_SIZE)),
            needs_enough=not whole,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return steps_per_epoch(self.images, self.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of all epochs."""
        return self.epochs * self.steps_per_epoch

    @property
    def too_few(self) -> bool:
        """True if the steps are too few to learn from."""
        return self.needs_enough and self.steps < ENOUGH_STEPS

    @property
    def advised(self) -> Length | None:
        """Length that makes enough steps, of no larger batches, if these are too few."""
        if not self.too_few:
            return None
        epochs, batch_size = auto_length(self.images, self.least_batch_size)
        if batch_size >= self.batch_size:
            epochs, batch_size = enough_epochs(self.images, self.batch_size), self.batch_size
        return dataclasses.replace(self, epochs=epochs, batch_size=batch_size)

    def line(self, chosen: bool) -> str:
        """Describe the training in one line, before it begins; `chosen` is True if nobody gave the batch size."""
        small = " (chosen, as the images are few)" if chosen and self.batch_size < BATCH_SIZE else ""
        return (
            f"{counted(self.images, 'image')} to train on, {self.held_out:,} held out: "
            f"{counted(self.epochs, 'epoch')} in batches of {self.batch_size}{small}, "
            f"{counted(self.steps, 'step')}"
        )


def about(seconds: float, word: str = "about") -> str:
    """Return a time in words: `about 25 minutes`.

    Args:
        seconds: estimated time.
        word: word before the number.
    """
    for unit, length, upto in (("second", 1, 90), ("minute", 60, 90), ("hour", 3600, 48)):
        if seconds / length < upto:
            return f"{word} {counted(max(1, round(seconds / length)), unit)}"
    return f"{word} {counted(round(seconds / 86400), 'day')}"


class Outlook:
    """Estimate of a training's time, told once, by its first steps and by the end of its first epoch.

    Measuring costs nothing: it takes the times at which `Trainer` reports progress.

    Args:
        length: length of the training.
        say: called with the line.
        slow_start: the first step may take much longer than the others: it compiles the student.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        length: Length,
        say: Callable[[str], None],
        *,
        slow_start: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._length, self._say, self._clock = length, say, clock
        self._least = MEASURED_STEPS if slow_start else 1
        self._begun = clock()
        self._first: tuple[float, int] | None = None
        """Time and number of the first step that ended."""
        self._last: tuple[float, int] = (self._begun, 0)
        self._between: list[float] = []
        """Seconds from the last step of an epoch to its saved student: validation and files."""
        self._told = False

    def on_progress(self, progress: Progress) -> None:
        """Take the time of a step; tell the estimate if the first epoch is a long one."""
        if self._told or progress.phase != "train":
            return
        now = self._clock()
        self._first = self._first or (now, progress.step)
        self._last = now, progress.step
        if progress.step - self._first[1] + 1 >= self._least and now - self._begun >= MEASURED_SECONDS:
            self._tell()

    def on_student(self) -> None:
        """Take the time of an epoch's end; tell the estimate if enough steps are measured, or there are no more."""
        if self._told or self._first is None:
            return
        now, (at, step) = self._clock(), self._last
        self._between.append(now - at)
        self._last = now, step
        if step - self._first[1] + 1 >= MEASURED_STEPS or step >= self._length.steps:
            self._tell()

    def seconds_per_step(self) -> float:
        """Return the seconds of a step, without those between epochs."""
        assert self._first is not None
        (begun, first), (ended, last) = self._first, self._last
        if last == first:  # nothing but the first step
            return max(ended - sum(self._between) - self._begun, 0.0)
        return max(ended - begun - sum(self._between), 0.0) / (last - first)

    def seconds(self, length: Length, done: int = 0) -> float:
        """Estimate the seconds of a training on the same images, with batches of any size.

        Args:
            length: its length.
            done: optimizer steps that are done.
        """
        image = self.seconds_per_step() * self._length.steps_per_epoch / length.images
        between = (
            sum(self._between) / len(self._between)
            if self._between
            else FORWARD_SHARE * image * length.held_out
        )
        epochs = length.epochs - done / length.steps_per_epoch
        evaluated = FORWARD_SHARE * image * min(TRAIN_EVAL_ROWS, length.images)
        return epochs * length.images * image + ceil(epochs) * between + evaluated

    def _tell(self) -> None:
        self._told = True
        assert self._first is not None
        length, done = self._length, self._last[1]
        word = "about" if done > self._first[1] else "at most"  # the first step takes longer than the others
        if (advised := length.advised) is None:
            left = about(self.seconds(length, done), word)
            self._say(f"{counted(length.steps - done, 'step')} left: {left}")
            return
        same = advised.batch_size == length.batch_size
        batch, without = (
            ("", "") if same else (f" --batch-size {advised.batch_size}", " without --batch-size")
        )
        self._say(
            f"{counted(length.steps, 'step')} {'is' if length.steps == 1 else 'are'} too few to learn from: "
            f"--epochs {advised.epochs}{batch} makes {advised.steps:,}, {about(self.seconds(advised), word)}; "
            f"--epochs auto{without} takes them"
        )


def learns_embeddings(identity: Mapping[str, Any]) -> bool:
    """Return True if a run's objective contains the error of the embeddings, which skill measures."""
    return identity.get("objective", "decoupled") == "decoupled" or bool(identity.get("mse_weight"))


def run_facts(run: Run) -> dict[str, Any]:
    """Return what a run's files say about its length and its student, as JSON values.

    Returns:
        `images` {train, val}; `batch_size`; `too_few_steps`; `advised_epochs` and `advised_batch_size` (which would
        make enough steps; None if these are enough); `train` (metrics of at most TRAIN_EVAL_ROWS of the training
        rows, after the last epoch; None before); `no_better_than_constant` (True if their skill is 0 or less; None if
        it is undefined, or the objective compares masks alone).
    """
    length, line = Length.of(run), run.last("train_eval")
    advised = length.advised
    skill = training_skill(run)
    return {
        "images": {"train": length.images, "val": length.held_out},
        "batch_size": length.batch_size,
        "too_few_steps": length.too_few,
        "advised_epochs": None if advised is None else advised.epochs,
        "advised_batch_size": None if advised is None else advised.batch_size,
        "train": None
        if line is None
        else {name: value for name, value in line.items() if name not in ("kind", "epoch", "step", "rows")},
        "no_better_than_constant": None if skill is None else skill <= 0,
    }


def training_skill(run: Run) -> float | None:
    """Return a finished student's skill over the valid cells of its training rows.

    None if it was never measured, is undefined, or isn't what the objective asks for.
    """
    line = run.last("train_eval")
    if line is None or not learns_embeddings(run.description.identity):
        return None
    skill: float | None = line["skill_valid"]
    return skill


def constant_note(skill: float | None, rows: str, length: Length | None) -> str | None:
    """Return a line about a student that is no better than a constant, with the mend; None if it is better.

    Args:
        skill: skill over valid cells; None if it is undefined.
        rows: the rows it was measured on, in words.
        length: length of the student's training; None if that isn't known.
    """
    if skill is None or skill > 0:
        return None
    fact = f"this student is no better than a constant (skill {skill:.3g} on {rows})"
    if length is None:
        return f"{fact}: see if these are images of the kind that it learned, embedded by its own teacher"
    steps = f"{counted(length.steps, 'step')} {'was' if length.steps == 1 else 'were'}"
    if length.too_few:
        return f"{fact}: {steps} too few; distill again with --epochs auto"
    return (
        f"{fact}, though {steps} made: distill again with another --lr, or with --init and trained weights, and see "
        "if the store holds the right images"
    )


def run_note(run: Run) -> str | None:
    """Return the line of `constant_note` about a finished run's training rows; None if there is nothing to say."""
    return constant_note(training_skill(run), "its own training rows", Length.of(run))


def tell_length(run: Run, processes: ProcessGroup, *, chosen: bool, slow_start: bool) -> Outlook:
    """Tell how many steps the training makes, as a warning if they are too few.

    Args:
        run: run that begins or resumes.
        processes: processes that train together.
        chosen: nobody gave the batch size.
        slow_start: the first step takes much longer than the others.

    Returns:
        An observer of the training, which tells how long it takes.
    """
    length = Length.of(run)
    level = logging.WARNING if length.too_few else logging.INFO
    if processes.is_main:
        logger.log(level, "%s", length.line(chosen))
        busy = -(-length.batch_size // run.description.resolved.micro_batch)
        if busy < processes.world_size:
            logger.warning(
                "a batch of %d keeps %d of %d processes busy: give a larger --batch-size, or fewer processes",
                length.batch_size,
                busy,
                processes.world_size,
            )

    def say(line: str) -> None:
        if processes.is_main:
            logger.log(level, "%s", line)

    return Outlook(length, say, slow_start=slow_start)


def tell_facts(run: Run) -> dict[str, Any]:
    """Return the facts about a finished run; warn if its student is no better than a constant."""
    if (note := run_note(run)) is not None:
        logger.warning("%s", note)
    return run_facts(run)
