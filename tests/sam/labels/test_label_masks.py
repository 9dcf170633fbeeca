from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco

from mobilesam.sam import AnnotationError, LabelMasks
from mobilesam.sam.labels import label_masks
from mobilesam.sam.labels.rle import write_runs

VALUES = np.zeros((24, 32), dtype=np.uint16)
VALUES[2:9, 3:12] = 1
VALUES[2:9, 20:30] = 1  # an object of two parts
VALUES[12:20, :] = 7
VALUES[21, 31] = 40_000

values = arrays.arrays(np.int64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 4))


def palette(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels.astype(np.uint8), "P")
    image.putpalette([number % 256 for number in range(768)])
    return image


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., LabelMasks]:
    """write(image, name="p1.png") -> the folder with one more mask."""

    def write_mask(image: Image.Image, name: str = "p1.png", **options: Any) -> LabelMasks:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name, **options)
        return LabelMasks(tmp_path)

    return write_mask


@given(values)
def test_every_value_but_zero_is_an_object_as_pycocotools_encodes_it(values_HW: np.ndarray) -> None:
    runs = label_masks._runs_by_value(values_HW)
    assert list(runs) == sorted(set(values_HW.ravel().tolist()) - {0})
    for value, found in runs.items():
        wanted = coco.encode(np.asfortranarray((values_HW == value).astype(np.uint8)))
        assert write_runs(found) == wanted["counts"].decode()


SMALL = np.where(VALUES > 255, 9, VALUES)
KINDS: dict[str, tuple[Image.Image, np.ndarray]] = {
    "16 bits of grey": (Image.fromarray(VALUES), VALUES),
    "8 bits of grey": (Image.fromarray(SMALL.astype(np.uint8)), SMALL),
    "palette": (palette(SMALL), SMALL),
    "1 bit": (Image.fromarray(SMALL == 7), SMALL == 7),
    "grey saved in colours": (Image.fromarray(SMALL.astype(np.uint8)).convert("RGB"), SMALL),
    "grey saved with alpha": (Image.fromarray(SMALL.astype(np.uint8)).convert("RGBA"), SMALL),
}


@pytest.mark.parametrize("name", KINDS)
def test_integers_of_every_kind_of_png_are_objects(name: str, write: Callable[..., LabelMasks]) -> None:
    image, wanted_HW = KINDS[name]
    found = write(image).read("p1.jpg", size=(24, 32))
    assert found is not None
    wanted = [wanted_HW == value for value in np.unique(wanted_HW) if value]
    assert len(found) == len(wanted)
    for index, mask_HW in enumerate(wanted):
        assert np.array_equal(found.mask(index), mask_HW)
        assert found.areas_P[index] == mask_HW.sum()
        x, y, width, height = coco.toBbox(found.rle(index)).tolist()
        assert found.boxes_P4[index].tolist() == [x, y, x + width, y + height]
    assert not found.left_out


def test_a_palette_of_few_colours_is_read_by_index(write: Callable[..., LabelMasks]) -> None:
    found = write(palette(VALUES == 7), bits=1).read("p1.jpg", size=(24, 32))
    assert found is not None
    assert found.areas_P.tolist() == [8 * 32]


def test_voc_void_is_no_object_beside_others(write: Callable[..., LabelMasks]) -> None:
    found = write(palette(np.where(VALUES > 255, 255, VALUES))).read("p1.jpg")
    assert found is not None
    assert [len(found), found.left_out[0][0]] == [2, "void (index 255 of a palette)"]
    alone = write(palette(np.where(VALUES == 7, 255, 0))).read("p1.jpg")
    assert alone is not None
    assert [len(alone), alone.left_out] == [1, ()]


def test_masks_are_found_by_the_photos_name_without_its_suffix(write: Callable[..., LabelMasks]) -> None:
    grey = Image.fromarray(SMALL.astype(np.uint8))
    for name in ("day/p1.png", "night/p1.PNG", "p2.jpg.png", "p3.png", "p4.png"):
        masks = write(grey, name)
    match = masks.match(["day/p1.jpg", "night/p1.jpg", "t.tar/p2.jpg", "p3.jpg", "p3.png"])
    assert {key: masks.names[place] for key, place in match.found.items()} == {
        "day/p1.jpg": "day/p1.png", "night/p1.jpg": "night/p1.PNG", "t.tar/p2.jpg": "p2.jpg.png",
    }  # fmt: skip
    assert (match.missing, match.ambiguous) == (("p4.png",), ("p3.png",))
    assert masks.has_labels("day/p1.jpg")
    assert not masks.has_labels("p3.jpg")
    assert masks.read("p3.jpg") is None


def test_masks_named_for_what_they_are_belong_to_the_photo_if_it_has_no_other(
    write: Callable[..., LabelMasks],
) -> None:
    grey = Image.fromarray(SMALL.astype(np.uint8))
    for name in (
        "p1_mask.png",
        "day2/p1_mask.png",
        "P2-SEG.png",
        "p3_mask.png",
        "p3.png",
        "p4_mask.png",
        "p4_seg.png",
    ):
        masks = write(grey, name)
    keys = ["p1.jpg", "../day2/p1.jpg", "p2.jpg", "p3.jpg", "p4.jpg"]
    match = masks.match(keys, Path("/photos/day1"))
    assert {key: masks.names[place] for key, place in match.found.items()} == {
        "p1.jpg": "p1_mask.png", "../day2/p1.jpg": "day2/p1_mask.png", "p2.jpg": "P2-SEG.png", "p3.jpg": "p3.png",
    }  # fmt: skip
    assert (match.missing, match.ambiguous) == (("p3_mask.png",), ("p4_mask.png", "p4_seg.png"))


def test_the_digest_is_that_of_keys_and_contents(write: Callable[..., LabelMasks], tmp_path: Path) -> None:
    masks = write(Image.fromarray(VALUES))
    before = masks.digest(["p1.jpg", "p2.jpg"])
    assert masks.digest(["p2.jpg", "p1.jpg"]) == before
    assert masks.digest(["p1.jpeg", "p2.jpg"]) != before
    (tmp_path / "p1.png").write_bytes((tmp_path / "p1.png").read_bytes() + b"x")
    assert masks.digest(["p1.jpg", "p2.jpg"]) != before


def test_a_mask_that_cannot_be_used_fails_its_image_with_the_fact(
    write: Callable[..., LabelMasks], tmp_path: Path
) -> None:
    masks = write(Image.fromarray(VALUES))
    with pytest.raises(
        AnnotationError, match=r"^p1.jpg: its mask p1.png: they are for .* 32 x 24, .* 9 x 8$"
    ):
        masks.read("p1.jpg", size=(8, 9))
    with pytest.raises(AnnotationError, match=r"EXIF orientation \(8\) turns it"):
        masks.read("p1.jpg", size=(32, 24), turn=lambda: 8)
    rng = np.random.default_rng(0)
    masks = write(Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)))
    with pytest.raises(AnnotationError, match="it has RGB pixels, not one integer an object"):
        masks.read("p1.jpg")
    whole = (tmp_path / "p1.png").read_bytes()
    (tmp_path / "p1.png").write_bytes(whole[:-500])
    with pytest.raises(AnnotationError, match="it is damaged"):
        masks.read("p1.jpg")
    (tmp_path / "p1.png").write_bytes(zlib.compress(whole))
    with pytest.raises(AnnotationError, match="it is no PNG that can be read"):
        masks.read("p1.jpg")
    (tmp_path / "p1.png").unlink()
    with pytest.raises(AnnotationError, match=r"its mask p1.png can't be read: No such file"):
        masks.read("p1.jpg")


def test_a_folder_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="gone is no folder of label masks"):
        LabelMasks(tmp_path / "gone")
    (tmp_path / ".hidden.png").touch()
    with pytest.raises(AnnotationError, match=r"has no label masks: PNGs named like the photos"):
        LabelMasks(tmp_path)
