"""Command line: one function per command. Options become config objects, and errors become exit codes.

Results go to standard output, messages and progress to standard error. Each command returns its exit code; `_explain`
chooses that of an error. Only the rooms' configs are imported at the top, the rooms inside commands, so that `--help`
is fast.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from . import __version__
from .common.click_options import PATH_TYPE, config_options, mapping_options, usage_errors
from .common.durable import final_name
from .common.errors import Interrupted, MobileSamError, ReportError
from .common.signals import StopFlag, stopped_by_signals
from .common.terminal import MessageHandler, Reporter, guarded_streams
from .distill.config import CostConfig, DistillConfig
from .precompute.config import PrecomputeConfig
from .predict.config import ExportConfig, SegmentConfig
from .verify.config import VerifyConfig
from .verify.evaluate.config import EvaluateConfig
from .verify.sweep.config import AXIS_OPTIONS, SweepConfig

# Exit codes. click itself exits with 2 for wrong usage; a signal's code is 128 + its number (129, 130 and 143).
DONE, FAILED_CHECK, INPUT, READER_GONE = 0, 1, 3, 141


class MainGroup(click.Group):
    """Group of all commands. A message that can't be written is dropped; a lost result becomes an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command, and exit unless `standalone_mode` is False."""
        with guarded_streams() as output:
            try:
                return super().main(*args, **kwargs)
            except SystemExit as end:
                output.flush()
                if output.failure is None or end.code:
                    raise
                if output.failure.errno in (
                    errno.EPIPE,
                    errno.EIO,
                ):  # as after `| head`; a terminal was closed
                    raise SystemExit(READER_GONE) from None
                reason = output.failure.strerror
                click.echo(f"error: the work is done, but its result can't be printed: {reason}", err=True)
                raise SystemExit(INPUT) from None


class RoomCommand(click.Command):
    """Command whose return value is its exit code, and whose errors become a short message and an exit code."""

    def invoke(self, context: click.Context) -> None:
        """Run the command and exit."""
        debug = context.params.pop("debug")
        try:
            with stopped_by_signals(StopFlag(), Interrupted, "interrupted"):
                code = super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            code = 130
        except Exception as error:  # noqa: BLE001 - the outermost handler
            if debug:
                traceback.print_exc()
            message, code = _explain(error)
            if not _rank():
                click.echo(f"error: {message}", err=True)
            elif code == INPUT:
                click.echo(f"error in process {_rank()}: {message}", err=True)
        context.exit(code)


def _explain(error: Exception) -> tuple[str, int]:
    """Return the message for an error and the exit code."""
    if isinstance(error, Interrupted):
        return str(error), 128 + error.signum
    if isinstance(error, ReportError) and isinstance(error.__cause__, Exception):
        message, code = _explain(error.__cause__)
        return f"no report: {message}", code
    if isinstance(error, MobileSamError):
        return str(error), INPUT
    if isinstance(error, OSError):
        place = final_name(error.filename) if isinstance(error.filename, str) else "input or output"
        return f"{place}: {error.strerror or error}", INPUT
    return f"unexpected {type(error).__name__}: {error}\nThis is a bug; --debug shows where.", INPUT


def _rank() -> int:
    """Return the rank among torchrun's processes; only rank 0 reports."""
    return int(os.environ.get("RANK", "0")) if os.environ.get("WORLD_SIZE", "1") != "1" else 0


def _common(command: Callable) -> Callable:
    json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
    debug_option = click.option("--debug", is_flag=True, help="Show tracebacks.")
    return json_option(debug_option(command))


def _check_paths(stores: Iterable[Path | None], images: Iterable[Path | None] = ()) -> None:
    """Refuse paths that hold no store or no images, before the seconds that torch takes to load."""
    from .sam.image_files import expand_paths
    from .store.layout import local_path
    from .store.zarr_metadata import read_spec

    for store in stores:
        if store is not None:
            read_spec(local_path(store))
    given = [path for path in images if path is not None]
    if given:
        expand_paths(given)


def _check_weights(*files: Path | None, latest: bool = False) -> None:
    """Refuse files of another kind than weights, before torch loads; with `latest`, refuse that there is no run."""
    from .distill.latest_run import refuse_no_run
    from .sam.weight_files import refuse_other_kind

    if latest:
        refuse_no_run()
    for file in files:
        if (
            file is not None and file.is_file() and not file.name.endswith(".json")
        ):  # an index is read as a whole
            refuse_other_kind(file)


def _print(as_json: bool, result: dict[str, Any], lines: list[str]) -> None:
    click.echo(json.dumps(result) if as_json else "\n".join(lines))


@contextmanager
def _printed_without_report(as_json: bool, lines: Callable[[dict[str, Any]], list[str]]) -> Iterator[None]:
    """Print the result before the error if only its report could not be written."""
    try:
        yield
    except ReportError as error:
        _print(as_json, error.result, lines(error.result))
        raise


@click.group(
    cls=MainGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="mobilesam")
def main() -> None:
    """Distil Segment Anything's image encoder into a small one.

    \b
    mobilesam precompute --images DIR --out store.zarr    embed images with the teacher, into a Zarr store
    mobilesam distill --epochs 8                          train a student on the store
    mobilesam verify                                      compare student and teacher
    mobilesam evaluate --store S --model NAME=FILE        compare models by their masks
    mobilesam inspect store.zarr --check                  describe a store and check it
    mobilesam segment photo.jpg --point 320 240           segment one image
    mobilesam export --out exported                       write files for MobileSAM's code and for onnxruntime
    mobilesam students                                    list the students and their cost
    mobilesam sweep --epochs 2,4,8 --seed 0,1,2           train and compare a grid of students

    Exit codes: 0 done; 1 a check, threshold or run failed; 2 wrong usage; 3 wrong input or environment; 129, 130 and
    143 interrupted; 141 nobody read the result.
    """
    # Only this package's logger: a root handler would also print messages of dask and matplotlib.
    logger = logging.getLogger(__package__)
    logger.handlers[:] = [MessageHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


@main.command(cls=RoomCommand)
@config_options(PrecomputeConfig)
@click.argument("more", nargs=-1, type=PATH_TYPE, metavar="[DIR|TAR]...")
@click.option("--dry-run", is_flag=True, help="Print the plan, its time and its disk space; change nothing.")
@_common
def precompute(config: PrecomputeConfig, more: tuple[Path, ...], dry_run: bool, as_json: bool) -> int:
    """Embed images with the teacher, into a store.

    Writes a Zarr store with one embedding per image and SAM's mask decoder. A rerun of the same command computes only
    what is missing. A broken image is recorded as failed and does not stop the job. Exit code 1 if the audit finds
    stored embeddings that are not the teacher's, 3 if no image could be embedded.

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
    from .common.dask_settings import own_dask_settings

    config = replace(config, images=config.images + more)
    settings = own_dask_settings() if config.scheduler is None else nullcontext()
    # dask takes some settings when it is imported.
    with settings, Reporter("precompute") as reporter:
        _check_paths([], config.images)
        from .precompute import dry_run as plan
        from .precompute import precompute as run
        from .precompute.dry_run import plan_lines
        from .precompute.run import summary_lines

        result = plan(config, reporter) if dry_run else run(config, reporter)
    _print(as_json, result, plan_lines(result) if dry_run else summary_lines(config.out, result))
    if dry_run:
        return DONE
    if result["failed"] == result["images"]:
        return INPUT
    return FAILED_CHECK if result["out_of_tolerance"] else DONE


@main.command(cls=RoomCommand)
@config_options(DistillConfig)
@_common
def distill(config: DistillConfig, as_json: bool) -> int:
    """Train a student on a store.

    The student learns the teacher's embeddings, or the masks that SAM's decoder makes of them. Writes checkpoints,
    metrics and student.safetensors to runs/NAME and points runs/latest to it. A rerun of the same command resumes the
    run; a finished one is only reported. Exit code 129, 130 or 143 if a signal stopped it, after its
    checkpoint was saved.

    \b
    Examples:
      mobilesam distill --epochs 8
      mobilesam distill --store store.zarr --images /data/photos --student tiny_vit --out runs/mine
      mobilesam distill --student timm:resnet18 --init resnet18.safetensors
      mobilesam distill --batch-size 8 --micro-batch 4 --lr 2e-3 --weight-decay 0.01 --warmup 0.05 --seed 1
      mobilesam distill --val-fraction 0.1 --loss-region valid --precision float32 --device cuda:0
      mobilesam distill --objective semi_coupled --objects 16 --rounds 3 --boxes 0.5 --mse-weight 1
      mobilesam distill --objective coupled --labels annotations --focal-weight 20 --dice-weight 1 --iou-weight 1
      mobilesam distill --objective coupled --coco labels.json
      mobilesam distill --objective semi_coupled --label-masks masks
      mobilesam distill --objective decoder --init runs/mine --lr 1e-4
      mobilesam distill --restart --json --debug
      mobilesam distill --resume
      torchrun --nproc-per-node 4 -m mobilesam distill --batch-size 64 --compile
    """
    # Another student's name is checked before anything else, which takes torch.
    if config.student == DistillConfig().student:
        _check_paths([config.store])
        _check_weights(config.init)
    from .distill import distill as run
    from .distill.run import summary_lines
    from .distill.students.registry import student_info

    with usage_errors():
        student_info(config.student)
    if _rank():
        logging.disable(logging.WARNING)
        run(config)
        return DONE
    with Reporter("distill") as reporter:
        result = run(config, progress=reporter.training)
    _print(as_json, result, [*summary_lines(result), "Next: mobilesam verify"])
    return DONE


@main.command(cls=RoomCommand)
@config_options(VerifyConfig)
@_common
def verify(config: VerifyConfig, as_json: bool) -> int:
    """Compare a student with its teacher.

    Prints metrics of the embeddings, and of the masks that SAM's decoder makes of them; writes only the --report.
    Exit code 1 if a threshold is missed.

    \b
    Examples:
      mobilesam verify
      mobilesam verify --split all --report report.html
      mobilesam verify --min-cosine 0.8 --min-skill 0.5 --min-miou 0.7 --json
      mobilesam verify --student mobile_sam.pt --store store.zarr --split all --points 8
      mobilesam verify --student runs/mine --store store.zarr --images /data/photos --split train
      mobilesam verify --precision float32 --device cpu --batch-size 2 --debug
      mobilesam verify --store headless.zarr --head sam_vit_b_01ec64.pth
    """
    _check_paths([config.store])
    _check_weights(config.student, config.head, latest=config.student is None)
    from .verify import table_lines
    from .verify import verify as run

    with _printed_without_report(as_json, table_lines), Reporter("verify") as reporter:
        result = run(config, progress=reporter.comparison, phase=reporter.phase)
    _print(as_json, result, table_lines(result))
    return DONE if result["passed"] else FAILED_CHECK


@main.command(cls=RoomCommand)
@click.argument("store", type=PATH_TYPE, default="store.zarr")
@click.option("--check", is_flag=True, help="Read everything and list each damaged shard and image.")
@click.option(
    "--repair", is_flag=True, help="Check, and remove damaged shards, so that precompute recomputes them."
)
@_common
def inspect(store: Path, check: bool, repair: bool, as_json: bool) -> int:
    """Describe a store, and check or repair it.

    Exit code 1 if the store is damaged, 0 if --repair has removed the damage. Intact shards are never changed.

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
    return FAILED_CHECK if result["problems"] else DONE


@main.command(cls=RoomCommand)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@config_options(CostConfig)
@_common
def students(config: CostConfig, names: tuple[str, ...], as_json: bool) -> int:
    """List students and their cost.

    Prints parameters, multiply-accumulates, and milliseconds per image on this machine, by default of all students.
    Exit code 3 if none of them could be built.

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
            rows += students_table([name], **dataclasses.asdict(config))
    _print(as_json, {"students": rows}, students_lines(rows))
    return INPUT if all(row["error"] is not None for row in rows) else DONE


@main.command(cls=RoomCommand)
@config_options(SegmentConfig)
@_common
def segment(config: SegmentConfig, as_json: bool) -> int:
    """Segment one image by points, boxes, or everything in it.

    All points, together with a single box, describe one object. Writes a picture with the masks drawn into it, and
    prints the time of the embedding and of the masks.

    \b
    Examples:
      mobilesam segment photo.jpg --point 320 240
      mobilesam segment photo.jpg --student runs/mine --point 320 240 --negative-point 20 20 --out masks.jpg
      mobilesam segment photo.jpg --student mobile_sam.pt --everything --masks masks --rle masks.json
      mobilesam segment photo.jpg --student student.safetensors --head store.zarr --box 40 60 400 300 --json
      mobilesam segment photo.jpg --teacher vit_b --checkpoint sam_vit_b_01ec64.pth --point 320 240 --device cuda:0
      mobilesam segment photo.jpg --teacher vit_nano --image-size 256 --everything --debug
    """
    _check_weights(config.student, config.head, latest=config.student is None and config.teacher is None)
    from .predict import segment as run
    from .predict.run import segment_lines

    with Reporter("segment") as reporter:
        result = run(config, download=reporter.download, phase=reporter.phase, points_done=reporter.points)
    _print(as_json, result, segment_lines(result))
    return DONE


@main.command(cls=RoomCommand)
@config_options(ExportConfig)
@_common
def export(config: ExportConfig, as_json: bool) -> int:
    """Write files that run without this package.

    X.pt is for MobileSAM's own code: student and head as one checkpoint (tiny_vit only). encoder.onnx and
    decoder.onnx are for onnxruntime; both are compared with torch before they are written. A folder gets all of
    these, safetensors with JSON, and a model card with teacher, data and metrics.

    \b
    Examples:
      mobilesam export --out exported
      mobilesam export --student runs/mine --out mine.pt
      mobilesam export --student mobile_sam.pt --image-size 512 --out small-encoder.onnx --json
      mobilesam export --student student.safetensors --head store.zarr --out decoder.onnx --debug
    """
    _check_weights(config.student, config.head, latest=config.student is None)
    from .predict import export as run
    from .predict.export.run import export_lines

    with Reporter("export") as reporter:
        result = run(config, progress=reporter.step)
    _print(as_json, result, export_lines(result))
    return DONE


@main.command(cls=RoomCommand)
@config_options(EvaluateConfig)
@_common
def evaluate(config: EvaluateConfig, as_json: bool) -> int:
    """Compare models by their masks and cost.

    The masks are compared with the teacher's and with labels; all models get the same prompts. Prints tables and
    writes only the --report. A broken image fails alone; a labelled object that can't be used is left out and
    counted. Exit code 3 if there was nothing to compare.

    \b
    Examples:
      mobilesam evaluate --store store.zarr --model mine=runs/latest --model nano=vit_nano --report masks.html
      mobilesam evaluate --images sa_000020.tar --teacher vit_h --model mobile=mobile_sam.pt --model mine=exported
      mobilesam evaluate --images photos --teacher vit_h --checkpoint vit_h.pth --model fastsam=FastSAM-s.pt
      mobilesam evaluate --images val2017 --coco instances_val2017.json --model b=vit_b.pth --max-objects 20
      mobilesam evaluate --images photos --label-masks masks --model mine=runs/latest
      mobilesam evaluate --store store.zarr --model mine=runs/latest --split val --points 8 --distances 50,100
      mobilesam evaluate --images photos --model other=their_predictor:weights.pt --limit 100 --seed 1 --json
      mobilesam evaluate --store headless.zarr --model mine=runs/latest --head sam_vit_b_01ec64.pth
      mobilesam evaluate --store store.zarr --model mobile=mobile_sam.pt --image-size 512 --device cpu --debug
    """
    _check_paths([config.store], [] if config.store else [config.images])
    _check_weights(config.head, *(Path(file) for _, file in config.models))
    from .verify import evaluate_masks, evaluation_lines

    with _printed_without_report(as_json, evaluation_lines), Reporter("evaluate") as reporter:
        result = evaluate_masks(
            config, progress=reporter.comparison, download=reporter.download, phase=reporter.phase
        )
    _print(as_json, result, evaluation_lines(result))
    return DONE if result["evaluated"] else INPUT


@main.command(cls=RoomCommand)
@config_options(DistillConfig, "base", only=["store", "images"])
@mapping_options(AXIS_OPTIONS, "axes")
@config_options(DistillConfig, "base", only=["micro_batch", "val_fraction", "precision", "device", "compile"])
@config_options(SweepConfig)
@_common
def sweep(config: SweepConfig, base: DistillConfig, axes: dict[str, tuple[Any, ...]], as_json: bool) -> int:
    """Train and verify a grid of students.

    An option with V,... takes several values separated by commas; every combination is one run. Options that aren't
    given have distill's defaults, and options that an objective doesn't use are left out of its runs. Decoder runs
    finetune the students of the decoupled runs, or those that --init names.

    Writes the runs, results.json, report.html, and tables in the layout of the MobileSAM paper to --out. A rerun of
    the same command resumes the sweep; additional values add runs. A failed run doesn't stop the others; the exit
    code is then 1.

    \b
    Examples:
      mobilesam sweep --batch-size 4,8 --epochs 2,4,8 --seed 0,1,2 --out sweeps/length
      mobilesam sweep --objective decoupled,semi_coupled,coupled,decoder --iterations 5000 --objects 4,8
      mobilesam sweep --student tiny_vit,deit_tiny --lr 5e-4,1e-3 --weight-decay 0,0.01 --warmup 0.05 --init a.pt
      mobilesam sweep --objective semi_coupled --labels teacher,annotations --rounds 1,2 --boxes 0,0.5 --mse-weight 1
      mobilesam sweep --objective coupled --focal-weight 5,20 --dice-weight 1,5 --iou-weight 1 --json
      mobilesam sweep --objective coupled --coco labels.json --lr 5e-4,1e-3
      mobilesam sweep --objective semi_coupled,coupled --label-masks masks
      mobilesam sweep --store store.zarr --images /data/photos --loss-region all,valid --val-fraction 0.1 --points 8
      mobilesam sweep --test-store other.zarr --test-images /data/other --precision float32 --device cpu
      mobilesam sweep --seed 0,1,2,3 --scheduler tcp://10.0.0.1:8786 --micro-batch 8 --compile --debug
    """
    if "student" not in axes:
        _check_paths([base.store, config.test_store])
        _check_weights(*map(Path, axes.get("init", ())))
    from .distill.students.registry import student_info
    from .verify import sweep as run
    from .verify.sweep.grid import plan_trials
    from .verify.sweep.run import summary_lines

    with usage_errors():
        config = replace(config, base=base, iterations=axes.pop("iterations", ()), axes=axes)
        plan_trials(config, training_rows=1)
        for student in axes.get("student", ()):
            student_info(student)
    with Reporter("sweep") as reporter:
        result = run(config, message=reporter.message, progress=reporter.training)
    _print(as_json, result, summary_lines(result))
    return FAILED_CHECK if result["failed"] else DONE
