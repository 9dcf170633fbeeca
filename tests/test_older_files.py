"""Stores, runs and sweeps that an older version wrote are used as they are; see tests/data/README.md."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from mobilesam.distill import DistillConfig, Run, distill
from mobilesam.precompute import PrecomputeConfig, precompute
from mobilesam.sam.teacher import load_head
from mobilesam.store import EmbeddingStore, encode_head
from mobilesam.store.inspection import inspect_store
from mobilesam.verify import SweepConfig, VerifyConfig, sweep, verify

ARCHIVE = Path(__file__).parent / "data" / "written_by_4c4873a.tar.xz"
STUDENT = "timm:test_resnet"
# The same options as the run had, and the places of this copy.
BASE = {
    "student": STUDENT,
    "recipe": "mobilesam-2023",
    "batch_size": 2,
    "val_fraction": 0.4,
    "device": "cpu",
    "precision": "float32",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    head, _ = encode_head({key: value.numpy() for key, value in load_head("vit_nano", None).items()})
    legacy = folder / "legacy"
    stores = [legacy / name / "embeddings" / "mobilesam" for name in ("store.zarr", "kept.zarr")]
    for place in (*stores, legacy / "runs" / "interrupted", *(legacy / "sweeps" / "a" / "runs").iterdir()):
        (place / "sam_head.safetensors").write_bytes(head)
    return legacy


@pytest.fixture
def legacy(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work on, which is the current directory."""
    folder = tmp_path / "legacy"
    shutil.copytree(unpacked, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def _config(legacy: Path, **changes: Any) -> DistillConfig:
    given = {
        "store": legacy / "store.zarr",
        "images": legacy / "photos",
        "init": legacy / "zeros.safetensors",
    }
    return DistillConfig(**(given | BASE | changes))


@pytest.mark.parametrize("name", ["store.zarr", "kept.zarr"])
def test_an_older_store_is_whole_and_reads_as_zarr_reads_it(unpacked: Path, name: str) -> None:
    assert inspect_store(unpacked / name, check=True)["problems"] == []
    group = zarr.open_group(unpacked / name, mode="r")
    with EmbeddingStore.open(unpacked / name) as store:
        found = store.read(range(6)).to_float32()
    wanted = group["embeddings"][:].astype(np.float32)
    if name == "kept.zarr":
        wanted *= group["scales"][:][:, :, None, None]
    np.testing.assert_array_equal(found, wanted)
    assert found.std() > 0.1


@pytest.mark.parametrize("name", ["store.zarr", "kept.zarr"])
def test_precompute_finds_nothing_to_do_in_an_older_store(legacy: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in (legacy / name).rglob("c.*")}
    result = precompute(PrecomputeConfig(images=(legacy / "photos",), out=legacy / name, device="cpu"))
    assert (result["done"], result["done_before"], result["failed"]) == (6, 6, 0)
    assert {path: path.read_bytes() for path in before} == before


def test_an_older_run_resumes_where_it_stopped_and_ends_as_it_would_have(legacy: Path) -> None:
    folder = legacy / "runs" / "interrupted"
    steps_before = [line["step"] for line in Run.open(folder).history() if line["kind"] == "train"]
    assert max(steps_before) == 3
    result = distill(_config(legacy, epochs=3, out=folder))
    assert (result["epochs"], result["steps"]) == (3, 6)
    steps = [line["step"] for line in Run.open(folder).history() if line["kind"] == "train"]
    assert steps[: len(steps_before)] == steps_before
    assert max(steps) == 6
    # What 4c4873a gave when it resumed the same run.
    assert result["val"]["mse"] == pytest.approx(0.9699593327049664, rel=1e-5)
    assert result["val"]["skill_valid"] == pytest.approx(0.24281020053478708, rel=1e-4)


def test_an_older_run_verifies_to_the_same_figures(legacy: Path) -> None:
    distill(_config(legacy, epochs=3, out=legacy / "runs" / "interrupted"))
    found = verify(
        VerifyConfig(
            student=legacy / "runs" / "interrupted",
            store=legacy / "store.zarr",
            images=legacy / "photos",
            split="all",
            points=2,
            device="cpu",
            precision="float32",
        )
    )
    assert found["images"] == 6
    # What 4c4873a's verify printed of the run that it had resumed.
    assert found["mse"] == pytest.approx(0.9668837448265349, rel=1e-5)
    assert found["cosine"]["mean"] == pytest.approx(0.28403235185247355, rel=1e-4)
    assert found["miou"] == pytest.approx(0.48458401396896367, abs=0.02)


def test_an_older_sweep_takes_its_finished_run_over_and_goes_on(legacy: Path) -> None:
    (run,) = (legacy / "sweeps" / "a" / "runs").iterdir()
    trained = (run / "metrics.jsonl").read_bytes()
    # A run's name holds a digest of this path, which is the same wherever the archive is unpacked.
    init = Path("/proc/self/cwd/zeros.safetensors")
    axes = {"student": (STUDENT,), "init": (init,), "batch_size": (2,)}
    base = DistillConfig(
        store=legacy / "store.zarr",
        recipe="mobilesam-2023",
        images=legacy / "photos",
        val_fraction=0.4,
        device="cpu",
        precision="float32",
    )
    config = SweepConfig(
        out=legacy / "sweeps" / "a", base=base, axes={**axes, "epochs": (1,), "seed": (0, 1)}, points=2
    )
    result = sweep(config)
    old, new = result["runs"]
    assert result["failed"] == 0
    assert old["name"] == run.name
    assert (run / "metrics.jsonl").read_bytes() == trained
    assert old["val"]["skill_valid"] == pytest.approx(0.24258772296680287, rel=1e-4)
    assert new["options"]["seed"] == 1
    assert new["status"] == "done"
