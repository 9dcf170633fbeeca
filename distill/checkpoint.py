"""last.pt and previous.pt: everything that a run needs to go on as if it had never stopped.

That is: the student's weights and statistics, AdamW's moments, torch's random numbers (nothing draws from them
while a student of today trains; one with dropout would), and TrainState. The learning rate and the order of rows
are pure functions of the step and the epoch, so the position in them is all that is kept of them.
"""

from __future__ import annotations

import errno
import io
import logging
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.durable import fsync_directory, write_atomic
from ..common.errors import ArchiveError, DistillError, ForeignObjects
from ..sam.torch_file import read_torch_file

logger = logging.getLogger(__name__)

FORMAT = 3
CHECKPOINT_FILE = "last.pt"
PREVIOUS_FILE = "previous.pt"
DAMAGED_FILE = "last.pt.damaged"
NEXT_FILE = "next.pt.partial"
_MEND = "put a whole copy back, or give --restart to start over, which keeps the old run beside the new one"


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands. Counts are totals over all sessions of the run.

    `epoch` epochs are complete and validated; of the next one, `batch` batches are done. `micro_steps` counts
    forward passes. `window` holds (loss, gradient norm) of the steps since the last logged line. `seconds`
    and `waited` were spent in the training loop and, of that, waiting for data; `elapsed` includes
    validation. `metrics_bytes` is the length of metrics.jsonl at this point. `mean_sum_CHW` is the float64 sum
    over the `mean_rows` teacher embeddings seen in the first epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    micro_steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    elapsed: float = 0.0
    metrics_bytes: int = 0
    best_epoch: int = 0
    best_score: float = float("inf")
    mean_sum_CHW: Tensor
    mean_rows: int = 0
    window: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The two checkpoints in a run's folder. `run_id` tells the run's own from those of others."""

    folder: Path
    run_id: str

    def exist(self) -> bool:
        """Whether there is anything to go on from, whole or damaged."""
        return any((self.folder / name).exists() for name in (CHECKPOINT_FILE, PREVIOUS_FILE))

    def save(
        self, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, device: torch.device
    ) -> None:
        """Makes this moment last.pt and what was last.pt previous.pt.

        The new file is complete and durable under another name first. A kill between the two renames leaves
        previous.pt to go on from.
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
                # Its groups are the configuration's, and the rate is the step's.
                "moments": optimizer.state_dict()["state"],
                # Not asdict(): it would copy the tensor.
                "state": {one.name: getattr(state, one.name) for one in fields(state)},
                "rng": rng,
            },
            buffer,
        )
        last = self.folder / CHECKPOINT_FILE
        write_atomic(self.folder / NEXT_FILE, buffer.getvalue())
        if last.exists():
            os.rename(last, self.folder / PREVIOUS_FILE)
        os.rename(self.folder / NEXT_FILE, last)
        fsync_directory(self.folder)

    def load(
        self, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, device: torch.device
    ) -> TrainState:
        """Puts the newest whole checkpoint into `student` (on `device`), `optimizer` and torch's generators.

        `state` is one of a run that begins: its tensor has the right shape. A damaged or missing last.pt falls
        back to previous.pt, with a warning; the damaged one is set aside, so that it never replaces the whole one.
        Raises DistillError when neither is whole; nothing has been changed then.
        """
        last, previous = self.folder / CHECKPOINT_FILE, self.folder / PREVIOUS_FILE
        try:
            saved = self._read(last, student, optimizer, state)
        except _Unusable as why:
            try:
                saved = self._read(previous, student, optimizer, state)
            except _Unusable as also:
                raise DistillError(f"{last} {why}, and {previous} {also};\n{_MEND}") from None
            logger.warning("%s %s: going on from %s, the checkpoint before it", last, why, previous)
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
        loaded.mean_sum_CHW = loaded.mean_sum_CHW.clone().to(device)
        return loaded

    def drop_previous(self) -> None:
        """For a run that is finished: last.pt alone can restore its student, and both take disk."""
        (self.folder / PREVIOUS_FILE).unlink(missing_ok=True)
        (self.folder / DAMAGED_FILE).unlink(missing_ok=True)

    def _read(
        self, path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
    ) -> dict[str, Any]:
        """What is in one file, all of it checked, so that putting it to use can't fail half way."""
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
            if saved["format"] != FORMAT:
                raise _Unusable(f"has a format that this version doesn't read, which is {FORMAT}")
            if saved["run_id"] != self.run_id:
                raise _Unusable("is another run's")
            _check(saved, student, optimizer, state)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError):
            raise _Unusable("is no checkpoint of this run") from None
        return {**saved, "state": TrainState(**saved["state"])}


class _Unusable(Exception):
    """A checkpoint can't be used: the end of a sentence that begins with its name."""


def _check(saved: Any, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Raises ValueError or what a wrong type raises where a checkpoint isn't one of this student and optimizer."""
    _check_same(saved["student"], student.state_dict())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if saved["moments"].keys() - range(len(parameters)):
        raise ValueError("moments of unknown parameters")
    for index, moments in saved["moments"].items():
        like = parameters[index]
        _check_same(moments, {"step": torch.empty(()), "exp_avg": like, "exp_avg_sq": like})
    values = saved["state"]
    if values.keys() != {one.name for one in fields(TrainState)}:
        raise ValueError("another state")
    _check_same({"": values["mean_sum_CHW"]}, {"": state.mean_sum_CHW})
    for name, value in values.items():
        wanted = type(getattr(state, name))
        if wanted in (int, float) and (type(value) is not wanted or not value >= 0):
            raise ValueError(f"{name} isn't a number")
    if any([type(number) for number in pair] != [float, float] for pair in values["window"]):
        raise ValueError("the window isn't pairs of numbers")
    torch.Generator().set_state(saved["rng"]["cpu"].clone())


def _check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if found.keys() != wanted.keys():
        raise ValueError("other names")
    for name, like in wanted.items():
        if found[name].shape != like.shape or found[name].dtype != like.dtype:
            raise ValueError(f"{name} has another shape or type")


def _cloned(moments: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """Copies that no longer depend on the file."""
    return {index: {name: value.clone() for name, value in one.items()} for index, one in moments.items()}
