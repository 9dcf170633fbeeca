"""The zip archives that ``torch.save`` writes: every record found and its checksum verified.

``torch.load`` verifies none: a flipped bit in a tensor passes for data there.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from .errors import SamError

MAX_DIRECTORY = 2 << 20
"""Largest central directory that is read, in bytes: thirty times that of TinyViT's weights with AdamW's moments,
and some 25 MB once it is parsed."""

_CHUNK = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s22x2H")


class ArchiveError(SamError):
    """A file isn't a whole archive: a one-line reason without the file's name, which whoever holds it adds."""


@dataclass(frozen=True, slots=True)
class Record:
    """Where a record's bytes lie in the file."""

    start: int
    size: int
    crc32: int


def read_records(file: BinaryIO) -> dict[str, Record]:
    """Find every record and verify its checksum, a megabyte at a time.

    Returns:
        Records by name, without the folder that torch puts them all into.

    Raises:
        ArchiveError: the archive is damaged, compressed, or records overlap or reach beyond the file.
        OSError: the file can't be read.
    """
    records = _locate(file)
    for name, record in records.items():
        if _crc32(file, record) != record.crc32:
            raise ArchiveError(f"the checksum of {name[:60]!r} is wrong")
    root = next(iter(records), "").partition("/")[0] + "/"
    if not all(name.startswith(root) for name in records):
        raise ArchiveError("its records don't lie in one folder")
    return {name.removeprefix(root): record for name, record in records.items()}


class _Bounded(io.RawIOBase):
    """What zipfile may read of a file at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._length = file.seek(0, io.SEEK_END)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            offset += self._length
        if offset < 0:
            raise ArchiveError("a place before the file's beginning is named")
        return self._file.seek(offset)

    def read(self, size: int | None = -1) -> bytes:
        rest = max(self._length - self.tell(), 0)
        if size is None or size < 0 or size > rest:
            size = rest
        if size > MAX_DIRECTORY:
            raise ArchiveError(f"its directory has {size:,} bytes; at most {MAX_DIRECTORY:,} are read")
        return self._file.read(size)


def _locate(file: BinaryIO) -> dict[str, Record]:
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise ArchiveError(f"no whole zip archive: {error}") from None
    records: dict[str, Record] = {}
    end_of_last, length = 0, file.seek(0, io.SEEK_END)
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ArchiveError("its records are compressed, which torch.save never does")
        start = _data_start(file, entry.header_offset)
        # Records apart from each other can't be more than the file holds.
        if entry.header_offset < end_of_last or start + entry.file_size > length:
            raise ArchiveError("its records overlap or reach beyond the file")
        if entry.filename in records:
            raise ArchiveError("it has two records of one name")
        records[entry.filename] = Record(start, entry.file_size, entry.CRC)
        end_of_last = start + entry.file_size
    return records


def _data_start(file: BinaryIO, header_offset: int) -> int:
    if header_offset < 0:
        raise ArchiveError("a place before the file's beginning is named")
    file.seek(header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise ArchiveError("a record isn't where the directory says")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _crc32(file: BinaryIO, record: Record) -> int:
    file.seek(record.start)
    checksum, left = 0, record.size
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise ArchiveError("the file ended while it was read")
        checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
    return checksum
