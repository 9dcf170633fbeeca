from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bounded import read_bounded
from flips import flipped
from safetensors.torch import load_file, save_file

from mobilesam.distill import DistillError, build_student, load_own_head, load_student, save_student
from mobilesam.distill.students.registry import outline_student, student_info
from mobilesam.distill.students.student_file import check_tensors, load_tensors, save_tensors
from mobilesam.sam.modeling.tiny_vit import TinyViT


@pytest.fixture
def student_file(tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    save_student(build_student("tiny_vit", 64, seed=3), path, "tiny_vit", 64, {"teacher": "vit_nano"})
    return path


def metadata(**changes: str) -> dict[str, str]:
    return {
        "format": "mobilesam student 1",
        "student": "tiny_vit",
        "image_size": "64",
        "info": "{}",
        **changes,
    }


def test_a_saved_student_rebuilds_itself_and_computes_the_same(student_file: Path) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    original = build_student("tiny_vit", 64, seed=3).eval()
    student, info = load_student(student_file)
    assert not student.training
    assert info == {"student": "tiny_vit", "image_size": 64, "student_size": 64, "teacher": "vit_nano"}
    with torch.no_grad():
        assert torch.equal(student(pixels), original(pixels))


@pytest.mark.parametrize("name", ["tiny_vit_11m", "deit_tiny", "timm:resnet18", "timm:convnext_atto"])
def test_a_student_of_each_kind_rebuilds_itself(tmp_path: Path, name: str) -> None:
    original = build_student(name, 64, seed=3).eval()
    save_student(original, tmp_path / "student.safetensors", name, 64, {})
    student, info = load_student(tmp_path)
    assert info == {"student": name, "image_size": 64, "student_size": 64}
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(student(pixels), original(pixels))


@pytest.mark.parametrize("name", ["tiny_vit", "deit_tiny", "timm:resnet18"])
def test_a_student_of_a_small_input_knows_its_size(tmp_path: Path, name: str) -> None:
    original = build_student(name, 128, 3, 64).eval()
    save_student(original, tmp_path / "student.safetensors", name, 128, {})
    student, info = load_student(tmp_path)
    assert info == {"student": name, "image_size": 128, "student_size": 64}
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(student(pixels), original(pixels))


@pytest.mark.parametrize("size", ["16", "40", "256", "x"])
def test_a_forged_size_of_the_input_is_refused(tmp_path: Path, size: str) -> None:
    state = {f"image_encoder.{key}": value for key, value in TinyViT(64).state_dict().items()}
    save_tensors(tmp_path / "student.safetensors", state, metadata(image_size="128", student_size=size))
    with pytest.raises(
        DistillError, match=r"student size must be a multiple of 16 from 32 to 128|damaged metadata"
    ):
        load_student(tmp_path)


def test_the_file_of_a_student_of_the_whole_size_is_as_before(student_file: Path) -> None:
    assert "student_size" not in check_tensors(student_file).metadata


def test_without_timm_another_copy_of_the_file_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "student.safetensors"
    save_student(build_student("deit_tiny", 64, seed=3), file, "deit_tiny", 64, {})
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DistillError, match=r"pip install 'mobilesam\[students\]'$"):
        load_student(file)


def test_a_student_is_found_in_a_runs_folder(student_file: Path) -> None:
    assert load_student(student_file.parent)[1]["teacher"] == "vit_nano"


def test_a_student_files_keys_are_those_of_mobile_sam_pt(student_file: Path) -> None:
    keys = set(load_file(student_file))
    assert keys == {f"image_encoder.{key}" for key in TinyViT(64).state_dict()}


def test_a_missing_student_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="run distill first"):
        load_student(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_truncated_student_file_is_one_clear_error(student_file: Path, length: int) -> None:
    data = student_file.read_bytes()
    student_file.write_bytes(data[:length])
    with pytest.raises(DistillError, match="damaged"):
        load_student(student_file)


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        (metadata(format="other"), "format"),
        ({}, "format"),
        (metadata(image_size="a lot"), "metadata"),
        (metadata(image_size="1000000"), "image size"),
        (metadata(image_size="65"), "image size"),
        (metadata(info="[]"), "metadata"),
        (metadata(info="{"), "metadata"),
        (metadata(student="giant_vit"), "giant_vit"),
    ],
)
def test_forged_metadata_is_refused(student_file: Path, forged: dict[str, str], message: str) -> None:
    save_tensors(student_file, load_file(student_file), forged)
    with pytest.raises(DistillError, match=message):
        load_student(student_file)


@pytest.mark.parametrize("how", ["missing", "unknown", "shape", "dtype", "nan"])
def test_weights_that_do_not_fit_are_refused_by_name(student_file: Path, how: str) -> None:
    tensors = load_file(student_file)
    key = "image_encoder.neck.0.weight"
    if how == "missing":
        del tensors[key]
    elif how == "unknown":
        tensors["image_encoder.extra"] = torch.zeros(1)
        key = "extra"
    elif how == "shape":
        tensors[key] = tensors[key][:, :-1].contiguous()
    elif how == "dtype":
        tensors[key] = tensors[key].half()
    else:
        tensors[key][0] = float("nan")
    save_tensors(student_file, tensors, metadata())
    with pytest.raises(DistillError, match=key.removeprefix("image_encoder.")):
        load_student(student_file)


def test_a_students_description_is_plain_json(student_file: Path) -> None:
    assert json.loads(json.dumps(load_student(student_file)[1])) == load_student(student_file)[1]


def test_a_file_without_its_checksum_is_refused(student_file: Path) -> None:
    save_file(load_file(student_file), student_file, metadata())
    with pytest.raises(DistillError, match="no SHA-256"):
        load_student(student_file)


def test_a_file_whose_length_begins_as_a_pickle_does_is_read(tmp_path: Path, small: str) -> None:
    student, firsts = build_student(small, 64, seed=3), set()
    for length in range(0, 300, 8):
        path = tmp_path / "student.safetensors"
        save_student(student, path, small, 64, {"teacher": "x" * length})
        first = path.read_bytes()[0]
        firsts.add(first)
        if first == 0x80:
            assert load_student(path)[1]["teacher"] == "x" * length
            assert load_own_head(path) is None
    assert 0x80 in firsts


def test_a_flipped_weight_is_an_error(student_file: Path) -> None:
    data = student_file.read_bytes()
    student_file.write_bytes(flipped(data, 8 * (len(data) - 1000)))
    with pytest.raises(DistillError, match="SHA-256 isn't the one"):
        load_student(student_file)


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def with_sha256(header: dict[str, object], data: bytes = b"") -> bytes:
    """Return a forged file that carries the right SHA-256 of itself."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(text + b"\n" + data).hexdigest()
    metadata = {**header["__metadata__"], "sha256": digest}
    return safetensors(json.dumps({**header, "__metadata__": metadata}).encode(), data)


def one_tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, object]:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return {"__metadata__": metadata(), "image_encoder.neck.0.weight": entry}


def all_tensors(shapes: dict[str, list[int]], offsets: Callable[[int], list[int]]) -> dict[str, object]:
    entries = {
        key: {"dtype": "F32", "shape": shape, "data_offsets": offsets(index)}
        for index, (key, shape) in enumerate(shapes.items())
    }
    return {"__metadata__": metadata(), **entries}


def all_claimed(student: str) -> bytes:
    """Return a file with every name and shape of a student, and no weights."""
    outline = outline_student(student_info(student), 64).state_dict()
    shapes = {f"image_encoder.{key}": list(value.shape) for key, value in outline.items()}
    header = all_tensors(shapes, lambda index: [0, 0])
    return with_sha256({**header, "__metadata__": metadata(student=student)})


def test_forged_headers_are_errors_in_bounded_memory(tmp_path: Path) -> None:
    shapes = {f"image_encoder.{key}": list(value.shape) for key, value in TinyViT(64).state_dict().items()}
    forged = {
        "a header of exabytes": safetensors(b"{}", length=2**63),
        "a header of gigabytes": safetensors(b"{}", length=2**31),
        "a header of 50 MB": safetensors(b"[" * 50_000_000),
        "a header that is deep": safetensors(b"[" * 500_000 + b"]" * 500_000),
        "a header that is deep, of objects": safetensors(b'{"a":' * 150_000 + b"1" + b"}" * 150_000),
        "a header of lists": safetensors(b"[" + b"[]," * 300_000 + b"1]"),
        "no object": safetensors(b"[1]"),
        "no JSON": safetensors(b"{'a': 1}"),
        "NaN": safetensors(b'{"__metadata__": NaN}'),
        "metadata of NaN": safetensors(b'{"__metadata__": {"sha256": NaN}}'),
        "a name twice": safetensors(b'{"a":{},"a":{},"__metadata__":{"sha256":"0"}}'),
        "a giant shape": with_sha256(one_tensor([2**40, 2**40], [0, 4]), bytes(4)),
        "numbers without end": with_sha256(one_tensor([10**1000], [0, 4]), bytes(4)),
        "offsets beyond the file": with_sha256(all_tensors(shapes, lambda index: [0, 2**60])),
        "overlapping": with_sha256(all_tensors(shapes, lambda index: [0, 4]), bytes(4)),
        "negative offsets": with_sha256(all_tensors(shapes, lambda index: [-4, 4]), bytes(4)),
        "no numbers": with_sha256(one_tensor(["a"], ["b"]), bytes(4)),
        "a long name": with_sha256(
            {"__metadata__": metadata(), "x" * 500_000: {"shape": [], "dtype": "F32"}}
        ),
        "a giant image size": with_sha256({"__metadata__": metadata(image_size="9" * 4000)}),
        "a giant student": with_sha256({"__metadata__": metadata(student="9" * 400_000)}),
        "a giant of timm's": with_sha256({"__metadata__": metadata(student="timm:eva_giant_patch14_560")}),
        "a giant ViT of timm's": with_sha256(
            {"__metadata__": metadata(student="timm:vit_huge_patch16_gap_448", image_size="16384")}
        ),
        "masks of gigabytes": with_sha256(
            {"__metadata__": metadata(student="timm:swin_tiny_patch4_window7_224", image_size="16384")}
        ),
        "a download": with_sha256({"__metadata__": metadata(student="timm:hf-hub:timm/resnet18")}),
        "a folder": with_sha256({"__metadata__": metadata(student="timm:local-dir:/tmp")}),
        "a long name of timm's": with_sha256({"__metadata__": metadata(student="timm:" + "r" * 400_000)}),
        "weights that aren't there": all_claimed("timm:vit_huge_patch16_gap_448"),
        "a deep description": with_sha256({"__metadata__": metadata(info="[" * 100_000)}),
        "empty": b"",
    }
    files = [tmp_path / f"{index}.safetensors" for index in range(len(forged))]
    for file, data in zip(files, forged.values(), strict=True):
        file.write_bytes(data)
    outcomes = read_bounded("student", files, 600_000_000)
    for (name, file), outcome in zip(zip(forged, files, strict=True), outcomes, strict=True):
        assert outcome.startswith(f"{file} ") or "student" in name, name
        assert outcome != "read", name
        assert len(outcome) < 500, name


def test_a_flipped_bit_in_a_tensor_file_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    tensors = {"a": torch.arange(5.0), "b": torch.arange(4).reshape(2, 2)}
    save_tensors(path, tensors, {"run_id": "abc"})
    data = path.read_bytes()
    errors = 0
    for bit in range(8 * len(data)):
        path.write_bytes(flipped(data, bit))
        try:
            assert check_tensors(path).metadata == {"run_id": "abc"}
            loaded = load_tensors(path)
            assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
        except DistillError as error:
            errors += str(path) in str(error)
    assert errors > 8 * len(data) * 0.95


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_truncated_tensor_file_is_an_error(tmp_path: Path, length: int) -> None:
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"a": torch.arange(50.0)}, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DistillError, match="damaged"):
        check_tensors(path)
