"""Making a run's folder, or finding the one to go on with."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..store.durable import write_atomic
from .errors import DistillError
from .run import CONFIG_FILE, HEAD_FILE, LOCK_FILE, SPLIT_FILE, Run, run_lock
from .split import Split

logger = logging.getLogger(__name__)


@contextmanager
def prepared_folder(
    folder: Path, description: dict[str, Any], split: Split, head: bytes | None, *, restart: bool
) -> Iterator[Run]:
    """Holds the folder for this process and gives the run in it: a new one, or the one begun before.

    `description` becomes config.json. A run that is there goes on only if `identity` and `data` are the same;
    what was resolved for it stays. With `restart` it is set aside under another name and nothing of it is lost.

    Raises DistillError when another process trains in the folder, when it holds something else, or when the
    run there was asked for differently.
    """
    _refuse_foreign(folder)
    if restart and (folder / CONFIG_FILE).exists():
        with run_lock(folder):
            _set_aside(folder)
    with run_lock(folder):
        if (folder / CONFIG_FILE).exists():
            _join(folder, description)
        else:
            if head is not None:
                write_atomic(folder / HEAD_FILE, head)
            _write_json(folder / SPLIT_FILE, {"train": split.train, "val": split.val})
            _write_json(folder / CONFIG_FILE, description)  # last: it makes the folder a run
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
    config = Run.open(folder).config
    lines = [
        f"{name}: {old.get(name)!r} then, {new.get(name)!r} now"
        for part in ("identity", "data")
        for old, new in [(config.get(part, {}), description[part])]
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if lines:
        raise DistillError(
            f"the run in {folder} was begun differently ({'; '.join(lines)})\n"
            "ask for the same, give another --out, or --restart to set it aside and start over"
        )
    moved = {"image_root": description["image_root"], "store": description["store"]}
    if any(config.get(name) != value for name, value in moved.items()):
        _write_json(folder / CONFIG_FILE, {**config, **moved})


def _write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1).encode() + b"\n")
