"""Files of ``torch.save``, in its zip format and in the one before it."""

from __future__ import annotations

import io
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .archive import ArchiveError, Record, read_records
from .unpickler import MAX_PICKLE, read_pickle

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
# What the older format begins with: two pickles of one number each.
_OLD_FORMAT = (0x1950A86A20F9469CFC6C, 1001)


def in_torch_format(start: bytes) -> bool:
    """Whether a file that begins with these bytes, nine or more where it has them, is one of ``torch.save``.

    A safetensors file begins with a length, eight bytes of which the first may be the one that a pickle begins with;
    then there is an object of JSON.
    """
    return start.startswith((ZIP_MAGIC, PICKLE_MAGIC)) and start[8:9] != b"{"


def read_torch_file(path: Path) -> object:
    """What was saved: tensors on the CPU in plain containers.

    In the zip format every record's checksum is verified, with bounded memory, before anything is unpickled; the
    tensors are then mapped, privately, from the file that was verified. The older format has no checksums and is
    read whole.

    Raises:
        ArchiveError: the file is damaged.
        ForeignObjects: it holds other things than tensors and plain values.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
            return _read_zip(file)
        file.seek(0)
        return _read_old(file)


def _read_zip(file: io.BufferedReader) -> object:
    records = read_records(file)
    order = _content(file, records, "byteorder", default=b"little")
    if order.decode("ascii", "replace") != sys.byteorder:
        raise ArchiveError(f"its numbers are {order[:20]!r}-endian, this machine's are {sys.byteorder}")
    description = _content(file, records, "data.pkl")
    # Private: what is written to these tensors never reaches the file.
    mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def storage(key: str, dtype: torch.dtype, elements: int) -> Tensor:
        if (key, dtype) not in flat:
            flat[key, dtype] = _mapped(mapped, records.get(f"data/{key}"), dtype, elements)
        return flat[key, dtype]

    return read_pickle(io.BytesIO(description), storage)


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
    if record is None or record.size != elements * dtype.itemsize or record.start % dtype.itemsize:
        raise ArchiveError("a storage is missing, of another size, or not aligned")
    if not elements:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=elements, offset=record.start)


def _read_old(file: io.BufferedReader) -> object:
    """Pickles of: a magic number, a version, the writer's type sizes, the object, the storages' keys; then the
    storages, each with its number of elements before it."""
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

    if tuple(read_pickle(file, storage) for _ in range(2)) != _OLD_FORMAT:
        raise ArchiveError("it doesn't begin as a file of torch.save does")
    read_pickle(file, storage)
    content, keys = read_pickle(file, storage), read_pickle(file, storage)
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
