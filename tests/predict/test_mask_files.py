from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pycocotools import mask as coco

from mobilesam.predict import PredictError
from mobilesam.predict.mask_files import Mask, add_masks, check_masks_folder, encode_mask, encode_rle
from mobilesam.predict.outputs import RLE, Outputs

PIXELS = arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def mask(pixels_HW: np.ndarray, iou: float | None = 0.9) -> Mask:
    height, width = pixels_HW.shape
    return Mask.from_pixels(
        pixels_HW,
        predicted_iou=iou,
        stability_score=None,
        point_coords=[[1.0, 2.0]],
        crop_box=[0, 0, width, height],
    )


def masks(count: int) -> list[Mask]:
    rng = np.random.default_rng(count)
    return [mask(rng.random((12, 7)) < 0.5) for _ in range(count)]


def write(folder: Path, written: list[Mask]) -> None:
    check_masks_folder(folder)
    with Outputs() as outputs:
        outputs.commit(add_masks(outputs, folder, written))


def write_together(folder: Path, others: Iterable[tuple[Path, str]]) -> None:
    """Three masks, and other files after them."""
    with Outputs() as outputs:
        stale = add_masks(outputs, folder, masks(3))
        for path, option in others:
            outputs.add(path, b'{"new": 1}', option, RLE)
        outputs.commit(stale)


@settings(max_examples=60, deadline=None)
@given(PIXELS)
def test_pixels_area_and_box_are_those_of_brute_force(pixels_HW: np.ndarray) -> None:
    kept = mask(pixels_HW)
    np.testing.assert_array_equal(kept.pixels(), pixels_HW)
    rows, columns = np.nonzero(pixels_HW)
    assert kept.area == len(rows)
    if len(rows):
        left, top = min(columns), min(rows)
        assert kept.bbox == [left, top, max(columns) - left + 1, max(rows) - top + 1]
    else:
        assert kept.bbox == [0, 0, 0, 0]


def test_a_masks_picture_is_grey_of_8_bits_with_0_and_255_alone() -> None:
    pixels_HW = np.random.default_rng(0).random((30, 41)) < 0.5
    image = Image.open(io.BytesIO(encode_mask(mask(pixels_HW))))
    assert (image.format, image.mode) == ("PNG", "L")
    np.testing.assert_array_equal(np.asarray(image), np.where(pixels_HW, 255, 0))


def test_rle_is_sa_1bs_layout_and_pycocotools_reads_it() -> None:
    written = masks(3)
    found = json.loads(encode_rle(written, "photo.jpg", (12, 7)))
    assert found["image"] == {"width": 7, "height": 12, "file_name": "photo.jpg"}
    keys = "id segmentation area bbox predicted_iou stability_score crop_box point_coords"
    for index, (annotation, original) in enumerate(zip(found["annotations"], written, strict=True)):
        assert set(annotation) == set(keys.split())
        assert annotation["id"] == index
        assert annotation["segmentation"]["size"] == [12, 7]
        assert isinstance(annotation["segmentation"]["counts"], str)
        decoded = coco.decode(annotation["segmentation"])
        np.testing.assert_array_equal(decoded == 1, original.pixels())
        assert annotation["area"] == decoded.sum()
        assert annotation["point_coords"] == [[1.0, 2.0]]


def test_undefined_scores_are_null_and_no_masks_are_an_empty_list() -> None:
    text = encode_rle([mask(np.ones((2, 2), bool), iou=None)], "a", (2, 2)).decode()
    assert "NaN" not in text
    assert json.loads(text)["annotations"][0]["predicted_iou"] is None
    assert json.loads(encode_rle([], "a", (2, 3)))["annotations"] == []


def test_masks_of_an_earlier_run_are_replaced_all_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    write(folder, masks(5))
    assert sorted(path.name for path in folder.iterdir()) == [f"00{i}.png" for i in range(5)]
    fewer = masks(2)
    write(folder, fewer)
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", "001.png"]
    for index, original in enumerate(fewer):
        np.testing.assert_array_equal(
            np.asarray(Image.open(folder / f"00{index}.png")) == 255, original.pixels()
        )
    write(folder, [])
    assert list(folder.iterdir()) == []


def test_beyond_999_masks_names_get_longer_and_are_replaced_too(tmp_path: Path) -> None:
    write(tmp_path / "masks", [mask(np.ones((1, 1), bool))] * 1002)
    assert (tmp_path / "masks" / "1001.png").is_file()
    write(tmp_path / "masks", masks(1))
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["000.png"]


@pytest.mark.parametrize("name", ["000.png", "notes.txt", ".hidden", "0.png", "000.png.bak"])
def test_a_folder_with_anything_else_is_refused_even_with_someones_numbered_pictures(
    tmp_path: Path, name: str
) -> None:
    write(tmp_path / "masks", masks(2))
    foreign = tmp_path / "masks" / name
    foreign.unlink(missing_ok=True)
    Image.new("L", (3, 3)).save(foreign, "PNG")
    before = foreign.read_bytes()
    with pytest.raises(PredictError, match=f"holds 1 other files, such as {name}"):
        check_masks_folder(tmp_path / "masks")
    assert foreign.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_numbered_file_that_is_no_picture_is_another_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "000.png").write_bytes(content)
    with pytest.raises(PredictError, match="1 other files"):
        check_masks_folder(tmp_path)


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".0123abcd.partial").write_bytes(b"half")
    write(tmp_path, masks(1))
    assert [path.name for path in tmp_path.iterdir()] == ["000.png"]


def test_a_failure_leaves_every_old_file_and_no_new_one(tmp_path: Path) -> None:
    folder, other = tmp_path / "masks", tmp_path / "overlay.png"
    write(folder, masks(2))
    other.write_bytes(b"old")
    before = {path: path.read_bytes() for path in (*folder.iterdir(), other)}
    with pytest.raises(PredictError, match=r"--rle: .*missing.* can't be written"):
        write_together(folder, [(other, "--out"), (tmp_path / "missing" / "rle.json", "--rle")])
    assert {path: path.read_bytes() for path in (*folder.iterdir(), other)} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks", "overlay.png"]


def test_a_mask_that_was_edited_since_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    write(folder, masks(2))
    with Image.open(folder / "001.png") as picture:
        picture.putpixel((0, 0), 128)
        text = PngInfo()
        for key, value in picture.info.items():
            text.add_text(key, value)
        picture.save(folder / "001.png", pnginfo=text)
    before = (folder / "001.png").read_bytes()
    with pytest.raises(PredictError, match=r"holds 1 other files, such as 001\.png"):
        write(folder, masks(1))
    assert (folder / "001.png").read_bytes() == before


def test_masks_of_a_version_without_marks_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    (folder / "000.png").write_bytes(encode_mask(masks(1)[0]))
    write(folder, masks(2))
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", "001.png"]


def test_an_interrupt_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Path]:
        yield tmp_path / "overlay.png"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_together(tmp_path / "masks", ((path, "--out") for path in interrupted()))
    assert list(tmp_path.iterdir()) == []


def test_a_masks_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, told in {tmp_path / "file": "is a file", tmp_path / "none" / "x": "there is no folder"}.items():
        with pytest.raises(PredictError, match=told):
            check_masks_folder(path)
