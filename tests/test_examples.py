"""The scripts in examples/, run as users run them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from random_student import save_random_student
from segment_anything import SamPredictor
from tiff_writer import write_tiff

from mobilesam.predict import ExportConfig, export, load_model
from mobilesam.sam import decode_image

EXAMPLES = Path(__file__).parents[1] / "examples"
POINT = ("210", "160")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    student = save_random_student(
        folder / "student.safetensors", "timm:resnet18", image_size=128, teacher="vit_h"
    )
    export(ExportConfig(student=student, out=folder / "out"))
    return folder / "out"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo that lies on its side, as phones store them."""
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(EXAMPLES / "photos" / "coffee.jpg").rotate(90, expand=True).save(path, exif=exif)
    return path


def _wanted(folder: Path, photo: Path) -> np.ndarray:
    """The best of three masks by predicted IoU, from segment_anything's predictor on our model."""
    predictor = SamPredictor(load_model(folder).sam)
    predictor.set_image(decode_image(photo.read_bytes()))
    masks, iou, _ = predictor.predict(np.array([[float(number) for number in POINT]]), np.array([1]))
    return masks[iou.argmax()]


def _assert_same(mask_file: Path, wanted: np.ndarray) -> None:
    with Image.open(mask_file) as image:
        found = np.asarray(image) > 0
    assert found.shape == wanted.shape
    assert 0.01 < wanted.mean() < 0.99, "a mask that says something"
    assert (found != wanted).mean() <= 1e-4


def test_segment_onnx_gives_our_mask_without_torch(exported: Path, photo: Path, tmp_path: Path) -> None:
    script = (
        "import runpy, sys\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'mobilesam' not in sys.modules\n"
    )
    files = [exported / "encoder.onnx", exported / "decoder.onnx", photo]
    done = subprocess.run(
        [sys.executable, "-c", script, str(EXAMPLES / "segment_onnx.py"), *map(str, files), *POINT, "mask.png"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert re.match(r"embedding \d+\.\d{3} s, mask \d+\.\d{3} s\n", done.stdout)
    _assert_same(tmp_path / "mask.png", _wanted(exported, photo))
    again = subprocess.run(
        [sys.executable, str(EXAMPLES / "segment_onnx.py"), *map(str, files), *POINT, "mask.png"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (again.returncode, again.stderr) == (1, "mask.png exists: give another name\n")


GREY = np.asarray(Image.open(EXAMPLES / "photos" / "coffee.jpg").convert("L").resize((48, 32)))
RAMP = GREY.astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("picture", "format"),
    [
        (Image.fromarray(RAMP), "PNG"),
        (Image.fromarray(RAMP), "TIFF"),
        (write_tiff(RAMP.astype(">u2")[..., None]), ""),
        (write_tiff(RAMP[..., None], photometric=0), ""),
        (Image.fromarray(GREY), "PNG"),
        (Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (48, 32), 0)]), "PNG"),
        (Image.open(EXAMPLES / "photos" / "coffee.jpg").resize((48, 32)).quantize(64), "PNG"),
        (Image.open(EXAMPLES / "photos" / "coffee.jpg").resize((48, 32)).convert("CMYK"), "JPEG"),
    ],
)
def test_segment_onnx_reads_photos_as_we_do(
    tmp_path: Path, picture: Image.Image | bytes, format: str
) -> None:
    file = tmp_path / "photo"
    if isinstance(picture, bytes):
        file.write_bytes(picture)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(file, format, exif=exif)
    read_photo = runpy.run_path(str(EXAMPLES / "segment_onnx.py"))["read_photo"]
    assert np.array_equal(np.asarray(read_photo(str(file))), decode_image(file.read_bytes()))


def test_segment_onnx_without_arguments_tells_its_usage() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "segment_onnx.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "encoder.onnx decoder.onnx photo.jpg X Y mask.png" in done.stderr


def test_segment_student_gives_our_mask(exported: Path, photo: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, EXAMPLES / "segment_student.py", exported, photo, *POINT, "mask.png"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    _assert_same(tmp_path / "mask.png", _wanted(exported, photo))
