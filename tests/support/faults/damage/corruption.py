"""Damage done to files on purpose, and where to do it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mobilesam.store import ArrayLayout


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Turn one bit of a file over."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def cut(path: Path, length: int) -> None:
    """Give a file another length; bytes that it did not have are zeros."""
    with path.open("r+b") as file:
        file.truncate(length)


def zero(path: Path) -> None:
    """Zeros throughout, the length kept."""
    path.write_bytes(bytes(path.stat().st_size))


def swap(one: Path, other: Path) -> None:
    """Exchange two files."""
    aside = one.with_name(f"{one.name}.aside")
    shutil.move(one, aside)
    shutil.move(other, one)
    shutil.move(aside, other)


def bits(offsets: Sequence[int], count: int, seed: str) -> Iterator[tuple[int, int]]:
    """`count` pairs (offset, bit): the first and the last offset, and others drawn by the seed."""
    draw = random.Random(seed)
    ends = [offsets[0], offsets[-1]][:count]
    for offset in [*ends, *(draw.choice(offsets) for _ in range(count - len(ends)))]:
        yield offset, draw.randrange(8)


def lengths(size: int, stride: int, count: int, seed: str) -> list[int]:
    """Lengths to cut a file of `size` bytes to: none, one byte, around a row's end, one byte less, some more than
    it had, and `count` drawn by the seed."""
    draw = random.Random(seed)
    fixed = {0, 1, stride - 1, stride, stride + 1, size - 1, size - 4, size + 1, size + 4096} - {size}
    return [*sorted(fixed), *(draw.randrange(size) for _ in range(count))]


def byte_classes(layout: ArrayLayout, slots: int) -> Mapping[str, Sequence[int]]:
    """Offsets in a shard file with `slots` rows, by what stands there."""
    rows = [range(slot * layout.stride, (slot + 1) * layout.stride) for slot in range(slots)]
    end, data = slots * layout.stride, layout.payload_bytes
    return {
        "payload": [offset for row in rows for offset in row[:data]],
        "checksum": [offset for row in rows for offset in row[data : data + 4]],
        "padding": [offset for row in rows for offset in row[data + 4 :]],
        "index entries": range(end, end + 16 * layout.shard_size),
        "index checksum": range(end + 16 * layout.shard_size, end + layout.index_bytes),
    }
