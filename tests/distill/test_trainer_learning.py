"""Learning: the whole trainer with a real teacher and real photos, small enough for two cores.

Shape suffixes: C channels, K channels of the map's input, h, w rows and columns of its kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mobilesam.distill import DistillConfig, Run, distill
from mobilesam.sam import image_pixels, load_image
from mobilesam.sam.teacher import load_teacher

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
PIECES = 4  # a photo is cut into as many rows and columns


def embeddings_by(embed: Callable[[Tensor], Tensor], images: Path, image_size: int) -> np.ndarray:
    """Embeddings of all images of a folder in the order of names; `embed` takes normalised pixels (1, 3, S, S)."""
    pixels = [
        image_pixels(load_image(file.read_bytes(), image_size), image_size)
        for file in sorted(images.iterdir())
    ]
    return np.concatenate([embed(pixels_1CHW).numpy() for pixels_1CHW in pixels])


def colours(pixels_1CHW: Tensor) -> Tensor:
    """Embedding of a teacher that sees colours alone: a fixed random map of the colours of each cell's quarters.

    A student learns it in two epochs; vit_nano's embeddings take dozens.
    """
    map_CKhw = torch.randn(256, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    return F.conv2d(F.avg_pool2d(pixels_1CHW, 8), map_CKhw, stride=2)


def train(store: Path, **options: object) -> Run:
    settings = {"batch_size": 4, "micro_batch": 4, "device": "cpu", "precision": "float32", **options}
    return Run.open(distill(DistillConfig(store=store, **settings))["run"])


def overfitted(tmp_path: Path, make_store: Callable[..., Path], image_size: int, epochs: int) -> float:
    """Skill of a student on the twelve photos that it was trained on."""
    folder = tmp_path / "photos"
    folder.mkdir()
    photos = sorted(file for file in PHOTOS.iterdir() if file.suffix in (".jpg", ".png"))[:12]
    for file in photos:
        (folder / file.name).write_bytes(file.read_bytes())
    Image.open(photos[1]).convert("RGB").crop((0, 0, 200, 200)).save(folder / "held_out.png")
    teacher = load_teacher("vit_nano", None, image_size=image_size)
    embeddings = embeddings_by(teacher.embed, folder, image_size)
    store = make_store(folder, image_size=image_size, embeddings=embeddings)
    run = train(store, epochs=epochs, batch_size=2, micro_batch=2, val_fraction=0.01)
    assert len(run.split.train) == 12
    logged = run.last("train_eval")
    assert logged is not None
    assert logged["rows"] == 12
    skill: float = logged["skill"]
    return skill


def test_a_student_learns_twelve_small_photos(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    assert overfitted(tmp_path, make_store, image_size=64, epochs=8) >= 0.4


@pytest.mark.long
def test_a_student_overfits_twelve_photos(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    assert overfitted(tmp_path, make_store, image_size=256, epochs=40) >= 0.8


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos cut into sixteen pieces each."""
    folder = tmp_path_factory.mktemp("pieces")
    for name in ("astronaut.jpg", "coffee.jpg", "cat.png"):
        photo = Image.open(PHOTOS / name).convert("RGB")
        width, height = photo.width // PIECES, photo.height // PIECES
        for place in range(PIECES * PIECES):
            left, top = place % PIECES * width, place // PIECES * height
            piece = photo.crop((left, top, left + width, top + height))
            piece.save(folder / f"{name[:3]}{place:02d}.png")
    return folder


def test_true_pairs_generalise_to_other_images_and_shuffled_pairs_do_not(
    pieces: Path, make_store: Callable[..., Path]
) -> None:
    embeddings = embeddings_by(colours, pieces, 128)
    # By a third of all: every image gets the embedding of a piece of another photo.
    shuffled = np.roll(embeddings, len(embeddings) // 3, axis=0)
    skills = []
    for paired in (embeddings, shuffled):
        store = make_store(pieces, image_size=128, embeddings=paired)
        run = train(store, student="deit_tiny", epochs=2, val_fraction=0.25)
        val = run.last("val")
        assert val is not None
        skills.append((val["skill"], val["skill_valid"]))
    assert min(skills[0]) > 0.2
    # The mean of n embeddings has 1/n of their variance: a smooth constant beats it by as much.
    assert max(skills[1]) <= 1 / len(run.split.train)
