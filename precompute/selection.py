"""Which of the listed images a store gets: pure, given the listing and what the store has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import chain

from ..sam import ImageFile, in_fraction, shown
from ..store import Selection
from .errors import PrecomputeError

_END: tuple[bytes, ImageFile | None] = (b"", None)


def select(files: Sequence[ImageFile], selection: Selection) -> list[ImageFile]:
    """The images of a new store: those that the fraction keeps, in the order given, up to the limit."""
    kept = [file for file in files if _keeps(selection, file)]
    if not kept:
        raise PrecomputeError(
            f"--fraction {selection.fraction:g} keeps none of {len(files):,} images: raise it"
        )
    return kept[: selection.limit]


def select_more(files: Iterable[ImageFile], selection: Selection, stored: Iterable[bytes]) -> list[ImageFile]:
    """The images to append to a store that has those with the keys `stored`. Both are sorted by the bytes of the key,
    and gone through once, side by side: a store's keys are never all in memory.

    Raises PrecomputeError when the selection is not a superset of what is stored: a row is never dropped.
    """
    new: list[ImageFile] = []
    rows = gone = dropped = 0
    first_gone: bytes | None = None
    listed = ((os.fsencode(file.key), file) for file in files)
    name, file = next(listed, _END)
    for key in stored:
        rows += 1
        while file is not None and name < key:
            if _keeps(selection, file):
                new.append(file)
            name, file = next(listed, _END)
        if file is None or name != key:
            gone += 1
            first_gone = first_gone or key
            continue
        dropped += not _keeps(selection, file)
        name, file = next(listed, _END)
    if file is not None:
        rest = chain([file], (later for _, later in listed))
        new += [later for later in rest if _keeps(selection, later)]
    _refuse_fewer(selection, rows, gone, first_gone, dropped)
    return new if selection.limit is None else new[: selection.limit - rows]


def _keeps(selection: Selection, file: ImageFile) -> bool:
    return in_fraction(file.key, selection.fraction, selection.seed)


def _refuse_fewer(selection: Selection, rows: int, gone: int, first_gone: bytes | None, dropped: int) -> None:
    if first_gone is not None:
        raise PrecomputeError(
            f"{gone:,} of the store's {rows:,} images are gone from the folder, the first: "
            f"{shown(os.fsdecode(first_gone))}; put them back, or give another --out"
        )
    if dropped:
        raise PrecomputeError(
            f"--fraction {selection.fraction:g} --seed {selection.seed} leaves out {dropped:,} of the "
            f"store's {rows:,} images: ask for what the store was made with or more, or give another --out"
        )
    if selection.limit is not None and selection.limit < rows:
        raise PrecomputeError(
            f"--limit {selection.limit:,} is fewer than the {rows:,} images in the store: raise it, "
            "or give another --out"
        )
