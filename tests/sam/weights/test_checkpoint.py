"""Files that are no usable checkpoint: one clear error each, two lines at most."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mobilesam.common.errors import CheckpointError
from mobilesam.sam.modeling.head_shapes import head_shapes
from mobilesam.sam.modeling.tiny_vit import TinyViT
from mobilesam.sam.registry import TEACHERS
from mobilesam.sam.teacher import load_head, load_teacher, state_shapes
from mobilesam.sam.weights.checkpoint import identify_teacher, read_state


class Hostile:
    """Runs code when it is unpickled: here, leaves a folder behind."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.evidence),)


@pytest.fixture(scope="session")
def state() -> dict[str, torch.Tensor]:
    """A small whole checkpoint: mobile_sam's."""
    torch.manual_seed(2)
    encoder = {f"image_encoder.{key}": value for key, value in TinyViT(1024).state_dict().items()}
    return encoder | {key: torch.zeros(shape) for key, shape in head_shapes().items()}


def refusal(path: Path, name: str = "mobile_sam") -> str:
    """The message of the one error that loading gives, checked to be short and without a cause to print."""
    with pytest.raises(CheckpointError) as caught:
        load_teacher(name, path, image_size=64)
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) <= 2
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    with pytest.raises(CheckpointError):
        load_head(name, path)
    return message


def test_an_absent_file_is_refused_by_name(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent.pth")


def test_a_directory_is_refused_with_the_advice_to_name_a_file(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)


def test_an_empty_file_is_refused_with_its_length(tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    assert "is empty (0 bytes)" in refusal(tmp_path / "empty.pth")


def test_a_web_page_saved_as_a_checkpoint_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><title>Not found</title>")
    message = refusal(tmp_path / "page.pth")
    assert "is not a checkpoint of PyTorch or safetensors: it is an HTML page" in message


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99, 0.99999])
def test_a_truncated_file_is_refused_as_damaged(
    tmp_path: Path, state: dict[str, torch.Tensor], share: float
) -> None:
    path = tmp_path / "mobile_sam.pt"
    torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    message = refusal(path)
    assert "truncated or damaged" in message
    assert f"{int(len(whole) * share):,} bytes" in message
    assert "40,728,226 expected" in message


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.99])
def test_a_truncated_file_in_the_old_format_is_refused_as_damaged(
    tmp_path: Path, state: dict[str, torch.Tensor], share: float
) -> None:
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "truncated or damaged" in refusal(path)


def test_a_zip_file_of_something_else_is_refused(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "is a zip archive of 1 file, the first readme.txt" in refusal(tmp_path / "other.pth")


@pytest.mark.parametrize("new_format", [True, False])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path, new_format: bool) -> None:
    path, evidence = tmp_path / "hostile.pth", tmp_path / "evidence"
    torch.save({"a": Hostile(evidence)}, path, _use_new_zipfile_serialization=new_format)
    message = refusal(path)
    assert f"Python objects other than tensors ({os.name}.mkdir, under 'a')" in message
    assert "refused" in message
    assert not evidence.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_plain_pickle_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    path, evidence = tmp_path / "hostile.pkl", tmp_path / "evidence"
    path.write_bytes(pickle.dumps(Hostile(evidence), protocol))
    assert "is a pickle that torch.save didn't write" in refusal(path)
    assert not evidence.exists()


def test_a_whole_pickled_network_is_refused_with_the_way_to_save_it(tmp_path: Path) -> None:
    torch.save(TinyViT(64), tmp_path / "network.pth")
    message = refusal(tmp_path / "network.pth")
    assert "mobilesam.sam.modeling.tiny_vit.TinyViT" in message
    assert "torch.save(model.state_dict(), FILE)" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({}, "it holds nothing"),
        ({"epoch": 3, "loss": 0.1}, "no tensors by name: it holds 'epoch', 'loss'"),
        ({"model": {"a": torch.zeros(2)}, "epoch": 3}, "none of SAM's names, but 1 tensor, a"),
    ],
)
def test_other_contents_are_refused_by_their_kind(tmp_path: Path, content: object, said: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert said in refusal(tmp_path / "other.pth")


def test_the_old_format_of_torch_save_is_read_whole(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    new, old = (
        load_teacher("mobile_sam", tmp_path / name, image_size=64).embed(x) for name in ("new.pt", "old.pt")
    )
    assert torch.equal(new, old)


def test_pixel_statistics_in_the_file_are_ignored(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    statistics = {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    torch.save(state | statistics, tmp_path / "mobile_sam.pt")
    assert set(read_state(tmp_path / "mobile_sam.pt")) == set(state)
    load_teacher("mobile_sam", tmp_path / "mobile_sam.pt", image_size=64)


def empty_checkpoint(name: str) -> dict[str, torch.Tensor]:
    """A checkpoint of this teacher whose tensors share one number, so that even vit_h's is a small file."""
    shapes = state_shapes(TEACHERS[name])
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


OFFICIAL = ["vit_h", "vit_l", "vit_b", "mobile_sam"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_another_teachers_file_is_named_as_what_it_is(name: str, tmp_path: Path) -> None:
    torch.save(empty_checkpoint(name), tmp_path / "file.pth")
    for other in OFFICIAL:
        if other != name:
            message = refusal(tmp_path / "file.pth", other)
            assert f"is a {name} checkpoint, not {other}; use --teacher {name}" in message


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_is_identified_by_its_encoders_keys_and_shapes(name: str) -> None:
    assert identify_teacher(empty_checkpoint(name)) == name


def test_an_unknown_encoder_belongs_to_no_teacher() -> None:
    assert identify_teacher({"a": torch.zeros(1)}) is None
    assert identify_teacher({"image_encoder.patch_embed.proj.weight": torch.zeros(99, 3, 16, 16)}) is None


def test_a_missing_key_is_counted_and_named(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    key = "image_encoder.neck.0.weight"
    torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "file.pt")
    message = refusal(tmp_path / "file.pt")
    assert "1 are missing, 0 are unknown" in message
    assert f"{key} is missing" in message


def test_an_encoder_alone_is_a_teacher_without_a_head(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({k: v for k, v in state.items() if k.startswith("image_encoder")}, tmp_path / "file.pt")
    teacher = load_teacher("mobile_sam", tmp_path / "file.pt", image_size=64)
    assert teacher.note == "file.pt: took 298 tensors of an image encoder alone, all that it holds"
    with pytest.raises(
        CheckpointError, match="holds an image encoder alone: SAM's prompt encoder and mask decod"
    ):
        load_head("mobile_sam", tmp_path / "file.pt")


def test_half_a_head_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({k: v for k, v in state.items() if not k.startswith("prompt_encoder")}, tmp_path / "file.pt")
    absent = sum(key.startswith("prompt_encoder") for key in head_shapes())
    assert f"{absent} are missing, 0 are unknown" in refusal(tmp_path / "file.pt")


def test_an_unknown_key_is_named(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state | {"image_encoder.hq.weight": torch.zeros(1)}, tmp_path / "file.pt")
    assert "image_encoder.hq.weight is unknown" in refusal(tmp_path / "file.pt")


def test_a_wrong_shape_is_said_with_both(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state | {"image_encoder.neck.1.weight": torch.zeros(255)}, tmp_path / "file.pt")
    assert "image_encoder.neck.1.weight has shape (255,), not (256,)" in refusal(tmp_path / "file.pt")


def test_another_networks_weights_are_counted(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    message = refusal(tmp_path / "resnet.pth", "vit_b")
    assert "is not a vit_b checkpoint" in message
    assert "it holds none of SAM's names, but 1 tensor, conv1.weight" in message
