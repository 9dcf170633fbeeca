"""Checkpoints made to take memory or time, or to be read as what they are not: one clear error each, in a process
that may take little more memory than it has."""

from __future__ import annotations

import argparse
import gc
import io
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounded import read_bounded
from flips import flipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilesam.common.errors import CheckpointError, ForeignObjects
from mobilesam.sam.weights.checkpoint import read_state
from mobilesam.sam.weights.torch_file import read_torch_file
from mobilesam.sam.weights.unpickler import Foreign

MEMORY = 600_000_000
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(elements: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return (
        b"("
        + text("storage")
        + b"ctorch\n"
        + kind.encode()
        + b"\n"
        + text(key)
        + text("cpu")
        + number(elements)
        + b"tQ"
    )


def tensor(elements: int, offset: int, size: bytes, stride: bytes, **how: str) -> bytes:
    return TENSOR + b"(" + storage(elements, **how) + number(offset) + size + stride + b"\x89NtR"


def state(value: bytes) -> bytes:
    """The pickle of {"a": value}."""
    return b"\x80\x02}" + text("a") + value + b"s."


def archive(description: bytes, payload: bytes = bytes(16), **options: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as written:
        written.writestr("archive/data.pkl", description)
        # Aligned as torch does it: what is wrong with these files is something else.
        entry = zipfile.ZipInfo("archive/data/0")
        entry.compress_type = written.compression
        entry.extra = struct.pack("<2H", 0x4246, pad := -(buffer.tell() + 30 + 14 + 4) % 64) + bytes(pad)
        written.writestr(entry, payload)
    return buffer.getvalue()


DOUBLED = b"(K\x01t" + b"q\x01h\x01h\x01\x86" * 200
BIG = 10**11

PICKLES: dict[str, bytes] = {
    "a storage larger than its record": tensor(BIG, 0, numbers(BIG), numbers(1)),
    "a storage somewhat larger than its record": tensor(5, 0, numbers(5), numbers(1)),
    "a storage smaller than its record": tensor(3, 0, numbers(3), numbers(1)),
    "no such record": tensor(4, 0, numbers(4), numbers(1), key="1"),
    "a record outside the folder": tensor(4, 0, numbers(4), numbers(1), key="../data.pkl"),
    "a shape larger than its storage": tensor(4, 0, numbers(BIG), numbers(1)),
    "an offset beyond the storage": tensor(4, 4, numbers(1), numbers(1)),
    "a negative offset": tensor(4, -4, numbers(1), numbers(1)),
    "a negative size": tensor(4, 0, numbers(-1), numbers(1)),
    "a negative stride": tensor(4, 3, numbers(4), numbers(-1)),
    "a stride beyond the storage": tensor(4, 0, numbers(2, 2), numbers(BIG, 1)),
    "sizes that overflow": tensor(4, 0, numbers(2**62, 2**62), numbers(2**62, 1)),
    "numbers of a hundred digits": tensor(4, 0, numbers(10**99), numbers(10**99)),
    "a thousand dimensions": tensor(4, 0, numbers(*[1] * 1000), numbers(*[1] * 1000)),
    "a shape that is no tuple": tensor(4, 0, text("ab"), text("cd")),
    "the state of a tensor set anew": tensor(4, 0, numbers(4), numbers(1)) + b"(" + storage(4) + number(0)
    + numbers(BIG) + numbers(1) + b"tb",
    "a bytearray of any size": b"c__builtin__\nbytearray\n" + numbers(BIG) + b"R",
    "a tensor of any size": b"ctorch\nTensor\n" + numbers(BIG) + b"R",
    "a storage of any size": b"ctorch.storage\nUntypedStorage\n" + numbers(BIG) + b"R",
    "a type that is called": b"ctorch\nFloatStorage\n" + numbers(BIG) + b"R",
    "a function with attributes": b"ccollections\nOrderedDict\n}" + text("x") + b"K\x01sb",
    "a dictionary made of arguments": b"ccollections\nOrderedDict\n((" + text("ab") + b"ltt" + b"R",
    "a key that takes for ever to hash": b"}" + DOUBLED + b"Ns",
    "many such keys": b"}(" + DOUBLED + b"Nu",
    "a million lists and more": b"(" + b"]" * (1 << 20) + b"t",
    "just under a million lists": b"(" + b"]" * 1_000_000 + b"t",
    "just under four million dictionaries": b"(" + b"}" * 3_990_000 + b"t",
    "just under four million notes of one object": b"(" + b"N" + b"\x94" * 3_990_000 + b"t",
    "a million foreign objects": b"cmy.own\nThing\nq\x01(" + b"h\x01)R" * 990_000 + b"t",
    "a frame longer than the file": b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f" + b"N",
    "bytes longer than the file": b"\x8e\xff\xff\xff\xff\x00\x00\x00\x00",
    "a bytearray longer than the file": b"\x96\xff\xff\xff\xff\x00\x00\x00\x00",
    "a class named by numbers": b"K\x01K\x02\x93",
    "an object made of a list": b"](h\x00)\x81",
    "an integer key of any size": b"}" + number(2**61 - 1) + b"Ns",
    "a million marks": b"(" * 1_000_000,
    "nested tuples": b")" + b"\x85" * 1_000_000,
    "a memo's number out of all reason": b"Nr\xff\xff\xff\x7f",
    "a string longer than the file": b"X\xff\xff\xff\xff",
    "a long number longer than the file": b"\x8b\xff\xff\xff\x7f",
    "a hundred thousand tensors and more": tensor(4, 0, numbers(4), numbers(1))
    + b"q\x01(" + (TENSOR + b"q\x02(" + storage(4) + b"K\x00" + numbers(4) + numbers(1) + b"\x89Ntq\x03R")
    + b"h\x02h\x03R" * 200_000 + b"t",
    "the stack taken below its end": b"t",
    "no end": b"N" * 10,
}  # fmt: skip


def test_hostile_pickles_are_errors_in_bounded_memory(outcomes: dict[str, str]) -> None:
    for name in PICKLES:
        assert outcomes[name] != "read", name
        said = ("truncated or damaged", "other than tensors", "no tensors by name")
        assert any(reason in outcomes[name] for reason in said), name


def old_format(
    description: bytes, keys: bytes = b"\x80\x02]" + text("0") + b"a.", data: bytes = b""
) -> bytes:
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    return head + description + keys + data


def old_tensor(elements: int, size: int) -> bytes:
    held = storage(elements)[:-2] + b"NtQ"
    return state(TENSOR + b"(" + held + number(0) + numbers(size) + numbers(1) + b"\x89NtR")


def old_files() -> dict[str, bytes]:
    four = struct.pack("<q", 4) + bytes(16)
    return {
        "old, huge storage": old_format(old_tensor(BIG, BIG), data=struct.pack("<q", BIG)),
        "old, huge shape": old_format(old_tensor(4, BIG), data=four),
        "old, other length": old_format(old_tensor(4, 4), data=struct.pack("<q", 3) + bytes(16)),
        "old, cut": old_format(old_tensor(4, 4), data=four[:-1]),
        "old, other keys": old_format(old_tensor(4, 4), b"\x80\x02]" + text("1") + b"a.", four),
        "old, long pickle": old_format(b"\x80\x02(" + b"]" * 4_100_000 + b"l."),
        "old, not even a number": b"\x80\x02.",
    }


def test_hostile_pickles_in_the_older_format_are_errors_in_bounded_memory(outcomes: dict[str, str]) -> None:
    for name in old_files():
        assert "truncated or damaged" in outcomes[name], name
    assert "truncated or damaged" in outcomes["old, long line"]
    assert "numbers, texts and operations" in outcomes["old, long pickle"]


def good(payload: bytes = bytes(16)) -> bytes:
    return archive(state(tensor(len(payload) // 4, 0, numbers(len(payload) // 4), numbers(1))), payload)


def with_records(count: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        for index in range(count):
            written.writestr(f"archive/data/{index}" + "x" * 100, b"")
    return buffer.getvalue()


def changed(old: bytes, new: bytes) -> bytes:
    data = good()
    assert old in data
    return data.replace(old, new)


def overlapping() -> bytes:
    """The directory's second entry points to the first one's record."""
    data = bytearray(good())
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = bytes(4)
    return bytes(data)


def size_changed(size: int) -> bytes:
    data = bytearray(good())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<2I", size, size)
    return bytes(data)


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed zeros": (lambda: archive(b"N.", bytes(1 << 24), compression=zipfile.ZIP_DEFLATED), "compressed"),
    "a record beyond the file": (lambda: size_changed(2**32 - 2), "beyond the file"),
    "a shorter record": (lambda: size_changed(15), "checksum"),
    "overlapping records": (overlapping, "overlap"),
    "two records of one name": (lambda: changed(b"archive/data.pkl", b"archive/data/0\0\0"), "two records"),
    "records outside the folder": (lambda: changed(b"archive/data/0", b"another/data/0"), "one folder"),
    "a directory of megabytes": (lambda: with_records(14_000), "directory"),
    "a flipped bit": (lambda: good(b"four" * 4).replace(b"four" * 4, b"gour" + b"four" * 3), "checksum"),
    "nothing in it": (lambda: b"PK\5\6" + bytes(18), "starts with b'PK"),
    "an end alone": (lambda: b"PK\3\4" + b"PK\5\6" + bytes(18), "truncated or damaged"),
}  # fmt: skip


def test_forged_archives_are_errors_in_bounded_memory(outcomes: dict[str, str]) -> None:
    for name, (_, reason) in ARCHIVES.items():
        assert reason in outcomes[name], name


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What reading each of the files said, all in one process; messages are short and name the file."""
    folder = tmp_path_factory.mktemp("hostile")
    whole = tensor(4, 0, numbers(4), numbers(1))
    made = {
        "whole": archive(state(whole)),
        "old, whole": old_format(old_tensor(4, 4), data=struct.pack("<q", 4) + bytes(16)),
        **{name: archive(state(value)) for name, value in PICKLES.items()},
        **{name: make() for name, (make, _) in ARCHIVES.items()},
        **old_files(),
        "old, long line": old_format(b"\x80\x02c" + b"a" * (2 << 20)),
    }
    files = {name: folder / f"{index}.pth" for index, name in enumerate(made)}
    for name, data in made.items():
        files[name].write_bytes(data)
    found = dict(zip(made, read_bounded("state", list(files.values()), MEMORY), strict=True))
    assert found.pop("whole") == found.pop("old, whole") == "read"
    for name, outcome in found.items():
        assert outcome.startswith(f"{files[name]} "), name
        assert len(outcome) < 500, name
        assert len(outcome.splitlines()) <= 2, name
    return found


def test_a_flipped_bit_in_a_weight_is_found_before_anything_is_used(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    weights = torch.arange(1000.0)
    torch.save({"a": weights}, path)
    data = path.read_bytes()
    at = data.index(weights.numpy().tobytes())
    for byte in (at, at + 1999, at + 3999):
        path.write_bytes(flipped(data, 8 * byte + 3))
        with pytest.raises(CheckpointError, match="checksum of 'own/data/0' is wrong"):
            read_state(path)


@cache
def saved_with(protocol: int) -> tuple[bytes, bytes]:
    """The pickle and the first storage of a file of torch.save, with weights and other objects beside them."""
    content = {
        "model": OrderedDict(a=torch.arange(4.0), b=torch.nn.Parameter(torch.ones(2))),
        "args": argparse.Namespace(path=Path("x"), lr=np.float64(0.1), seen={1, 2}, names=frozenset("ab")),
        "history": [{"step": step, "loss": (step, 0.5)} for step in range(3)],
        "counts": defaultdict(list, {"é": ["text", 1 << 70]}),
        "bytes": [b"bytes", bytearray(b"more")],
    }
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol)
    with zipfile.ZipFile(buffer) as read:
        return read.read("archive/data.pkl"), read.read("archive/data/0")


def archive_of(description: bytes, payload: bytes) -> bytes:
    """A file of torch.save with two storages, whose checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        written.writestr("archive/data.pkl", description)
        written.writestr("archive/data/0", payload)
        written.writestr("archive/data/1", bytes(8))
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_a_file_of_any_protocol_is_read_with_inert_objects_in_place_of_foreign_ones(
    tmp_path: Path, protocol: int
) -> None:
    (tmp_path / "file.pt").write_bytes(archive_of(*saved_with(protocol)))
    loaded: Any = read_torch_file(tmp_path / "file.pt", foreign=True)
    assert torch.equal(loaded["model"]["a"], torch.arange(4.0))
    assert loaded["history"][2] == {"step": 2, "loss": (2, 0.5)}
    assert loaded["counts"] == {"é": ["text", 1 << 70]}
    assert isinstance(loaded["args"], Foreign)
    assert loaded["args"].name == ("copy_reg._reconstructor" if protocol == 1 else "argparse.Namespace")
    with pytest.raises(ForeignObjects):
        read_torch_file(tmp_path / "file.pt")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_types_without_storages_of_their_own_are_read_or_inert(tmp_path: Path, old: bool) -> None:
    eighths = torch.tensor([0.5, 0.25, 2.0])
    content = {
        "float8": eighths.to(torch.float8_e4m3fn),
        "uint16": torch.tensor([7, 60_000], dtype=torch.uint16),
        "int8": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "bytes": torch.ones(2).untyped_storage(),
        "weights": torch.arange(4.0),
    }
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=not old)
    loaded: Any = read_torch_file(tmp_path / "file.pt", foreign=True)
    assert torch.equal(loaded["float8"].float(), eighths)
    assert loaded["uint16"].tolist() == [7, 60_000]
    assert isinstance(loaded["int8"], Foreign)
    assert torch.equal(loaded["weights"], torch.arange(4.0))


@pytest.mark.parametrize("protocol", [2, 4, 5])
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=6
    )
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_pickle_is_read_or_refused_in_our_words(
    tmp_path: Path, protocol: int, changes: list[tuple[int, bytes, int]]
) -> None:
    """Bytes of the pickle are replaced, inserted and removed; the checksums are those of the changed pickle."""
    description, payload = saved_with(protocol)
    for place, new, removed in changes:
        at = place % len(description)
        description = description[:at] + new + description[at + removed :]
    (tmp_path / "file.pt").write_bytes(archive_of(description, payload))
    said = ""
    try:
        state = read_state(tmp_path / "file.pt")
    except CheckpointError as error:
        state, said = {}, str(error)
    assert len(said) < 600
    assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_weights_are_mapped_from_the_file_and_never_written_to_it(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    torch.save({"a": torch.arange(1000.0)}, path)
    before = path.read_bytes()
    state = read_state(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    state["a"].zero_()
    assert path.read_bytes() == before


def test_a_file_that_torch_wrote_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "transposed": base.t(),
        "slice": base[1:3, ::2],
        "shared": base,
        "expanded": torch.ones(()).expand(3, 4),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        **{
            str(t): torch.arange(3).to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64)
        },
        **{
            str(t): torch.arange(3).to(t)
            for t in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
        },
    }
    for new in (True, False):
        torch.save(tensors, tmp_path / "file.pt", _use_new_zipfile_serialization=new)
        found = read_state(tmp_path / "file.pt")
        wanted = torch.load(tmp_path / "file.pt", weights_only=True)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key].dtype == value.dtype
            assert found[key].stride() == value.stride()
            assert torch.equal(found[key], value)


def test_a_file_is_unmapped_with_its_last_tensor_and_without_garbage_collection(tmp_path: Path) -> None:
    file = tmp_path / "mapped.pt"
    torch.save({"weight": torch.ones(3), "parameter": torch.nn.Parameter(torch.ones(2))}, file)

    def mapped() -> bool:
        return file.name in Path("/proc/self/maps").read_text()

    gc.collect()
    gc.disable()
    try:
        state = read_state(file)
        assert mapped()
        del state
        assert not mapped()
    finally:
        gc.enable()
