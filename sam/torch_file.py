"""Files of ``torch.save``, in its zip format and in the one before it."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..common.errors import SamError

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


# --- The zip archives that ``torch.save`` writes: every record found and its checksum verified.
#
# ``torch.load`` verifies none: a flipped bit in a tensor passes for data there.
#

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


# --- Pickles of tensors and plain values, read so that no file can run code or take much more memory than it has
# bytes.
#
# ``torch.load(weights_only=True)`` runs no code either, but it lets a file call constructors that allocate what
# they
# are told to, resize storages, and use as a dictionary's key what takes for ever to hash.
#

MAX_PICKLE = 1 << 20
"""Largest pickle that is read, in bytes: ten times that of TinyViT's weights with AdamW's moments (950 tensors). One
byte makes some 70 of memory at most, an empty list."""

MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8

Storage = Callable[[str, torch.dtype, int], Tensor]
"""storage(key, dtype, elements) -> the flat tensor of a storage's elements."""

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class ForeignObjects(SamError):
    """A pickle holds other things than tensors and plain values; the message names one."""


def read_pickle(file: BinaryIO, storage: Storage) -> object:
    """Read one pickle from where ``file`` stands: numbers, strings, lists, tuples, dicts, and tensors on the CPU.

    Tensors are views of what ``storage`` gives. Parameters come as tensors, OrderedDicts without attributes.

    Raises:
        ForeignObjects: something else is in it; it was not made.
        ArchiveError: the pickle is damaged, too large, or a tensor reaches beyond its storage.
    """
    try:
        return _Unpickler(_Limited(file), storage).load()
    except (SamError, OSError):
        raise
    # Whatever bytes make of a stack machine, it is the bytes that are wrong.
    except Exception as error:  # noqa: BLE001
        reason = (str(error).strip().splitlines() or [""])[0][:100] or type(error).__name__
        raise ArchiveError(f"its pickle is damaged: {reason}") from None


class _Limited:
    """The next MAX_PICKLE bytes of a file, as far as pickle asks for them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_PICKLE

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise ArchiveError(f"its pickle has more than {MAX_PICKLE:,} bytes")
        self._left -= size
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError("the file ends in its pickle")
        return data

    def readline(self) -> bytes:
        line = self._file.readline(self._left)
        self._left -= len(line)
        return line


class _Unpickler(pickle._Unpickler):
    """pickle's machine in Python, with the operations that ``torch.save`` uses and none that could be misused."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {}
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: _Limited, storage: Storage) -> None:
        super().__init__(file)
        self._storage, self._tensors = storage, 0

    def load(self) -> object:
        try:
            return super().load()
        except _UnknownOperation as error:
            raise ForeignObjects(f"pickle operation {error.args[0]:#x}") from None

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise ForeignObjects(f"{module}.{name}"[:100]) from None

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage: ("storage", dtype, key, device, elements), in the older format with None at the end."""
        kind, dtype, key, _, elements = pid[:5]
        if kind != "storage" or pid[5:] not in ((), (None,)) or not isinstance(dtype, torch.dtype):
            raise ArchiveError("a storage isn't described as torch does")
        if type(key) is not str or type(elements) is not int or elements < 0:
            raise ArchiveError("a storage isn't described as torch does")
        return self._storage(key, dtype, elements)

    def _tensor(
        self, storage: object, offset: object, size: object, stride: object, *_hooks: object
    ) -> Tensor:
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise ArchiveError(f"it holds more than {MAX_TENSORS:,} tensors")
        if not isinstance(storage, Tensor) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise ArchiveError("a tensor isn't described as torch does")
        if len(size) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
            raise ArchiveError("a tensor isn't described as torch does")
        # Refuses what lies beyond the storage, where Tensor.set_ would make the storage larger.
        return storage.as_strided(size, stride, offset)  # type: ignore[arg-type]

    def _parameter(self, data: object, *_hooks: object) -> object:
        return data

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if function is dict and arguments == ():
            self.stack[-1] = {}
        elif function is _Unpickler._tensor or function is _Unpickler._parameter:
            self.stack[-1] = function(self, *arguments)
        else:
            raise ForeignObjects("a call that makes no tensor")

    def _load_build(self) -> None:
        # Only the _metadata of a state dict, which says nothing that its keys don't.
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise ForeignObjects("an object with attributes")

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def _set(self, target: object, items: list[Any]) -> None:
        # A tuple of tuples of tuples, each twice the same, would be hashed for ever.
        if type(target) is not dict or any(type(key) not in (str, int) for key in items[::2]):
            raise ForeignObjects("a dictionary whose keys are neither strings nor integers")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _load_append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def _load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(self.stack[-1], items)

    def _extend(self, target: object, items: list[Any]) -> None:
        if type(target) is not list:
            raise ForeignObjects("a list of another kind")
        target.extend(items)


# Plain functions: bound methods would hold the machine, and with it a mapped file, until garbage is collected.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): dict,
    ("torch._utils", "_rebuild_tensor_v2"): _Unpickler._tensor,
    ("torch._utils", "_rebuild_parameter"): _Unpickler._parameter,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _UnknownOperation(Exception):
    """An operation that isn't in the table; its argument is the operation's byte."""


class _Operations(dict[int, Callable[..., None]]):
    def __missing__(self, operation: int) -> Callable[..., None]:
        raise _UnknownOperation(operation)


_AS_IN_PICKLE = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.EMPTY_TUPLE,
    pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.EMPTY_DICT,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.BINPERSID,
)  # fmt: skip
_Unpickler.dispatch = _Operations(
    {operation[0]: pickle._Unpickler.dispatch[operation[0]] for operation in _AS_IN_PICKLE}
    | {
        pickle.REDUCE[0]: _Unpickler._load_reduce,
        pickle.BUILD[0]: _Unpickler._load_build,
        pickle.SETITEM[0]: _Unpickler._load_setitem,
        pickle.SETITEMS[0]: _Unpickler._load_setitems,
        pickle.APPEND[0]: _Unpickler._load_append,
        pickle.APPENDS[0]: _Unpickler._load_appends,
    }
)
