"""`mobilesam distill`: open the store, describe the run, create or resume its folder, train, summarise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn

from ..common.durable import explain_os_errors
from ..common.errors import DistillError, DistillInterrupted, counted
from ..common.signals import StopFlag, stopped_by_signals
from ..sam.allocator import keep_freed_memory
from ..sam.device import resolve_device, resolve_precision
from ..store import EmbeddingStore
from ..store.spec import package_versions
from .checksummed_json import digest
from .config import DistillConfig
from .data.labels import AnnotationLabels, OpenLabels, open_labels
from .data.loader import Loader, check_preprocessing, default_workers, find_image_root
from .data.rows import CommittedRows, RecordsByRow
from .data.sampler import Split, split_rows
from .distributed import ProcessGroup, join_process_group
from .expectations import resolve_length, tell_facts, tell_length
from .latest_run import RUNS, point_latest
from .loss.coupled import MaskOptions
from .loss.registry import build_objective
from .metrics.evaluate import ComputeSettings
from .run_description import (
    CONFIG_FILE,
    DataDescription,
    ResolvedSettings,
    RunDescription,
    StoreDescription,
)
from .run_folder import Run, closest_run, open_or_create_run, split_sha256
from .students.cost import default_micro_batch
from .students.init_weights import InitialWeights, read_initial, start_neck
from .students.registry import build_student, check_student_size, student_info
from .train_log import Progress
from .trainer import Trainer

logger = logging.getLogger(__name__)

STOPPED_EARLY = "stopped before training began, so that nothing was lost; run the same command again"
"""Message for a stop by a signal before there is anything to save."""


def distill(
    config: DistillConfig,
    *,
    progress: Callable[[Progress], None] | None = None,
    stop: StopFlag | None = None,
    latest: bool = True,
) -> dict[str, Any]:
    """Train a student on a store's embeddings.

    An interrupted run resumes; a finished one returns its result without training. Under torchrun, every process
    calls this with the same configuration and gets the same result; only rank 0 writes files. In the main thread,
    SIGINT and SIGTERM save a checkpoint and stop.

    Args:
        config: all options.
        progress: callback for display, after each step and before each batch of an evaluation.
        stop: flag to set from elsewhere to save a checkpoint and stop.
        latest: make `runs/latest` point to the run as soon as it has a student.

    Returns:
        `run` (absolute path), `epochs`, `steps`, `seconds` (total over all sessions of the run), `images_per_second`
        (in the training loop), `data_wait_share` (share of the training loop's time spent waiting for data), `val`
        (metrics of the validation rows after the last epoch), `finished` (time of the run's end, in ISO 8601),
        `already_finished` (True if nothing was trained by this call); with labels from annotations also `labels`
        (`annotated`, `images`, `empty` and `broken`, numbers of images; `objects` and `left_out` by reason, numbers
        of labelled objects of the images trained on; `names`, numbers of a COCO file's or folder's listed names);
        and the keys of `run_facts`: `images`, `batch_size`, `too_few_steps`, `advised_epochs`,
        `advised_batch_size`, `train`, `no_better_than_constant`.

    Raises:
        DistillInterrupted: stopped by a signal or by `stop`.
        DistillError, StoreError, SamError: options, store, images or the run's folder can't be used, or training
            failed; the message is for the user.
    """
    stop = stop or StopFlag()
    with stopped_by_signals(stop, DistillInterrupted, STOPPED_EARLY), ExitStack() as stack:
        processes = stack.enter_context(join_process_group())
        store = stack.enter_context(EmbeddingStore.open(config.store))
        rows = _committed_rows(store)
        split = split_rows(rows, config.val_fraction)
        chosen = config.batch_size is None
        config = _resolve_student_size(resolve_length(config, len(split.train)), store)
        initial = _initial_weights(config, store)
        image_root = _checked_image_root(config, store)
        labels = open_labels(config, image_root, store, split.train)
        description = describe(config, store, rows, split, initial, processes, labels, image_root)
        del rows
        head = store.read_head() if store.head_path.exists() else None
        folder = config.out or RUNS / _folder_name(description)
        started: tuple[Path, dict[str, Any] | None] | None = None
        if processes.is_main:
            stack.enter_context(explain_os_errors(folder))
            unnamed = config.out is None and not (folder / CONFIG_FILE).exists()
            run = stack.enter_context(
                open_or_create_run(folder, description, split, head, restart=config.restart)
            )
            if unnamed and initial is None:
                _name_closest_run(run)
            if latest:
                point_latest(run.path)
            started = run.path, _finished_result(run)
        path, finished = processes.broadcast(started)
        if not processes.is_main:
            run = Run.open(path)
        if finished is not None:
            return {**finished, "run": str(path), "already_finished": True}
        outlook = tell_length(run, processes, chosen=chosen, slow_start=config.compile)

        def on_progress(done: Progress) -> None:
            outlook.on_progress(done)
            if progress is not None:
                progress(done)

        def on_student() -> None:
            outlook.on_student()
            if latest:
                point_latest(run.path)

        inputs = _Inputs(store=store, initial=initial, labels=labels)
        result = _train(config, run, inputs, processes, stop, on_progress, on_student)
        facts = processes.broadcast(tell_facts(run) if processes.is_main else None)
        return {**result, **facts, "already_finished": False}


def _committed_rows(store: EmbeddingStore) -> CommittedRows:
    """Return the rows to learn from; warn about rows that are missing or failed an audit.

    Raises DistillError if there is none, or the store's preprocessing is not this version's.
    """
    rows, counts = CommittedRows.of(store), store.manifest.counts()
    if not len(rows):
        raise DistillError(
            f"{store.path} has no finished rows ({counts.pending} pending, {counts.failed} failed): run precompute "
            "to the end first"
        )
    check_preprocessing(store)
    if counts.pending or counts.failed:
        logger.warning(
            "%s: training on the %d finished rows; %d are pending, %d failed",
            store.path,
            counts.done,
            counts.pending,
            counts.failed,
        )
    if outside := store.audits_out_of_tolerance():
        logger.warning(
            "%s: %d audited rows differ from the teacher's embeddings; mobilesam inspect shows the numbers",
            store.path,
            len(outside),
        )
    return rows


def _resolve_student_size(config: DistillConfig, store: EmbeddingStore) -> DistillConfig:
    """Check the student's size; the store's image size itself becomes None, which is the same student."""
    size = check_student_size(config.student_size, store.spec.image_size)
    return replace(config, student_size=None if size == store.spec.image_size else size)


def _initial_weights(config: DistillConfig, store: EmbeddingStore) -> InitialWeights | None:
    """Read the file of `--init`, if one is given; for the decoder objective it must hold a whole student."""
    if config.init is None:
        return None
    size = config.student_size or store.spec.image_size
    initial = read_initial(config.init, config.student, store.spec.image_size, size)
    if config.objective == "decoder" and initial.file_size not in (None, size):
        raise DistillError(
            f"{initial.path} is a student of {initial.file_size} pixels, this run's gets {size}: give "
            f"--student-size {initial.file_size}"
        )
    if config.objective == "decoder" and (initial.left or initial.resized):
        raise DistillError(
            f"{initial.path} is no finished {config.student}: {len(initial.left)} of its weights are missing and "
            f"{len(initial.resized)} are for another image size; give a student that distill has trained"
        )
    return initial


def describe(
    config: DistillConfig,
    store: EmbeddingStore,
    rows: CommittedRows,
    split: Split,
    initial: InitialWeights | None,
    processes: ProcessGroup,
    labels: OpenLabels | None,
    image_root: Path | None,
) -> RunDescription:
    """Describe a run that begins now, with device, precision and micro-batch resolved for this machine.

    Args:
        config: all options, their length and the student's size resolved.
        store: store open for reading.
        rows: rows to learn from.
        split: the same rows, divided into training and validation.
        initial: weights to start from; None: random.
        processes: processes that train together.
        labels: source of labels; None: the teacher's masks.
        image_root: folder of the images; None: the store keeps them.

    Raises:
        DistillError: the student is unknown.
        SamError: the device or the precision isn't available on this machine.
    """
    image_size = store.spec.image_size
    student_size = config.student_size or image_size
    device = resolve_device(processes.local_device(config.device))
    precision = resolve_precision(config.precision, device)
    _, batch_size = config.length
    micro_batch = config.micro_batch or default_micro_batch(
        student_info(config.student),
        -(-batch_size // processes.world_size),
        store.spec.image_size,
        precision,
        device,
        masks=None if config.objective == "decoupled" else MaskOptions.from_config(config),
        student_size=student_size,
    )
    counts = store.manifest.counts()
    return RunDescription(
        student=config.student,
        image_size=image_size,
        student_size=student_size,
        options=config.to_json(),
        identity=config.identity()
        | ({"init_sha256": initial.sha256} if initial else {})
        | (dict(labels.identity) if labels else {}),
        init=initial.report() if initial else None,
        labels=labels.report() if labels else None,
        data=DataDescription(
            store_id=store.spec.store_id,
            rows=len(rows),
            rows_digest=rows.digest,
            annotated=None if labels is None else labels.annotated,
        ),
        resolved=ResolvedSettings(
            device=str(device),
            precision=precision,
            micro_batch=micro_batch,
            processes=processes.world_size,
        ),
        store=StoreDescription(path=Path(config.store).resolve(), spec=store.spec),
        image_root=image_root,
        counts={"done": counts.done, "failed": counts.failed, "pending": counts.pending},
        versions=package_versions(("torch", "numpy", "pillow")),
        split_sha256=split_sha256(split),
    )


def _checked_image_root(config: DistillConfig, store: EmbeddingStore) -> Path | None:
    """Return the folder of the images; None for those that the store keeps, beside which are no annotations."""
    root = find_image_root(store, config.images)
    if root is None and config.learns_from_labels and config.label_source is None:
        raise DistillError(
            f"{store.path} keeps images but no annotations: say where both are with --images DIR, or give a COCO "
            "file with --coco"
        )
    return root


def _folder_name(description: RunDescription) -> str:
    """Return a folder name: the student's name, and a digest of identity and data."""
    # No colon in the name: rsync and scp would take the part before it for a host.
    label = description.student.replace(":", "-")
    return f"{label}-{digest(description.identity, description.data.to_json())}"


def _name_closest_run(run: Run) -> None:
    """Tell that a run in a folder of its own begins anew, where an earlier one was asked for almost the same."""
    closest = closest_run(run)
    if closest is None:
        return
    earlier, differences = closest
    new = RUNS / run.path.name
    if not differences:
        logger.warning(
            "a new run begins in %s, from new weights: the one in %s is the same, begun with --out",
            new,
            earlier,
        )
        return
    logger.warning(
        "a new run begins in %s, from new weights: the earlier one in %s was begun differently (%s); to start from "
        "its student, add --init %s",
        new,
        earlier,
        "; ".join(differences),
        earlier,
    )


def _finished_result(run: Run) -> dict[str, Any] | None:
    """Return the result of a finished run; None if it must be trained, or restored from its last checkpoint."""
    finished = run.result()
    if finished is None:
        return None
    try:
        run.student()
        run.mean_embedding()
    except DistillError as error:
        logger.warning("%s\nthe run's last checkpoint restores it", error)
        return None
    run.checkpoints.drop_previous()
    return {**finished, **tell_facts(run)}


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Inputs of a training, open for reading."""

    store: EmbeddingStore
    initial: InitialWeights | None
    """Weights to start from; None: random."""
    labels: OpenLabels | None
    """Source of labels; None: the teacher's masks."""


def _train(
    config: DistillConfig,
    run: Run,
    inputs: _Inputs,
    processes: ProcessGroup,
    stop: StopFlag,
    progress: Callable[[Progress], None] | None,
    on_student: Callable[[], None],
) -> dict[str, Any]:
    """Build student, objective and loader, train, and return the run's result."""
    store, initial = inputs.store, inputs.initial
    device = resolve_device(processes.local_device(config.device))
    if device.type == "cpu":
        keep_freed_memory()
    resolved = run.description.resolved
    compute = ComputeSettings(device=device, precision=resolved.precision, batch_size=resolved.micro_batch)
    student_size = run.description.student_size
    student = build_student(config.student, store.spec.image_size, config.seed, student_size)
    if not run.checkpoints.exist():
        recipe = config.resolved_recipe
        if recipe.neck_start is not None:
            start_neck(student, recipe.neck_start, store, run.split.train, recipe.loss_region)
        if initial is not None:  # afterwards, since its file may hold the neck
            initial.apply(student)
    student = student.to(device)
    objective = build_objective(config, store, device)
    if initial is not None and initial.head is not None and objective.head is not None:
        objective.head.load_state_dict(initial.head)
        if not run.checkpoints.exist():
            logger.info("starting from the mask decoder of %s, too", initial.path)
    loader = Loader(
        store,
        RecordsByRow(store),
        run.image_root,
        workers=config.workers or default_workers(device),
        pin_memory=device.type == "cuda",
        labels=_annotation_labels(config, run, inputs.labels),
        student_size=student_size,
    )
    with _compiled(student, config, compute), loader:
        trainer = Trainer(
            config, run, student, loader, compute=compute, objective=objective, processes=processes
        )
        return trainer.fit(stop, progress, on_student)


def _annotation_labels(config: DistillConfig, run: Run, labels: OpenLabels | None) -> AnnotationLabels | None:
    """Return the reader of labels; None if labels are the teacher's masks."""
    if labels is None:
        return None
    size, root = run.description.image_size, run.image_root
    return AnnotationLabels(labels.source, size, config.objects, config.seed, root)


@contextmanager
def _compiled(student: nn.Module, config: DistillConfig, compute: ComputeSettings) -> Iterator[None]:
    """Let torch.compile compile the student at its first use, with `--compile`. Weights keep their names."""
    if not config.compile:
        yield
        return
    if compute.device.type == "cpu" and compute.precision == "bfloat16":
        logger.warning("--compile gains nothing on a CPU in bfloat16: its steps were 60 times slower there")
    from torch._dynamo.exc import TorchDynamoException

    student.compile()
    try:
        yield
    except TorchDynamoException as error:
        fact = str(error).strip().splitlines()[0]
        raise DistillError(
            f"torch.compile can't compile {config.student} here ({fact}); leave out --compile, which only makes "
            "training faster"
        ) from error


def finished_words(result: Mapping[str, Any]) -> str:
    """Return when a run was finished, in local time: `finished on 2026-01-31 at 23:59`.

    Args:
        result: result of `distill`, or `Run.result` of a finished run.
    """
    when = datetime.fromisoformat(result["finished"]).astimezone()
    return f"finished on {when:%Y-%m-%d at %H:%M}"


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result of `distill` as lines for the terminal; metrics are of the validation rows' valid cells."""
    val, finished = result["val"], ""
    if result["already_finished"]:
        when = datetime.fromisoformat(result["finished"]).astimezone()
        finished = (
            f" was finished on {when:%Y-%m-%d at %H:%M}, and nothing was trained now; --restart starts over"
        )
    size = (
        f"{counted(result['epochs'], 'epoch')}, {counted(result['steps'], 'step')}, {result['seconds']:.0f} s"
    )
    lines = [
        *([f"{result['run']}{finished}"] if finished else []),
        f"it took {size}" if finished else f"{result['run']}: {size}",
        f"{result['images_per_second']:.3g} images/s, {result['data_wait_share']:.1%} of the time waiting for data",
        f"held out: cosine {val['cosine_valid']['mean']:.4f}, skill {val['skill_valid']:.4f}",
    ]
    if (train := result["train"]) is not None and train["skill_valid"] is not None:
        lines.append(f"trained on: skill {train['skill_valid']:.4f}")
    if "labels" in result:
        labels = result["labels"]
        words = "labels of" if "names" in labels else "annotations beside"
        fact = f"{words} {labels['annotated']:,} of {counted(labels['images'], 'image')}"
        unused = [f"{labels[kind]:,} {kind}" for kind in ("empty", "broken") if labels[kind]]
        lines.append(f"{fact}, {', '.join(unused)}" if unused else fact)
        lines += _object_lines(labels)
    if "miou" in val:
        miou = "undefined" if val["miou"] is None else f"{val['miou']:.4f}"
        lines.append(f"held out: mIoU {miou} with the teacher's masks")
    return lines


def _object_lines(labels: Mapping[str, Any]) -> list[str]:
    """Return lines on the labelled objects of the images trained on, and on the names that list the images."""
    if "objects" not in labels:  # a result of an older version
        return []
    lines, left_out = [], labels["left_out"]
    count = sum(left_out.values())
    if count:
        reasons = "; ".join(f"{reason}: {number:,}" for reason, number in left_out.items())
        lines.append(f"{count:,} of {labels['objects'] + count:,} labelled objects left out ({reasons})")
    if "names" in labels:
        names = labels["names"]
        lines.append(f"{names['matched']:,} of {names['listed']:,} listed images are among the store's")
    return lines
