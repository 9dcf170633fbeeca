"""X.pt: what MobileSAM's own code and ours make of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_student import IMAGE_SIZE, save_random_student

from mobilesam.distill import load_student
from mobilesam.predict import ExportConfig, PredictError, export, load_model, load_teacher_model

PHOTO = Path(__file__).parents[3] / "examples" / "photos" / "coffee.jpg"


@pytest.fixture(scope="module")
def random_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_student(
        tmp_path_factory.mktemp("random_student") / "student.safetensors", teacher="vit_h"
    )


@pytest.fixture(scope="module")
def exported(random_student: Path) -> tuple[Path, dict[str, Any]]:
    out = random_student.parent / "mine.pt"
    return out, export(ExportConfig(student=random_student, out=out))


def _upstream() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mobile_sam

    return mobile_sam


def test_it_has_upstreams_keys_and_shapes_in_contiguous_float32(
    exported: tuple[Path, dict[str, Any]],
) -> None:
    state = torch.load(exported[0], weights_only=True)
    wanted = _upstream().sam_model_registry["vit_t"]().state_dict()
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in wanted.items()
    }
    for key, value in state.items():
        assert value.is_contiguous()
        assert value.dtype == wanted[key].dtype, key
        assert value.dtype == torch.float32 or key.endswith("num_batches_tracked")


def test_upstream_loads_it_strictly_and_embeds_at_1024_as_ours(
    exported: tuple[Path, dict[str, Any]],
) -> None:
    upstream = _upstream().sam_model_registry["vit_t"](checkpoint=str(exported[0])).eval()
    ours = load_model(exported[0]).sam
    pixels_BCHW = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = upstream.image_encoder(pixels_BCHW), ours.image_encoder(pixels_BCHW)
    assert found.shape == (1, 256, 64, 64)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.long
def test_upstreams_predictor_gives_the_masks_of_our_model(exported: tuple[Path, dict[str, Any]]) -> None:
    from segment_anything import SamPredictor

    mobile_sam = _upstream()
    theirs = mobile_sam.SamPredictor(
        mobile_sam.sam_model_registry["vit_t"](checkpoint=str(exported[0])).eval()
    )
    ours = SamPredictor(load_model(exported[0]).sam)
    image_HWC = np.asarray(Image.open(PHOTO).convert("RGB"))
    points, labels = np.array([[450, 120], [300, 300]]), np.array([1, 0])
    (masks, iou, _), (wanted, wanted_iou, _) = (
        (predictor.set_image(image_HWC), predictor.predict(points, labels))[1] for predictor in (ours, theirs)
    )
    assert 0.001 < wanted.mean() < 0.999
    assert (masks != wanted).mean() <= 1e-4
    assert np.allclose(iou, wanted_iou, atol=1e-4)


def test_it_loads_back_through_our_own_loaders_with_the_same_weights(
    random_student: Path, exported: tuple[Path, dict[str, Any]]
) -> None:
    original = load_model(random_student).sam.state_dict()
    encoder, info = load_student(exported[0], image_size=IMAGE_SIZE)
    assert info == {"student": "tiny_vit", "image_size": IMAGE_SIZE, "student_size": IMAGE_SIZE}
    teacher = load_teacher_model("mobile_sam", exported[0], image_size=IMAGE_SIZE)
    again = load_model(exported[0], image_size=IMAGE_SIZE)
    for sam in (teacher.sam, again.sam):
        state = sam.state_dict()
        assert state.keys() == original.keys()
        assert all(torch.equal(state[key], original[key]) for key in original)
    assert torch.equal(encoder.state_dict()["neck.0.weight"], original["image_encoder.neck.0.weight"])


def test_another_image_size_than_upstreams_is_told(exported: tuple[Path, dict[str, Any]]) -> None:
    (warning,) = exported[1]["warnings"]
    assert "1024" in warning
    assert f"--image-size {IMAGE_SIZE}" in warning


def test_at_1024_there_is_nothing_to_tell(mobile_sam_pt: Path, tmp_path: Path) -> None:
    result = export(ExportConfig(student=mobile_sam_pt, out=tmp_path / "again.pth"))
    assert result["warnings"] == []
    first, second = (torch.load(path, weights_only=True) for path in (mobile_sam_pt, tmp_path / "again.pth"))
    used = [key for key in first if ".head." not in key and "norm_head" not in key]
    assert all(torch.equal(first[key], second[key]) for key in used)


def test_another_student_is_refused_with_the_reason_and_the_mend(tmp_path: Path) -> None:
    student = save_random_student(tmp_path / "other.safetensors", "tiny_vit_11m")
    with pytest.raises(PredictError, match=r"no class for tiny_vit_11m.*a folder"):
        export(ExportConfig(student=student, out=tmp_path / "other.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_the_head_may_come_from_a_store(run: Path, store: Path, tmp_path: Path) -> None:
    export(ExportConfig(student=run, head=store, out=tmp_path / "a.pt"))
    export(ExportConfig(student=run, out=tmp_path / "b.pt"))
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert all(torch.equal(first[key], second[key]) for key in first)
