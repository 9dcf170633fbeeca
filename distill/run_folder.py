"""Folder of a run: reading its files; creating, resuming and locking the folder.

config.json (run_description.py), split.json, metrics.jsonl and TensorBoard's events (train_log.py), last.pt and
previous.pt (checkpoint.py), student.safetensors, sam_head.safetensors, mean_embedding.safetensors, run.lock.

Shape suffixes: C channels, H, W rows and columns of the embedding (g each).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.durable import make_folder, write_atomic
from ..common.errors import DistillError, RunLocked, counted, shown
from ..sam.photos.file_kinds import store_around
from .checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE, Checkpoints
from .checksummed_json import (
    decode_line,
    decode_lines,
    integers_sha256,
    is_checksummed,
    json_sha256,
    read_checksummed,
    write_checksummed,
    write_checksummed_integers,
)
from .data.sampler import Split
from .latest_run import LATEST, has_student, latest_run, runs_with_student
from .run_description import CONFIG_FILE as CONFIG_FILE
from .run_description import CONFIG_MEND, FORMAT, NO_STUDENT, STUDENT_FILE, RunDescription, is_run
from .students.student_file import MEND, check_tensors, load_student, load_tensors, save_tensors

logger = logging.getLogger(__name__)

SPLIT_FILE = "split.json"
METRICS_FILE = "metrics.jsonl"
HEAD_FILE = "sam_head.safetensors"
MEAN_FILE = "mean_embedding.safetensors"
MEAN_KEY = "mean_embedding"
LOCK_FILE = "run.lock"
EVENTS = "events.out.tfevents.*"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run that `distill` has begun. Files that change during training are read on each call.

    Files are checked against their checksums, and for belonging to this run.
    """

    path: Path
    """Absolute path of the folder."""
    description: RunDescription
    """Content of config.json."""
    split: Split
    """Rows for training and for validation: content of split.json."""

    @classmethod
    def open(cls, path: Path | str | None = None) -> Run:
        """Open a run's folder.

        Args:
            path: the folder; None: the latest run (`latest_run`).

        Raises:
            DistillError: there is no run, or its description or split is damaged.
        """
        folder = latest_run() if path is None or Path(path) == LATEST else Path(path)
        if not folder.is_dir():
            raise DistillError(f"no run at {folder}; run distill first, or give a run's folder")
        folder = folder.resolve()
        if not is_run(folder):
            raise DistillError(f"{folder} is not a run: it has no {CONFIG_FILE} of one")
        description = RunDescription.from_json(_read_config(folder))
        return cls(path=folder, description=description, split=_read_split(folder, description.split_sha256))

    @property
    def id(self) -> str:
        """Hexadecimal SHA-256 of `identity` and `data`: equal for runs that learn the same."""
        return json_sha256([self.description.identity, self.description.data.to_json()])

    @property
    def store_path(self) -> Path:
        """Path of the store at the last start of the run."""
        return self.description.store.path

    @property
    def image_root(self) -> Path | None:
        """Folder of the images at the last start of the run; None: the images that the store keeps."""
        return self.description.image_root

    @property
    def student_path(self) -> Path:
        """File of the student after the last complete epoch."""
        return self.path / STUDENT_FILE

    @property
    def head_path(self) -> Path:
        """File of SAM's prompt encoder and mask decoder, copied from the store."""
        return self.path / HEAD_FILE

    @property
    def checkpoints(self) -> Checkpoints:
        """Checkpoints that the run resumes from."""
        return Checkpoints(folder=self.path, run_id=self.id)

    def student(self, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
        """Load the student to `device`.

        Returns:
            The encoder in evaluation mode, and its description, as from `load_student`.

        Raises:
            DistillError: the file is missing, damaged or another run's.
        """
        if not self.student_path.exists():
            raise DistillError(self._without_student())
        student, info = load_student(self.student_path, device)
        if info.get("run_id") != self.id:
            raise DistillError(f"{self.student_path} is another run's; {MEND}")
        return student, info

    def _without_student(self) -> str:
        """Return the message for a run whose student isn't there."""
        if self.last("val") is None:
            return f"{self.path} is not finished: {NO_STUDENT}"
        return f"{self.student_path} is missing; run the same distill command again, which restores it"

    def student_metadata(self) -> dict[str, Any]:
        """Return the student's origin, for its file: teacher, preprocessing, store, initial weights, run."""
        description, spec = self.description, self.description.store.spec
        return {
            "teacher": spec.teacher,
            "checkpoint_sha256": spec.checkpoint_sha256,
            "preprocessing": spec.preprocessing,
            "store_id": spec.store_id,
            **({} if description.init is None else {"init": description.init}),
            "run": self.path.name,
            "run_id": self.id,
            "versions": description.versions,
        }

    def read_head(self) -> bytes:
        """Read SAM's head.

        Returns:
            The content of a safetensors file.

        Raises:
            DistillError: the file is missing, or is not the head of the store.
        """
        wanted = self.description.store.spec.head_sha256
        try:
            data = self.head_path.read_bytes()
        except OSError as error:
            raise DistillError(f"{self.head_path} can't be read: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != wanted:
            raise DistillError(f"{self.head_path} is damaged; copy it from the store, or run distill again")
        return data

    def mean_embedding(self) -> Tensor:
        """Read the mean of the training rows' embeddings, which exists after the first epoch.

        Returns:
            float32 (256, g, g).

        Raises:
            DistillError: the file is missing, damaged or another run's.
        """
        path, grid = self.path / MEAN_FILE, self.description.image_size // 16
        mend = "run distill again, which resumes or restores it"
        try:
            header = check_tensors(path)
            if header.metadata.get("run_id") != self.id or header.shapes != {MEAN_KEY: (256, grid, grid)}:
                raise DistillError(f"{path} is another run's")
            return load_tensors(path)[MEAN_KEY]
        except OSError as error:
            raise DistillError(f"{path} can't be read ({error.strerror or error}); {mend}") from error
        except DistillError as error:
            raise DistillError(f"{error}; {mend}") from error

    def save_mean_embedding(self, mean_CHW: Tensor) -> None:
        """Write the file that `mean_embedding` reads.

        Args:
            mean_CHW: float32 (256, g, g), on the CPU.
        """
        save_tensors(self.path / MEAN_FILE, {MEAN_KEY: mean_CHW}, {"run_id": self.id})

    def unfinished(self, info: Mapping[str, Any]) -> list[str]:
        """Return a list with a warning if a student was saved before the run's last epoch, else an empty list.

        Args:
            info: the student's description, as from `student`.
        """
        done, wanted = info.get("epoch"), self.description.options["epochs"]
        return [f"the run isn't finished: epoch {done} of {wanted}"] if (done or 0) < wanted else []

    def history(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl.

        Returns:
            Its lines in order; `kind` of each is "train", "val", "train_eval" or "result".

        Raises:
            DistillError: a line is damaged.
        """
        return decode_lines(self.path / METRICS_FILE, self._lines())

    def _lines(self) -> list[bytes]:
        """Return the complete lines of metrics.jsonl, without newlines: a kill may leave a partial last line."""
        try:
            return (self.path / METRICS_FILE).read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []

    def last(self, kind: str) -> dict[str, Any] | None:
        """Return the newest line of one kind (see `history`), or None."""
        return next((line for line in reversed(self.history()) if line["kind"] == kind), None)

    def result(self) -> dict[str, Any] | None:
        """Return the result of a finished run as `distill` returned it, or None.

        It is the last line of metrics.jsonl. A damaged last line, as after a power cut, counts as none: the run
        resumes from its checkpoint and writes it again.
        """
        try:
            line = decode_line(self._lines()[-1])
        except (IndexError, ValueError):
            return None
        if line.pop("kind") != "result":
            return None
        if "finished" not in line:  # older versions didn't record it
            written = (self.path / METRICS_FILE).stat().st_mtime
            line["finished"] = datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds")
        return line


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json; DistillError if it is missing, damaged or of another format."""
    try:
        config = read_checksummed(folder / CONFIG_FILE)
    except DistillError as error:
        raise DistillError(f"{error}; {CONFIG_MEND}") from error
    if config.get("format") != FORMAT:
        raise DistillError(
            f"the run in {folder} has format {config.get('format')}, this version reads {FORMAT}; start over with "
            "distill --restart"
        )
    return config


def _read_split(folder: Path, sha256: str) -> Split:
    """Read split.json; DistillError if it is missing, damaged, or doesn't have this SHA-256."""
    file = folder / SPLIT_FILE
    mend = "run distill again, which restores it"
    try:
        split = read_checksummed(file)
    except DistillError as error:
        raise DistillError(f"{error}; {mend}") from error
    if json_sha256(split) != sha256:
        raise DistillError(f"{file} is another run's; {mend}")
    return Split(train=array("q", split["train"]), val=array("q", split["val"]))


def _write_split(folder: Path, split: Split) -> None:
    write_checksummed_integers(folder / SPLIT_FILE, {"train": split.train, "val": split.val})


def split_sha256(split: Split) -> str:
    """Return the hexadecimal SHA-256 of split.json's value, which config.json holds as `split_sha256`."""
    return integers_sha256({"train": split.train, "val": split.val})


@contextmanager
def open_or_create_run(
    folder: Path, description: RunDescription, split: Split, head: bytes | None, *, restart: bool
) -> Iterator[Run]:
    """Lock a folder for this process, and yield the existing run in it, or a new one.

    An existing run resumes only if `identity` and `data` are the same. It keeps its resolved settings; a damaged
    split or head is written again from the arguments. A run with other settings that never saved a checkpoint is
    replaced by the new one.

    Args:
        folder: the run's folder.
        description: content of config.json for a new run; its `split_sha256` is that of `split`.
        split: rows for training and for validation.
        head: content of the head's safetensors file; None if the store has none.
        restart: rename an existing run's folder to NAME.old-N and begin a new run.

    Raises:
        RunLocked: another process trains in the folder.
        DistillError: the folder holds something else, or a run of other settings, or its description is damaged.
    """
    _refuse_other_content(folder)
    if restart and (folder / CONFIG_FILE).exists():
        with run_lock(folder):
            _set_aside(folder)
    with run_lock(folder):
        for leftover in folder.glob("*.partial"):
            leftover.unlink(missing_ok=True)
        if (folder / CONFIG_FILE).exists():
            _resume_or_clear(folder, description)
        if not (folder / CONFIG_FILE).exists():
            if head is not None:
                write_atomic(folder / HEAD_FILE, head)
            _write_split(folder, split)
            write_checksummed(folder / CONFIG_FILE, description.to_json())  # last: it makes the folder a run
        _restore_from_store(folder, split, head)
        yield Run.open(folder)


def _refuse_other_content(folder: Path) -> None:
    """Refuse a path that is a file, lies in a store, isn't UTF-8, or is a folder with something other than a run."""
    try:
        str(folder.resolve()).encode()
    except UnicodeEncodeError:
        raise DistillError(
            f"--out {shown(str(folder.resolve()))} isn't valid UTF-8, which the run's files need; give another --out"
        ) from None
    if folder.exists() and not folder.is_dir():
        raise DistillError(f"{folder} is a file; give another --out")
    if not folder.exists():
        if (store := store_around(str(folder.resolve()))) is not None:
            raise DistillError(f"--out {folder} lies in the store {store}; give another --out")
        return
    config = folder / CONFIG_FILE
    if config.exists() and (is_checksummed(config) or (folder / LOCK_FILE).exists()):
        return  # a run, perhaps a damaged one
    ours = {LOCK_FILE, HEAD_FILE, SPLIT_FILE}
    others = [path.name for path in folder.iterdir() if path.name not in ours and path.suffix != ".partial"]
    if (folder / SPLIT_FILE).exists() and not is_checksummed(folder / SPLIT_FILE):
        others.append(SPLIT_FILE)  # a split of something else
    if others:
        raise DistillError(
            f"{folder} holds {counted(len(others), 'other file')} and no run, the first: {shown(min(others))}; "
            "give another --out"
        )


def _set_aside(folder: Path) -> None:
    """Rename the folder to the first free name NAME.old-N."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    logger.warning("the run that was in %s is kept as %s", folder, aside)


def _resume_or_clear(folder: Path, description: RunDescription) -> None:
    """Check that the run in the folder has the same settings, and update the paths of store and images.

    A run of other settings is deleted if it never saved anything; otherwise it is refused, with a list of the
    differences.
    """
    # JSON, not the typed description: keys that this version doesn't know stay in the file.
    config, wanted = _read_config(folder), description.to_json()
    differences = _differences(config, wanted)
    if differences and not _has_learned(folder):
        _clear(folder)
    elif differences:
        init = f"--init {folder} --out OTHER to start from its student, " if has_student(folder) else ""
        raise DistillError(
            f"the run in {folder} was begun differently ({'; '.join(differences)})\n"
            f"ask for the same, or give {init}another --out, or --restart to set it aside and start over"
        )
    else:
        moved = {"image_root": wanted["image_root"], "store": wanted["store"]}
        if any(config.get(name) != value for name, value in moved.items()):
            write_checksummed(folder / CONFIG_FILE, {**config, **moved})


def _differences(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the options and data that differ between the values of two config.json, one text each."""
    return [
        f"{name}: {old.get(name)!r} then, {new.get(name)!r} now"
        for part in ("identity", "data")
        for old, new in [(config.get(part, {}), wanted[part])]
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _has_learned(folder: Path) -> bool:
    """Return True if a checkpoint or a student was saved; a run that failed before its first step has neither."""
    return any((folder / name).exists() for name in (CHECKPOINT_FILE, PREVIOUS_FILE, STUDENT_FILE))


def _clear(folder: Path) -> None:
    """Delete the files of a run, config.json last: after a kill the folder is either still a run or no run."""
    for path in (folder / METRICS_FILE, *folder.glob(EVENTS), folder / CONFIG_FILE):
        path.unlink(missing_ok=True)
    logger.info("the run in %s was begun differently and never saved anything: replaced by a new one", folder)


def _restore_from_store(folder: Path, split: Split, head: bytes | None) -> None:
    """Write split.json and the head again where they are missing or damaged."""
    sha256 = _read_config(folder)["split_sha256"]
    try:
        _read_split(folder, sha256)
    except DistillError as error:
        if split_sha256(split) != sha256:
            raise
        logger.warning("%s", error)
        _write_split(folder, split)
    path = folder / HEAD_FILE
    if head is not None and not (path.exists() and path.read_bytes() == head):
        logger.warning("%s was missing or damaged: copied from the store again", path)
        write_atomic(path, head)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for one trainer; the lock ends with the process that holds it.

    Raises:
        RunLocked: another process holds the lock.
    """
    make_folder(folder)
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise RunLocked(
                f"{folder} is being trained by {owner}; wait for it, or give another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def trainer_of(folder: Path) -> str | None:
    """Return who trains the run in a folder now, such as "process 7 on host"; None if nobody does."""
    try:
        with open(folder / LOCK_FILE, encoding="utf-8") as file:
            try:
                # shared: two readers don't see each other
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        return None
    return None


def closest_run(run: Run) -> tuple[Path, list[str]] | None:
    """Find the run in `runs` with a student of the same name that was begun with the fewest other options or data.

    Args:
        run: run that has just begun.

    Returns:
        Its folder and the differences, one text each; None if there is no other run.
    """
    wanted = run.description.to_json()
    found: list[tuple[Path, list[str]]] = []
    for folder in runs_with_student():
        try:
            config = _read_config(folder)
        except DistillError:
            continue  # damaged, or of another version: not worth a word while another run begins
        if folder.resolve() != run.path and config.get("student") == run.description.student:
            found.append((folder, _differences(config, wanted)))
    return min(found, key=lambda one: len(one[1]), default=None)
