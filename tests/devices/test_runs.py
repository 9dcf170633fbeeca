"""Whole commands on a device: precompute, distill, verify, evaluate, segment and sweep, against the CPU's results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mobilesam.common.errors import DistillInterrupted, PrecomputeError
from mobilesam.common.signals import StopFlag
from mobilesam.distill import DistillConfig, Progress, Run, distill
from mobilesam.precompute import PrecomputeConfig, precompute
from mobilesam.predict import SegmentConfig, segment
from mobilesam.store import EmbeddingStore
from mobilesam.verify import EvaluateConfig, SweepConfig, VerifyConfig, evaluate_masks, sweep, verify

SIZE = 64


def _config(store: Path, device: torch.device, **changes: object) -> DistillConfig:
    options = {"epochs": 2, "batch_size": 2, "val_fraction": 0.3, "precision": "float32", "out": Path("run")}
    return DistillConfig(store=store, device=device.type, **{**options, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(store: Path, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    distill(_config(store, device, out=out))
    return out


# ---- precompute


def test_precompute_through_a_dask_worker_gives_the_cpus_embeddings(
    store: Path, photos: Path, device: torch.device, tmp_path: Path
) -> None:
    config = PrecomputeConfig(
        images=(photos,), out=tmp_path / "cpu.zarr", teacher="vit_nano", image_size=SIZE, precision="float32",
        device="cpu",
    )  # fmt: skip
    precompute(config)
    with EmbeddingStore.open(store) as found, EmbeddingStore.open(config.out) as expected:
        ours, theirs = (one.read(range(7)).to_float32() for one in (found, expected))
    assert np.abs(ours - theirs).max() <= 2e-3 * np.ptp(theirs)


def test_precompute_in_bfloat16_stays_within_the_audits_limits(
    photos: Path, device: torch.device, tmp_path: Path
) -> None:
    result = precompute(
        PrecomputeConfig(
            images=(photos,), out=tmp_path / "s.zarr", teacher="vit_nano", image_size=256, precision="bfloat16",
            device=device.type, batch_size=4, audit=7, dtype="int8",
        )
    )  # fmt: skip
    assert (result["done"], result["audit"]["rows"], result["out_of_tolerance"]) == (7, 7, False)


@pytest.mark.cuda
def test_a_compiled_teacher_gives_the_same_embeddings_in_a_partial_batch_too(
    store: Path, photos: Path, tmp_path: Path
) -> None:
    config = PrecomputeConfig(
        images=(photos,), out=tmp_path / "s.zarr", teacher="vit_nano", image_size=SIZE, precision="float32",
        device="cuda", batch_size=2, compile=True, audit=2,
    )  # fmt: skip
    result = precompute(config)
    assert (result["done"], result["out_of_tolerance"]) == (7, False)
    with EmbeddingStore.open(store) as eager, EmbeddingStore.open(config.out) as compiled:
        ours, theirs = (one.read(range(7)).to_float32() for one in (compiled, eager))
    assert np.abs(ours - theirs).max() <= 2e-3 * np.ptp(theirs)


@pytest.mark.cuda
def test_precompute_at_1024_pixels_with_a_partial_last_batch(photos: Path, tmp_path: Path) -> None:
    result = precompute(
        PrecomputeConfig(
            images=(photos,), out=tmp_path / "s.zarr", teacher="vit_nano", image_size=1024, device="cuda",
            batch_size=4, audit=2,
        )
    )  # fmt: skip
    assert (result["done"], result["failed"], result["out_of_tolerance"]) == (7, 0, False)


@pytest.mark.cuda
def test_too_little_memory_is_one_clear_error(photos: Path, tmp_path: Path) -> None:
    script = (
        "import torch; torch.cuda.set_per_process_memory_fraction(1e-4)\n"
        "from mobilesam.sam.teacher import load_teacher\n"
        "t = load_teacher('vit_nano', None, image_size=1024, device='cuda')\n"
        "t.embed(torch.zeros(64, 3, 1024, 1024))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "OutOfMemoryError" in done.stderr
    with pytest.raises(PrecomputeError, match="no memory for 100000 images at once: lower --batch-size"):
        precompute(
            PrecomputeConfig(
                images=(photos,), out=tmp_path / "s.zarr", teacher="vit_nano", image_size=1024, device="cuda",
                batch_size=100_000, audit=0,
            )
        )  # fmt: skip


# ---- distill


@pytest.mark.parametrize("objective", ["decoupled", "semi_coupled", "coupled"])
def test_each_objective_learns_as_on_the_cpu(objective: str, store: Path, device: torch.device) -> None:
    masks = {} if objective == "decoupled" else {"objects": 2, "mse_weight": 1.0}
    changes: dict[str, object] = {"objective": objective, **masks}
    found = distill(_config(store, device, **changes))
    expected = distill(_config(store, torch.device("cpu"), out=Path("cpu"), **changes))
    assert found["val"]["mse"] == pytest.approx(expected["val"]["mse"], rel=0.05)
    if objective != "decoupled":
        assert found["val"]["miou"] == pytest.approx(expected["val"]["miou"], abs=0.1)


def test_the_decoder_alone_learns(store: Path, device: torch.device, run: Path) -> None:
    result = distill(_config(store, device, objective="decoder", init=run, objects=2, out=Path("decoder")))
    assert 0 <= result["val"]["miou"] <= 1


def test_a_run_resumes_from_its_checkpoint_to_the_same_student(
    store: Path, device: torch.device, run: Path
) -> None:
    stop = StopFlag()

    def stops(progress: Progress) -> None:
        if progress.step == 3:
            stop.set(15)

    with pytest.raises(DistillInterrupted):
        distill(_config(store, device), progress=stops, stop=stop)
    assert Run.open(Path("run")).checkpoints.exist()
    resumed = distill(_config(store, device))
    whole = Run.open(run).result()
    assert whole is not None
    assert resumed["val"]["mse"] == pytest.approx(whole["val"]["mse"], rel=1e-3)
    mine, theirs = (Run.open(out).student()[0].state_dict() for out in (Path("run"), run))
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key].cpu(), value.cpu(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kept", [False, True])
def test_distill_reads_int8_stores_and_kept_images(
    kept: bool, photos: Path, device: torch.device, tmp_path: Path
) -> None:
    out = tmp_path / "int8.zarr"
    precompute(
        PrecomputeConfig(
            images=(photos,), out=out, teacher="vit_nano", image_size=SIZE, dtype="int8", keep_images=kept,
            device=device.type, audit=0,
        )
    )  # fmt: skip
    result = distill(_config(out, device))
    assert np.isfinite(result["val"]["mse"])


@pytest.mark.cuda
def test_a_compiled_student_learns_the_same(store: Path) -> None:
    cuda = torch.device("cuda")
    eager = distill(_config(store, cuda, out=Path("eager")))
    compiled = distill(_config(store, cuda, out=Path("compiled"), compile=True))
    assert compiled["val"]["mse"] == pytest.approx(eager["val"]["mse"], rel=1e-2)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_gpus_learn_what_one_learns(store: Path, run: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mobilesam", "distill",
        "--json", "--store", str(store), "--epochs", "2", "--batch-size", "2", "--val-fraction", "0.3",
        "--precision", "float32", "--out", "two",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    whole = Run.open(run).result()
    assert whole is not None
    assert json.loads(done.stdout)["val"]["mse"] == pytest.approx(whole["val"]["mse"], rel=0.05)


# ---- what comes after


def test_verify_agrees_with_the_cpu(run: Path, device: torch.device) -> None:
    found, expected = (
        verify(VerifyConfig(student=run, split="all", device=where)) for where in (device.type, "cpu")
    )
    for name in ("mse", "skill_valid", "relative_mse"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4)
    assert found["miou"] == pytest.approx(expected["miou"], abs=0.01)
    assert found["miou_constant"] == pytest.approx(expected["miou_constant"], abs=0.01)


def test_verify_gives_the_trainers_metrics(run: Path, device: torch.device) -> None:
    whole = Run.open(run).result()
    assert whole is not None
    found = verify(VerifyConfig(student=run, device=device.type, precision="auto", points=0))
    assert found["mse"] == pytest.approx(whole["val"]["mse"], rel=1e-4)


def test_evaluate_agrees_with_the_cpu(run: Path, store: Path, device: torch.device) -> None:
    def table(where: str) -> float:
        result = evaluate_masks(
            EvaluateConfig(models=(("mine", str(run)),), store=store, split="all", device=where, points=2)
        )
        return float(result["models"][0]["teacher"]["point"]["miou"])

    assert table(device.type) == pytest.approx(table("cpu"), abs=0.02)


def test_segment_agrees_with_the_cpu(run: Path, photos: Path, device: torch.device) -> None:
    areas = []
    for where in (device.type, "cpu"):
        config = SegmentConfig(
            image=photos / "0.png", student=run, points=((40, 30),), out=Path(f"{where}.png"), device=where
        )
        areas.append(segment(config)["masks"][0]["area"])
    assert areas[0] == pytest.approx(areas[1], rel=0.02, abs=20)


def test_a_sweep_trains_and_verifies_on_the_device(store: Path, device: torch.device) -> None:
    base = _config(store, device, epochs=1, out=None)
    result = sweep(SweepConfig(base=base, axes={"seed": (0, 1)}, points=2, out=Path("sweeps")))
    assert [one["status"] for one in result["runs"]] == ["done", "done"]
    assert all(0 <= one["val"]["miou"] <= 1 for one in result["runs"])


@pytest.fixture(autouse=True)
def _one_thread_of_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
