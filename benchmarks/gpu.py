"""Everything that this program does on a GPU, tested and measured in less than ten minutes.

    make gpu                      # python -m benchmarks.gpu --write-docs
    python -m benchmarks.gpu --only student --json

runs the tests marked `cuda`; measures SAM's encoders (ours, ours compiled, segment_anything's in float32 and
bfloat16), the student's step at several micro-batches (ours, ours compiled, MobileSAM's own), precompute and distill
as whole runs. Weights are random and photos are generated: neither changes the time. Parts are measured in the order
of their weight, each in a process of its own; what the time doesn't suffice for is said. `--write-docs` puts the
table into docs/PERFORMANCE.md, between its markers `gpu`.

Without a GPU it ends in one line and exit code 3. `--device cpu` runs the same code in small, to see that it works.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch

from benchmarks.pipeline import write_checkpoint
from benchmarks.support.figures import Figure, report, seconds_each
from benchmarks.support.machine import machine
from benchmarks.support.pictures import make_large_photos, make_pictures
from benchmarks.support.processes import in_a_new_process
from benchmarks.support.synthetic_store import make_photo_store
from benchmarks.support.teacher_seconds import embedding_seconds
from benchmarks.support.training_step import PEER_IMAGE_SIZE, Side, step_seconds_and_memory
from benchmarks.table import filled, markdown
from benchmarks.teacher import encoders, nearness
from mobilesam.distill import DistillConfig, distill
from mobilesam.precompute import PrecomputeConfig, precompute

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "PERFORMANCE.md"
SECTIONS = ("tests", "vit_h", "student", "precompute", "distill", "vit_b", "vit_l")
"""Parts in the order in which they are measured."""

Found = tuple[list[Figure], list[str]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the measurements."""

    device: str
    image_size: int
    """Side of the encoders' square in pixels."""
    batch: int
    """Images of a teacher's batch."""
    calls: int
    """Timed calls of each encoder, and steps of each student."""
    micro_batches: tuple[int, ...]
    photos: int
    """Photos of a run of precompute; distill trains on as many."""
    height: int
    """Height of a photo in pixels; it is 1.5 times as wide."""
    teacher: str
    """Teacher of the run of precompute."""
    epochs: int
    """Epochs of the runs of distill."""
    compiles: bool


GPU = Scale(
    device="cuda",
    image_size=1024,
    batch=8,
    calls=20,
    micro_batches=(8, 32, 64),
    photos=192,
    height=1500,
    teacher="vit_h",
    epochs=6,
    compiles=True,
)
SMALL = Scale(
    device="cpu",
    image_size=64,
    batch=2,
    calls=1,
    micro_batches=(2,),
    photos=6,
    height=60,
    teacher="vit_nano",
    epochs=1,
    compiles=False,
)


@click.command(epilog="Exit code 1: a test or a part failed. 3: no GPU.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option(
    "--only", type=click.Choice(SECTIONS), multiple=True, help="Part to run alone; may be repeated."
)
@click.option("--minutes", default=9.0, show_default=True, help="No part begins after this time.")
@click.option("--write-docs", is_flag=True, help="Also write the table into docs/PERFORMANCE.md.")
@click.option("--json", "as_json", is_flag=True)
def main(device: str, only: tuple[str, ...], minutes: float, write_docs: bool, as_json: bool) -> None:
    """Test and measure this program on a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(_no_gpu())
    scale = GPU if device == "cuda" else SMALL
    began, failed = time.monotonic(), []
    figures: list[Figure] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        parts = _parts(scale, Path(temporary))
        for name in only or SECTIONS:
            minute = (time.monotonic() - began) / 60
            if minute > minutes:
                notes.append(f"{name}: not begun, {minute:.1f} minutes were gone")
                continue
            print(f"{minute:4.1f} min  {name}", file=sys.stderr, flush=True)
            try:
                found, remarks = parts[name]()
            except Exception as error:  # noqa: BLE001 - the other parts are worth their minutes, whatever fails here
                failed.append(name)
                remarks, found = [f"{name} FAILED: {type(error).__name__}: {str(error).strip()[:400]}"], []
            figures += found
            notes += remarks
    about = {"gpu": _gpu_name(), **machine()} if device == "cuda" else machine()
    if write_docs and device == "cuda":
        lines = [asdict(figure) | {"reached": figure.reached} for figure in figures]
        table = markdown({"gpu": {"machine": about, "figures": lines, "notes": notes}})
        DOCUMENT.write_text(filled(DOCUMENT.read_text(), table, "gpu"))
    report(figures, [_gpu_name(), *notes] if device == "cuda" else notes, as_json=as_json)
    if failed or any("FAILED" in note for note in notes):
        sys.exit(1)


def _no_gpu() -> int:
    print(
        f"no GPU that torch {torch.__version__} can use: nothing was measured; --device cpu runs the same in small",
        file=sys.stderr,
    )
    return 3


def _gpu_name() -> str:
    about = torch.cuda.get_device_properties(0)
    return f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, torch {torch.__version__}"


def _parts(scale: Scale, folder: Path) -> dict[str, Callable[[], Found]]:
    teachers = ("vit_h", "vit_b", "vit_l")
    return {
        "tests": _tests,
        **{name: lambda name=name: in_a_new_process(measure_teacher, name, scale) for name in teachers},
        "student": lambda: measure_student(scale, folder / "student"),
        "precompute": lambda: measure_precompute(scale, folder / "precompute"),
        "distill": lambda: measure_distill(scale, folder / "distill"),
    }


def _tests() -> Found:
    """Run the tests marked `cuda`; the last line of their report is the note."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [done.stderr[-400:]]
    if done.returncode in (0, 5):  # 5: none was collected
        return [], [f"tests marked cuda: {lines[-1]}"]
    told = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20]
    return [], [f"tests marked cuda FAILED: {lines[-1]}", *told]


@torch.no_grad()
def measure_teacher(teacher: str, scale: Scale) -> Found:
    """Measure one of SAM's encoders; images a second by the GPU's own clock, batches back to back."""
    device = torch.device(scale.device)
    sides = encoders(teacher, device, scale.batch, scale.image_size, bfloat16=True)
    expected = sides["segment_anything"]()
    notes, rates = [], {}

    def add(name: str, call: Callable[[], torch.Tensor]) -> None:
        notes.append(f"{teacher} {name}: {nearness(call(), expected)}")
        call()
        rates[name] = scale.batch / seconds_each(call, device, scale.calls)

    for name, call in sides.items():
        add(name, call)

    def peer_bfloat16() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return sides["segment_anything"]().float()

    add("segment_anything bfloat16", peer_bfloat16)
    if scale.compiles:
        ours = sides["bfloat16"].func  # type: ignore[attr-defined]
        ours.compile(dynamic=False)
        add("bfloat16, compiled", sides["bfloat16"])
    goals = {"bfloat16": 60.0, "bfloat16, compiled": 80.0} if teacher == "vit_h" else {}
    peer = max(rates["segment_anything"], rates["segment_anything bfloat16"])
    figures = [
        Figure(
            what=f"{teacher}, ours in {name}, images/s",
            value=rates[name],
            target=goals.get(name, peer),
            sides=f"batches of {scale.batch}; segment_anything {rates['segment_anything']:.4g} in float32, "
            f"{rates['segment_anything bfloat16']:.4g} in bfloat16",
        )
        for name in ("float32", "bfloat16", "bfloat16, compiled")
        if name in rates
    ]
    return figures, notes


def measure_student(scale: Scale, folder: Path) -> Found:
    """Measure the trainer's step by micro-batch, and MobileSAM's own with the same images."""
    folder.mkdir()
    make_pictures(folder / "pictures", max(scale.micro_batches), scale.image_size)
    store = make_photo_store(folder / "store.zarr", folder / "pictures", scale.image_size)
    device, keeps = torch.device(scale.device), scale.device == "cpu"
    ours = Side(name="ours", ours=True, precision="bfloat16", keeps_memory=keeps)
    sides = [ours]
    if scale.compiles:
        sides.append(replace(ours, name="ours, compiled", compiled=True))
    if scale.image_size == PEER_IMAGE_SIZE:
        peer = Side(name="MobileSAM float32", ours=False, precision="float32", keeps_memory=keeps)
        sides += [peer, replace(peer, name="MobileSAM bfloat16", precision="bfloat16")]
    figures, notes = [], []
    for images in scale.micro_batches:
        rates = {}
        for side in sides:
            seconds, peak = in_a_new_process(
                step_seconds_and_memory, side, store, images, device, scale.calls
            )
            rates[side.name] = images / seconds
            notes.append(
                f"step of {images}, {side.name}: {images / seconds:.4g} images/s, {peak / 2**30:.1f} GiB at most"
            )
        best = max(rate for name, rate in rates.items() if name.startswith("ours"))
        figures.append(
            Figure(
                what=f"training step of {images} images at {scale.image_size} px, images/s",
                value=best,
                target=600.0,
                sides=", ".join(f"{name} {rate:.4g}" for name, rate in rates.items()),
            )
        )
    return figures, notes


def measure_precompute(scale: Scale, folder: Path) -> Found:
    """Measure a run of precompute on photos against its teacher alone."""
    folder.mkdir()
    photos = make_large_photos(folder / "photos", scale.photos, scale.height, scale.height * 3 // 2)
    checkpoint = (
        None
        if scale.teacher == "vit_nano"
        else in_a_new_process(write_checkpoint, scale.teacher, folder / "teacher.pth")
    )
    alone = in_a_new_process(
        embedding_seconds, scale.teacher, checkpoint, scale.image_size, sorted(photos.iterdir())[:8]
    )
    config = PrecomputeConfig(
        images=(photos,),
        out=folder / "store.zarr",
        teacher=scale.teacher,
        checkpoint=checkpoint,
        image_size=scale.image_size,
        device=scale.device,
    )
    result = precompute(config)
    rate, fastest = result["images_per_second"], 1 / min(alone)
    figure = Figure(
        what=f"precompute with {scale.teacher}, share of its encoder's speed",
        value=rate / fastest,
        target=0.95,
        sides=f"{rate:.4g} images/s from photos of {scale.height} x {scale.height * 3 // 2} pixels, the encoder "
        f"alone {fastest:.4g}",
    )
    return [figure], [f"precompute: the teacher was busy {result['teacher_share']:.1%} of the time"]


def measure_distill(scale: Scale, folder: Path) -> Found:
    """Measure runs of distill on photos and on kept images: images a second, and the wait for data."""
    folder.mkdir()
    photos = make_large_photos(folder / "photos", scale.photos, scale.height, scale.height * 3 // 2)
    figures, notes = [], []
    for what, kept in (("photos", False), ("kept images", True)):
        store = make_photo_store(folder / f"{kept}.zarr", photos, scale.image_size, keep_images=kept)
        config = DistillConfig(
            store=store,
            epochs=scale.epochs,
            batch_size=max(scale.micro_batches),
            device=scale.device,
            out=folder / f"run-{kept}",
        )
        result = in_a_new_process(distill, config)
        rate, waited = result["images_per_second"], result["data_wait_share"]
        sides = f"{result['steps']} steps of {result['batch_size']}"
        notes.append(f"distill from {what}: {rate:.4g} images/s, {sides}")
        figures.append(
            Figure(
                what=f"distill from {what}, share of the time that it waits for data",
                value=waited,
                target=0.01,
                at_least=False,
                sides=f"{rate:.4g} images/s, {sides}",
            )
        )
    return figures, notes


if __name__ == "__main__":
    main()
