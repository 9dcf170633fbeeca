"""Selection of a store's images: fraction, seed, limit, and additions to what is stored."""

from __future__ import annotations

import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilesam.common.image_ref import ImageRef
from mobilesam.precompute import PrecomputeError
from mobilesam.precompute.listing import Absent
from mobilesam.precompute.plan import select, select_additional
from mobilesam.sam import in_fraction
from mobilesam.store import Selection


def _files(count: int) -> list[ImageRef]:
    return [ImageRef(key=f"{number:04d}.jpg", size=1, offset=None) for number in range(count)]


def _selection(fraction: float = 1.0, seed: int = 0, limit: int | None = None) -> Selection:
    return Selection(fraction=fraction, seed=seed, limit=limit)


def _keys(files: list[ImageRef]) -> list[str]:
    return [file.key for file in files]


def _stored(files: list[ImageRef]) -> list[bytes]:
    return sorted(file.key.encode() for file in files)


@given(small=st.floats(0.05, 1.0), large=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_a_larger_fraction_holds_a_smaller_one(small: float, large: float, seed: int) -> None:
    small, large = sorted([small, large])
    files = _files(300)
    assert set(_keys(select(files, _selection(small, seed)))) <= set(
        _keys(select(files, _selection(large, seed)))
    )


def test_a_fraction_keeps_about_its_share() -> None:
    assert 850 < len(select(_files(10_000), _selection(0.1))) < 1150


def test_the_limit_takes_the_first_of_what_the_fraction_keeps() -> None:
    files = _files(100)
    assert select(files, _selection(0.5, limit=7)) == select(files, _selection(0.5))[:7]


def test_a_fraction_that_keeps_nothing_is_refused_with_its_number() -> None:
    with pytest.raises(PrecomputeError, match=r"1e-09 keeps none of 20"):
        select(_files(20), _selection(1e-9))


def test_a_rerun_with_the_same_selection_adds_nothing() -> None:
    files = _files(50)
    for selection in (_selection(), _selection(0.5, seed=4), _selection(limit=9), _selection(0.5, limit=9)):
        assert select_additional(files, selection, _stored(select(files, selection))) == []


def test_additional_files_are_appended_after_the_stored_ones() -> None:
    files = _files(10)
    stored = _stored(files[4:])
    assert _keys(select_additional(files, _selection(), stored)) == _keys(files[:4])


def test_a_higher_limit_adds_up_to_it() -> None:
    assert _keys(select_additional(_files(10), _selection(limit=6), _stored(_files(4)))) == [
        "0004.jpg",
        "0005.jpg",
    ]


def test_a_file_that_sorts_first_does_not_displace_what_is_stored_under_a_limit() -> None:
    files = [ImageRef(key="000-new.jpg", size=1, offset=None), *_files(5)]
    assert select_additional(files, _selection(limit=5), _stored(_files(5))) == []


@pytest.mark.parametrize(
    ("files", "selection", "message"),
    [
        (_files(10), _selection(0.5), r"--fraction 0\.5 --seed 0 leaves out \d of the store's 10"),
        (_files(10), _selection(limit=9), r"--limit 9 is fewer than the 10"),
    ],
)
def test_a_selection_that_lacks_stored_images_is_refused_with_both_numbers(
    files: list[ImageRef], selection: Selection, message: str
) -> None:
    with pytest.raises(PrecomputeError, match=message):
        select_additional(files, selection, _stored(_files(10)))


def test_another_seed_that_drops_stored_images_is_refused() -> None:
    files = _files(100)
    stored = _stored(select(files, _selection(0.5, seed=1)))
    with pytest.raises(PrecomputeError, match="--seed 2"):
        select_additional(files, _selection(0.5, seed=2), stored)


def test_stored_images_that_the_listing_lacks_are_counted_and_the_first_is_named() -> None:
    absent = Absent()
    files = [*_files(8), ImageRef(key="0009.jpg", size=1)]
    assert select_additional(files, _selection(), _stored(_files(11)), absent) == []
    assert absent == Absent(rows=11, count=2, first=b"0008.jpg")


_KEYS = st.lists(st.text("abcé€😀\udcff/", min_size=1, max_size=3), unique=True)


@given(listed=_KEYS, stored=_KEYS, fraction=st.floats(0.2, 1.0), limit=st.none() | st.integers(1, 12))
def test_walking_listing_and_store_side_by_side_gives_the_same_as_sets(
    listed: list[str], stored: list[str], fraction: float, limit: int | None
) -> None:
    files = [ImageRef(key=key, size=1, offset=None) for key in sorted(listed, key=os.fsencode)]
    selection = _selection(fraction, limit=limit)
    kept = [file for file in files if in_fraction(file.key, fraction, 0)]
    problem, absent, gone = None, Absent(), sorted(map(os.fsencode, set(stored) - set(listed)))
    if dropped := (set(stored) & set(listed)) - set(_keys(kept)):
        problem = f"leaves out {len(dropped)} of the store's {len(stored)} image"
    elif limit is not None and limit < len(stored):
        problem = f"--limit {limit} is fewer than the {len(stored)} images"
    walked = iter(sorted(map(os.fsencode, stored)))
    if problem:
        with pytest.raises(PrecomputeError, match=problem):
            select_additional(iter(files), selection, walked, absent)
        return
    new = [file for file in kept if file.key not in stored]
    assert (
        select_additional(iter(files), selection, walked, absent)
        == new[: None if limit is None else limit - len(stored)]
    )
    assert absent == Absent(rows=len(stored), count=len(gone), first=gone[0] if gone else None)


def test_the_keys_of_a_store_are_never_all_in_memory() -> None:
    files = [ImageRef(key=f"{number:0200d}.jpg", size=1, offset=None) for number in range(50_000)]
    stored = (file.key.encode() for file in files)
    tracemalloc.start()
    assert select_additional(files, _selection(), stored) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000, "bytes; the keys are 10,200,000, and other tests' threads allocate some"
