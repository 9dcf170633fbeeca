"""Each test of this folder runs on a GPU (marked `cuda`) and as a twin on the CPU (marked `long`): none rots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gradient_photo import gradient_photo

from mobilesam.precompute import PrecomputeConfig, precompute

SIZE = 64
SHAPES = ((60, 90), (64, 64), (90, 40), (50, 64), (64, 30), (33, 80), (70, 70))


@pytest.fixture(
    scope="session",
    params=[pytest.param("cpu", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.cuda)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test."""
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven photos of several shapes, so that the last batch of two is a partial one."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (height, width) in enumerate(SHAPES):
        gradient_photo(number, (height, width)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, photos: Path, device: torch.device) -> Path:
    """Store of vit_nano's embeddings of the photos, made by dask workers on the device, and audited there."""
    out = tmp_path_factory.mktemp("store") / "store.zarr"
    result = precompute(
        PrecomputeConfig(
            images=(photos,),
            out=out,
            precision="float32",
            teacher="vit_nano",
            image_size=SIZE,
            device=device.type,
            batch_size=2,
            shard_size=4,
            audit=2,
        )
    )
    assert (result["done"], result["failed"], result["audit"]["rows"]) == (len(SHAPES), 0, 2)
    assert not result["out_of_tolerance"]
    return out


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
