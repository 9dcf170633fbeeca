"""Files of `torch.save`, in its zip format, whose records' checksums are all verified, and in the older one.

`torch.load` verifies no checksum, so that it doesn't notice a flipped bit in a tensor.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...common.errors import ArchiveError, ForeignObjects
from .unpickler import MAX_PICKLE, read_pickle

ZIP_MAGIC = b"PK\x03\x04"

MAX_DIRECTORY = 2 << 20
"""Largest central directory that is read, in bytes: thirty times that of TinyViT's weights with AdamW's moments;
parsed it takes about 25 MB."""

# The older format begins with these two pickles of one number each: a magic number and a version.
_OLD_FORMAT = (0x1950A86A20F9469CFC6C, 1001)
_CHUNK = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s22x2H")


def read_torch_file(path: Path, *, foreign: bool = False) -> object:
    """Read a file of `torch.save`.

    In the zip format every record's checksum is verified, with bounded memory, before anything is unpickled; the
    tensors are then mapped privately from the verified file. Files whose checksums were not computed
    (`torch.utils.serialization.config.save.compute_crc32`) and the older format, which has none and is read whole,
    are not verified.

    Args:
        path: path of the file.
        foreign: True to return a `Foreign` in place of each object of another kind; False to refuse the file.

    Returns:
        The saved object: tensors on the CPU in plain containers.

    Raises:
        ArchiveError: the file is damaged.
        ForeignObjects: it holds other objects than tensors and plain values, and `foreign` is False; or it is a
            pickle of another program.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
            return _read_zip(file, foreign)
        file.seek(0)
        return _read_old(file, foreign)


def _read_zip(file: io.BufferedReader, foreign: bool) -> object:
    records = read_records(file)
    order = _content(file, records, "byteorder", default=b"little")
    if order.decode("ascii", "replace") != sys.byteorder:
        raise ArchiveError(f"its numbers are {order[:20]!r}-endian, this machine's are {sys.byteorder}")
    description = _content(file, records, "data.pkl")
    # A private mapping: writes to these tensors never reach the file.
    mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def storage(key: str, dtype: torch.dtype, elements: int) -> Tensor:
        if (key, dtype) not in flat:
            flat[key, dtype] = _mapped(mapped, records.get(f"data/{key}"), dtype, elements)
        return flat[key, dtype]

    return read_pickle(io.BytesIO(description), storage, foreign=foreign)


def _content(
    file: io.BufferedReader, records: dict[str, Record], name: str, default: bytes | None = None
) -> bytes:
    record = records.get(name)
    if record is None:
        if default is None:
            raise ArchiveError(f"it has no record {name!r}: not written by torch.save")
        return default
    if record.size > MAX_PICKLE:
        raise ArchiveError(f"its record {name!r} has {record.size:,} bytes; at most {MAX_PICKLE:,} are read")
    file.seek(record.start)
    return file.read(record.size)


def _mapped(mapped: mmap.mmap, record: Record | None, dtype: torch.dtype, elements: int) -> Tensor:
    if record is None or record.size != elements * dtype.itemsize:
        raise ArchiveError("a storage is missing or of another size")
    if not elements:
        return torch.empty(0, dtype=dtype)
    if (
        record.start % dtype.itemsize
    ):  # torch.save aligns storages, a program that repacks the archive may not
        return torch.frombuffer(
            bytearray(mapped[record.start : record.start + record.size]), dtype=dtype, count=elements
        )
    return torch.frombuffer(mapped, dtype=dtype, count=elements, offset=record.start)


def _read_old(file: io.BufferedReader, foreign: bool) -> object:
    """Read the older format: pickles of a magic number, a version, the writer's type sizes, the object and the keys
    of its storages; then the storages, each preceded by its number of elements."""
    flat: dict[str, Tensor] = {}
    left = os.fstat(file.fileno()).st_size

    def storage(key: str, dtype: torch.dtype, elements: int) -> Tensor:
        nonlocal left
        if key not in flat:
            left -= elements * dtype.itemsize
            if left < 0:
                raise ArchiveError("its tensors are larger than the file")
            flat[key] = torch.empty(elements, dtype=dtype)
        if flat[key].dtype != dtype:
            raise ArchiveError("a storage has two types")
        return flat[key]

    magic = read_pickle(file, storage, foreign=True)
    if type(magic) is not int:
        raise ForeignObjects("a pickle that torch.save didn't write")
    if (magic, read_pickle(file, storage)) != _OLD_FORMAT:
        raise ArchiveError("it doesn't begin like a file of torch.save")
    read_pickle(file, storage)
    content, keys = read_pickle(file, storage, foreign=foreign), read_pickle(file, storage)
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(flat):
        raise ArchiveError("its list of storages isn't that of its tensors")
    for key in keys:
        _fill(file, flat[key])
    return content


def _fill(file: io.BufferedReader, flat: Tensor) -> None:
    elements = int.from_bytes(file.read(8), sys.byteorder)
    data: np.ndarray = flat.view(torch.uint8).numpy()
    if elements != flat.numel() or file.readinto(data.data) != len(data):
        raise ArchiveError("the file ends before its tensors do")


@dataclass(frozen=True, slots=True)
class Record:
    """Place of a record's bytes in the file."""

    start: int
    size: int
    crc32: int


def read_records(file: BinaryIO) -> dict[str, Record]:
    """Find every record of a zip archive and verify its checksum, a megabyte at a time.

    If all checksums are 0, they were not computed, and aren't compared.

    Args:
        file: archive, open for reading bytes.

    Returns:
        Records by name, without the folder that contains all of them.

    Raises:
        ArchiveError: the archive is damaged, compressed, or records overlap or reach beyond the file.
        OSError: the file can't be read.
    """
    records = _locate(file)
    computed = any(record.crc32 for record in records.values())
    for name, record in records.items():
        if computed and _crc32(file, record) != record.crc32:
            raise ArchiveError(f"the checksum of {name[:60]!r} is wrong")
    root = next(iter(records), "").partition("/")[0] + "/"
    if not all(name.startswith(root) for name in records):
        raise ArchiveError("its records are not in one folder, as those of torch.save are")
    return {name.removeprefix(root): record for name, record in records.items()}


class _BoundedFile(io.RawIOBase):
    """File wrapper that lets zipfile read at most MAX_DIRECTORY bytes at once."""

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
            raise ArchiveError("it refers to a place before the file's beginning")
        return self._file.seek(offset)

    def read(self, size: int | None = -1) -> bytes:
        rest = max(self._length - self.tell(), 0)
        if size is None or size < 0 or size > rest:
            size = rest
        if size > MAX_DIRECTORY:
            raise ArchiveError(f"its directory has {size:,} bytes; at most {MAX_DIRECTORY:,} are read")
        return self._file.read(size)


def archive_names(file: BinaryIO) -> list[str] | None:
    """Return the names in a zip archive's directory, of any program; None if it has no intact one.

    Args:
        file: archive, open for reading bytes.
    """
    try:
        return [entry.filename for entry in _directory(file)]
    except ArchiveError:
        return None


def _directory(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """Read a zip archive's directory; ArchiveError, with the reason, if there is no intact one."""
    try:
        with zipfile.ZipFile(_BoundedFile(file)) as archive:
            return archive.infolist()
    # zipfile raises NotImplementedError for features that it can't read, which damage can claim.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        if "not a zip file" in str(error):
            raise ArchiveError(
                "no zip directory at its end, as after an unfinished download or copy"
            ) from None
        raise ArchiveError(f"no intact zip archive: {error}") from None


def _locate(file: BinaryIO) -> dict[str, Record]:
    entries = sorted(_directory(file), key=lambda entry: entry.header_offset)
    records: dict[str, Record] = {}
    end_of_last, length = 0, file.seek(0, io.SEEK_END)
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ArchiveError(
                "its records are compressed, not by torch.save: unpack it, and pack it with zip -0"
            )
        start = _data_start(file, entry.header_offset)
        # Records that don't overlap can't hold more bytes than the file.
        if entry.header_offset < end_of_last or start + entry.file_size > length:
            raise ArchiveError("its records overlap or reach beyond the file")
        if entry.filename in records:
            raise ArchiveError("it has two records of the same name")
        records[entry.filename] = Record(start, entry.file_size, entry.CRC)
        end_of_last = start + entry.file_size
    return records


def _data_start(file: BinaryIO, header_offset: int) -> int:
    if header_offset < 0:
        raise ArchiveError("it refers to a place before the file's beginning")
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
