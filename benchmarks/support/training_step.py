"""One training step, ours or MobileSAM's, each in a process of its own."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.support.profiler import shares
from mobilesam.distill import Batch, ComputeSettings, DistillConfig, Loader, Run, build_student
from mobilesam.distill.data.sampler import Split
from mobilesam.distill.distributed import ProcessGroup
from mobilesam.distill.run import describe
from mobilesam.distill.trainer import Trainer
from mobilesam.sam import normalize_and_pad
from mobilesam.sam.allocator import keep_freed_memory
from mobilesam.store import EmbeddingStore

PEER_IMAGE_SIZE = 1024
"""The only one that MobileSAM's code takes."""

WARM_STEPS = 2
"""Until caches are filled, and an allocator that keeps memory has what it needs."""

ENDLESS = 10**6
"""Epochs, so that no step is the last."""

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Side:
    """Whose step is measured, in which precision, and whether the process keeps freed memory, as distill's does on a
    CPU. On a CPU its threads are torch's default: all cores."""

    name: str
    ours: bool
    precision: str
    keeps_memory: bool


def step_seconds(side: Side, store: Path, images: int, device: torch.device) -> float:
    """Seconds of one step on the first images of a store."""
    with _step(side, store, images, device) as step:
        for _ in range(WARM_STEPS):
            step()
        began = time.perf_counter()
        step()
        return time.perf_counter() - began


def step_shares(side: Side, store: Path, images: int, device: torch.device) -> list[str]:
    """Which operators a step's time goes to, as lines."""
    with _step(side, store, images, device) as step:
        return shares(side.name, step, WARM_STEPS)


@contextmanager
def _step(side: Side, path: Path, images: int, device: torch.device) -> Iterator[Step]:
    if side.keeps_memory:
        keep_freed_memory()
    with EmbeddingStore.open(path) as store:
        root = Path(store.spec.image_root)
        with Loader(store, store.manifest.records(), root, workers=1) as loader:
            rows = list(range(images))
            with closing(loader.batches([rows])) as batches:
                batch = next(batches)
            step = (
                _our_step(side.precision, loader, batch, store, device)
                if side.ours
                else _peer_step(batch, device)
            )
            yield _waited_for(step, device)


def _waited_for(step: Step, device: torch.device) -> Step:
    """The step, and what it has set going on a GPU."""
    if device.type != "cuda":
        return step

    def call() -> None:
        step()
        torch.cuda.synchronize(device)

    return call


def _our_step(
    precision: str, loader: Loader, batch: Batch, store: EmbeddingStore, device: torch.device
) -> Step:
    """The step of distill's trainer as it begins its first epoch, from the loader's batch on."""
    rows, image_size = batch.rows, store.spec.image_size
    config = DistillConfig(store=store.path, epochs=ENDLESS, batch_size=len(rows), micro_batch=len(rows))
    split = Split(train=tuple(rows), val=())
    description = describe(config, store, store.records("done"), split, None, ProcessGroup())
    trainer = Trainer(
        config,
        Run(path=store.path.parent, description=description, split=split),
        build_student(config.student, image_size, seed=0).to(device),
        loader,
        compute=ComputeSettings(device=device, precision=precision, batch_size=len(rows)),
    )
    trainer.student.train()
    return lambda: trainer.step(rows, [batch])


def _peer_step(batch: Batch, device: torch.device) -> Step:
    """A step of MobileSAM's TinyViT in float32: MSE and AdamW. Its pixels are normalised, and its targets float32,
    before the step."""
    pixels_BCHW = normalize_and_pad(batch.canvas_BHWC.to(device), batch.sizes_B2)
    teacher_BCHW = batch.values_BCHW.to(device).float()
    model = _mobile_sam_tiny_vit().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        loss = F.mse_loss(model(pixels_BCHW), teacher_BCHW)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _mobile_sam_tiny_vit() -> nn.Module:
    """MobileSAM's image encoder, with the arguments that its build_sam.py gives for `vit_t`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it registers its names over timm's, and says so
        from mobile_sam.modeling import TinyViT

    torch.manual_seed(0)
    return TinyViT(
        img_size=PEER_IMAGE_SIZE,
        in_chans=3,
        num_classes=1000,
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7],
        mlp_ratio=4.0,
        drop_rate=0.0,
        drop_path_rate=0.0,
        use_checkpoint=False,
        mbconv_expand_ratio=4.0,
        local_conv_size=3,
        layer_lr_decay=0.8,
    )
