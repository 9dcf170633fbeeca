"""Command line: one function per command. Options become config objects, and errors become exit codes.

Results go to standard output, messages and progress to standard error. Each command returns its exit code;
`common/command.py` chooses that of an error. Only the rooms' configs are imported at the top, the rooms inside
commands, so that `--help` is fast.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from . import __version__
from .common.click_options import PATH_TYPE, config_options, mapping_options, usage_errors
from .common.command import (
    DONE,
    FAILED_CHECK,
    INPUT,
    MainGroup,
    RoomCommand,
    common_options,
    print_result,
    printed_without_report,
    process_rank,
)
from .common.errors import ImageError, shown
from .common.terminal import MessageHandler, Reporter, say
from .distill.config import CostConfig, DistillConfig
from .precompute.config import PrecomputeConfig
from .predict.config import DemoConfig, ExportConfig, SegmentConfig
from .verify.config import VerifyConfig
from .verify.evaluate.config import EvaluateConfig
from .verify.sweep.config import AXIS_OPTIONS, SweepConfig


def _check_paths(stores: Iterable[Path | None], images: Iterable[Path | None] = ()) -> None:
    """Refuse paths that hold no store or no images, before the seconds that torch takes to load."""
    from .sam.photos.image_files import expand_paths
    from .store.layout import local_path
    from .store.zarr_metadata import read_spec

    for store in stores:
        if store is not None:
            read_spec(local_path(store))
    given = [path for path in images if path is not None]
    if given:
        expand_paths(given)


def _check_weights(*files: Path | None, student: Path | None = None, latest: bool = False) -> None:
    """Refuse weights that are missing or of another kind, before torch loads.

    Args:
        files: files or folders of weights, or stores with a head; None for options that weren't given.
        student: student that the command uses; None: the latest run.
        latest: refuse that there is no run if `student` is None.
    """
    from .distill.latest_run import refuse_no_run
    from .distill.run_description import is_run, student_path
    from .sam.weights.weight_files import INDEX_SUFFIX, refuse_other_kind, weight_files

    if latest and student is None:
        refuse_no_run()
    given = [file for file in files if file is not None]
    for file in given:
        if not file.exists():
            weight_files(file)
    if student is not None and not is_run(student):
        given.append(student_path(student))
    for file in given:
        if file.is_file() and not file.name.endswith(INDEX_SUFFIX):  # an index is read as a whole
            refuse_other_kind(file)


def _check_checkpoint(teacher: str | None, checkpoint: Path | None) -> None:
    """Refuse a built-in teacher's checkpoint before torch loads; a teacher of another package reads its own."""
    from .sam.registry import TEACHERS

    if teacher in TEACHERS:
        _check_weights(checkpoint)


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
    mobilesam demo                                        open an exported web demo in the browser
    mobilesam students                                    list the students and their cost
    mobilesam sweep --epochs 2,4,8 --seed 0,1,2           train and compare a grid of students
    mobilesam doctor                                      describe this machine and what comes next here

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
@common_options
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
        _check_checkpoint(config.teacher, config.checkpoint)
        from .precompute import dry_run as plan
        from .precompute import precompute as run
        from .precompute.dry_run import plan_lines
        from .precompute.run import summary_lines

        result = plan(config, reporter) if dry_run else run(config, reporter)
    print_result(as_json, result, plan_lines(result) if dry_run else summary_lines(config.out, result))
    if dry_run:
        return DONE
    if result["failed"] == result["images"]:
        return INPUT
    return FAILED_CHECK if result["out_of_tolerance"] else DONE


@main.command(cls=RoomCommand)
@config_options(DistillConfig)
@common_options
def distill(config: DistillConfig, as_json: bool) -> int:
    """Train a student on a store.

    The student learns the teacher's embeddings, or the masks that SAM's decoder makes of them. Writes checkpoints,
    metrics and student.safetensors to runs/NAME and points runs/latest to it. A rerun of the same command resumes the
    run; a finished one is only reported. Exit code 129, 130 or 143 if a signal stopped it, after its
    checkpoint was saved.

    \b
    Examples:
      mobilesam distill --epochs 8
      mobilesam distill --epochs auto
      mobilesam distill --store store.zarr --images /data/photos --student tiny_vit --out runs/mine
      mobilesam distill --student timm:resnet18 --init resnet18.safetensors
      mobilesam distill --student repvit_m1_1 --student-size 512
      mobilesam distill --batch-size 8 --micro-batch 4 --lr 2e-3 --weight-decay 0.01 --warmup 0.05 --seed 1
      mobilesam distill --val-fraction 0.1 --loss-region valid --precision float32 --device cuda:0
      mobilesam distill --recipe mobilesam-2023 --loss mse_cosine
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
    if process_rank():
        logging.disable(logging.WARNING)
        run(config)
        return DONE
    with Reporter("distill") as reporter:
        result = run(config, progress=reporter.training)
    print_result(as_json, result, [*summary_lines(result), "Next: mobilesam verify"])
    return DONE


@main.command(cls=RoomCommand)
@config_options(VerifyConfig)
@common_options
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
    _check_weights(config.head, student=config.student, latest=True)
    from .verify import table_lines
    from .verify import verify as run

    with printed_without_report(as_json, table_lines), Reporter("verify") as reporter:
        result = run(config, progress=reporter.comparison, phase=reporter.phase, drawn=reporter.drawing)
    print_result(as_json, result, table_lines(result))
    return DONE if result["passed"] else FAILED_CHECK


@main.command(cls=RoomCommand)
@click.argument("store", type=PATH_TYPE, default="store.zarr")
@click.option("--check", is_flag=True, help="Read everything and list each damaged shard and image.")
@click.option(
    "--repair", is_flag=True, help="Check, and remove damaged shards, so that precompute recomputes them."
)
@common_options
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
    print_result(as_json, result, inspection_lines(result))
    return FAILED_CHECK if result["problems"] else DONE


@main.command(cls=RoomCommand)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@config_options(CostConfig)
@common_options
def students(config: CostConfig, names: tuple[str, ...], as_json: bool) -> int:
    """List students and their cost.

    Prints parameters, and multiply-accumulates and milliseconds per image on this machine for inputs of two sizes, by
    default of all students. Exit code 3 if none of them could be built.

    \b
    Examples:
      mobilesam students
      mobilesam students tiny_vit timm:resnet18 timm:mobilenetv3_small_100 --json
      mobilesam students deit_tiny --image-size 512 --device cuda:0 --precision bfloat16 --debug
      mobilesam students tiny_vit repvit_m1_1 --student-size 256
    """
    from .distill import STUDENTS, students_lines, students_table

    names = names or tuple(STUDENTS)
    rows: list[dict[str, Any]] = []
    with Reporter("students") as reporter:
        for name in names:
            reporter.show(len(rows), len(names), name)
            rows += students_table([name], **dataclasses.asdict(config))
    print_result(as_json, {"students": rows}, students_lines(rows))
    return INPUT if all(row["error"] is not None for row in rows) else DONE


@main.command(cls=RoomCommand)
@config_options(SegmentConfig)
@common_options
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
    if not config.image.exists():
        raise ImageError(f"{shown(str(config.image))}: the file is missing")
    _check_weights(config.head, student=config.student, latest=config.teacher is None)
    _check_checkpoint(config.teacher, config.checkpoint)
    from .predict import segment as run
    from .predict.run import segment_lines

    with Reporter("segment") as reporter:
        result = run(config, download=reporter.download, phase=reporter.phase, points_done=reporter.points)
    print_result(as_json, result, segment_lines(result))
    return DONE


@main.command(cls=RoomCommand)
@config_options(ExportConfig)
@common_options
def export(config: ExportConfig, as_json: bool) -> int:
    """Write files that run without this package.

    X.pt is for MobileSAM's own code: student and head as one checkpoint (tiny_vit only). encoder.onnx and
    decoder.onnx are for onnxruntime; both are compared with torch before they are written. A folder gets all of
    these, safetensors with JSON, and a model card with teacher, data and metrics. With --format web it gets a page
    that segments photos in the browser, for any web server or `mobilesam demo`.

    \b
    Examples:
      mobilesam export --out exported
      mobilesam export --student runs/mine --out mine.pt
      mobilesam export --student mobile_sam.pt --image-size 512 --out small-encoder.onnx --json
      mobilesam export --student student.safetensors --head store.zarr --out decoder.onnx --debug
      mobilesam export --format web --out demo --examples photo.jpg --examples street.jpg
      mobilesam export --format web --out demo --runtime-dir node_modules/onnxruntime-web
    """
    _check_weights(config.head, student=config.student, latest=True)
    from .predict import export as run
    from .predict.export.run import export_lines

    with Reporter("export") as reporter:
        result = run(config, progress=reporter.step, download=reporter.download)
    print_result(as_json, result, export_lines(result))
    return DONE


@main.command(cls=RoomCommand)
@click.argument("folder", type=PATH_TYPE, default="demo", metavar="[DIR]")
@config_options(DemoConfig)
@click.option("--no-open", is_flag=True, help="Don't open the page in a browser.")
@common_options
def demo(folder: Path, config: DemoConfig, no_open: bool, as_json: bool) -> int:
    """Open an exported web demo in the browser.

    Serves DIR, which `mobilesam export --format web --out DIR` wrote, to this machine alone, with the headers by
    which a browser allows several threads. Prints the address first, and serves until Ctrl-C.

    \b
    Examples:
      mobilesam demo
      mobilesam demo exported --port 9000
      mobilesam demo exported --no-open --json --debug
    """
    from .predict.export.web.server import DemoServer, demo_lines

    server = DemoServer(replace(config, folder=folder))
    print_result(as_json, server.result, demo_lines(server.result))
    say("Ctrl-C ends it")
    server.serve(opens=not no_open)
    return DONE


@main.command(cls=RoomCommand)
@config_options(EvaluateConfig)
@common_options
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
    models = (Path(file) for _, file in config.models)  # or names of teachers
    _check_weights(config.head, *(file for file in models if file.exists()))
    _check_checkpoint(config.teacher, config.checkpoint)
    from .verify import evaluate_masks, evaluation_lines

    with printed_without_report(as_json, evaluation_lines), Reporter("evaluate") as reporter:
        result = evaluate_masks(
            config,
            progress=reporter.comparison,
            download=reporter.download,
            phase=reporter.phase,
            drawn=reporter.drawing,
        )
    print_result(as_json, result, evaluation_lines(result))
    return DONE if result["evaluated"] else INPUT


@main.command(cls=RoomCommand)
@config_options(DistillConfig, "base", only=["store", "images"])
@mapping_options(AXIS_OPTIONS, "axes")
@config_options(DistillConfig, "base", only=["micro_batch", "val_fraction", "precision", "device", "compile"])
@config_options(SweepConfig)
@common_options
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
      mobilesam sweep --student-size 1024,512 --seed 0,1,2
      mobilesam sweep --recipe mobilesam-2026,edgesam --loss mse,huber --iterations 500
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
    print_result(as_json, result, summary_lines(result))
    return FAILED_CHECK if result["failed"] else DONE


@main.command(cls=RoomCommand)
@common_options
def doctor(as_json: bool) -> int:
    """Describe this machine, this installation and this folder.

    Prints devices, memory, disk, packages and extras, the photos, stores and runs in the current folder, what is
    wrong with them and how to mend it, and the next command with what it needs. Put the --json of it into a bug
    report; passwords and keys are left out. Exit code 3 if something that every command needs is broken.

    \b
    Examples:
      mobilesam doctor
      mobilesam doctor --json --debug
    """
    from .doctor import doctor as run
    from .doctor.run import doctor_lines

    result = run(phase=say)  # a Reporter needs rich, which may be broken
    print_result(as_json, result, doctor_lines(result))
    return DONE if result["works"] else INPUT
