"""A run's folder: what lies in it, and how to read it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import DistillError
from .split import Split
from .students import STUDENT_FILE

RUNS = Path("runs")
LATEST = RUNS / "latest"
CONFIG_FILE = "config.json"
SPLIT_FILE = "split.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "last.pt"
HEAD_FILE = "sam_head.safetensors"
MEAN_FILE = "mean_embedding.safetensors"
LOCK_FILE = "run.lock"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that `distill` has begun. Files that are written later are read when they are asked for.

    `config` is config.json: `student`, `image_size`, `config` (options as given), `resolved` (micro-batch,
    precision, device), `store` (path and spec), `image_root`, `counts`, `untrained_teacher`, `versions`.
    """

    path: Path
    config: dict[str, Any]
    split: Split

    @classmethod
    def open(cls, path: Path | str | None = None) -> Run:
        """Opens a run's folder, or with None the one that `runs/latest` points to.

        Raises DistillError when there is none or its description is damaged.
        """
        folder = Path(path) if path is not None else LATEST
        if not folder.is_dir():
            raise DistillError(f"no run at {folder}; run distill first, or give a run's folder")
        folder = folder.resolve()
        if not (folder / CONFIG_FILE).is_file():
            raise DistillError(f"{folder} is not a run: it has no {CONFIG_FILE}")
        config, split = _read_json(folder / CONFIG_FILE), _read_json(folder / SPLIT_FILE)
        try:
            rows = Split(train=tuple(split["train"]), val=tuple(split["val"]))
        except (KeyError, TypeError) as error:
            raise DistillError(f"{folder / SPLIT_FILE} is damaged ({error!r}); train again") from error
        return cls(path=folder, config=config, split=rows)

    @property
    def store_path(self) -> Path:
        """Where the store lay when the run began."""
        return Path(self.config["store"]["path"])

    @property
    def image_root(self) -> Path:
        """Where the images lay when the run was last started."""
        return Path(self.config["image_root"])

    @property
    def student_path(self) -> Path:
        """The student as of the last complete epoch."""
        return self.path / STUDENT_FILE

    @property
    def head_path(self) -> Path:
        """SAM's prompt encoder and mask decoder, copied from the store."""
        return self.path / HEAD_FILE

    @property
    def checkpoint_path(self) -> Path:
        """What a rerun goes on from."""
        return self.path / CHECKPOINT_FILE

    def mean_embedding(self) -> Tensor:
        """The training rows' mean embedding, float32 (256, g, g); there after the first epoch."""
        path = self.path / MEAN_FILE
        try:
            return load_file(path)["mean_embedding"]
        except (OSError, SafetensorError, KeyError) as error:
            raise DistillError(
                f"{path} is missing or damaged ({error}); finish the run's first epoch"
            ) from error

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in order; `kind` tells them apart: train, val, train_eval, result."""
        path = self.path / METRICS_FILE
        if not path.is_file():
            return []
        # A kill may leave half a last line; every other line was whole when it was followed.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise DistillError(f"{path} is damaged ({error})") from error

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest line of one kind."""
        return next((line for line in reversed(self.history()) if line["kind"] == kind), None)

    def result(self) -> dict[str, Any] | None:
        """What distill() returned when the run finished, or None while it hasn't."""
        line = self.last("result")
        return None if line is None else {name: value for name, value in line.items() if name != "kind"}


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the folder for one trainer; DistillError when another one has it. A dead one's lock is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise DistillError(
                f"{folder} is being trained by {owner}; wait for it, or give another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def point_latest(folder: Path) -> None:
    """Makes `runs/latest` point at `folder` by a relative link, replaced atomically."""
    RUNS.mkdir(exist_ok=True)
    if os.path.lexists(LATEST) and not LATEST.is_symlink():
        raise DistillError(f"{LATEST} is not a link; move it away: it must point to the latest run")
    draft = RUNS / f".latest.{os.getpid()}"
    draft.unlink(missing_ok=True)
    draft.symlink_to(os.path.relpath(folder.resolve(), RUNS.resolve()))
    os.replace(draft, LATEST)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DistillError(f"{path} is missing or damaged ({error}); train again") from error
    if not isinstance(value, dict):
        raise DistillError(f"{path} is damaged: not a JSON object; train again")
    return value
