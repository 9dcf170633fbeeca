"""Link runs/latest: the newest run that has a student.

A run without a student can't be verified, exported or used; so the link moves when a run writes its first one.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..common.errors import DistillError
from .checksummed_json import digest
from .run_description import STUDENT_FILE, is_run

logger = logging.getLogger(__name__)

RUNS = Path("runs")
LATEST = RUNS / "latest"


def point_latest(folder: Path) -> None:
    """Make `runs/latest` point to a run with a student, if there is one.

    That is this run as soon as it has a student. Before, a link to a run with a student stays, and another one is
    replaced: by a link to the newest run with a student, else to this run. The link is relative and replaced
    atomically.

    Args:
        folder: run that begins, goes on, or has written its student.

    Raises:
        DistillError: `runs/latest` is not a link.
    """
    RUNS.mkdir(exist_ok=True)
    if os.path.lexists(LATEST) and not LATEST.is_symlink():
        raise DistillError(f"{LATEST} is not a link; move it away: it must point to the latest run")
    if has_student(folder):
        target = folder.resolve()
    elif has_student(LATEST):
        return
    else:
        target = next(iter(runs_with_student()), folder).resolve()
    # The temporary name depends on the folder, which the caller has locked: the next start replaces a leftover link.
    draft = RUNS / f".latest.{digest(str(folder.resolve()))}"
    draft.unlink(missing_ok=True)
    draft.symlink_to(os.path.relpath(target, RUNS.resolve()))
    os.replace(draft, LATEST)


def latest_run() -> Path:
    """Return `runs/latest`, or, with a warning, the newest run in `runs` with a student if that one has none.

    An older version's link may point to a run without a student; so may one whose run was set aside or removed.

    Raises:
        DistillError: there is no run.
    """
    usable = [] if has_student(LATEST) else runs_with_student()
    if usable:
        logger.warning("%s; taken instead: %s, the newest run that has a student", _fact(), usable[0])
        return usable[0]
    if not LATEST.is_dir():
        fact = f": {_fact()}" if LATEST.is_symlink() else ""
        raise DistillError(f"no run at {LATEST}{fact}; run distill first, or give a run's folder")
    return LATEST


def refuse_no_run() -> None:
    """Raise the DistillError of `latest_run`, if there is no run, without a warning."""
    if not has_student(LATEST) and not runs_with_student():
        latest_run()


def _fact() -> str:
    """Return the reason why `runs/latest` can't be used."""
    if not os.path.lexists(LATEST):
        return f"there is no {LATEST}"
    why = "is not finished: no student yet" if LATEST.is_dir() else "is gone"
    return f"{LATEST} points to {os.path.realpath(LATEST)}, which {why}"


def runs_with_student() -> list[Path]:
    """Return the folders in `runs` that are runs with a student, the newest student first."""
    if not RUNS.is_dir():
        return []
    folders = [
        path for path in RUNS.iterdir() if path != LATEST and path.name[0] != "." and has_student(path)
    ]
    return sorted(folders, key=lambda folder: (folder / STUDENT_FILE).stat().st_mtime, reverse=True)


def has_student(folder: Path) -> bool:
    """Return True if a folder is a run that has written a student."""
    return is_run(folder) and (folder / STUDENT_FILE).is_file()
