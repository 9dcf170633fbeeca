"""Seconds and operators of one training step, ours or MobileSAM's, each measured in a process of its own.

Shape suffixes: B images of a batch, C channels, H, W rows and columns of an image or map, 2 (height, width).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.support.figures import by_turns, seconds_each
from benchmarks.support.profiler import shares
from mobilesam.distill import Batch, ComputeSettings, DistillConfig, Loader, Run, build_student
from mobilesam.distill.data.rows import CommittedRows, RecordsByRow
from mobilesam.distill.data.sampler import Split
from mobilesam.distill.distributed import ProcessGroup
from mobilesam.distill.recipe import DEFAULT_RECIPE
from mobilesam.distill.run import describe
from mobilesam.distill.trainer import Trainer
from mobilesam.sam import normalize_and_pad
from mobilesam.sam.allocator import keep_freed_memory
from mobilesam.sam.device import resolve_device, resolve_precision
from mobilesam.store import EmbeddingStore

PEER_IMAGE_SIZE = 1024
"""Pixels; the only size that MobileSAM's code takes."""

WARM_STEPS = 2
"""Untimed steps, which fill caches and the memory that an allocator keeps."""

ENDLESS = 10**6
"""Epochs of the configuration, so that no step is the last."""

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Side:
    """Training step to be measured. On a CPU its threads are torch's default: all cores."""

    name: str
    ours: bool
    """True for distill's trainer, False for MobileSAM's TinyViT."""
    precision: str
    keeps_memory: bool
    """Keep freed memory in the process, as distill does on a CPU."""
    compiled: bool = False
    """Compile the student, as `distill --compile` does; ours only."""


def step_seconds(side: Side, store: Path, images: int, device: torch.device, steps: int = 1) -> float:
    """Return the seconds of one of `steps` steps, back to back, on the first images of a store."""
    with _step(side, store, images, device) as step:
        for _ in range(WARM_STEPS):
            step()
        return seconds_each(step, device, steps)


def step_seconds_and_memory(
    side: Side, store: Path, images: int, device: torch.device, steps: int
) -> tuple[float, int]:
    """Return what `step_seconds` does, and the GPU memory in bytes that was allocated at most (a CPU: 0)."""
    seconds = step_seconds(side, store, images, device, steps)
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def step_shares(side: Side, store: Path, images: int, device: torch.device) -> list[str]:
    """Return the shares of a step's time by kind of operator, as text."""
    with _step(side, store, images, device) as step:
        return shares(side.name, step, WARM_STEPS)


def recipe_step_seconds(
    recipes: Iterable[str], path: Path, student: str, images: int, rounds: int
) -> dict[str, float]:
    """Return the median seconds of a step by recipe, measured in turn in this process.

    Args:
        recipes: names of recipes.
        path: store whose first images are trained on.
        student: name of the student in the registry.
        images: images of a step, in one forward pass.
        rounds: timed steps of each recipe; 0: none.
    """
    if not rounds:
        return {}
    device = resolve_device("auto")
    if device.type == "cpu":
        keep_freed_memory()
    precision = resolve_precision("auto", device)
    with _first_batch(path, images) as (loader, batch, store):
        sides = {
            name: _waited_for(
                _our_step(precision, loader, batch, store, device, recipe=name, student=student), device
            )
            for name in recipes
        }
        for step in sides.values():
            step()
        return by_turns(sides, rounds)


@contextmanager
def _first_batch(path: Path, images: int) -> Iterator[tuple[Loader, Batch, EmbeddingStore]]:
    """Yield a store's loader, the batch of its first images, and the store."""
    with EmbeddingStore.open(path) as store:
        root = Path(store.spec.image_root)
        with Loader(store, RecordsByRow(store), root, workers=1) as loader:
            with closing(loader.batches([list(range(images))])) as batches:
                batch = next(batches)
            yield loader, batch, store


@contextmanager
def _step(side: Side, path: Path, images: int, device: torch.device) -> Iterator[Step]:
    if side.keeps_memory:
        keep_freed_memory()
    with _first_batch(path, images) as (loader, batch, store):
        yield (
            _our_step(side.precision, loader, batch, store, device, compiled=side.compiled)
            if side.ours
            else _peer_step(batch, device, side.precision)
        )


def _waited_for(step: Step, device: torch.device) -> Step:
    """Return the step, followed by a wait for its work on a GPU."""
    if device.type != "cuda":
        return step

    def call() -> None:
        step()
        torch.cuda.synchronize(device)

    return call


def _our_step(
    precision: str,
    loader: Loader,
    batch: Batch,
    store: EmbeddingStore,
    device: torch.device,
    *,
    recipe: str = DEFAULT_RECIPE,
    student: str = "tiny_vit",
    compiled: bool = False,
) -> Step:
    """Return the step of distill's trainer at the start of its first epoch, from the loader's batch on."""
    rows, image_size = batch.rows, store.spec.image_size
    config = DistillConfig(
        store=store.path,
        student=student,
        recipe=recipe,
        epochs=ENDLESS,
        batch_size=len(rows),
        micro_batch=len(rows),
    )
    split = Split(train=tuple(rows), val=())
    every, root = CommittedRows.of(store), Path(store.spec.image_root)
    description = describe(config, store, every, split, None, ProcessGroup(), None, root)
    network = build_student(config.student, image_size, seed=0).to(device)
    if compiled:
        network.compile()
    trainer = Trainer(
        config,
        Run(path=store.path.parent, description=description, split=split),
        network,
        loader,
        compute=ComputeSettings(device=device, precision=precision, batch_size=len(rows)),
    )
    trainer.student.train()
    return lambda: trainer.step(rows, [batch])


def _peer_step(batch: Batch, device: torch.device, precision: str) -> Step:
    """Return a step of MobileSAM's TinyViT: MSE and AdamW; bfloat16 is autocast.

    Pixels are normalised, and targets converted to float32, before the step.
    """
    pixels_BCHW = normalize_and_pad(batch.canvas_BHWC.to(device), batch.sizes_B2)
    teacher_BCHW = batch.values_BCHW.to(device).float()
    model = _mobile_sam_tiny_vit().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            emb_BCHW = model(pixels_BCHW)
        loss = F.mse_loss(emb_BCHW.float(), teacher_BCHW)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _mobile_sam_tiny_vit() -> nn.Module:
    """Build MobileSAM's image encoder, with the arguments of `vit_t` in its build_sam.py."""
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
