from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from segment_anything import SamPredictor

from mobilesam.distill import DistillError, Run, build_student, save_student
from mobilesam.predict import load_model, load_teacher_model
from mobilesam.sam import CheckpointError


def test_a_run_is_a_whole_sam_by_its_folder_or_its_students_file(
    run: Path, head: dict[str, torch.Tensor]
) -> None:
    for given in (run, run / "student.safetensors", str(run)):
        model = load_model(given)
        assert model.run is not None
        assert (model.student, model.image_size) == ("tiny_vit", 64)
        state = model.sam.state_dict()
        assert all(torch.equal(state[key], value) for key, value in head.items())
        assert not model.sam.training
        assert {value.dtype for value in model.sam.parameters()} == {torch.float32}


def test_a_head_works_at_any_image_size(store: Path, tmp_path: Path, head: dict[str, torch.Tensor]) -> None:
    """Its weights don't depend on it; the store's was kept at 64 pixels."""
    save_student(build_student("tiny_vit", 128, seed=3), tmp_path / "s.safetensors", "tiny_vit", 128, {})
    model = load_model(tmp_path / "s.safetensors", head=store)
    assert model.sam.prompt_encoder.image_embedding_size == (8, 8)
    assert model.sam.prompt_encoder.input_image_size == (128, 128)
    predictor = SamPredictor(model.sam)
    predictor.set_image(torch.zeros(40, 60, 3, dtype=torch.uint8).numpy())
    assert predictor.predict(box=torch.tensor([1, 2, 30, 30]).numpy())[0].shape == (3, 40, 60)


def test_an_image_size_is_for_files_that_do_not_say(run: Path, mobile_sam_pt: Path) -> None:
    assert load_model(mobile_sam_pt, image_size=128).image_size == 128
    assert load_model(mobile_sam_pt).image_size == 1024
    assert load_model(run, image_size=64).image_size == 64
    with pytest.raises(DistillError, match="takes images of 64 pixels, not 1024: leave out --image-size"):
        load_model(run, image_size=1024)


def test_a_head_of_another_teacher_is_told(lone_student: Path, store: Path) -> None:
    model = load_model(lone_student, head=store)
    assert model.notes[0].startswith(
        "the head is another teacher's: vit_nano with checkpoint 000000000000..."
    )
    assert "vit_h with aaaaaaaaaaaa..." in model.notes[0]


def test_a_run_that_is_not_finished_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(run).notes == ()
    whole = Run.student

    def earlier(self: Run, device: torch.device) -> tuple[torch.nn.Module, dict[str, Any]]:
        student, info = whole(self, device)
        return student, info | {"epoch": 0}

    monkeypatch.setattr(Run, "student", earlier)
    assert load_model(run).notes == ("the run isn't finished: epoch 0 of 1",)


def test_a_run_without_its_student_or_head_is_an_error_with_the_mend(run: Path) -> None:
    (run / "sam_head.safetensors").rename(run / "away")
    with pytest.raises(DistillError, match=r"sam_head.safetensors can't be read"):
        load_model(run)
    (run / "student.safetensors").unlink()
    with pytest.raises(
        DistillError, match=r"student.safetensors is missing; run .*distill command again, which restores"
    ):
        load_model(run)


def test_a_teacher_is_a_whole_sam() -> None:
    model = load_teacher_model("vit_nano", image_size=64)
    assert (model.student, model.image_size, model.file) == ("vit_nano", 64, None)
    with pytest.raises(CheckpointError, match="takes no checkpoint"):
        load_teacher_model("vit_nano", Path("x.pth"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no student at .*thing"),
        (b"", "is empty"),
        (b"this is text, and some more of it", "is not a checkpoint of PyTorch or safetensors: it is a text"),
        ("folder", "no student at .*thing"),
        ("store", "no student at .*store.zarr"),
        ("head", "holds SAM's head .* alone, no image encoder"),
        ("config", "damaged or no safetensors"),
        ("checkpoint", "is a checkpoint that training resumes from; give the run, "),
    ],
)
def test_wrong_kinds_of_student_are_told_in_two_lines(
    tmp_path: Path, run: Path, store: Path, content: bytes | str | None, told: str
) -> None:
    path = {"store": store, "head": run / "sam_head.safetensors", "config": run / "config.json"}.get(
        str(content), run / "last.pt" if content == "checkpoint" else tmp_path / "thing"
    )
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises((DistillError, CheckpointError), match=told) as raised:
        load_model(path)
    assert len(str(raised.value).splitlines()) <= 2
