"""examples/vit_nano/train_on_scenes.py: the pictures that vit_nano learns from, and that a training resumes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/vit_nano/layered_pictures.py with two pictures of each kind, of 64 pixels."""
    from examples.vit_nano import layered_pictures

    monkeypatch.setattr(layered_pictures, "KINDS", dict.fromkeys(layered_pictures.KINDS, 2))
    monkeypatch.setattr(layered_pictures, "SIDE", 64)
    return layered_pictures


@pytest.mark.parametrize("index", range(6))
def test_every_part_lies_in_one_whole_and_every_whole_in_one_group(scenes: ModuleType, index: int) -> None:
    from examples.vit_nano.scene import scene

    one, same = scene(3, index, 96), scene(3, index, 96)
    assert np.array_equal(one.pixels_HWC, same.pixels_HWC)
    assert np.array_equal(one.numbers_LHW, same.numbers_LHW)
    assert one.pixels_HWC.std() > 0
    for finer, coarser in pairwise(one.numbers_LHW):
        assert finer.min() > 0
        for number in np.unique(finer):
            assert len(np.unique(coarser[finer == number])) == 1


def test_regions_of_a_photo_follow_its_edges_and_are_fewer_at_each_level(scenes: ModuleType) -> None:
    from examples.vit_nano.photo_regions import MergeWeights, regions

    rng = np.random.default_rng(0)
    pixels_HWC = rng.integers(90, 110, (96, 128, 3)).astype(np.uint8)
    truth_HW = np.zeros((96, 128), bool)
    truth_HW[20:70, 30:90] = True
    pixels_HWC[truth_HW] = pixels_HWC[truth_HW] // 2 + np.array([100, 0, 0], np.uint8)
    levels = regions(pixels_HWC, [12, 5, 2], MergeWeights())
    assert [len(np.unique(level_HW)) for level_HW in levels] == [12, 5, 2]
    inside = levels[2] == levels[2][45, 60]
    assert (inside & truth_HW).sum() / (inside | truth_HW).sum() > 0.85
    for finer, coarser in pairwise(levels):
        assert all(len(np.unique(coarser[finer == number])) == 1 for number in np.unique(finer))


def test_pictures_are_made_once_and_prompts_lie_in_their_objects(scenes: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in scenes.KINDS:
        paths = scenes.make(tmp_path, kind, 1)
        before = [path.stat().st_mtime_ns for path in paths]
        assert scenes.make(tmp_path, kind, 1) == paths
        assert [path.stat().st_mtime_ns for path in paths] == before
        for path in paths:
            sample = scenes.square(path, 128, rng)
            assert max(sample.size) == 128
            assert not sample.canvas_SSC[sample.size[0] :].any()
            for prompt in scenes.draw_prompts(sample, 5, rng):
                assert sample.levels_LMM[prompt.level, prompt.y, prompt.x] == prompt.number


def test_the_training_goes_on_from_weights_and_is_resumed(
    scenes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from examples.vit_nano import train_on_scenes as training

    monkeypatch.setattr(training, "PROMPTED", {256: (1, 3)})
    monkeypatch.setattr(training, "validate", lambda *_: {})
    package = Path(__file__).parents[1] / "sam" / "vit_nano.safetensors"
    pictures = {kind: scenes.make(tmp_path, kind, 1) for kind in scenes.KINDS}
    run = training.Run(tmp_path / "run", package, 1e-4)
    (tmp_path / "run").mkdir()
    first = run.step
    before = {key: value.clone() for key, value in run.sam.state_dict().items()}
    training.train(run, pictures, first + 1, [256], 1e-4)
    run = training.Run(tmp_path / "run", package, 1e-4)
    assert run.step == first + 1
    training.train(run, pictures, first + 2, [256], 0.0)
    assert run.lr == pytest.approx(0.0)
    moved = [key for key, value in run.sam.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.startswith("image_encoder") for key in moved)
    assert any(key.startswith("head.mask_decoder") for key in moved)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


def test_listed_photos_are_named_by_git_ids_and_small_copies_are_written(
    scenes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    from examples.vit_nano import fetch_photos

    for repository in fetch_photos.PHOTOS:
        assert repository in fetch_photos.LICENCES
        assert all(len(photo.content) == 40 and photo.path for photo in fetch_photos.listed(repository))
    source = tmp_path / "source"
    source.mkdir()
    Image.new("RGB", (2000, 1000), (200, 10, 10)).save(source / "a b.jpg")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", "-C", str(source), *command], check=True)
    found = subprocess.run(
        ["git", "-C", str(source), "rev-parse", "HEAD:a b.jpg"], check=True, capture_output=True, text=True
    )
    content = found.stdout.strip()
    config = tmp_path / "config"
    config.write_text(f'[url "{source}"]\n\tinsteadOf = https://github.com/some/photos\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setattr(fetch_photos, "PHOTOS", {"some/photos": f"\n{content} a b.jpg\n"})
    assert fetch_photos.fetch(tmp_path / "out") == 1
    (written,) = (tmp_path / "out").iterdir()
    with Image.open(written) as image:
        assert image.size == (1024, 512)
    (source / "a b.jpg").unlink()
    assert fetch_photos.fetch(tmp_path / "out") == 1
