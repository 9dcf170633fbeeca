from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from photo_store import make_photo_store
from PIL import Image
from torch import Tensor

from mobilesam.distill import DistillConfig, build_student, distill, save_student
from mobilesam.sam.teacher import load_head

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlays go to the current directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mobile_sam_pt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in mobile_sam.pt's format, written by upstream's classes; random weights, masks with many edges."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mobile_sam

    torch.manual_seed(3)
    state = mobile_sam.sam_model_registry["vit_t"]().state_dict()
    path = tmp_path_factory.mktemp("weights") / "mobile_sam.pt"
    torch.save(enliven(state), path)
    return path


def enliven(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random weights whose masks follow image and prompt, have sharp edges, and are rated well.

    A cell attends to a point that is near it: cells and tokens are projected alike, so that the product of their
    positions counts, and what isn't position is made small. Kernels of the upscaling are flat, which leaves
    no pattern in each cell. Logits are far from zero. The second of the three masks is rated best.
    """
    for key, value in state.items():
        if "cross_attn_image_to_token" in key and key.endswith("q_proj.weight"):
            torch.nn.init.orthogonal_(value)
            value.mul_(3)
            state[key.replace("q_proj", "k_proj")].copy_(value)
        elif "cross_attn_image_to_token" in key and key.endswith(("q_proj.bias", "k_proj.bias")):
            value.zero_()
        elif "output_hypernetworks_mlps" in key and ".layers.2." in key:
            value.mul_(10_000)
        elif key.startswith("mask_decoder.output_upscaling.") and value.ndim == 4:
            value.copy_(value[..., :1, :1].expand_as(value))
        elif "point_embeddings" in key or "not_a_point" in key:
            value.mul_(0.1)
        elif _is_content(key):
            value.mul_(0.25)
        elif key == "mask_decoder.iou_prediction_head.layers.2.bias":
            value.copy_(torch.tensor([0.97, 0.94, 0.99, 0.95]))
        elif key == "mask_decoder.iou_prediction_head.layers.2.weight":
            value.mul_(0.2)
    return state


def _is_content(key: str) -> bool:
    norm = key.startswith("mask_decoder.transformer.") and ".norm" in key
    tokens = ("mask_decoder.iou_token.", "mask_decoder.mask_tokens.", "prompt_encoder.no_mask_embed.")
    return key.endswith("weight") and (norm or key.startswith(tokens))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three small pictures at 64 pixels, with vit_nano's head and random embeddings."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)).save(
            folder / "images" / f"{number}.png"
        )
    head = {key: value.numpy() for key, value in load_head("vit_nano", None).items()}
    make_store(folder / "store.zarr", folder / "images", head)
    return folder / "store.zarr"


def make_store(path: Path, images: Path, head: dict[str, np.ndarray]) -> None:
    """Every image of a folder with a random embedding, as precompute would have it at 64 pixels."""
    rows = range(len(list(images.iterdir())))
    embeddings = [np.random.default_rng(row).standard_normal((256, 4, 4), np.float32) for row in rows]
    make_photo_store(path, images, head=head, embeddings=np.stack(embeddings))


@pytest.fixture(scope="session")
def finished_run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch; the folder above it has runs/latest."""
    folder = tmp_path_factory.mktemp("work")
    config = DistillConfig(store=store, epochs=1, batch_size=2, device="cpu", precision="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        distill(config)
    return (folder / "runs" / "latest").resolve()


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def small_photo(tmp_path: Path) -> Path:
    """A photo of 90 x 60 pixels."""
    path = tmp_path / "small.png"
    Image.open(PHOTOS / "rocket.jpg").convert("RGB").resize((90, 60)).save(path)
    return path


@pytest.fixture(scope="session")
def head() -> dict[str, torch.Tensor]:
    return load_head("vit_nano", None)


@pytest.fixture
def lone_student(tmp_path: Path) -> Path:
    """A student's file with nothing beside it, for 64 pixels."""
    path = tmp_path / "lone" / "student.safetensors"
    path.parent.mkdir()
    info = {"teacher": "vit_h", "checkpoint_sha256": "a" * 64}
    save_student(build_student("tiny_vit", 64, seed=3), path, "tiny_vit", 64, info)
    return path
