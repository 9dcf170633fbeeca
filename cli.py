"""The command line: options to config objects, errors to exit codes. What it says goes to standard error, results
to standard output.

Exit codes: 0 done; 1 a check or threshold failed; 2 usage; 3 input or environment; 130 and 143 interrupted.
Rooms are imported inside commands, so that `--help` is instant.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .distill.config import LABELS, OBJECTIVES, DistillConfig
from .sam.registry import TEACHERS

if TYPE_CHECKING:
    from .distill import Progress
    from .precompute import Snapshot

FAILED_CHECK, INPUT = 1, 3
# Whether a path can be read is for the rooms to say: that is input, not usage.
_PATH = click.Path(path_type=Path, readable=False)

# Options that several commands have, with the same meaning.
_device = click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]")
_moved_images = click.option(
    "--images", type=_PATH, metavar="DIR", help="Where the images are now, if they moved."
)
_checkpoint = click.option("--checkpoint", type=_PATH, metavar="FILE", help="The teacher's weights.")


class RoomCommand(click.Command):
    """A command whose rooms' errors become one or two lines and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        """Run, and translate what is raised."""
        debug = context.params.pop("debug", False)
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            context.exit(130)
        except Exception as error:  # noqa: BLE001 - this is where errors end
            if debug:
                traceback.print_exc()
            message, code = _explain(error)
            if not _rank():
                click.echo(f"error: {message}", err=True)
            elif code == INPUT:
                click.echo(f"error in process {_rank()}: {message}", err=True)
            context.exit(code)


def _rank() -> int:
    """Which of torchrun's processes this is: only the first one, 0, reports."""
    return int(os.environ.get("RANK", "0")) if os.environ.get("WORLD_SIZE", "1") != "1" else 0


def _explain(error: Exception) -> tuple[str, int]:
    from .common.errors import (
        DistillError,
        PrecomputeError,
        PredictError,
        ReportError,
        SamError,
        StoreError,
        VerifyError,
    )

    signum = getattr(error, "signum", None)
    if signum is not None:
        return str(error), 128 + signum
    if isinstance(error, ReportError) and isinstance(error.__cause__, Exception):
        message, code = _explain(error.__cause__)
        return f"no report: {message}", code
    if isinstance(error, SamError | StoreError | PrecomputeError | DistillError | VerifyError | PredictError):
        return str(error), INPUT
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}", INPUT
    return f"unexpected {type(error).__name__}: {error}\nThis is a bug; --debug shows where.", INPUT


@contextmanager
def _usage() -> Iterator[None]:
    """What a config object refuses is a wrong use of options."""
    try:
        yield
    except Exception as error:
        message, code = _explain(error)
        if code != INPUT or message.startswith("unexpected"):
            raise
        raise click.UsageError(message) from error


def _options(*options: Callable) -> Callable:
    """One decorator of many."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


def _common(command: Callable) -> Callable:
    json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
    debug_option = click.option("--debug", is_flag=True, help="Show tracebacks.")
    return json_option(debug_option(command))


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given: the others take their config object's defaults."""
    return {name: value for name, value in options.items() if value is not None}


class Reporter:
    """Messages and progress on standard error: a bar on a terminal, else a line every `LINE_SECONDS`."""

    LINE_SECONDS = 10.0

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(stderr=True, highlight=False)
        self._last_time, self._last_shown = time.monotonic(), (-1.0, -1.0)
        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1, note="", visible=False)

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        """A line that matters once."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, done: float, total: float, note: str) -> None:
        """How far it is, and a note such as rate and time left."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, total=total, note=note, visible=True)
            return
        news = (done, total) != self._last_shown
        if time.monotonic() - self._last_time >= self.LINE_SECONDS or (done == total and news):
            self._last_time, self._last_shown = time.monotonic(), (done, total)
            self.message(f"{done:,.0f}/{total:,.0f} {note}")

    def download(self, done: int, total: int) -> None:
        """Bytes of a checkpoint downloaded."""
        self.show(done, total, "bytes downloaded")

    def training(self, progress: Progress) -> None:
        """How far distill is."""
        loss = [] if progress.loss is None else [f"loss {progress.loss:.4g}"]
        speed = [f"{progress.images_per_second:.3g} images/s", f"{_time(progress.eta_seconds)} left"]
        what = [f"steps, epoch {progress.epoch} of {progress.epochs}", progress.phase]
        self.show(progress.step, progress.steps, ", ".join([*what, *loss, *speed]))

    def comparison(self, done: int, total: int) -> None:
        """How far verify is."""
        self.show(done, total, "images")

    def progress(self, snapshot: Snapshot) -> None:
        """How far precompute is."""
        rate = snapshot.images_per_second
        speed = [] if rate is None else [f"{rate:.3g} images/s", f"{_time(snapshot.eta or 0)} left"]
        counts = [f"{snapshot.done_before:,} done before", f"{snapshot.failed:,} failed"]
        self.show(snapshot.computed, snapshot.images, ", ".join(["images", *speed, *counts]))


def _time(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def _print(as_json: bool, result: dict[str, Any], lines: list[str]) -> None:
    click.echo(json.dumps(result) if as_json else "\n".join(lines))


@contextmanager
def _figures_first(as_json: bool, lines: Callable[[dict[str, Any]], list[str]]) -> Iterator[None]:
    """What was found is printed also where its report can't be made."""
    from .verify import ReportError

    try:
        yield
    except ReportError as error:
        _print(as_json, error.result, lines(error.result))
        raise


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mobilesam")
def main() -> None:
    """Distil Segment Anything's image encoder into a small one.

    \b
    mobilesam precompute --images DIR --out store.zarr    run the teacher once, into a Zarr store
    mobilesam distill --epochs 8                          fit the student to the store
    mobilesam verify                                      how close student and teacher are
    mobilesam evaluate --store S --model NAME=FILE        any models' masks, with the teacher's and with labels
    mobilesam inspect store.zarr --check                  what a store is, and whether it is whole
    mobilesam segment photo.jpg --point 320 240           masks of one image
    mobilesam export --out exported                       files for MobileSAM's own code and for onnxruntime
    mobilesam students                                    what there is to distil into, and what it costs
    mobilesam sweep --epochs 2,4,8 --seed 0,1,2           a grid of students, side by side
    """
    # Only our own: a handler at the root would print what dask and matplotlib say to themselves.
    logger = logging.getLogger(__package__)
    logger.handlers[:] = [logging.StreamHandler()]
    logger.propagate = False


# fmt: off
_precompute_options = _options(
    click.option("--images", type=_PATH, multiple=True, required=True, metavar="DIR|TAR...",
                  help="Folders (searched recursively) and .tar files; several may follow one --images."),
    click.argument("more", nargs=-1, type=_PATH, metavar="[DIR|TAR]..."),
    click.option("--out", type=_PATH, default="store.zarr", show_default=True,
                  help="The store, made or gone on with."),
    click.option("--teacher", type=click.Choice(list(TEACHERS)),
                  help="[default: the store's, else vit_h]"),
    click.option("--checkpoint", type=_PATH, metavar="FILE",
                  help="The teacher's weights [default: found in MOBILESAM_CACHE, else downloaded into it]"),
    click.option("--fraction", type=float, default=1.0, show_default=True, metavar="F",
                  help="Keep this share of the images, chosen by a hash of each one's name."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of --fraction's choice."),
    click.option("--limit", type=int, metavar="N", help="At most this many images."),
    click.option("--extend", is_flag=True, help="Append images that the store lacks."),
    click.option("--retry-failed", is_flag=True, help="Compute shards with failed images anew."),
    click.option("--dtype", type=click.Choice(["float16", "float32", "int8"]),
                  help="Of the stored embeddings [default: the store's, else float16]"),
    click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
                  help="Of the teacher's arithmetic; auto is bfloat16 where the hardware accelerates it."),
    _device,
    click.option("--workers", type=int, metavar="N", help="Worker processes [default: one a GPU; 1 on a CPU]"),
    click.option("--scheduler", metavar="ADDRESS", help="Use the dask cluster at this address."),
    click.option("--shard-size", default="auto", show_default=True, metavar="S",
                  help="Images per shard; auto is 64, or less where a shard would take over five minutes."),
    click.option("--batch-size", type=int, metavar="B",
                  help="Images that the teacher takes at once [default: by device]"),
    click.option("--compile", is_flag=True,
                  help="Have torch.compile translate the teacher first: minutes at each worker's start."),
    click.option("--image-size", type=int, metavar="PX",
                  help="Side of the teacher's input [default: the store's, else 1024]"),
    click.option("--image-timeout", type=float, default=120.0, show_default=True, metavar="SECONDS",
                  help="An image that takes longer to read and decode fails."),
    click.option("--audit", type=int, default=2, show_default=True, metavar="K",
                  help="At the end, embed K random images of this run again in float32 and compare."),
    click.option("--keep-images", is_flag=True,
                  help="Keep the resized images in the store, too: it then trains and verifies without the photos."),
    click.option("--performance-report", type=_PATH, metavar="FILE.html",
                  help="Write dask's performance report."),
    click.option("--dry-run", is_flag=True, help="Say what would be done, needed and taken; change nothing."),
)
# fmt: on


@main.command(cls=RoomCommand)
@_precompute_options
@_common
def precompute(
    images: tuple[Path, ...], more: tuple[Path, ...], dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Run the teacher once over the images, into a store.

    A rerun of the same command computes only what is missing. A broken image is recorded as failed and does not
    stop the job. Exit code 1 when the audit finds stored embeddings that are not the teacher's.

    \b
    Examples:
      mobilesam precompute --images photos --out store.zarr --teacher vit_b --checkpoint sam_vit_b_01ec64.pth
      mobilesam precompute --images sa_000000.tar sa_000001.tar --fraction 0.01 --seed 1 --dry-run
      mobilesam precompute --images photos --limit 100 --teacher vit_nano --image-size 256 --json
      mobilesam precompute --images photos --extend --retry-failed
      mobilesam precompute --images photos --dtype int8 --precision bfloat16 --device cuda:1 --batch-size 16
      mobilesam precompute --images photos --workers 2 --shard-size 32 --performance-report dask.html
      mobilesam precompute --images photos --device cuda --batch-size 16 --compile
      mobilesam precompute --images photos --keep-images --dtype int8
      mobilesam precompute --images /nfs/photos --image-timeout 600 --audit 10
      mobilesam precompute --images /data/photos --out /data/store.zarr --scheduler tcp://10.0.0.1:8786 --debug
    """
    from .precompute import PrecomputeConfig
    from .precompute import dry_run as plan_only
    from .precompute import precompute as run
    from .precompute.dry_run import plan_lines
    from .precompute.run import summary_lines

    with _usage():
        shard_size = _auto_or_number("--shard-size", options.pop("shard_size"))
        config = PrecomputeConfig(images=images + more, shard_size=shard_size, **options)
    with Reporter("precompute") as reporter:
        result = plan_only(config, reporter) if dry_run else run(config, reporter)
    _print(as_json, result, plan_lines(result) if dry_run else summary_lines(config.out, result))
    if not dry_run:
        click.get_current_context().exit(_precompute_code(result))


def _precompute_code(result: dict[str, Any]) -> int:
    """A store in which nothing could be embedded is of no use to the next command; one out of tolerance neither."""
    if result["failed"] == result["images"]:
        return INPUT
    return FAILED_CHECK if result["out_of_tolerance"] else 0


def _auto_or_number(option: str, value: str) -> int | None:
    if value == "auto":
        return None
    try:
        return int(value)
    except ValueError:
        raise click.UsageError(f"{option} {value!r} is neither auto nor a number") from None


_DISTILL = {field.name: field.default for field in fields(DistillConfig)}


# fmt: off
_distill_options = _options(
    click.option("--store", type=_PATH, default=_DISTILL["store"], show_default=True,
                  help="What precompute made."),
    _moved_images,
    click.option("--student", default=_DISTILL["student"], show_default=True, metavar="NAME",
                  help="tiny_vit, tiny_vit_11m, tiny_vit_21m, deit_tiny, or timm:NAME for a backbone of timm's."),
    click.option("--init", type=_PATH, metavar="FILE",
                  help="Start from these weights: ImageNet's (timm's or TinyViT's files), MobileSAM's, a student's."),
    click.option("--epochs", type=int, default=_DISTILL["epochs"], show_default=True),
    click.option("--batch-size", type=int, default=_DISTILL["batch_size"], show_default=True,
                  help="Images that one optimizer step is made of."),
    click.option("--micro-batch", type=int, metavar="M",
                  help="Images in memory at once [default: 2 on a CPU, by free memory on a GPU]"),
    click.option("--lr", type=float, default=_DISTILL["lr"], show_default=True,
                  help="Highest learning rate; a decoder that is trained has a tenth of it."),
    click.option("--weight-decay", type=float, default=_DISTILL["weight_decay"], show_default=True),
    click.option("--warmup", type=float, default=_DISTILL["warmup"], show_default=True,
                  help="Share of the steps in which the rate rises."),
    click.option("--seed", type=int, default=_DISTILL["seed"], show_default=True),
    click.option("--val-fraction", type=float, default=_DISTILL["val_fraction"], show_default=True,
                  help="Share of the images held out."),
    click.option("--objective", type=click.Choice(OBJECTIVES), default=_DISTILL["objective"], show_default=True,
                  help="The embeddings alone; masks through SAM's decoder, which stays as it is (semi_coupled) or is "
                  "trained, too (coupled); or the decoder alone, for the student that --init names."),
    click.option("--labels", type=click.Choice(LABELS), default=_DISTILL["labels"], show_default=True,
                  help="Whose masks: the teacher's, or those of SA-1B's JSON files beside the images, where there "
                  "are any."),
    click.option("--objects", type=int, default=_DISTILL["objects"], show_default=True, metavar="N",
                  help="Objects of each image that a step asks for."),
    click.option("--rounds", type=int, default=_DISTILL["rounds"], show_default=True, metavar="N",
                  help="Prompts of each object: the first one, and corrections."),
    click.option("--boxes", type=float, default=_DISTILL["boxes"], show_default=True, metavar="SHARE",
                  help="Of the objects, asked for by a box first; the others by a point."),
    click.option("--mse-weight", type=float, default=_DISTILL["mse_weight"], show_default=True,
                  help="Of the embeddings' error, beside the masks'."),
    click.option("--focal-weight", type=float, default=_DISTILL["focal_weight"], show_default=True),
    click.option("--dice-weight", type=float, default=_DISTILL["dice_weight"], show_default=True),
    click.option("--iou-weight", type=float, default=_DISTILL["iou_weight"], show_default=True,
                  help="Of the error of predicted IoUs."),
    click.option(
        "--loss-region",
        type=click.Choice(["all", "valid"]),
        default=_DISTILL["loss_region"],
        show_default=True,
        help="The whole square, or only its image part.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default=_DISTILL["precision"],
        show_default=True,
    ),
    _device,
    click.option("--compile", is_flag=True, default=None,
                  help="Have torch.compile translate the student first: minutes at the start, then faster on GPUs."),
    click.option("--resume/--restart", default=True, show_default=True,
                  help="Go on with the same run, or begin it anew."),
    click.option("--out", type=_PATH, metavar="runs/NAME",
                  help="The run's folder [default: by student, options and data]"),
)
# fmt: on


@main.command(cls=RoomCommand)
@_distill_options
@_common
def distill(resume: bool, as_json: bool, **options: Any) -> None:
    """Fit a student to a store's embeddings, by their mean squared error or by the masks made of them.

    Writes runs/NAME and points runs/latest to it. A rerun of the same command goes on where it was.

    \b
    Examples:
      mobilesam distill --epochs 8
      mobilesam distill --store store.zarr --images /data/photos --student tiny_vit --out runs/mine
      mobilesam distill --student timm:resnet18 --init resnet18.safetensors
      mobilesam distill --batch-size 8 --micro-batch 4 --lr 2e-3 --weight-decay 0.01 --warmup 0.05 --seed 1
      mobilesam distill --val-fraction 0.1 --loss-region valid --precision float32 --device cuda:0
      mobilesam distill --objective semi_coupled --objects 16 --rounds 3 --boxes 0.5 --mse-weight 1
      mobilesam distill --objective coupled --labels annotations --focal-weight 20 --dice-weight 1 --iou-weight 1
      mobilesam distill --objective decoder --init runs/mine --lr 1e-4
      mobilesam distill --restart --json --debug
      mobilesam distill --resume
      torchrun --nproc-per-node 4 -m mobilesam distill --batch-size 64 --compile
    """
    from .distill import distill as run
    from .distill.run import summary_lines
    from .distill.students.registry import student_info

    with _usage():
        config = DistillConfig(**_given(**options), restart=not resume)
        student_info(config.student)
    if _rank():
        logging.disable(logging.WARNING)
        run(config)
        return
    with Reporter("distill") as reporter:
        result = run(config, progress=reporter.training)
    _print(as_json, result, [*summary_lines(result), "Next: mobilesam verify"])


# fmt: off
_verify_options = _options(
    click.option("--student", type=_PATH, metavar="RUN_OR_FILE", help="[default: runs/latest]"),
    click.option("--store", type=_PATH, help="[default: the run's]"),
    _moved_images,
    click.option("--split", type=click.Choice(["val", "train", "all"]), default="val", show_default=True),
    click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
                  help="Of the student's arithmetic; auto is what it was trained in."),
    _device,
    click.option("--batch-size", type=int, metavar="B", help="[default: by device]"),
    click.option("--report", type=_PATH, metavar="FILE.html",
                  help="Write one self-contained page with curves and pictures."),
    click.option("--min-cosine", type=float, metavar="X", help="Fail below this mean cosine (valid cells)."),
    click.option("--min-skill", type=float, metavar="X", help="Fail below this skill (valid cells)."),
    click.option("--min-miou", type=float, metavar="X", help="Fail below this mean IoU of the masks."),
    click.option("--points", type=int, default=4, show_default=True, metavar="N",
                  help="Compare the masks of N x N points in each image; 0 leaves masks out."),
)
# fmt: on


@main.command(cls=RoomCommand)
@_verify_options
@_common
def verify(as_json: bool, **options: Any) -> None:
    """Compare a student with its teacher: their embeddings, and the masks that SAM's decoder makes of them.

    Exit code 1 when a threshold is missed.

    \b
    Examples:
      mobilesam verify
      mobilesam verify --split all --report report.html
      mobilesam verify --min-cosine 0.8 --min-skill 0.5 --min-miou 0.7 --json
      mobilesam verify --student mobile_sam.pt --store store.zarr --split all --points 8
      mobilesam verify --student runs/mine --store store.zarr --images /data/photos --split train
      mobilesam verify --precision float32 --device cpu --batch-size 2 --debug
    """
    from .verify import VerifyConfig, table_lines
    from .verify import verify as run

    with _usage():
        config = VerifyConfig(**options)
    with _figures_first(as_json, table_lines), Reporter("verify") as reporter:
        result = run(config, progress=reporter.comparison)
    _print(as_json, result, table_lines(result))
    if not result["passed"]:
        click.get_current_context().exit(FAILED_CHECK)


@main.command(cls=RoomCommand)
@click.argument("store", type=_PATH, default="store.zarr")
@click.option("--check", is_flag=True, help="Read everything and name each damaged shard and image.")
@click.option("--repair", is_flag=True, help="Check, and take damaged shards out, to be computed anew.")
@_common
def inspect(store: Path, check: bool, repair: bool, as_json: bool) -> None:
    """Tell what a store is, and whether it is whole.

    Exit code 1 when something is wrong with it, 0 when --repair has mended that. A good shard is never touched.

    \b
    Examples:
      mobilesam inspect store.zarr
      mobilesam inspect store.zarr --check --json
      mobilesam inspect store.zarr --repair --debug
    """
    from .store.inspection import inspect_store, inspection_lines

    with Reporter("inspect") as reporter:
        result = inspect_store(store, check=check or repair, repair=repair, progress=reporter.comparison)
    _print(as_json, result, inspection_lines(result))
    if result["problems"]:
        click.get_current_context().exit(FAILED_CHECK)


@main.command(cls=RoomCommand)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--image-size", type=int, default=1024, show_default=True, metavar="PX")
@_device
@click.option(
    "--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="float32", show_default=True
)
@_common
def students(names: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """List students with what they cost: parameters, multiply-accumulates, milliseconds an image on this machine.

    \b
    Examples:
      mobilesam students
      mobilesam students tiny_vit timm:resnet18 timm:mobilenetv3_small_100 --json
      mobilesam students deit_tiny --image-size 512 --device cuda:0 --precision bfloat16 --debug
    """
    from .distill import STUDENTS, students_lines, students_table

    names = names or tuple(STUDENTS)
    rows: list[dict[str, Any]] = []
    with Reporter("students") as reporter:
        for name in names:
            reporter.show(len(rows), len(names), name)
            rows += students_table([name], **options)
    _print(as_json, {"students": rows}, students_lines(rows))
    if all(row["error"] is not None for row in rows):
        click.get_current_context().exit(INPUT)


# fmt: off
_segment_options = _options(
    click.argument("image", type=_PATH),
    click.option("--student", type=_PATH, metavar="RUN_OR_FILE",
                  help="A run, an export, a student's file, or one like mobile_sam.pt [default: runs/latest]"),
    click.option("--head", type=_PATH, metavar="STORE_OR_FILE",
                  help="SAM's mask decoder, where the student lies without it."),
    click.option("--teacher", type=click.Choice(list(TEACHERS)), help="In a student's place."),
    _checkpoint,
    click.option("--point", "points", type=float, nargs=2, multiple=True, metavar="X Y",
                  help="On the object, in pixels of the image; may be repeated."),
    click.option("--negative-point", "negative_points", type=float, nargs=2, multiple=True, metavar="X Y",
                  help="Beside the object; may be repeated."),
    click.option("--box", "boxes", type=float, nargs=4, multiple=True, metavar="X0 Y0 X1 Y1",
                  help="Around the object. Several mean an object each."),
    click.option("--everything", is_flag=True, help="Whatever SAM's automatic mask generator finds."),
    click.option("--out", type=_PATH, default="overlay.png", show_default=True, metavar="FILE",
                  help="The picture with the masks drawn in, PNG or JPEG."),
    click.option("--masks", type=_PATH, metavar="DIR", help="Write each mask as a PNG, 255 on the object."),
    click.option("--rle", type=_PATH, metavar="FILE", help="Write the masks as SA-1B does, in COCO's RLE."),
    _device,
    click.option("--image-size", type=int, metavar="PX",
                  help="For teachers and files like mobile_sam.pt, which don't say [default: 1024]"),
)
# fmt: on


@main.command(cls=RoomCommand)
@_segment_options
@_common
def segment(as_json: bool, **options: Any) -> None:
    """Segment one image by points, boxes, or everything in it.

    All points, with the box if there is one, mean one object. Prints how long the embedding and the masks took.

    \b
    Examples:
      mobilesam segment photo.jpg --point 320 240
      mobilesam segment photo.jpg --student runs/mine --point 320 240 --negative-point 20 20 --out masks.jpg
      mobilesam segment photo.jpg --student mobile_sam.pt --everything --masks masks --rle masks.json
      mobilesam segment photo.jpg --student student.safetensors --head store.zarr --box 40 60 400 300 --json
      mobilesam segment photo.jpg --teacher vit_b --checkpoint sam_vit_b_01ec64.pth --point 320 240 --device cuda:0
      mobilesam segment photo.jpg --teacher vit_nano --image-size 256 --everything --debug
    """
    from .predict import SegmentConfig
    from .predict import segment as run
    from .predict.run import segment_lines

    with _usage():
        config = SegmentConfig(**options)
    with Reporter("segment") as reporter:
        result = run(config, download=reporter.download)
    _print(as_json, result, segment_lines(result))


@main.command(cls=RoomCommand)
@click.option("--student", type=_PATH, metavar="RUN_OR_FILE", help="[default: runs/latest]")
@click.option("--head", type=_PATH, metavar="STORE_OR_FILE", help="SAM's mask decoder, if it lies elsewhere.")
@click.option(
    "--out",
    type=_PATH,
    required=True,
    metavar="X.pt|encoder.onnx|decoder.onnx|DIR",
    help="What to make, by its name; a folder gets all of them.",
)
@click.option(
    "--image-size",
    type=int,
    metavar="PX",
    help="For files like mobile_sam.pt, which don't say [default: 1024]",
)
@_common
def export(as_json: bool, **options: Any) -> None:
    """Make files that run without this package.

    X.pt is for MobileSAM's own code: student and head as one checkpoint (of tiny_vit alone). encoder.onnx and
    decoder.onnx are for onnxruntime; both are compared with torch before they are left there. A folder gets all of
    these, safetensors with JSON, and a card that says what teacher, data and metrics are behind them.

    \b
    Examples:
      mobilesam export --out exported
      mobilesam export --student runs/mine --out mobile_sam.pt
      mobilesam export --student mobile_sam.pt --image-size 512 --out small-encoder.onnx --json
      mobilesam export --student student.safetensors --head store.zarr --out decoder.onnx --debug
    """
    from .predict import ExportConfig
    from .predict import export as run
    from .predict.export.run import export_lines

    with _usage():
        config = ExportConfig(**options)
        _ = config.kind
    result = run(config)
    _print(as_json, result, export_lines(result))


# fmt: off
_evaluate_options = _options(
    click.option("--model", "models", multiple=True, metavar="NAME=FILE",
                 help="May be repeated. FILE is a run, an export, a student's file, mobile_sam.pt, a checkpoint of "
                 "vit_b, vit_l or vit_h, or vit_nano; fastsam:FILE (or the name fastsam) is FastSAM, through "
                 "ultralytics, whose licence is AGPL-3.0; PREDICTOR:FILE is for packages with an entry point in "
                 "mobilesam.predictors."),
    click.option("--store", type=_PATH, help="Its images and its teacher's embeddings."),
    click.option("--images", type=_PATH, metavar="DIR|TAR",
                 help="Without a store: the images. With one: where they are now, if they moved."),
    click.option("--teacher", type=click.Choice(list(TEACHERS)), help="To be run on --images."),
    _checkpoint,
    click.option("--coco", type=_PATH, metavar="FILE.json",
                 help="Labels: a COCO instances file [default: SA-1B's JSON beside each image]"),
    click.option("--points", type=int, default=4, show_default=True, metavar="N",
                 help="N x N points in each image against the teacher; 0 leaves that out."),
    click.option("--distances", default="100,200,300,400,500", show_default=True, metavar="PX,PX,...",
                 help="Between a foreground and a background point; none leaves pairs out."),
    click.option("--max-objects", type=int, default=64, show_default=True, metavar="N",
                 help="At most so many labelled objects an image, drawn."),
    click.option("--split", type=click.Choice(["auto", "val", "all"]), default="auto", show_default=True,
                 help="Of a store; auto is what no run among the models was trained on."),
    click.option("--limit", type=int, metavar="N", help="At most this many images."),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--image-size", type=int, metavar="PX",
                 help="For files that don't say theirs [default: the store's, else 1024]"),
    _device,
    click.option("--report", type=_PATH, metavar="FILE.html",
                 help="Write one self-contained page with everybody's masks side by side."),
)
# fmt: on


@main.command(cls=RoomCommand)
@_evaluate_options
@_common
def evaluate(models: tuple[str, ...], distances: str, as_json: bool, **options: Any) -> None:
    """Compare models by their masks: with the teacher's, with labels, and by what they cost.

    The same prompts go to all of them. A broken image or label fails that image alone; exit code 3 when there was
    nothing to compare.

    \b
    Examples:
      mobilesam evaluate --store store.zarr --model mine=runs/latest --model nano=vit_nano --report masks.html
      mobilesam evaluate --images sa_000020.tar --teacher vit_h --model mobile=mobile_sam.pt --model mine=exported
      mobilesam evaluate --images photos --teacher vit_h --checkpoint vit_h.pth --model fastsam=FastSAM-s.pt
      mobilesam evaluate --images val2017 --coco instances_val2017.json --model b=vit_b.pth --max-objects 20
      mobilesam evaluate --store store.zarr --model mine=runs/latest --split val --points 8 --distances 50,100
      mobilesam evaluate --images photos --model other=their_predictor:weights.pt --limit 100 --seed 1 --json
      mobilesam evaluate --store store.zarr --model mobile=mobile_sam.pt --image-size 512 --device cpu --debug
    """
    from .verify import EvaluateConfig, evaluate_masks, evaluation_lines

    with _usage():
        pairs = tuple((name, value) for name, _, value in (model.partition("=") for model in models))
        config = EvaluateConfig(models=pairs, distances=_pixels(distances), **options)
    with _figures_first(as_json, evaluation_lines), Reporter("evaluate") as reporter:
        result = evaluate_masks(config, progress=reporter.comparison, download=reporter.download)
    _print(as_json, result, evaluation_lines(result))
    if not result["evaluated"]:
        click.get_current_context().exit(INPUT)


def _pixels(distances: str) -> tuple[int, ...]:
    try:
        return () if distances == "none" else tuple(map(int, distances.split(",")))
    except ValueError:
        raise click.UsageError(f"--distances {distances!r}: give pixels, such as 100,200, or none") from None


def _axis(name: str, help_text: str) -> Callable:
    """An option of sweep that takes several values, with commas between."""
    return click.option(f"--{name.replace('_', '-')}", name, metavar="V,...", help=help_text)


# fmt: off
_sweep_options = _options(
    click.option("--store", type=_PATH, default=_DISTILL["store"], show_default=True,
                  help="What precompute made."),
    _moved_images,
    _axis("student", "As distill has it, and so on; each without its values has distill's default."),
    _axis("init", "Files or runs to start from."),
    _axis("objective", "decoupled, semi_coupled, coupled; decoder finetunes what decoupled has made, or --init."),
    _axis("batch_size", "Images that one optimizer step is made of."),
    _axis("epochs", "[default: 8]"),
    _axis("iterations", "In place of --epochs: optimizer steps, to the nearest number of epochs."),
    _axis("lr", "Highest learning rates."),
    _axis("weight_decay", "Of AdamW."),
    _axis("warmup", "Shares of the steps in which the rate rises."),
    _axis("loss_region", "all, valid"),
    _axis("labels", "teacher, annotations. This and the next are of masks, and left out where decoupled."),
    _axis("objects", "Objects of each image that a step asks for."),
    _axis("rounds", "Prompts of each object."),
    _axis("boxes", "Shares of the objects asked for by a box first."),
    _axis("mse_weight", "Of the embeddings' error beside the masks'."),
    _axis("focal_weight", "Of the masks' focal loss."),
    _axis("dice_weight", "Of their dice loss."),
    _axis("iou_weight", "Of the error of predicted IoUs."),
    _axis("seed", "Several show the spread."),
    click.option("--micro-batch", type=int, metavar="M", help="Images in memory at once [default: as distill]"),
    click.option("--val-fraction", type=float, default=_DISTILL["val_fraction"], show_default=True,
                  help="Share of the images held out, the same ones in all runs."),
    click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
                  show_default=True),
    _device,
    click.option("--compile", is_flag=True, default=None, help="Have torch.compile translate the students."),
    click.option("--points", type=int, default=4, show_default=True, metavar="N",
                  help="Compare the masks of N x N points in each image."),
    click.option("--test-store", type=_PATH, metavar="STORE",
                  help="Judge the students by all images of another store, too."),
    click.option("--test-images", type=_PATH, metavar="DIR", help="Where those are now, if they moved."),
    click.option("--scheduler", metavar="ADDRESS",
                  help="Train on the dask cluster at this address, one run a worker [default: all here, in turn]"),
    click.option("--out", type=_PATH, default="sweeps/latest", show_default=True, metavar="sweeps/NAME"),
)
# fmt: on


@main.command(cls=RoomCommand)
@_sweep_options
@_common
def sweep(as_json: bool, **options: Any) -> None:
    """Train and verify a grid of students: every combination of the values given, with commas between.

    Leaves tables in the shape of the paper's, results.json and report.html in --out. A rerun of the same command goes
    on where it was; further values add their runs. Exit code 1 when a run failed, which doesn't stop the others.

    \b
    Examples:
      mobilesam sweep --batch-size 4,8 --epochs 2,4,8 --seed 0,1,2 --out sweeps/length
      mobilesam sweep --objective decoupled,semi_coupled,coupled,decoder --iterations 5000 --objects 4,8
      mobilesam sweep --student tiny_vit,deit_tiny --lr 5e-4,1e-3 --weight-decay 0,0.01 --warmup 0.05 --init a.pt
      mobilesam sweep --objective semi_coupled --labels teacher,annotations --rounds 1,2 --boxes 0,0.5 --mse-weight 1
      mobilesam sweep --objective coupled --focal-weight 5,20 --dice-weight 1,5 --iou-weight 1 --json
      mobilesam sweep --store store.zarr --images /data/photos --loss-region all,valid --val-fraction 0.1 --points 8
      mobilesam sweep --test-store other.zarr --test-images /data/other --precision float32 --device cpu
      mobilesam sweep --seed 0,1,2,3 --scheduler tcp://10.0.0.1:8786 --micro-batch 8 --compile --debug
    """
    from .distill.students.registry import student_info
    from .verify import SweepConfig
    from .verify import sweep as run
    from .verify.sweep.config import AXES, parse_axis
    from .verify.sweep.grid import plan_trials
    from .verify.sweep.run import summary_lines

    common = {name: options.pop(name) for name in (
        "store", "images", "micro_batch", "val_fraction", "precision", "device", "compile"
    )}  # fmt: skip
    with _usage():
        texts = _given(**{name: options.pop(name) for name in (*AXES, "iterations")})
        axes = {name: parse_axis(name, text) for name, text in texts.items()}
        iterations = axes.pop("iterations", ())
        config = SweepConfig(
            base=DistillConfig(**_given(**common)), axes=axes, iterations=iterations, **options
        )
        plan_trials(config, training_rows=1)
        for student in axes.get("student", ()):
            student_info(student)
    with Reporter("sweep") as reporter:
        result = run(config, message=reporter.message, progress=reporter.training)
    _print(as_json, result, summary_lines(result))
    if result["failed"]:
        click.get_current_context().exit(FAILED_CHECK)
