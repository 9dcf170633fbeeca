"""One distillation from its configuration to its result: open, describe, prepare the folder, train."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..common.durable import explain_os_errors
from ..common.errors import DistillError, DistillInterrupted
from ..common.signals import StopFlag, stopped_by_signals
from ..sam.allocator import keep_freed_memory
from ..sam.device import resolve_device, resolve_precision
from ..store import EmbeddingStore, ImageRecord
from .checksummed_json import digest
from .config import DistillConfig
from .data.image_root import check_preprocessing, image_root
from .data.labels import Labels, count_annotated
from .data.loader import Loader
from .data.sampler import Split, split_rows
from .distributed import ProcessGroup, join_process_group
from .loss.coupled import MaskOptions
from .loss.registry import build_objective
from .metrics.evaluate import ComputeSettings
from .run_description import (
    DataDescription,
    ResolvedSettings,
    RunDescription,
    StoreDescription,
    rows_digest,
)
from .run_folder import RUNS, Run, open_or_create_run, point_latest, split_sha256
from .students.cost import default_micro_batch
from .students.init_weights import InitialWeights, read_initial
from .students.registry import build_student, student_info
from .train_log import Progress
from .trainer import Trainer

logger = logging.getLogger(__name__)

STOPPED_EARLY = "stopped before training went on, so that nothing was lost; run the same command again"
"""Message of a stop by a signal before there is anything to save."""


def distill(
    config: DistillConfig,
    *,
    progress: Callable[[Progress], None] | None = None,
    stop: StopFlag | None = None,
    latest: bool = True,
) -> dict[str, Any]:
    """Fits a student to a store's embeddings and returns the run's result.

    A run that was interrupted goes on; one that is finished returns its result without training. The keys:
    `run` (absolute path), `epochs`, `steps`, `seconds` (all sessions of the run), `images_per_second` (images
    trained by time in the training loop), `data_wait_share` (of that time), `val` (metrics of the validation
    rows after the last epoch).

    Started by torchrun, every process calls this with the same configuration, and gets the same result; the first one
    alone writes. With `latest`, runs/latest is made to point at the run.

    In the main thread SIGINT and SIGTERM save and stop; so does setting `stop`. Raises DistillInterrupted then,
    DistillError, StoreError or SamError (each with a message for the user) when something is wrong.
    """
    stop = stop or StopFlag()
    with stopped_by_signals(stop, DistillInterrupted, STOPPED_EARLY), ExitStack() as stack:
        processes = stack.enter_context(join_process_group())
        store = stack.enter_context(EmbeddingStore.open(config.store))
        records = _committed(store)
        split = split_rows({record.row: str(record.sha256) for record in records}, config.val_fraction)
        initial = None
        if config.init is not None:
            initial = read_initial(config.init, config.student, store.spec.image_size)
            if config.objective == "decoder":
                _check_finished(initial, config.student)
        description = describe(config, store, records, split, initial, processes)
        # No colon in a folder's name: rsync and scp take what is before it for a host.
        label = config.student.replace(":", "-")
        name = f"{label}-{digest(description.identity, description.data.to_json())}"
        head = store.read_head() if store.head_path.exists() else None
        folder = config.out or RUNS / name
        begun: tuple[Path, dict[str, Any] | None] | None = None
        if processes.is_main:
            stack.enter_context(explain_os_errors(folder))
            run = stack.enter_context(
                open_or_create_run(folder, description, split, head, restart=config.restart)
            )
            if latest:
                point_latest(run.path)
            begun = run.path, _finished(run)
        path, finished = processes.broadcast(begun)
        if not processes.is_main:
            run = Run.open(path)
        if finished is not None:
            return {**finished, "run": str(path)}
        return _train(config, run, store, records, initial, processes, stop, progress)


def _finished(run: Run) -> dict[str, Any] | None:
    """The result of a run that is finished and whole."""
    finished = run.result()
    if finished is None or not _whole(run):
        return None
    run.checkpoints.drop_previous()
    logger.info("%s is finished: its result is reported again; --restart trains anew", run.path)
    return finished


def _whole(run: Run) -> bool:
    """Whether a finished run can be used as it lies there; its last checkpoint restores what can't."""
    try:
        run.student()
        run.mean_embedding()
    except DistillError as error:
        logger.warning("%s\nthe run's last checkpoint restores it", error)
        return False
    return True


def _train(
    config: DistillConfig,
    run: Run,
    store: EmbeddingStore,
    records: Sequence[ImageRecord],
    initial: InitialWeights | None,
    processes: ProcessGroup,
    stop: StopFlag,
    progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    device = resolve_device(processes.local_device(config.device))
    if device.type == "cpu":
        keep_freed_memory()
    resolved = run.description.resolved
    compute = ComputeSettings(device=device, precision=resolved.precision, batch_size=resolved.micro_batch)
    workers = config.workers or default_workers(device)
    pin_memory = device.type == "cuda"
    student = build_student(config.student, store.spec.image_size, config.seed)
    if initial is not None and not run.checkpoints.exist():
        initial.apply(student)
    student = student.to(device)
    objective = build_objective(config, store, device)
    if initial is not None and initial.head is not None and objective.head is not None:
        objective.head.load_state_dict(initial.head)
    labels = _labels(config, run)
    with (
        _compiled(student, config),
        Loader(
            store, records, run.image_root, workers=workers, pin_memory=pin_memory, labels=labels
        ) as loader,
    ):
        trainer = Trainer(
            config,
            run,
            student,
            loader,
            compute=compute,
            objective=objective,
            processes=processes,
        )
        return trainer.fit(stop, progress)


def _check_finished(initial: InitialWeights, student: str) -> None:
    """Raises DistillError where a file doesn't have the whole of a student, as it was trained."""
    if initial.left or initial.resized:
        raise DistillError(
            f"{initial.path} is no finished {student}: {len(initial.left)} of its weights are missing and "
            f"{len(initial.resized)} are for another image size; give a student that distill has trained"
        )


def _labels(config: DistillConfig, run: Run) -> Labels | None:
    """Where objects are read from; None where the teacher's masks are all."""
    if config.labels == "teacher":
        return None
    assert run.image_root is not None, "_image_root has seen to it"
    return Labels(run.image_root, run.description.image_size, config.objects, config.seed)


@contextmanager
def _compiled(student: nn.Module, config: DistillConfig) -> Iterator[None]:
    """Has torch.compile translate the student as it is used, if that was asked for. Its weights keep their names."""
    if not config.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    student.compile()
    try:
        yield
    except TorchDynamoException as error:
        fact = str(error).strip().splitlines()[0]
        raise DistillError(
            f"torch.compile can't translate {config.student} here ({fact}); leave out --compile, which only makes "
            "training faster"
        ) from error


def _committed(store: EmbeddingStore) -> list[ImageRecord]:
    """The rows to learn from; says how many are missing."""
    records, counts = store.manifest.records("done"), store.manifest.counts()
    if not records:
        raise DistillError(
            f"{store.path} has no finished rows ({counts.pending} pending, {counts.failed} failed): run precompute "
            "to the end first"
        )
    check_preprocessing(store)
    if counts.pending or counts.failed:
        logger.warning(
            "%s: learning from the %d rows that are done; %d are pending, %d failed",
            store.path,
            counts.done,
            counts.pending,
            counts.failed,
        )
    if outside := store.audits_out_of_tolerance():
        logger.warning(
            "%s: %d of its audited rows are not what the teacher computes; mobilesam inspect tells the numbers",
            store.path,
            len(outside),
        )
    return records


def default_workers(device: torch.device) -> int:
    """Decoding threads: few on a CPU, which trains slower than one of them decodes."""
    available = len(os.sched_getaffinity(0))
    return min(2 if device.type == "cpu" else 16, available)


# --- What config.json says of a run, and what its student's file says of it.


def describe(
    config: DistillConfig,
    store: EmbeddingStore,
    records: Sequence[ImageRecord],
    split: Split,
    initial: InitialWeights | None,
    processes: ProcessGroup,
) -> RunDescription:
    """The content of config.json for a run begun now."""
    info = student_info(config.student)
    device = resolve_device(processes.local_device(config.device))
    precision = resolve_precision(config.precision, device)
    micro_batch = config.micro_batch or default_micro_batch(
        info,
        -(-config.batch_size // processes.world_size),
        store.spec.image_size,
        precision,
        device,
        masks=None if config.objective == "decoupled" else MaskOptions.from_config(config),
    )
    counts = store.manifest.counts()
    root = _image_root(config, store)
    return RunDescription(
        student=config.student,
        image_size=store.spec.image_size,
        options=config.to_json(),
        identity=config.identity() | ({"init_sha256": initial.sha256} if initial else {}),
        init=initial.report() if initial else None,
        data=DataDescription(
            store_id=store.spec.store_id,
            rows=len(records),
            rows_digest=rows_digest(records),
            annotated=_annotated(root, records) if config.labels == "annotations" else None,
        ),
        resolved=ResolvedSettings(
            device=str(device), precision=precision, micro_batch=micro_batch, processes=processes.world_size
        ),
        store=StoreDescription(path=Path(config.store).resolve(), spec=store.spec),
        image_root=root,
        counts={"done": counts.done, "failed": counts.failed, "pending": counts.pending},
        versions={
            "mobilesam": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "pillow")},
        },
        split_sha256=split_sha256(split),
    )


def _image_root(config: DistillConfig, store: EmbeddingStore) -> Path | None:
    """The folder of the images that are learned from; None for those that the store keeps."""
    root = image_root(store, config.images)
    if root is None and config.labels == "annotations":
        raise DistillError(
            f"{store.path} keeps images but no annotations: say where both are with --images DIR"
        )
    return root


def _annotated(root: Path | None, records: Sequence[ImageRecord]) -> int:
    """How many of the images have annotations beside them; DistillError where none has."""
    assert root is not None, "_image_root has seen to it"
    count = count_annotated(root, records)
    if not count:
        raise DistillError(
            f"none of the {len(records):,} images in {root} has annotations beside it, as 1.json is beside 1.jpg: "
            "say with --images where there are some, or learn from the teacher's masks with --labels teacher"
        )
    return count


# --- What a run has come to, as lines for people.


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """The result of `distill`; the metrics are those of the image part of the held-out rows."""
    val = result["val"]
    lines = [
        f"{result['run']}: {result['epochs']} epochs, {result['steps']:,} steps, {result['seconds']:.0f} s",
        f"{result['images_per_second']:.3g} images/s, {result['data_wait_share']:.1%} of the time waiting for data",
        f"held out: cosine {val['cosine_valid']['mean']:.4f}, skill {val['skill_valid']:.4f}",
    ]
    if "labels" in result:
        labels = result["labels"]
        fact = f"annotations beside {labels['annotated']:,} of {labels['images']:,} images"
        unused = [f"{labels[kind]:,} {kind}" for kind in ("empty", "broken") if labels[kind]]
        lines.append(f"{fact}, {', '.join(unused)}" if unused else fact)
    if "miou" in val:
        miou = "undefined" if val["miou"] is None else f"{val['miou']:.4f}"
        lines.append(f"held out: mIoU {miou} with the teacher's masks")
    return lines
