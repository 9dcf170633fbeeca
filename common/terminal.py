"""Messages and progress for people, on standard error."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Protocol


class TrainingProgress(Protocol):
    """Progress of a training, counted in optimiser steps; `distill.Progress` has these fields."""

    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def images_per_second(self) -> float: ...
    @property
    def eta_seconds(self) -> float: ...


class EmbeddingProgress(Protocol):
    """Progress of a precompute run, counted in images; `precompute.Snapshot` has these fields."""

    @property
    def images(self) -> int: ...
    @property
    def done_before(self) -> int: ...
    @property
    def computed(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def images_per_second(self) -> float | None: ...
    @property
    def eta(self) -> float | None: ...


class Reporter:
    """Messages and progress on standard error: a progress bar on a terminal, else a line every `LINE_SECONDS`.

    Args:
        title: name of the command, in front of the bar.
    """

    LINE_SECONDS = 10.0

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(stderr=True, highlight=False)
        self._last_time, self._last_shown = time.monotonic(), (-1.0, -1.0)
        self._bar = Progress(
            TextColumn(title),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1, note="", visible=False)

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, done: float, total: float, note: str) -> None:
        """Show the progress.

        Args:
            done: units done so far.
            total: units in all.
            note: text after the numbers, such as unit, rate and time left.
        """
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, total=total, note=note, visible=True)
            return
        news = (done, total) != self._last_shown
        if time.monotonic() - self._last_time >= self.LINE_SECONDS or (done == total and news):
            self._last_time, self._last_shown = time.monotonic(), (done, total)
            self.message(f"{done:,.0f}/{total:,.0f} {note}")

    def download(self, done: int, total: int) -> None:
        """Show how many of a checkpoint's bytes are downloaded."""
        self.show(done, total, "bytes downloaded")

    def comparison(self, done: int, total: int) -> None:
        """Show how many images are compared."""
        self.show(done, total, "images")

    def training(self, progress: TrainingProgress) -> None:
        """Show the progress of a distillation, in steps."""
        loss = [] if progress.loss is None else [f"loss {progress.loss:.4g}"]
        speed = [f"{progress.images_per_second:.3g} images/s", f"{_time(progress.eta_seconds)} left"]
        place = [f"steps, epoch {progress.epoch} of {progress.epochs}", progress.phase]
        self.show(progress.step, progress.steps, ", ".join([*place, *loss, *speed]))

    def progress(self, snapshot: EmbeddingProgress) -> None:
        """Show the progress of a precompute job, in images."""
        rate = snapshot.images_per_second
        speed = [] if rate is None else [f"{rate:.3g} images/s", f"{_time(snapshot.eta or 0)} left"]
        counts = [f"{snapshot.done_before:,} done before", f"{snapshot.failed:,} failed"]
        self.show(snapshot.computed, snapshot.images, ", ".join(["images", *speed, *counts]))


def _time(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))
