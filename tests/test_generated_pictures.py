"""The generator of pictures with known objects, examples/generate_pictures.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mobilesam.sam import list_images
from mobilesam.sam.labels.annotations import AnnotationFiles

SCRIPT = Path(__file__).parents[1] / "examples" / "generate_pictures.py"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_pictures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_seed_gives_the_same_pictures_and_another_seed_others(generator: ModuleType):
    one, same, other = (generator.generate(seed, 3, 128) for seed in (0, 0, 1))
    assert np.array_equal(one.pixels_HWC, same.pixels_HWC)
    assert all(np.array_equal(*pair) for pair in zip(one.masks, same.masks, strict=True))
    assert one.pixels_HWC.shape != other.pixels_HWC.shape or not np.array_equal(
        one.pixels_HWC, other.pixels_HWC
    )


@pytest.mark.parametrize("index", range(8))
def test_a_picture_has_five_objects_or_more_that_share_no_pixel(generator: ModuleType, index: int):
    picture = generator.generate(0, index, 160)
    assert max(picture.pixels_HWC.shape[:2]) == 160
    assert len(picture.masks) >= 5
    assert np.sum(picture.masks, axis=0).max() == 1
    assert min(mask.sum() for mask in picture.masks) >= 9


def test_a_scene_is_the_same_at_any_size(generator: ModuleType):
    small, large = (generator.generate(0, 5, side) for side in (128, 512))
    shape = small.pixels_HWC.shape[1::-1]
    shrunk = np.asarray(Image.fromarray(large.pixels_HWC).resize(shape, Image.Resampling.BOX), np.float32)
    assert np.abs(shrunk - small.pixels_HWC).mean() < 12
    whole_small, whole_large = (np.any(picture.masks, axis=0) for picture in (small, large))
    shrunk_mask = np.asarray(Image.fromarray(whole_large).resize(shape, Image.Resampling.BOX))
    assert np.mean(shrunk_mask == whole_small) > 0.97


def test_objects_are_of_very_different_sizes(generator: ModuleType):
    shares = [mask.mean() for index in range(12) for mask in generator.generate(0, index, 96).masks]
    assert np.quantile(shares, 0.9) > 15 * np.quantile(shares, 0.1)


def test_what_is_written_is_in_sa_1bs_layout_and_its_masks_are_read_back(
    generator: ModuleType, tmp_path: Path
):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path, "--count", "2", "--side", "128", "--seed", "7"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("2 pictures with their labels")
    images = list_images([tmp_path])
    assert [file.key for file in images.files] == ["sa_1.jpg", "sa_2.jpg"]
    files = AnnotationFiles(tmp_path)
    for index, file in enumerate(images.files, 1):
        picture = generator.generate(7, index, 128)
        found = files.read(file.key, size=picture.pixels_HWC.shape[:2])
        assert found is not None
        assert len(found) == len(picture.masks)
        for i, mask in enumerate(picture.masks):
            assert np.array_equal(found.mask(i), mask)
            x0, y0, x1, y1 = found.boxes_P4[i]
            ys, xs = np.nonzero(mask)
            assert (x0, y0, x1, y1) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
