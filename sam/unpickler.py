"""Unpickler for tensors and plain values, with which no file can run code or take much more memory than its length.

`torch.load(weights_only=True)` runs no code either, but it lets a file call constructors that allocate any amount of
memory, resize storages, and use dictionary keys that take for ever to hash.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from ..common.errors import ArchiveError, ForeignObjects, SamError

MAX_PICKLE = 1 << 20
"""Largest pickle that is read, in bytes: ten times that of TinyViT's weights with AdamW's moments (950 tensors). One
byte can allocate about 70 bytes of memory at most (an empty list)."""

MAX_TENSORS = 100_000
"""Most tensors in one pickle."""

MAX_DIMENSIONS = 8
"""Most dimensions of one tensor."""

Storage = Callable[[str, torch.dtype, int], Tensor]
"""Function of a storage's key, dtype and number of elements that returns them as a flat tensor."""

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


def read_pickle(file: BinaryIO, storage: Storage) -> object:
    """Read one pickle from the file's current position.

    Args:
        file: file, open for reading bytes.
        storage: function that returns a storage's elements as a flat CPU tensor; tensors are views of it.

    Returns:
        Numbers, strings, lists, tuples, dicts, and tensors on the CPU. Parameters become tensors, OrderedDicts
        become dicts without attributes.

    Raises:
        ForeignObjects: the pickle holds another object, which is not created.
        ArchiveError: the pickle is damaged, too large, or a tensor reaches beyond its storage.
    """
    try:
        return _Unpickler(_LimitedFile(file), storage).load()
    except (SamError, OSError):
        raise
    # Damaged bytes can make the unpickler raise any exception.
    except Exception as error:  # noqa: BLE001
        reason = (str(error).strip().splitlines() or [""])[0][:100] or type(error).__name__
        raise ArchiveError(f"its pickle is damaged: {reason}") from None


class _LimitedFile:
    """File wrapper that lets at most the next MAX_PICKLE bytes be read."""

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
    """Python's pure-Python unpickler, reduced to the operations that `torch.save` uses."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {}
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: _LimitedFile, storage: Storage) -> None:
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
        """Return a storage, described as ("storage", dtype, key, device, elements); older files add None."""
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
        # as_strided refuses a tensor that reaches beyond the storage; Tensor.set_ would enlarge the storage.
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
        # The attributes are dropped: a state dict's only one is _metadata, which adds nothing to its keys.
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
        # Nested tuples that hold the same tuple twice at each level would take for ever to hash.
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


# Plain functions: bound methods would keep the unpickler, and a mapped file, alive until garbage collection.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): dict,
    ("torch._utils", "_rebuild_tensor_v2"): _Unpickler._tensor,
    ("torch._utils", "_rebuild_parameter"): _Unpickler._parameter,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _UnknownOperation(Exception):
    """Pickle operation that isn't supported; the argument is its byte."""


class _Operations(dict[int, Callable[..., None]]):
    """Functions by operation; raises _UnknownOperation for an operation that isn't supported."""

    def __missing__(self, operation: int) -> Callable[..., None]:
        raise _UnknownOperation(operation)


_INHERITED_OPERATIONS = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.EMPTY_TUPLE,
    pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.EMPTY_DICT,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.BINPERSID,
)  # fmt: skip
_Unpickler.dispatch = _Operations(
    {operation[0]: pickle._Unpickler.dispatch[operation[0]] for operation in _INHERITED_OPERATIONS}
    | {
        pickle.REDUCE[0]: _Unpickler._load_reduce,
        pickle.BUILD[0]: _Unpickler._load_build,
        pickle.SETITEM[0]: _Unpickler._load_setitem,
        pickle.SETITEMS[0]: _Unpickler._load_setitems,
        pickle.APPEND[0]: _Unpickler._load_append,
        pickle.APPENDS[0]: _Unpickler._load_appends,
    }
)
