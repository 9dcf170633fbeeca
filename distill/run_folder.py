"""A run's folder: what lies in it, and how to read it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.durable import make_folder, write_atomic
from ..common.errors import DistillError, RunLocked
from .checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE, Checkpoints
from .data.sampler import Split
from .students.student_file import MEND, STUDENT_FILE, check_tensors, load_student, load_tensors, save_tensors

if TYPE_CHECKING:
    from ..store import ImageRecord

FORMAT = 2
RUNS = Path("runs")
LATEST = RUNS / "latest"
CONFIG_FILE = "config.json"
SPLIT_FILE = "split.json"
METRICS_FILE = "metrics.jsonl"
HEAD_FILE = "sam_head.safetensors"
MEAN_FILE = "mean_embedding.safetensors"
MEAN_KEY = "mean_embedding"
LOCK_FILE = "run.lock"
EVENTS = "events.out.tfevents.*"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that `distill` has begun. Files that are written later are read when they are asked for.

    `config` is config.json: `student`, `image_size`, `config` (options as given), `resolved` (micro-batch,
    precision, device), `store` (path and spec), `image_root`, `counts`, `versions`.

    Whatever is read from the folder is checked against a checksum and against the run it belongs to.
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
        config = read_description(folder)
        return cls(path=folder, config=config, split=read_split(folder, config))

    @property
    def id(self) -> str:
        """Hex SHA-256 of what was asked for and of the data: equal where runs learn the same."""
        return json_sha256([self.config["identity"], self.config["data"]])

    @property
    def store_path(self) -> Path:
        """Where the store lay when the run began."""
        return Path(self.config["store"]["path"])

    @property
    def image_root(self) -> Path | None:
        """Where the images lay when the run was last started; None when they were those that the store keeps."""
        root = self.config["image_root"]
        return None if root is None else Path(root)

    @property
    def student_path(self) -> Path:
        """The student as of the last complete epoch."""
        return self.path / STUDENT_FILE

    @property
    def head_path(self) -> Path:
        """SAM's prompt encoder and mask decoder, copied from the store."""
        return self.path / HEAD_FILE

    @property
    def checkpoints(self) -> Checkpoints:
        """What a rerun goes on from."""
        return Checkpoints(folder=self.path, run_id=self.id)

    def student(self, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
        """As `load_student`; DistillError also when the file in the folder is another run's."""
        student, info = load_student(self.student_path, device)
        if info.get("run_id") != self.id:
            raise DistillError(f"{self.student_path} is another run's; {MEND}")
        return student, info

    def read_head(self) -> bytes:
        """SAM's head as safetensors; DistillError when it isn't the store's."""
        wanted = self.config["store"]["spec"]["head_sha256"]
        try:
            data = self.head_path.read_bytes()
        except OSError as error:
            raise DistillError(f"{self.head_path} can't be read: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != wanted:
            raise DistillError(f"{self.head_path} is damaged; copy it from the store, or run distill again")
        return data

    def mean_embedding(self) -> Tensor:
        """The training rows' mean embedding, float32 (256, g, g); there after the first epoch."""
        path, grid = self.path / MEAN_FILE, self.config["image_size"] // 16
        mend = "run distill again, which goes on or writes it anew"
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
        """Writes what `mean_embedding` reads."""
        save_tensors(self.path / MEAN_FILE, {MEAN_KEY: mean_CHW}, {"run_id": self.id})

    def unfinished(self, info: Mapping[str, Any]) -> list[str]:
        """A note on the student, by its description, where the run hasn't come to its end; else none."""
        done, wanted = info.get("epoch"), self.config["config"]["epochs"]
        return [f"the run isn't finished: epoch {done} of {wanted}"] if (done or 0) < wanted else []

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in order; `kind` tells them apart: train, val, train_eval, result."""
        # A kill may leave half a last line; every other line was whole when it was followed.
        return decode_lines(self.path / METRICS_FILE, self._lines())

    def _lines(self) -> list[bytes]:
        try:
            return (self.path / METRICS_FILE).read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest line of one kind."""
        return next((line for line in reversed(self.history()) if line["kind"] == kind), None)

    def result(self) -> dict[str, Any] | None:
        """What distill() returned when the run finished, or None while it hasn't.

        It is the last line. One that is damaged, as a power cut may leave it, is no result: the run goes on from
        its checkpoint and writes it again.
        """
        try:
            line = decode_line(self._lines()[-1])
        except (IndexError, ValueError):
            return None
        return line if line.pop("kind") == "result" else None


def read_description(folder: Path) -> dict[str, Any]:
    """The content of config.json; DistillError when it is missing or damaged."""
    try:
        config = read_sealed(folder / CONFIG_FILE)
    except DistillError as error:
        mend = "put back a whole copy, or start over with distill --restart"
        raise DistillError(f"{error}; {mend}") from error
    if config.get("format") != FORMAT:
        raise DistillError(
            f"the run in {folder} has format {config.get('format')}, this version reads {FORMAT}; start over with "
            "distill --restart"
        )
    return config


def read_split(folder: Path, config: dict[str, Any]) -> Split:
    """The content of split.json; DistillError when it is missing, damaged, or not the one of this description."""
    file = folder / SPLIT_FILE
    mend = "run distill again, which writes it anew"
    try:
        split = read_sealed(file)
    except DistillError as error:
        raise DistillError(f"{error}; {mend}") from error
    if json_sha256(split) != config["split_sha256"]:
        raise DistillError(f"{file} is another run's; {mend}")
    return Split(train=tuple(split["train"]), val=tuple(split["val"]))


def decode_lines(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    """Decodes lines of `path`; DistillError naming the first that is damaged."""
    decoded = []
    for number, line in enumerate(lines, 1):
        try:
            decoded.append(decode_line(line))
        except ValueError as error:
            raise DistillError(
                f"{path} is damaged in line {number} of {len(lines)} ({error}); put back a whole copy, or give "
                "--restart to start over"
            ) from error
    return decoded


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the folder for one trainer; DistillError when another one has it. A dead one's lock is gone."""
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


def point_latest(folder: Path) -> None:
    """Makes `runs/latest` point at `folder` by a relative link, replaced atomically."""
    RUNS.mkdir(exist_ok=True)
    if os.path.lexists(LATEST) and not LATEST.is_symlink():
        raise DistillError(f"{LATEST} is not a link; move it away: it must point to the latest run")
    # One name for each folder, which the caller has locked: what a kill leaves is replaced by the rerun.
    draft = RUNS / f".latest.{digest(str(folder.resolve()))}"
    draft.unlink(missing_ok=True)
    draft.symlink_to(os.path.relpath(folder.resolve(), RUNS.resolve()))
    os.replace(draft, LATEST)


# --- Making a run's folder, or finding the one to go on with.

logger = logging.getLogger(__name__)


@contextmanager
def prepared_folder(
    folder: Path, description: dict[str, Any], split: Split, head: bytes | None, *, restart: bool
) -> Iterator[Run]:
    """Holds the folder for this process and gives the run in it: a new one, or the one begun before.

    `description` becomes config.json. A run that is there goes on only if `identity` and `data` are the same;
    what was resolved for it stays, and what the store still tells (split, head) is written anew where it was
    damaged. With `restart` it is set aside under another name and nothing of it is lost. One that was begun
    differently, but never came to a checkpoint, is begun anew.

    Raises DistillError when another process trains in the folder, when it holds something else, or when the
    run there was asked for differently or its description is damaged.
    """
    rows = {"train": split.train, "val": split.val}
    description = {**description, "split_sha256": json_sha256(rows)}
    _refuse_foreign(folder)
    if restart and (folder / CONFIG_FILE).exists():
        with run_lock(folder):
            _set_aside(folder)
    with run_lock(folder):
        for leftover in folder.glob("*.partial"):
            leftover.unlink(missing_ok=True)
        if (folder / CONFIG_FILE).exists():
            _join(folder, description)
        if not (folder / CONFIG_FILE).exists():
            if head is not None:
                write_atomic(folder / HEAD_FILE, head)
            write_sealed(folder / SPLIT_FILE, rows)
            write_sealed(folder / CONFIG_FILE, description)  # last: it makes the folder a run
        _restore(folder, rows, head)
        yield Run.open(folder)


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DistillError(f"{folder} is a file; give another --out")
    if not folder.exists() or (folder / CONFIG_FILE).exists():
        return
    ours = {LOCK_FILE, HEAD_FILE, SPLIT_FILE}
    others = [path.name for path in folder.iterdir() if path.name not in ours and path.suffix != ".partial"]
    if others:
        raise DistillError(f"{folder} holds {len(others)} other file(s) and no run; give another --out")


def _set_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    logger.warning("the run that was in %s is kept as %s", folder, aside)


def _join(folder: Path, description: dict[str, Any]) -> None:
    """Checks that the run is the one asked for, and notes where the images lie now."""
    config = read_description(folder)
    lines = [
        f"{name}: {old.get(name)!r} then, {new.get(name)!r} now"
        for part in ("identity", "data")
        for old, new in [(config.get(part, {}), description[part])]
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if lines and _never_saved(folder):
        _clear(folder)
    elif lines:
        raise DistillError(
            f"the run in {folder} was begun differently ({'; '.join(lines)})\n"
            "ask for the same, give another --out, or --restart to set it aside and start over"
        )
    else:
        moved = {"image_root": description["image_root"], "store": description["store"]}
        if any(config.get(name) != value for name, value in moved.items()):
            write_sealed(folder / CONFIG_FILE, {**config, **moved})


def _never_saved(folder: Path) -> bool:
    """Whether nothing that was learned is in the folder: a photo may have stopped the run before its first step."""
    return not any((folder / name).exists() for name in (CHECKPOINT_FILE, PREVIOUS_FILE, STUDENT_FILE))


def _clear(folder: Path) -> None:
    """Takes away what such a run left; config.json last, so that a kill leaves it as it was or no run."""
    for path in (folder / METRICS_FILE, *folder.glob(EVENTS), folder / CONFIG_FILE):
        path.unlink(missing_ok=True)
    logger.info("the run in %s was begun differently and never saved anything: begun anew", folder)


def _restore(folder: Path, rows: dict[str, Any], head: bytes | None) -> None:
    """Writes split.json and the head anew where they aren't what the run began with and the store still tells."""
    config = read_description(folder)
    try:
        read_split(folder, config)
    except DistillError as error:
        if json_sha256(rows) != config["split_sha256"]:
            raise
        logger.warning("%s", error)
        write_sealed(folder / SPLIT_FILE, rows)
    path = folder / HEAD_FILE
    if head is not None and not (path.exists() and path.read_bytes() == head):
        logger.warning("%s was missing or damaged: copied from the store again", path)
        write_atomic(path, head)


# --- JSON that carries a checksum of itself: whole files (SHA-256) and the lines of a log (CRC-32).
#
# Both stay plain JSON to everybody else: the checksum is one more key, the last one.
#

_FILE_KEY = "sha256"
_LINE_KEY = "crc32"


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as JSON with its SHA-256, atomically and durably."""
    write_atomic(path, json.dumps({**value, _FILE_KEY: json_sha256(value)}, indent=1).encode() + b"\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what write_sealed wrote; DistillError when the file is missing, damaged or not what was written."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DistillError(f"{path} is missing or damaged ({reason})") from error
    if not isinstance(value, dict) or value.pop(_FILE_KEY, None) != json_sha256(value):
        raise DistillError(f"{path} is damaged: its SHA-256 isn't the one it was written with")
    return value


def encode_line(value: Mapping[str, Any]) -> bytes:
    """One line of JSON, its last key the CRC-32 (hex) of the line as it would be without that key."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return text[:-1] + b',"%s":"%08x"}\n' % (_LINE_KEY.encode(), zlib.crc32(text))


def decode_line(line: bytes) -> dict[str, Any]:
    """The object of a line, which ends before its newline, without its checksum; ValueError if that is wrong."""
    text, _, found = line.rpartition(b',"%s":"' % _LINE_KEY.encode())
    text += b"}"
    if found != b'%08x"}' % zlib.crc32(text):
        raise ValueError("its checksum is wrong")
    value: dict[str, Any] = json.loads(text)
    return value


# --- What names a JSON value: its SHA-256, whole or short enough for a folder.


def json_sha256(value: object) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest(*parts: object) -> str:
    """Eight hexadecimal digits of the SHA-256 of some JSON values: short enough for a folder's name."""
    return json_sha256(parts)[:8]


def rows_digest(records: Iterable[ImageRecord]) -> str:
    """Of what committed rows hold: their images' and their embeddings' checksums."""
    return digest([(record.row, record.crc32c, record.scales_crc32c, record.sha256) for record in records])
