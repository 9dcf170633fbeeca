"""Sealed JSON, lines and tensor files, with each of their bits flipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flips import flipped

from mobilesam.distill import DistillError
from mobilesam.distill.checksummed_json import decode_line, encode_line, read_checksummed, write_checksummed
from mobilesam.distill.students.student_file import check_tensors, load_tensors, save_tensors


def test_a_flipped_bit_in_sealed_json_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    path, value = tmp_path / "value.json", {"rows": [1, 20], "lr": 0.001, "name": "\u00e4", "none": None}
    write_checksummed(path, value)
    data = path.read_bytes()
    outcomes = set()
    for bit in range(8 * len(data)):
        path.write_bytes(flipped(data, bit))
        try:
            assert read_checksummed(path) == value
            outcomes.add("same")
        except DistillError as error:
            outcomes.add("error" if str(path) in str(error) else "another file's error")
    assert outcomes == {"same", "error"}


def test_a_flipped_bit_in_a_line_is_an_error() -> None:
    value = {"kind": "train", "epoch": 1, "loss": 0.25, "text": "crc32"}
    line = encode_line(value)
    assert line.endswith(b"\n")
    assert decode_line(line[:-1]) == value
    for bit in range(8 * (len(line) - 1)):
        with pytest.raises(ValueError, match="checksum"):
            decode_line(flipped(line[:-1], bit))


@pytest.mark.parametrize("line", [b"", b"{}", b'{"kind":"train"}', b'{"a":1,"crc32":"00000000"}', b"[]"])
def test_lines_without_the_right_checksum_are_errors(line: bytes) -> None:
    with pytest.raises(ValueError, match="checksum"):
        decode_line(line)


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
