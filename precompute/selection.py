"""Which of the listed images a store gets: pure, given the listing and what the store has."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..sam import ImageFile, in_fraction, shown
from ..store import Selection
from .errors import PrecomputeError


def select(files: Sequence[ImageFile], selection: Selection) -> list[ImageFile]:
    """The images of a new store: those that the fraction keeps, in the order given, up to the limit."""
    kept = [file for file in files if in_fraction(file.key, selection.fraction, selection.seed)]
    if not kept:
        raise PrecomputeError(
            f"--fraction {selection.fraction:g} keeps none of {len(files):,} images: raise it"
        )
    return kept[: selection.limit]


def select_more(files: Sequence[ImageFile], selection: Selection, stored: Collection[str]) -> list[ImageFile]:
    """The images to append to a store that has those with the keys `stored`.

    Raises PrecomputeError when the selection is not a superset of what is stored: a row is never dropped.
    """
    kept = [file for file in files if in_fraction(file.key, selection.fraction, selection.seed)]
    known = frozenset(stored)
    _refuse_fewer(files, kept, selection, known)
    new = [file for file in kept if file.key not in known]
    return new if selection.limit is None else new[: selection.limit - len(known)]


def _refuse_fewer(
    files: Sequence[ImageFile], kept: Sequence[ImageFile], selection: Selection, stored: frozenset[str]
) -> None:
    gone = stored - {file.key for file in files}
    if gone:
        raise PrecomputeError(
            f"{len(gone):,} of the store's {len(stored):,} images are gone from the folder, the first: "
            f"{shown(min(gone))}; put them back, or give another --out"
        )
    dropped = stored - {file.key for file in kept}
    if dropped:
        raise PrecomputeError(
            f"--fraction {selection.fraction:g} --seed {selection.seed} leaves out {len(dropped):,} of the "
            f"store's {len(stored):,} images: ask for what the store was made with or more, or give another --out"
        )
    if selection.limit is not None and selection.limit < len(stored):
        raise PrecomputeError(
            f"--limit {selection.limit:,} is fewer than the {len(stored):,} images in the store: raise it, "
            "or give another --out"
        )
