"""Checkpoints that a run resumes from, last.pt and previous.pt: a resumed run ends as if it had never stopped.

A checkpoint holds the weights and statistics of what is trained (the student, its head, or both), AdamW's moments,
the state of torch's random number generators (no student draws from them today; one with dropout would) and
`TrainState`. The learning rate and the order of rows are functions of the step and the epoch, and are not saved.

Shape suffixes: C channels, H, W rows and columns of the embedding (g each).
"""

from __future__ import annotations

import errno
import io
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.durable import fsync_directory, write_atomic
from ..common.errors import ArchiveError, DistillError, ForeignObjects
from ..sam.weights.torch_file import read_torch_file
from .optimizer import Muon

logger = logging.getLogger(__name__)

FORMAT = 4
"""Version of the checkpoint's content."""
OLDER_FORMAT = 3
"""Version that is read, too: its `window` has a pair of numbers for each step instead of sums."""
CHECKPOINT_FILE = "last.pt"
PREVIOUS_FILE = "previous.pt"
DAMAGED_FILE = "last.pt.damaged"
NEXT_FILE = "next.pt.partial"
_MEND = "put back a whole copy, or give --restart to start over, which keeps the old run beside the new one"


@dataclass(kw_only=True)
class Throughput:
    """Images and times, in seconds, of all sessions of a run."""

    images: int = 0
    """Images trained on; each counts once per epoch."""
    seconds: float = 0.0
    """Time in the training loop, without validation and saving."""
    waited: float = 0.0
    """Part of `seconds` spent waiting for data."""
    elapsed: float = 0.0
    """Total time, with validation and saving."""


@dataclass(kw_only=True)
class BestEpoch:
    """Epoch with the best validation so far."""

    epoch: int = 0
    """Number of the epoch, from 1; 0 before the first."""
    score: float = float("inf")
    """Score of `Validation.score`; less is better."""


@dataclass(kw_only=True)
class EmbeddingSum:
    """Sum of the teacher's embeddings seen in the first epoch, for their mean."""

    sum_CHW: Tensor
    """float64 (256, g, g)."""
    rows: int = 0
    """Number of embeddings in the sum."""


class ExactSum:
    """Exact sum of any number of floats, in a few floats: `value` equals math.fsum of all of them.

    Each of `parts` holds the bits of the sum that the larger ones can't (Shewchuk, "Adaptive Precision Floating-Point
    Arithmetic", 1997; the algorithm of math.fsum).

    Args:
        parts: finite floats that the sum begins with.
    """

    def __init__(self, parts: Iterable[float] = ()) -> None:
        self.parts: list[float] = []
        for part in parts:
            self.add(part)

    def add(self, number: float) -> None:
        """Add a finite number."""
        kept = []
        for part in self.parts:
            if abs(number) < abs(part):
                number, part = part, number
            total = number + part
            if lost := part - (total - number):
                kept.append(lost)
            number = total
        self.parts = [*kept, number]

    @property
    def value(self) -> float:
        """The sum, rounded once."""
        return math.fsum(self.parts)


@dataclass(kw_only=True)
class Window:
    """Sums over the steps since the last logged line."""

    steps: int = 0
    loss: ExactSum = field(default_factory=ExactSum)
    grad_norm: ExactSum = field(default_factory=ExactSum)

    def add(self, loss: float, grad_norm: float) -> None:
        """Add a step's loss and the norm of its gradient."""
        self.steps += 1
        self.loss.add(loss)
        self.grad_norm.add(grad_norm)

    def to_saved(self) -> dict[str, Any]:
        """Return plain values for a checkpoint, of the same size after any number of steps."""
        return {"steps": self.steps, "loss": self.loss.parts, "grad_norm": self.grad_norm.parts}

    @classmethod
    def from_saved(cls, value: Any) -> Window:
        """Rebuild the window from the value of `to_saved`, or from a list of pairs, as OLDER_FORMAT has it.

        Raises:
            ValueError, TypeError, KeyError: it is neither.
        """
        window = cls()
        if isinstance(value, list):
            for loss, grad_norm in value:
                window.add(_finite(loss), _finite(grad_norm))
            return window
        if type(value["steps"]) is not int or value["steps"] < 0:
            raise ValueError("the number of steps isn't one")
        sums = (ExactSum(map(_finite, value[name])) for name in ("loss", "grad_norm"))
        return cls(steps=value["steps"], loss=next(sums), grad_norm=next(sums))


def _finite(number: Any) -> float:
    if type(number) is not float or not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


@dataclass(kw_only=True)
class LogState:
    """Position in the log of metrics."""

    metrics_bytes: int = 0
    """Length of metrics.jsonl."""
    window: Window = field(default_factory=Window)


@dataclass(kw_only=True)
class TrainState:
    """Progress of a run: all of a checkpoint but weights, moments and random number generators."""

    epoch: int = 0
    """Number of complete, validated epochs."""
    batch: int = 0
    """Batches done in the current epoch."""
    step: int = 0
    """Optimizer steps done in all sessions."""
    micro_steps: int = 0
    """Forward passes in training, of one process in all sessions."""
    throughput: Throughput = field(default_factory=Throughput)
    best: BestEpoch = field(default_factory=BestEpoch)
    embeddings: EmbeddingSum
    log: LogState = field(default_factory=LogState)

    def to_saved(self) -> dict[str, Any]:
        """Return the values as a flat dictionary for a checkpoint; the tensor is not copied."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "micro_steps": self.micro_steps,
            "images": self.throughput.images,
            "seconds": self.throughput.seconds,
            "waited": self.throughput.waited,
            "elapsed": self.throughput.elapsed,
            "metrics_bytes": self.log.metrics_bytes,
            "best_epoch": self.best.epoch,
            "best_score": self.best.score,
            "mean_sum_CHW": self.embeddings.sum_CHW,
            "mean_rows": self.embeddings.rows,
            "window": self.log.window.to_saved(),
        }

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> TrainState:
        """Rebuild the state from the values of `to_saved`."""
        return cls(
            **{name: values[name] for name in ("epoch", "batch", "step", "micro_steps")},
            throughput=Throughput(
                **{name: values[name] for name in ("images", "seconds", "waited", "elapsed")}
            ),
            best=BestEpoch(epoch=values["best_epoch"], score=values["best_score"]),
            embeddings=EmbeddingSum(sum_CHW=values["mean_sum_CHW"], rows=values["mean_rows"]),
            log=LogState(metrics_bytes=values["metrics_bytes"], window=Window.from_saved(values["window"])),
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Last two checkpoints in a run's folder; the older one is used if the newer is damaged."""

    folder: Path
    run_id: str
    """`Run.id`; a checkpoint of another run is refused."""

    def exist(self) -> bool:
        """Return True if there is a checkpoint file, whole or damaged."""
        return any((self.folder / name).exists() for name in (CHECKPOINT_FILE, PREVIOUS_FILE))

    def save(
        self, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, device: torch.device
    ) -> None:
        """Write last.pt, and rename the one before it to previous.pt.

        The new file is complete and durable under another name first. A kill between the two renames leaves
        previous.pt to resume from.

        Args:
            student: module to save (`Objective.trained`).
            optimizer: its optimizer.
            state: progress of the run.
            device: device whose random number generator is saved beside the CPU's.

        Raises:
            DistillError: the new file can't be read; the older ones are unchanged.
        """
        rng = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(device)
        buffer = io.BytesIO()
        torch.save(
            {
                "format": FORMAT,
                "run_id": self.run_id,
                "student": student.state_dict(),
                # Without its groups: they follow from the configuration, and the learning rate from the step.
                "moments": optimizer.state_dict()["state"],
                "state": state.to_saved(),
                "rng": rng,
            },
            buffer,
        )
        last = self.folder / CHECKPOINT_FILE
        draft = self.folder / NEXT_FILE
        try:
            write_atomic(draft, buffer.getvalue())
        except OSError as error:
            error.filename = str(last)
            raise
        try:
            read_torch_file(draft)  # a file that exceeds the reader's limits never replaces one that doesn't
        except (ArchiveError, ForeignObjects) as error:
            draft.unlink()
            raise DistillError(f"{last} can't be saved so that it can be read: {error}") from error
        if last.exists():
            os.rename(last, self.folder / PREVIOUS_FILE)
        os.rename(draft, last)
        fsync_directory(self.folder)

    def load(
        self, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, device: torch.device
    ) -> TrainState:
        """Load the newest whole checkpoint into `student`, `optimizer` and torch's random number generators.

        A damaged or missing last.pt falls back to previous.pt, with a warning; the damaged one is renamed, so that it
        never replaces the whole one.

        Args:
            student: module to load into (`Objective.trained`), on `device`.
            optimizer: its optimizer.
            state: initial state of the run, whose tensor has the expected shape.
            device: device of the training.

        Returns:
            The saved state, its tensor on `device`.

        Raises:
            DistillError: neither file is whole; nothing has been changed.
        """
        last, previous = self.folder / CHECKPOINT_FILE, self.folder / PREVIOUS_FILE
        try:
            saved = self._read(last, student, optimizer, state)
        except _Unusable as why:
            try:
                saved = self._read(previous, student, optimizer, state)
            except _Unusable as also:
                raise DistillError(f"{last} {why}, and {previous} {also};\n{_MEND}") from None
            logger.warning("%s %s: resuming from %s, the checkpoint before it", last, why, previous)
            if last.exists():
                os.rename(last, self.folder / DAMAGED_FILE)
                fsync_directory(self.folder)
        student.load_state_dict(saved["student"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": _cloned(saved["moments"]), "param_groups": groups})
        torch.set_rng_state(saved["rng"]["cpu"].clone())
        if device.type == "cuda" and "cuda" in saved["rng"]:
            torch.cuda.set_rng_state(saved["rng"]["cuda"].clone(), device)
        loaded: TrainState = saved["state"]
        loaded.embeddings.sum_CHW = loaded.embeddings.sum_CHW.clone().to(device)
        return loaded

    def drop_previous(self) -> None:
        """Delete previous.pt: last.pt alone can restore the student of a finished run, and both take disk."""
        (self.folder / PREVIOUS_FILE).unlink(missing_ok=True)
        (self.folder / DAMAGED_FILE).unlink(missing_ok=True)

    def _read(
        self, path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
    ) -> dict[str, Any]:
        """Read one file and check all of it, so that loading it into student and optimizer can't fail midway."""
        try:
            saved = read_torch_file(path)
        except FileNotFoundError:
            raise _Unusable("is missing") from None
        except (ArchiveError, ForeignObjects) as error:
            raise _Unusable(f"({path.stat().st_size:,} bytes) is damaged: {error}") from None
        except OSError as error:
            if error.errno != errno.EIO:
                raise DistillError(f"{path} can't be read: {error.strerror or error}") from error
            raise _Unusable("can't be read from the disk") from None
        if not isinstance(saved, dict):
            raise _Unusable("is no checkpoint of this run")
        try:
            if saved["format"] not in (FORMAT, OLDER_FORMAT):
                raise _Unusable(
                    f"has a format that this version doesn't read: it reads {OLDER_FORMAT} and {FORMAT}"
                )
            if saved["run_id"] != self.run_id:
                raise _Unusable("is another run's")
            _check(saved, student, optimizer, state)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError):
            raise _Unusable("is no checkpoint of this run") from None
        return {**saved, "state": TrainState.from_saved(saved["state"])}


class _Unusable(Exception):
    """A checkpoint can't be used; the message ends a sentence that begins with the file's name."""


def _check(saved: Any, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Refuse a checkpoint of another student or optimizer, by ValueError or the error that a wrong type raises."""
    _check_same(saved["student"], student.state_dict())
    parameters = [
        (parameter, bool(group.get(Muon.MATRICES)))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    if saved["moments"].keys() - range(len(parameters)):
        raise ValueError("moments of unknown parameters")
    for index, moments in saved["moments"].items():
        like, is_matrix = parameters[index]
        squares = {} if is_matrix else {"exp_avg_sq": like}
        _check_same(moments, {"step": torch.empty(()), "exp_avg": like, **squares})
    values, fresh = saved["state"], state.to_saved()
    if values.keys() != fresh.keys():
        raise ValueError("another state")
    _check_same({"": values["mean_sum_CHW"]}, {"": fresh["mean_sum_CHW"]})
    for name, value in values.items():
        wanted = type(fresh[name])
        if wanted in (int, float) and (type(value) is not wanted or not value >= 0):
            raise ValueError(f"{name} isn't a number")
    Window.from_saved(values["window"])
    torch.Generator().set_state(saved["rng"]["cpu"].clone())


def _check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise ValueError if names, shapes or dtypes differ."""
    if found.keys() != wanted.keys():
        raise ValueError("other names")
    for name, like in wanted.items():
        if found[name].shape != like.shape or found[name].dtype != like.dtype:
            raise ValueError(f"{name} has another shape or type")


def _cloned(moments: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """Return copies, so that the memory-mapped file can be closed or replaced."""
    return {index: {name: value.clone() for name, value in one.items()} for index, one in moments.items()}
