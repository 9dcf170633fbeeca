"""Making a run's folder, or finding the one to go on with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..store.durable import write_atomic
from .checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE
from .digests import json_sha256
from .errors import DistillError
from .run import (
    CONFIG_FILE,
    EVENTS,
    HEAD_FILE,
    LOCK_FILE,
    METRICS_FILE,
    SPLIT_FILE,
    Run,
    read_description,
    read_split,
    run_lock,
)
from .sealed import write_sealed
from .split import Split
from .student_file import STUDENT_FILE

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
