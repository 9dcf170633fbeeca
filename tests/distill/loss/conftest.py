from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from torch import Tensor

from mobilesam.distill.data.loader import AnnotatedObjects
from mobilesam.distill.loss.base import MicroBatch
from mobilesam.sam.modeling.head import SamHead, build_head
from mobilesam.sam.teacher import load_head


@pytest.fixture(scope="module")
def head_tensors() -> dict[str, Tensor]:
    return load_head("vit_nano", None)


@pytest.fixture(scope="module")
def head(head_tensors: dict[str, Tensor]) -> SamHead:
    return build_head({key: value.clone() for key, value in head_tensors.items()}, 64)


@pytest.fixture(scope="module")
def masked_store(images: Path, make_store: Callable[..., Path], head_tensors: dict[str, Tensor]) -> Path:
    """Store of the six pictures with random embeddings, and with a head that works."""
    return make_store(images, head={key: value.numpy() for key, value in head_tensors.items()})


@pytest.fixture
def labelled_store(
    images: Path, tmp_path: Path, make_store: Callable[..., Path], head_tensors: dict[str, Tensor]
) -> Path:
    """Store as `masked_store`, with two objects in the annotations beside each picture."""
    folder = tmp_path / "labelled"
    shutil.copytree(images, folder)
    store = make_store(folder, head={key: value.numpy() for key, value in head_tensors.items()})
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        width, height = Image.open(path).size
        _annotate(path, [(0, 0, width // 2, height), (width // 2, height // 4, width, height)], number)
    return store


def _annotate(path: Path, boxes: list[tuple[int, int, int, int]], number: int = 0) -> None:
    """Write SA-1B's JSON beside a picture, its objects filled boxes."""
    width, height = Image.open(path).size
    objects = []
    for x0, y0, x1, y1 in boxes:
        mask = np.zeros((height, width), np.uint8)
        mask[y0:y1, x0:x1] = 1
        rle = coco.encode(np.asfortranarray(mask))
        segmentation = {"size": [height, width], "counts": rle["counts"].decode()}
        objects.append(
            {
                "id": len(objects),
                "segmentation": segmentation,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(mask.sum()),
            }
        )
    about = {"image_id": number, "width": width, "height": height, "file_name": path.name}
    path.with_suffix(".json").write_text(json.dumps({"image": about, "annotations": objects}))


@pytest.fixture(scope="session")
def random_micro_batch() -> Callable[[list[bool]], MicroBatch]:
    """random_micro_batch(annotated) -> images of 64 pixels; each has one object, its left half, of two places."""
    return _random_micro_batch


def _random_micro_batch(annotated: list[bool]) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    count = len(annotated)
    masks = torch.zeros(count, 2, 32, 32, dtype=torch.bool)
    masks[:, 0, :, :16] = True
    known = torch.zeros(count, 2, dtype=torch.bool)
    known[:, 0] = True
    return MicroBatch(
        student_BCHW=torch.randn(count, 256, 4, 4, generator=generator),
        teacher_BCHW=torch.randn(count, 256, 4, 4, generator=generator),
        valid_BHW=torch.ones(count, 4, 4, dtype=torch.bool),
        sizes_B2=torch.full((count, 2), 64),
        generator=torch.Generator().manual_seed(2),
        objects=AnnotatedObjects(masks_BQMM=masks, known_BQ=known, annotated_B=torch.tensor(annotated)),
    )
