"""File corruption (flipped bits, truncation, zeros, swaps) and the offsets to apply it to."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mobilesam.store import ArrayLayout


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Invert one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def cut(path: Path, length: int) -> None:
    """Truncate or extend a file; new bytes are zeros."""
    with path.open("r+b") as file:
        file.truncate(length)


def zero(path: Path) -> None:
    """Overwrite a file with zeros, keeping its length."""
    path.write_bytes(bytes(path.stat().st_size))


def swap(one: Path, other: Path) -> None:
    """Exchange two files."""
    aside = one.with_name(f"{one.name}.aside")
    shutil.move(one, aside)
    shutil.move(other, one)
    shutil.move(aside, other)


def bits(offsets: Sequence[int], count: int, seed: str) -> Iterator[tuple[int, int]]:
    """Yield `count` pairs (offset, bit): first and last offset, then offsets drawn with the seed."""
    draw = random.Random(seed)
    ends = [offsets[0], offsets[-1]][:count]
    for offset in [*ends, *(draw.choice(offsets) for _ in range(count - len(ends)))]:
        yield offset, draw.randrange(8)


def lengths(size: int, stride: int, count: int, seed: str) -> list[int]:
    """Return lengths to cut a file of `size` bytes to.

    They are 0, 1, some around the first row's end (`stride` bytes) and around the file's end, and `count` drawn with
    the seed.
    """
    draw = random.Random(seed)
    fixed = {0, 1, stride - 1, stride, stride + 1, size - 1, size - 4, size + 1, size + 4096} - {size}
    return [*sorted(fixed), *(draw.randrange(size) for _ in range(count))]


def byte_classes(layout: ArrayLayout, slots: int) -> Mapping[str, Sequence[int]]:
    """Return the offsets in a shard file of `slots` rows, by kind of content."""
    rows = [range(slot * layout.stride, (slot + 1) * layout.stride) for slot in range(slots)]
    end, data = slots * layout.stride, layout.payload_bytes
    return {
        "payload": [offset for row in rows for offset in row[:data]],
        "checksum": [offset for row in rows for offset in row[data : data + 4]],
        "padding": [offset for row in rows for offset in row[data + 4 :]],
        "index entries": range(end, end + 16 * layout.shard_size),
        "index checksum": range(end + 16 * layout.shard_size, end + layout.index_bytes),
    }
