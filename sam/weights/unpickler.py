"""Unpickler for tensors and plain values, with which no file can run code or take much more memory than its length.

`torch.load(weights_only=True)` runs no code either, but it lets a file call constructors that allocate any amount of
memory, resize storages, and use dictionary keys that take for ever to hash. It also refuses files with other objects
beside the weights, which most training scripts save; here each of them becomes a `Foreign`, which has a name and does
nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from ...common.errors import ArchiveError, ForeignObjects, SamError

MAX_PICKLE = 64 << 20
"""Largest pickle that is read, in bytes: a history of a million steps beside the weights of a large network."""

MAX_READS = 4_000_000
"""Most reads of one pickle: one for each operation and one for its number or text. Each allocates about 100 bytes of
memory at most, beside the bytes that it reads."""

MAX_TENSORS = 100_000
"""Most tensors in one pickle."""

MAX_DIMENSIONS = 8
"""Most dimensions of one tensor."""

MAX_KEY = 1 << 60
"""Largest integer that is a key of a dictionary; below it, different keys have different hashes."""

Storage = Callable[[str, torch.dtype, int], Tensor]
"""Function of a storage's key, dtype and number of elements that returns them as a flat tensor."""

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    # Bytes of other objects than tensors of weights, whose place in the file has to be known.
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
}
_UNTYPED = torch.uint8
"""Type of the elements of a storage without a type: bytes, which each tensor takes as its own type's."""
_UNTYPED_DTYPES = (
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("uint16", "uint32", "uint64", "complex32"),
)
"""Names in torch of the types that are saved in storages without a type."""


class Foreign:
    """Stand-in for an object of a class that isn't known here; nothing of it was called or imported.

    Args:
        name: name of its class or function, with the module.
    """

    __slots__ = ("items", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.items: dict[Any, Any] | None = None
        """Its content, if it is a kind of dictionary."""

    def __repr__(self) -> str:
        return f"<{self.name}>"


def read_pickle(file: BinaryIO, storage: Storage, *, foreign: bool = False) -> object:
    """Read one pickle from the file's current position.

    Args:
        file: file, open for reading bytes.
        storage: function that returns a storage's elements as a flat CPU tensor; tensors are views of it.
        foreign: True to return a `Foreign` for each object of another kind; False to refuse the pickle.

    Returns:
        Numbers, strings, bytes, lists, tuples, dicts, and tensors on the CPU. Parameters become tensors, OrderedDicts
        and defaultdicts become dicts without attributes, sets become empty lists, any other object is a `Foreign`.
        Entries of dictionaries whose keys are neither strings nor integers are dropped.

    Raises:
        ForeignObjects: the pickle holds another object, and `foreign` is False.
        ArchiveError: the pickle is damaged, too large, or a tensor reaches beyond its storage.
    """
    try:
        return _Unpickler(_LimitedFile(file), storage, foreign).load()
    except (SamError, OSError):
        raise
    # Damaged bytes can make the unpickler raise any exception.
    except Exception as error:  # noqa: BLE001
        reason = (str(error).strip().splitlines() or [""])[0][:100] or type(error).__name__
        raise ArchiveError(f"its pickle is damaged: {reason}") from None


class _LimitedFile:
    """File wrapper that allows MAX_READS reads of MAX_PICKLE bytes together."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left, self._reads = file, MAX_PICKLE, MAX_READS

    def read(self, size: int) -> bytes:
        self._count(size)
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError("the file ends in its pickle")
        return data

    def readline(self) -> bytes:
        line = self._file.readline(self._left)
        self._count(len(line))
        return line

    def _count(self, size: int) -> None:
        self._left -= size
        self._reads -= 1
        if self._left < 0:
            raise ArchiveError(f"its pickle has more than {MAX_PICKLE:,} bytes")
        if self._reads < 0:
            raise ArchiveError(f"its pickle has more than {MAX_READS:,} numbers, texts and operations")


class _Unpickler(pickle._Unpickler):
    """Python's pure-Python unpickler, reduced to operations that call nothing but this class's own methods."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {}
    memo: dict[int, Any]
    read: Callable[[int], bytes]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    append: Callable[[Any], None]

    def __init__(self, file: _LimitedFile, storage: Storage, foreign: bool) -> None:
        super().__init__(file)
        self._storage, self._foreign, self._tensors = storage, foreign, 0

    def load(self) -> object:
        try:
            return super().load()
        except _UnknownOperation as error:
            raise ArchiveError(f"its pickle has an unknown operation, {error.args[0]:#x}") from None

    def find_class(self, module: str, name: str) -> Any:
        known = _GLOBALS.get((module, name))
        if known is not None:
            return known
        if not self._foreign:
            raise ForeignObjects(f"{module}.{name}"[:100])
        return _ForeignClass(f"{module}.{name}"[:100])

    def persistent_load(self, pid: Any) -> Tensor | Foreign:
        """Return a storage, described as ("storage", dtype, key, device, elements); older files add None."""
        if type(pid) is not tuple or len(pid) < 5:
            raise ArchiveError("a storage isn't described as torch does")
        kind, dtype, key, _, elements = pid[:5]
        if isinstance(dtype, _ForeignClass):
            return Foreign(dtype.name)
        if kind != "storage" or pid[5:] not in ((), (None,)) or not isinstance(dtype, torch.dtype):
            raise ArchiveError("a storage isn't described as torch does")
        if type(key) is not str or type(elements) is not int or elements < 0:
            raise ArchiveError("a storage isn't described as torch does")
        return self._storage(key, dtype, elements)

    def _tensor(
        self, storage: object, offset: object, size: object, stride: object, *_hooks: object
    ) -> Tensor | Foreign:
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise ArchiveError(f"it holds more than {MAX_TENSORS:,} tensors")
        if isinstance(storage, Foreign):
            return storage
        if not isinstance(storage, Tensor) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise ArchiveError("a tensor isn't described as torch does")
        if len(size) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
            raise ArchiveError("a tensor isn't described as torch does")
        # as_strided refuses a tensor that reaches beyond the storage; Tensor.set_ would enlarge the storage.
        return storage.as_strided(size, stride, offset)  # type: ignore[arg-type]

    def _untyped_tensor(
        self,
        storage: object,
        offset: object,
        size: object,
        stride: object,
        _grad: object,
        _hooks: object,
        dtype: object,
        *_metadata: object,
    ) -> Tensor | Foreign:
        """Return a tensor of a type that has no storages of its own, such as float8."""
        if isinstance(dtype, _ForeignClass):
            return Foreign(dtype.name)
        if not isinstance(storage, Tensor) or storage.dtype != _UNTYPED or not isinstance(dtype, torch.dtype):
            raise ArchiveError("a tensor isn't described as torch does")
        if len(storage) % dtype.itemsize:
            raise ArchiveError("a tensor has a part of a number")
        return self._tensor(storage.view(dtype), offset, size, stride)

    def _parameter(self, data: object, *_attributes: object) -> object:
        return data

    def _subclass(self, function: object, _type: object, arguments: object, *_attributes: object) -> object:
        """Return a tensor that was saved with attributes, without them."""
        return self._call(function, arguments)

    def _dictionary(self, items: object = (), *_more: object) -> dict[Any, Any]:
        """Return a dictionary, empty or of pairs (Python 2's OrderedDict)."""
        made: dict[Any, Any] = {}
        if isinstance(items, list):
            for pair in items:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    break
                self._set(made, [*pair])
        return made

    def _call(self, function: object, arguments: object) -> object:
        if isinstance(function, _ForeignClass):
            return Foreign(function.name)
        if type(arguments) is not tuple or not any(function is known for known in _CALLED):
            raise ArchiveError("its pickle calls what is no function")
        return function(self, *arguments)  # type: ignore[operator]

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _load_newobj_ex(self) -> None:
        self.stack.pop()
        self._load_newobj()

    def _load_frame(self) -> None:
        self.read(8)  # the length of a part of the pickle that a writer suggests to read at once

    def _load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def _load_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ArchiveError("its pickle names a class by what is no text")
        self.append(self.find_class(module, name))

    def _load_build(self) -> None:
        # The attributes are dropped: a state dict's only one is _metadata, which adds nothing to its keys.
        self.stack.pop()
        if not isinstance(self.stack[-1], dict | Foreign):
            raise ArchiveError("its pickle sets attributes of what has none")

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def _set(self, target: object, items: list[Any]) -> None:
        if isinstance(target, Foreign):
            target.items = {} if target.items is None else target.items
            target = target.items
        if type(target) is not dict:
            raise ArchiveError("its pickle sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nested tuples that hold the same tuple twice at each level would take for ever to hash.
            if type(key) is str or (type(key) is int and abs(key) < MAX_KEY):
                target[key] = value

    def _load_append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def _load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(self.stack[-1], items)

    def _extend(self, target: object, items: list[Any]) -> None:
        if isinstance(target, Foreign):
            return
        if type(target) is not list:
            raise ArchiveError("its pickle extends what is no list")
        target.extend(items)

    def _load_empty_set(self) -> None:
        self.append([])  # its members, which could take for ever to hash, are dropped

    def _load_additems(self) -> None:
        self.pop_mark()

    def _load_frozenset(self) -> None:
        self.pop_mark()
        self.append([])


class _ForeignClass:
    """Stand-in for a class or function that isn't known here."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


# Plain functions: bound methods would keep the unpickler, and a mapped file, alive until garbage collection.
_CALLED: tuple[Callable[..., object], ...] = (
    _Unpickler._tensor,
    _Unpickler._untyped_tensor,
    _Unpickler._parameter,
    _Unpickler._subclass,
    _Unpickler._dictionary,
)
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Unpickler._dictionary,
    ("collections", "defaultdict"): _Unpickler._dictionary,
    ("builtins", "dict"): _Unpickler._dictionary,
    ("torch._utils", "_rebuild_tensor"): _Unpickler._tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Unpickler._tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _Unpickler._untyped_tensor,
    ("torch._utils", "_rebuild_parameter"): _Unpickler._parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Unpickler._parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _Unpickler._subclass,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    ("torch.storage", "UntypedStorage"): _UNTYPED,
    ("torch", "UntypedStorage"): _UNTYPED,
    **{("torch", name): getattr(torch, name) for name in _UNTYPED_DTYPES if hasattr(torch, name)},
}


class _UnknownOperation(Exception):
    """Pickle operation that isn't supported; the argument is its byte."""


class _Operations(dict[int, Callable[..., None]]):
    """Functions by operation; raises _UnknownOperation for an operation that isn't supported."""

    def __missing__(self, operation: int) -> Callable[..., None]:
        raise _UnknownOperation(operation)


_INHERITED_OPERATIONS = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP, pickle.NONE,
    pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4,
    pickle.INT, pickle.LONG, pickle.BINFLOAT,  # the first two are protocol 1's
    pickle.SHORT_BINSTRING, pickle.BINSTRING, pickle.SHORT_BINBYTES, pickle.BINBYTES,
    pickle.BINBYTES8, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8, pickle.EMPTY_TUPLE,
    pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.MEMOIZE,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.BINPERSID,
)  # fmt: skip
_Unpickler.dispatch = _Operations(
    {operation[0]: pickle._Unpickler.dispatch[operation[0]] for operation in _INHERITED_OPERATIONS}
    | {
        pickle.FRAME[0]: _Unpickler._load_frame,
        pickle.BYTEARRAY8[0]: _Unpickler._load_bytearray8,
        pickle.REDUCE[0]: _Unpickler._load_reduce,
        pickle.NEWOBJ[0]: _Unpickler._load_newobj,
        pickle.NEWOBJ_EX[0]: _Unpickler._load_newobj_ex,
        pickle.STACK_GLOBAL[0]: _Unpickler._load_stack_global,
        pickle.BUILD[0]: _Unpickler._load_build,
        pickle.SETITEM[0]: _Unpickler._load_setitem,
        pickle.SETITEMS[0]: _Unpickler._load_setitems,
        pickle.APPEND[0]: _Unpickler._load_append,
        pickle.APPENDS[0]: _Unpickler._load_appends,
        pickle.EMPTY_SET[0]: _Unpickler._load_empty_set,
        pickle.ADDITEMS[0]: _Unpickler._load_additems,
        pickle.FROZENSET[0]: _Unpickler._load_frozenset,
    }
)
