from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flips import flipped
from safetensors.torch import save_file

from mobilesam.distill import DistillError, build_student, save_student
from mobilesam.predict import load_model
from mobilesam.predict.head_source import read_head_file
from mobilesam.sam import CheckpointError
from mobilesam.sam.modeling.head_shapes import HEAD_PREFIXES
from mobilesam.store import StoreError

MEMORY = 600_000_000


def same_head(model: Any, head: dict[str, torch.Tensor]) -> bool:
    state = model.sam.state_dict()
    return all(torch.equal(state[key], value) for key, value in head.items())


def test_a_student_without_its_run_takes_the_head_beside_it_or_the_one_given(
    lone_student: Path, run: Path, store: Path, mobile_sam_pt: Path, head: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(DistillError, match=r"holds no mask decoder.*--head"):
        load_model(lone_student)
    for given in (store, run / "sam_head.safetensors"):
        assert same_head(load_model(lone_student, head=given), head)
    assert same_head(load_model(lone_student, fallback_head=store), head)
    other = {key: value for key, value in torch.load(mobile_sam_pt).items() if key.startswith(HEAD_PREFIXES)}
    assert same_head(load_model(lone_student, head=mobile_sam_pt), other)
    shutil.copy(run / "sam_head.safetensors", lone_student.parent)
    model = load_model(lone_student, fallback_head=mobile_sam_pt)
    assert same_head(model, head)
    assert model.head_source == str(lone_student.parent / "sam_head.safetensors")


def test_an_exports_folder_or_file_has_its_own_head(tmp_path: Path, head: dict[str, torch.Tensor]) -> None:
    student = build_student("tiny_vit", 64, seed=3)
    save_student(student, tmp_path / "model.safetensors", "tiny_vit", 64, {"teacher": "vit_b"}, head=head)
    for given in (tmp_path, tmp_path / "model.safetensors"):
        model = load_model(given)
        assert same_head(model, head)
        assert model.info["teacher"] == "vit_b"
    assert read_head_file(tmp_path / "model.safetensors").state.keys() == head.keys()


@pytest.mark.parametrize("where", [0, 9, 2000, -3])
def test_a_flipped_bit_in_a_runs_head_is_an_error(run: Path, where: int) -> None:
    path = run / "sam_head.safetensors"
    data = path.read_bytes()
    path.write_bytes(flipped(data, 8 * (where % len(data))))
    with pytest.raises(DistillError, match=r"sam_head.safetensors is damaged"):
        load_model(run)


def test_a_flipped_bit_in_an_exports_head_is_an_error(
    tmp_path: Path, lone_student: Path, head: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.safetensors"
    save_student(build_student("tiny_vit", 64, seed=3), path, "tiny_vit", 64, {}, head=head)
    data = path.read_bytes()
    path.write_bytes(flipped(data, 8 * (len(data) - 100)))
    for load in (lambda: load_model(tmp_path), lambda: load_model(lone_student, head=path)):
        with pytest.raises(DistillError, match="SHA-256 isn't the one"):
            load()


@pytest.mark.parametrize("how", ["missing", "shape", "integers", "nan", "nothing", "cut"])
def test_a_head_that_does_not_fit_is_named_with_the_mend(
    tmp_path: Path, lone_student: Path, head: dict[str, torch.Tensor], how: str
) -> None:
    key, changed = "mask_decoder.iou_token.weight", dict(head)
    if how == "missing":
        del changed[key]
    elif how == "nothing":
        changed = {"image_encoder.x": torch.zeros(1)}
    else:
        changed[key] = {
            "shape": changed[key][:, :-1].contiguous(),
            "integers": changed[key].long(),
            "nan": changed[key] * float("nan"),
        }.get(how, changed[key])
    path = tmp_path / "head.safetensors"
    save_file(changed, path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DistillError, match=r"head.safetensors") as raised:
        load_model(lone_student, head=path)
    assert "--head" in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_head_with_more_layers_than_sams_is_taken_for_sams_part_with_a_note(
    tmp_path: Path, lone_student: Path, head: dict[str, torch.Tensor]
) -> None:
    more = {"mask_decoder.hf_token.weight": torch.zeros(1, 256), "mask_decoder.hf_mlp.x": torch.zeros(2)}
    save_file({**head, **more}, tmp_path / "head.safetensors")
    model = load_model(lone_student, head=tmp_path / "head.safetensors")
    assert same_head(model, head)
    left = "mask_decoder.hf_mlp (1), mask_decoder.hf_token (1)"
    assert model.notes[-1] == f"of the head in head.safetensors SAM's own part is used; left out: {left}"


def test_a_head_saved_in_half_precision_is_computed_with_in_float32(
    tmp_path: Path, lone_student: Path, head: dict[str, torch.Tensor]
) -> None:
    save_file({key: value.half() for key, value in head.items()}, tmp_path / "head.bin")
    assert same_head(
        load_model(lone_student, head=tmp_path / "head.bin"), {k: v.half().float() for k, v in head.items()}
    )


def test_a_safetensors_file_is_known_by_its_content_whatever_its_first_byte(
    tmp_path: Path, lone_student: Path, head: dict[str, torch.Tensor]
) -> None:
    """Its first byte is the low byte of its header's length, which may be that of a pickle."""
    path = tmp_path / "head.safetensors"
    for padding in range(0, 256, 8):
        save_file(head, path, metadata={"padding": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert same_head(load_model(lone_student, head=path), head)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist; give --head with the store"),
        (b"", "is empty"),
        (b"this is text", "not a checkpoint of PyTorch or safetensors: it is a text"),
        ("folder", "store"),
    ],
)
def test_wrong_kinds_of_head_are_told_in_two_lines(
    tmp_path: Path, lone_student: Path, content: bytes | str | None, told: str
) -> None:
    path = tmp_path / "thing"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises((DistillError, CheckpointError, StoreError), match=told) as raised:
        load_model(lone_student, head=path)
    assert len(str(raised.value).splitlines()) <= 2


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def test_forged_heads_are_errors_in_bounded_memory(tmp_path: Path, lone_student: Path, store: Path) -> None:
    key = "mask_decoder.iou_token.weight"

    def one(shape: list[int], offsets: list[int]) -> bytes:
        return json.dumps({key: {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()

    forged = {
        "a header of exabytes": safetensors(b"{}", length=2**63),
        "a header of gigabytes": safetensors(b"{}", length=2**31),
        "a header of 50 MB": safetensors(b'{"' + b"a" * 50_000_000),
        "a header that is deep": safetensors(b'{"a":' * 150_000 + b"1" + b"}" * 150_000),
        "no JSON": safetensors(b"{'a': 1}"),
        "a giant shape": safetensors(one([2**40, 2**40], [0, 4]), bytes(4)),
        "offsets beyond the file": safetensors(one([2**30], [0, 2**32]), bytes(4)),
        "more than its bytes": safetensors(one([1, 256], [0, 4]), bytes(4)),
        "one weight alone": safetensors(one([1, 256], [0, 1024]), bytes(1024)),
        "the start alone": b"\x08\0\0\0",
    }
    files = [tmp_path / f"{index}.safetensors" for index in range(len(forged))]
    for file, data in zip(files, forged.values(), strict=True):
        file.write_bytes(data)
    for name, outcome in zip(forged, read_bounded(lone_student, store, files), strict=True):
        assert ".safetensors" in outcome, name
        assert len(outcome) < 400, name
        assert len(outcome.splitlines()) <= 2, name


def test_a_head_of_a_terabyte_is_an_error_before_it_is_read(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.safetensors"
    header = {"mask_decoder.iou_token.weight": {"dtype": "F32", "shape": [1, 256], "data_offsets": [0, 1024]}}
    with sparse.open("wb") as opened:
        opened.write(safetensors(json.dumps(header).encode()))
        opened.truncate(10**12)
    with pytest.raises(DistillError, match=r"sparse.safetensors .* is truncated or damaged"):
        read_head_file(sparse)


_PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from mobilesam.distill import DistillError
from mobilesam.predict import load_model

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(1)
limit = memory("VmSize") + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
load_model(sys.argv[2], head=sys.argv[3])
for name in sys.argv[4:]:
    try:
        load_model(sys.argv[2], head=name)
        outcome = "read"
    except DistillError as error:
        outcome = str(error)
    print(json.dumps(outcome), flush=True)
"""


def read_bounded(student: Path, head: Path, files: list[Path]) -> list[str]:
    """Return the errors of loading a student with each file as its head, once `head` was read, in a process that may
    take only so much more memory than its imports did."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(MEMORY), *map(str, [student, head, *files])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
