"""Hostile files as teacher, student and checkpoint: refused, no code run, memory bounded."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.fault_log import FaultLog
from faults.fixtures import contents, mobilesam, refused
from faults.input.sandbox import read_in_sandbox
from faults.recovery import Snapshot, missing_rows, wrong_reads

from mobilesam.distill import DistillConfig, distill
from mobilesam.distill.students.student_file import _digest
from mobilesam.sam.modeling.head_shapes import head_shapes
from mobilesam.sam.modeling.tiny_vit import TinyViT

pytestmark = pytest.mark.fault

GIB, MIB = 1 << 30, 1 << 20
ALLOWED_GROWTH = 400 * MIB
"""An honest teacher or checkpoint takes some 100 MiB to read; hostile files ask for a gibibyte or more."""

READERS_OF_PICKLES = ("teacher", "head", "checkpoint")


class Call:
    """Object that unpickles as the result of a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced


def torch_zip(path: Path, content: bytes, records: Mapping[str, bytes] | None = None, **options: Any) -> None:
    """Write a file like torch.save's around any pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        for name, data in {"version": b"3\n", **(records or {})}.items():
            archive.writestr(f"archive/{name}", data)


def old_format(path: Path, content: bytes) -> None:
    """Write torch.save's format from before zip files around a pickle."""
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(head) + content + pickle.dumps([], 2))


def plain(path: Path, content: bytes) -> None:
    """Write the pickle alone."""
    path.write_bytes(content)


def _global(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def codes(evidence: Path) -> dict[str, bytes]:
    """Return pickles that create the file `evidence` if they are loaded by pickle.loads."""
    shell = f"touch {evidence}"
    text = b"X" + struct.pack("<I", len(shell)) + shell.encode()
    short = b"\x8c\x05posix\x8c\x06system\x93"
    return {
        "reduce": pickle.dumps({"a": Call(os.system, shell)}, 2),
        "reduce, protocol 0": pickle.dumps({"a": Call(os.system, shell)}, 0),
        "reduce, protocol 5": pickle.dumps({"a": Call(os.system, shell)}, 5),
        "eval": b"\x80\x02" + _global("builtins", "eval") + b"X\x10\x00\x00\x00__import__('os')\x85R.",
        "exec": pickle.dumps(Call(exec, f"open({str(evidence)!r}, 'w')"), 2),
        "stack global": b"\x80\x04" + short + text + b"\x85R.",
        "inst": b"(" + text + b"iposix\nsystem\n.",
        "obj": b"\x80\x02(" + _global("posix", "system") + text + b"o.",
        "newobj": b"\x80\x02" + _global("posix", "system") + text + b"\x85\x81.",
        "build": b"\x80\x02" + _global("collections", "OrderedDict") + b")R}X\x0c\x00\x00\x00__setstate__"
        + _global("posix", "system") + b"sb" + text + b"b.",
        "attribute of a function": b"\x80\x04\x8c\x0ctorch._utils"
        + b"\x8c\x2f_rebuild_tensor_v2.__globals__.__getitem__\x93.",
        "persistent id": b"\x80\x02" + _global("posix", "system") + text + b"\x85RQ.",
        "extension": b"\x80\x02\x82\x01.",
        "torch.load again": pickle.dumps(Call(torch.load, str(evidence)), 2),
    }  # fmt: skip


def storage(key: str, elements: int, kind: str = "FloatStorage") -> bytes:
    """Return pickle code for the persistent id of a storage."""
    name = key.encode()
    return (
        b"(X\x07\x00\x00\x00storage" + _global("torch", kind) + b"X" + struct.pack("<I", len(name)) + name
        + b"X\x03\x00\x00\x00cpu" + b"\x8a\x08" + struct.pack("<q", elements) + b"tQ"
    )  # fmt: skip


def tensor(storage_id: bytes, size: int, stride: int) -> bytes:
    """Return pickle code that calls _rebuild_tensor_v2."""
    number = b"\x8a\x08" + struct.pack("<q", size)
    return (
        _global("torch._utils", "_rebuild_tensor_v2") + b"(" + storage_id + b"K\x00" + number + b"\x85"
        + b"\x8a\x08" + struct.pack("<q", stride) + b"\x85\x89" + _global("collections", "OrderedDict") + b")RtR"
    )  # fmt: skip


def keyed(value: bytes) -> bytes:
    """Return the pickle of {"image_encoder.neck.0.weight": value}."""
    return b"\x80\x02}X\x1b\x00\x00\x00image_encoder.neck.0.weight" + value + b"s."


def nested_pairs(levels: int) -> bytes:
    """Return pickle code of a tuple that holds one tuple twice, and so on: walking it visits 2 ** levels tuples."""
    return b")" + b"2\x86" * levels


BOMBS: dict[str, bytes] = {
    "bytearray of 64 GiB": b"\x80\x02" + _global("builtins", "bytearray")
    + b"\x8a\x08" + struct.pack("<q", 64 * GIB) + b"\x85R.",
    "bytes of 8 EiB": b"\x80\x04\x8e" + struct.pack("<Q", (1 << 63) - 1) + b"x.",
    "text of 4 GiB": b"\x80\x02X" + struct.pack("<I", (1 << 32) - 1) + b"x.",
    "long of 2 GiB": b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",
    "frame of 8 EiB": b"\x80\x04\x95" + struct.pack("<Q", (1 << 63) - 1) + b"N.",
    "memo of 16 GiB": b"\x80\x02Nr" + struct.pack("<I", (1 << 31) - 1) + b".",
    "storage of 4 TiB": keyed(tensor(storage("0", 1 << 40), 4, 1)),
    "storage of a negative length": keyed(tensor(storage("0", -1), 4, 1)),
    "tensor beyond its storage": keyed(tensor(storage("0", 4), 1 << 40, 1)),
    "one number as 4 TiB": keyed(tensor(storage("0", 4), 1 << 40, 0)),
    "a key that is hashed for ever": b"\x80\x02}" + nested_pairs(200) + b"Ns.",
    "a value that is printed for ever": keyed(nested_pairs(200)),
    "content that is printed for ever": b"\x80\x02" + nested_pairs(200) + b".",
    "lists in lists": b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",
    "marks": b"\x80\x02" + b"(" * 3_000_000 + b".",
    "empty lists": b"\x80\x02(" + b"]" * 3_500_000 + b"l.",
    "nothing": b"",
    "only the end": b".",
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS_OF_PICKLES)
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_pickles_that_run_code_are_refused(
    fault_log: FaultLog, tmp_path: Path, reader: str, form: str
) -> None:
    evidence = tmp_path / "evidence"
    assert_refused(fault_log, reader, f"code, {form}", written(tmp_path, form, codes(evidence)))
    assert not evidence.exists()


def written(folder: Path, form: str, contents: Mapping[str, bytes]) -> dict[str, Path]:
    """Write one file for each pickle; return {name: path}."""
    files = {}
    for number, (name, content) in enumerate(contents.items()):
        files[name] = folder / f"{number}.pt"
        if form == "zip":
            torch_zip(files[name], content, {"data/0": bytes(16)})
        else:
            {"old": old_format, "plain": plain}[form](files[name], content)
    return files


def assert_refused(fault_log: FaultLog, reader: str, phase: str, files: Mapping[str, Path]) -> None:
    """Assert that each file is refused with a clear message and bounded memory."""
    results = dict(zip(files, read_in_sandbox(reader, list(files.values())), strict=True))
    for number, (name, result) in enumerate(results.items()):
        fault_log.record(
            call="hostile", ordinal=number, file=name, phase=f"{reader}, {phase}", fired=True, lost=0,
            wrong=int(result.outcome == "read"), role="reader",
        )  # fmt: skip
    for name, result in results.items():
        assert result.outcome == "refused", (name, result)
        assert result.grown < ALLOWED_GROWTH, (name, result)
        assert 1 <= len(result.message.splitlines()) <= 2, (name, result)
        assert len(result.message) < 1000, (name, result)
        assert result.message.replace("\n", "").isprintable(), (name, result)


def test_the_same_pickles_run_code_in_plain_pickle(tmp_path: Path) -> None:
    """Otherwise the tests of this file would test nothing."""
    ran = []
    for name, content in codes(tmp_path / "evidence").items():
        (tmp_path / "evidence").unlink(missing_ok=True)
        with contextlib.suppress(Exception):  # raised after the code ran
            pickle.loads(content)
        if (tmp_path / "evidence").exists():
            ran.append(name)
    assert set(ran) >= {
        "reduce",
        "reduce, protocol 0",
        "reduce, protocol 5",
        "exec",
        "stack global",
        "inst",
        "obj",
    }


@pytest.mark.parametrize("reader", READERS_OF_PICKLES)
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_pickles_that_take_all_memory_or_time_are_refused(
    fault_log: FaultLog, tmp_path: Path, reader: str, form: str
) -> None:
    assert_refused(fault_log, reader, f"bomb, {form}", written(tmp_path, form, BOMBS))


def compressed(path: Path) -> None:
    torch_zip(path, bytes(GIB), compression=zipfile.ZIP_DEFLATED)


def forged_size(path: Path) -> None:
    """Write an archive whose directory claims 4 GiB for every record."""
    torch_zip(path, pickle.dumps({}, 2))
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\x01\x02")
    while place >= 0:
        data[place + 20 : place + 28] = struct.pack("<II", 0xFFFFFFFE, 0xFFFFFFFE)
        place = data.find(b"PK\x01\x02", place + 4)
    path.write_bytes(data)


def forged_directory(path: Path) -> None:
    """Write an archive whose end record claims a directory of 4 GiB with 65,535 entries."""
    torch_zip(path, pickle.dumps({}, 2))
    data = bytearray(path.read_bytes())
    place = data.rfind(b"PK\x05\x06")
    data[place + 8 : place + 20] = struct.pack("<HHII", 65535, 65535, 0xFFFFFFF0, 0)
    path.write_bytes(data)


def many_records(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(200_000):
            archive.writestr(f"archive/{number}", b"")


def overlapping(path: Path) -> None:
    """Write an archive in which many records share one record's bytes: small file, large tensors."""
    content = b"\x80\x02}(" + b"".join(
        b"X\x04\x00\x00\x00%04d" % number + tensor(storage(str(number), MIB), MIB, 1)
        for number in range(400)
    ) + b"u."  # fmt: skip
    torch_zip(path, content, {f"data/{number}": b"" for number in range(400)} | {"data/big": bytes(4 * MIB)})
    data = bytearray(path.read_bytes())
    entries = []
    place = data.find(b"PK\x01\x02")
    while place >= 0:
        entries.append(place)
        place = data.find(b"PK\x01\x02", place + 4)
    big = entries[-1]
    for entry in entries[3:-1]:
        data[entry + 16 : entry + 28] = data[big + 16 : big + 28]
        data[entry + 42 : entry + 46] = data[big + 42 : big + 46]
    path.write_bytes(data)


@pytest.mark.parametrize("reader", READERS_OF_PICKLES)
def test_forged_archives_are_refused(fault_log: FaultLog, tmp_path: Path, reader: str) -> None:
    files = {}
    for make in (compressed, forged_size, forged_directory, many_records, overlapping):
        files[make.__name__] = tmp_path / f"{make.__name__}.pt"
        make(files[make.__name__])
        assert files[make.__name__].stat().st_size < 64 * MIB
    assert_refused(fault_log, reader, "archive", files)


# ---- safetensors


def safetensors(
    path: Path, header: Any, data: bytes = b"", *, length: int | None = None, seal: bool = False
) -> None:
    """Write a file with any header; with `seal` it has the right SHA-256, which a forger can compute too."""
    if seal:
        header["__metadata__"]["sha256"] = _digest(header, [data])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


METADATA = {"format": "mobilesam student 1", "student": "tiny_vit", "image_size": "64", "info": "{}"}


def weight(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _with(**tensors: Any) -> dict[str, Any]:
    return {"__metadata__": dict(METADATA), **tensors}


HEADERS: dict[str, Callable[[Path], None]] = {
    "a header of 16 EiB": lambda path: safetensors(path, b"{}", length=(1 << 64) - 1),
    "a header of 1 TiB": lambda path: safetensors(path, b"{}", length=1 << 40),
    "a header of 99 MB of blanks": lambda path: safetensors(path, b"{" + b" " * 99_000_000 + b"}"),
    "a header longer than the file": lambda path: safetensors(path, b"{}", length=100),
    "no header": lambda path: path.write_bytes(b"\0" * 4),
    "no object": lambda path: safetensors(path, b"[1]"),
    "nested lists": lambda path: safetensors(path, b'{"a":' + b"[" * 400_000 + b"]" * 400_000 + b"}"),
    "nested metadata": lambda path: safetensors(
        path, {"__metadata__": {**METADATA, "info": "[" * 200_000}}, seal=True
    ),
    "a million tensors": lambda path: safetensors(
        path, {"__metadata__": {}, **{str(n): weight([0], 0, 0) for n in range(300_000)}}
    ),
    "a tensor of 4 EiB": lambda path: safetensors(path, _with(a=weight([1 << 60], 0, 1 << 62)), seal=True),
    "a tensor of more than its bytes": lambda path: safetensors(
        path, _with(a=weight([1 << 40], 0, 16)), bytes(16), seal=True
    ),
    "sizes whose product overflows": lambda path: safetensors(
        path, _with(a=weight([1 << 32, 1 << 32], 0, 0)), seal=True
    ),
    "a negative size": lambda path: safetensors(path, _with(a=weight([-4], 0, 16)), bytes(16), seal=True),
    "tensors that overlap": lambda path: safetensors(
        path, _with(a=weight([4], 0, 16), b=weight([4], 0, 16)), bytes(16), seal=True
    ),
    "offsets backwards": lambda path: safetensors(path, _with(a=weight([4], 16, 0)), bytes(16), seal=True),
    "a type that isn't one": lambda path: safetensors(
        path, _with(a=weight([4], 0, 16, "F999")), bytes(16), seal=True
    ),
    "another student": lambda path: safetensors(
        path, {"__metadata__": {**METADATA, "student": "../../etc"}}, seal=True
    ),
    "a size of 2 ** 40 pixels": lambda path: safetensors(
        path, {"__metadata__": {**METADATA, "image_size": str(1 << 40)}}, seal=True
    ),
    "a size of 16384 pixels": lambda path: safetensors(
        path, {"__metadata__": {**METADATA, "image_size": "16384"}}, seal=True
    ),
    "a size of a million digits": lambda path: safetensors(
        path, {"__metadata__": {**METADATA, "image_size": "9" * 900_000}}, seal=True
    ),
    "metadata that are numbers": lambda path: safetensors(path, b'{"__metadata__":{"format":7,"sha256":7}}'),
    "metadata that are a list": lambda path: safetensors(path, b'{"__metadata__":[]}'),
    "a newline in a name": lambda path: safetensors(
        path, _with(**{"a\nb\x1b[31m": weight([4], 0, 16)}), bytes(16), seal=True
    ),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Call(os.system, "false"), 2)),
    "a zip": lambda path: torch_zip(path, pickle.dumps({}, 2)),
}


def test_forged_students_are_refused(fault_log: FaultLog, tmp_path: Path) -> None:
    files = {}
    for number, (name, make) in enumerate(HEADERS.items()):
        files[name] = tmp_path / f"{number}.safetensors"
        make(files[name])
    assert_refused(fault_log, "student", "header", files)


# ---- the commands


def honest_teacher(path: Path) -> Path:
    """Write a mobile_sam checkpoint with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = {f"image_encoder.{key}": value for key, value in TinyViT(1024).state_dict().items()}
    torch.save(encoder | {key: torch.zeros(shape) for key, shape in head_shapes().items()}, path)
    return path


def test_the_commands_refuse_hostile_files_with_exit_code_3(
    run: Callable[..., dict[str, Any]], fault_log: FaultLog, tmp_path: Path, pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """precompute, distill and verify leave store and run unchanged."""
    monkeypatch.chdir(tmp_path)
    evidence, store = tmp_path / "evidence", tmp_path / "store.zarr"
    run()
    options = {"store": store, "out": Path("run"), "epochs": 1, "batch_size": 4, "device": "cpu"}
    distill(DistillConfig(**options, precision="float32"))
    undisturbed, before = Snapshot.of(store), contents(store)
    code = codes(evidence)["reduce"]

    torch_zip(tmp_path / "teacher.pt", code)
    refused(
        mobilesam(
            "precompute", "--images", pictures, "--out", "other.zarr", "--teacher", "mobile_sam", "--checkpoint",
            "teacher.pt", "--image-size", "64", "--json", cwd=tmp_path,
        ),
        "posix.system",
    )  # fmt: skip
    torch_zip(tmp_path / "student.safetensors", code)
    refused(
        mobilesam(
            "verify",
            "--student",
            "student.safetensors",
            "--store",
            store,
            "--split",
            "all",
            "--json",
            cwd=tmp_path,
        )
    )

    # An unfinished run is resumed from last.pt.
    os.truncate("run/metrics.jsonl", 0)
    torch_zip(tmp_path / "run/last.pt", code)
    (tmp_path / "run/previous.pt").unlink(missing_ok=True)
    refused(
        mobilesam(
            "distill", "--store", store, "--out", "run", "--epochs", "1", "--batch-size", "4", "--device", "cpu",
            "--precision", "float32", "--json", cwd=tmp_path,
        ),
        "last.pt",
    )  # fmt: skip
    assert not evidence.exists()
    wrong, lost = wrong_reads(store, undisturbed), missing_rows(store, undisturbed)
    for phase in ("precompute", "verify", "distill"):
        fault_log.record(
            call="hostile", ordinal=0, file="*", phase=f"command line, {phase}", fired=True, lost=len(lost),
            wrong=len(wrong), role="reader",
        )  # fmt: skip
    assert contents(store) == before
    assert not (tmp_path / "other.zarr").exists()


def test_the_memory_limit_suffices_for_honest_files(tmp_path: Path) -> None:
    """Honest files are read within the limit on memory."""
    path = honest_teacher(tmp_path / "teacher.pt")
    for reader in ("teacher", "head"):
        (result,) = read_in_sandbox(reader, [path])
        assert (result.outcome, result.message) == ("read", "")
        assert result.grown < ALLOWED_GROWTH
