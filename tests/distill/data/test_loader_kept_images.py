"""Training from the images that a store keeps, without the photos that it was made of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from one_process import one_process_cluster, precompute_small

from mobilesam.distill import ComputeSettings, DistillConfig, DistillError, Loader, Run, distill, evaluate
from mobilesam.distill.data.rows import RecordsByRow
from mobilesam.store import EmbeddingStore, StoreDamaged
from mobilesam.verify import VerifyConfig, verify

Options = Callable[..., DistillConfig]


@pytest.fixture
def options(options: Options, small: str) -> Options:
    """Options with the smallest student: where images come from doesn't depend on the student."""
    return partial(options, student=small)


@pytest.fixture(scope="module")
def kept(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that keeps its six images, precomputed."""
    out = tmp_path_factory.mktemp("kept") / "store.zarr"
    with one_process_cluster() as cluster:
        precompute_small(images=(images,), out=out, scheduler=cluster.scheduler_address, keep_images=True)
    return out


@pytest.fixture
def alone(kept: Path, tmp_path: Path) -> Path:
    """Return the store as on another machine: moved, and without the photos."""
    moved = tmp_path / "elsewhere.zarr"
    shutil.copytree(kept, moved)
    for file in moved.rglob("zarr.json"):
        assert json.loads(file.read_text())
    return moved


def _without_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise AssertionError("a photo was read")

    monkeypatch.setattr("mobilesam.distill.data.loader.read_checked", fail)


def _losses(result: dict[str, Any]) -> list[Any]:
    return [line for line in Run.open(result["run"]).history() if line["kind"] in ("train", "val")]


def test_training_and_verifying_read_no_photo(
    alone: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_photos(monkeypatch)
    result = distill(options(alone))
    run = Run.open(result["run"])
    assert run.image_root is None
    checked = verify(VerifyConfig(split="val", points=1))
    for name in ("mse", "skill_valid"):
        assert checked[name] == pytest.approx(result["val"][name], rel=1e-5)
    assert distill(options(alone))["val"] == result["val"], "the finished run is found again"


def test_training_from_kept_images_and_from_photos_is_the_same_to_the_bit(
    kept: Path, images: Path, options: Options, tmp_path: Path
) -> None:
    losses = []
    for name, folder in (("kept", None), ("photos", images)):
        result = distill(options(kept, images=folder, out=tmp_path / name))
        losses.append(
            [
                (line["kind"], line.get("loss"), line.get("mse"), line.get("gradient_norm"))
                for line in _losses(result)
            ]
        )
    assert losses[0] == losses[1]
    assert Run.open(tmp_path / "photos").image_root == images


def test_a_damaged_kept_image_stops_training_by_name(alone: Path, options: Options) -> None:
    for tar in (alone / "embeddings" / "mobilesam" / "images").iterdir():
        data = bytearray(tar.read_bytes())
        data[600] ^= 1
        tar.write_bytes(data)
    with pytest.raises(StoreDamaged, match=r"\.tar, row \d .*--repair"):
        distill(options(alone))


def test_a_store_without_kept_images_needs_its_photos(
    images: Path, make_store: Callable[..., Path], options: Options, tmp_path: Path
) -> None:
    store = make_store(images)
    with pytest.raises(DistillError, match=r"--images .*nowhere: no such folder; give the folder"):
        distill(options(store, images=tmp_path / "nowhere"))
    with (
        EmbeddingStore.open(store) as opened,
        Loader(opened, RecordsByRow(opened), None, workers=1) as loader,
        pytest.raises(ValueError, match="keeps no images"),
    ):
        list(loader.batches([[0]]))


def test_evaluate_takes_kept_images(kept: Path, images: Path, options: Options, tmp_path: Path) -> None:
    result = distill(options(kept, out=tmp_path / "run"))
    student, _ = Run.open(result["run"]).student()
    with EmbeddingStore.open(kept) as store:
        found = [
            evaluate(
                student,
                store,
                range(6),
                root,
                ComputeSettings(device=torch.device("cpu"), precision="float32", batch_size=2),
                mean_embedding=None,
            )[0]
            for root in (None, images)
        ]
    assert found[0] == found[1]
