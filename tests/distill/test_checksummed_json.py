"""JSON files and lines, with each of their bits flipped."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from flips import flipped

from mobilesam.distill import DistillError, checksummed_json
from mobilesam.distill.checksummed_json import (
    decode_line,
    encode_line,
    integers_sha256,
    json_sha256,
    read_checksummed,
    write_checksummed,
    write_checksummed_integers,
)


def test_a_flipped_bit_in_a_json_file_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("page", [1, 3, 100])
def test_lists_of_integers_are_written_as_any_other_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(checksummed_json, "_PAGE", page)
    value = {"train": [0, 3, 4, 7, 11_000_000], "val": [5]}
    write_checksummed(tmp_path / "a.json", value)
    write_checksummed_integers(tmp_path / "b.json", {key: array("q", each) for key, each in value.items()})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert integers_sha256(value) == json_sha256(value)
    assert integers_sha256({"val": [1], "train": [2, 3]}) == json_sha256({"val": [1], "train": [2, 3]})
    assert read_checksummed(tmp_path / "b.json") == value
