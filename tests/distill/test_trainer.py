from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mobilesam.distill import (
    ComputeSettings,
    DistillConfig,
    DistillError,
    DistillInterrupted,
    Loader,
    Run,
    StopFlag,
    build_student,
    distill,
)
from mobilesam.distill.data.rows import RecordsByRow
from mobilesam.distill.data.sampler import split_batches
from mobilesam.distill.trainer import Trainer, fill_gradients
from mobilesam.store import EmbeddingStore

Options = Callable[..., DistillConfig]


def test_accumulating_a_batch_gives_the_gradient_of_the_whole_batch(
    store: Path, images: Path, options: Options
) -> None:
    # Without batch norm, whose statistics depend on what is computed together.
    def gradient(micro_batch: int) -> torch.Tensor:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Conv2d(3, 256, 16, 16), nn.GELU(), nn.Conv2d(256, 256, 1))
        config = options(
            store, epochs=1, batch_size=5, micro_batch=micro_batch, loss_region="valid", out=f"m{micro_batch}"
        )
        state = one_step(config, student, images).optimizer.state
        # After one step AdamW's first moment is a tenth of the clipped gradient.
        return torch.cat([state[parameter]["exp_avg"].flatten() for parameter in student.parameters()])

    whole = gradient(5)
    torch.testing.assert_close(gradient(2), whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def one_step(config: DistillConfig, student: nn.Module, images: Path) -> Trainer:
    """The trainer after one step on rows 0 to 4."""
    distill_folder(config)
    with (
        EmbeddingStore.open(config.store) as store,
        Loader(store, RecordsByRow(store), images, workers=1) as loader,
    ):
        trainer = make_trainer(config, student, loader, "cpu")
        rows, size = [0, 1, 2, 3, 4], config.micro_batch or 5
        trainer.student.train()
        trainer.step(rows, loader.batches(split_batches(rows, size)))
    return trainer


def distill_folder(config: DistillConfig) -> None:
    """A run's folder to train in: that of a run that was stopped at once."""
    flag = StopFlag()
    flag.set()
    with pytest.raises(DistillInterrupted):
        distill(config, stop=flag)


def make_trainer(config: DistillConfig, student: nn.Module, loader: Loader, device: str) -> Trainer:
    assert config.out is not None
    return Trainer(
        config,
        Run.open(config.out),
        student.to(device),
        loader,
        compute=ComputeSettings(
            device=torch.device(device), precision=config.precision, batch_size=config.micro_batch or 5
        ),
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(store: Path, options: Options) -> None:
    with pytest.raises(DistillError, match="lower --lr"):
        distill(options(store, lr=1e30, clip=1e30, epochs=3, warmup=0, out="run"))
    saved = Path("run/last.pt")
    if saved.exists():
        weights = torch.load(saved, weights_only=True)["student"]
        assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.cuda
def test_a_step_on_a_gpu_never_waits_for_it(store: Path, images: Path, options: Options) -> None:
    config = options(store, epochs=1, batch_size=5, micro_batch=2, out="run", precision="bfloat16")
    distill_folder(config)
    student = build_student("tiny_vit", 64, seed=0)
    with (
        EmbeddingStore.open(store) as opened,
        Loader(opened, RecordsByRow(opened), images, workers=1, pin_memory=True) as loader,
    ):
        trainer = make_trainer(config, student, loader, "cuda")
        trainer.student.train()
        rows = [0, 1, 2, 3, 4]
        parts = [[0, 1], [2, 3], [4]]
        trainer.step(rows, loader.batches(parts))  # cuDNN and AdamW set themselves up
        ready = list(loader.batches(parts))
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step(rows, iter(ready))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.meter.fetch()
    assert trainer.meter.last_loss is not None
    assert math.isfinite(trainer.meter.last_loss)


def test_a_head_that_no_prompt_used_decays_as_with_several_processes() -> None:
    used, unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    both = torch.nn.ModuleList([used, unused])
    used(torch.ones(1, 2)).sum().backward()
    fill_gradients(both)
    assert unused.weight.grad is not None
    assert not unused.weight.grad.any()
    assert used.weight.grad.any()
