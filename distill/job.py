"""One distillation from its configuration to its result: open, describe, prepare the folder, train."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..sam.allocator import keep_freed_memory
from ..sam.precision import resolve_device
from ..store import EmbeddingStore, ImageRecord
from ..store.durable import explained
from .config import DistillConfig
from .description import describe, student_metadata
from .digests import digest
from .errors import DistillError
from .folder import prepared_folder
from .initial import InitialWeights, read_initial
from .labels import Labels
from .loader import Loader
from .objectives import build_objective
from .progress import Progress
from .replicas import Replicas, joined_replicas
from .run import RUNS, Run, point_latest
from .split import split_rows
from .stop import StopFlag, stopped_by_signals
from .store_images import check_preprocessing
from .students import build_student
from .trainer import Trainer

logger = logging.getLogger(__name__)


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
    with stopped_by_signals(stop), ExitStack() as stack:
        replicas = stack.enter_context(joined_replicas())
        store = stack.enter_context(EmbeddingStore.open(config.store))
        records = _committed(store)
        split = split_rows({record.row: str(record.sha256) for record in records}, config.val_fraction)
        initial = None
        if config.init is not None:
            initial = read_initial(config.init, config.student, store.spec.image_size)
            if config.objective == "decoder":
                _check_finished(initial, config.student)
        description = describe(config, store, records, initial, replicas)
        # No colon in a folder's name: rsync and scp take what is before it for a host.
        label = config.student.replace(":", "-")
        name = f"{label}-{digest(description['identity'], description['data'])}"
        head = store.read_head() if store.head_path.exists() else None
        folder = config.out or RUNS / name
        begun: tuple[Path, dict[str, Any] | None] | None = None
        if replicas.first:
            stack.enter_context(explained(folder))
            run = stack.enter_context(
                prepared_folder(folder, description, split, head, restart=config.restart)
            )
            if latest:
                point_latest(run.path)
            begun = run.path, _finished(run)
        path, finished = replicas.shared(begun)
        if not replicas.first:
            run = Run.open(path)
        if finished is not None:
            return {**finished, "run": str(path)}
        return _train(config, run, store, records, initial, replicas, stop, progress)


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
    replicas: Replicas,
    stop: StopFlag,
    progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    device = resolve_device(replicas.device(config.device))
    if device.type == "cpu":
        keep_freed_memory()
    resolved = run.config["resolved"]
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
            device=device,
            precision=resolved["precision"],
            micro_batch=resolved["micro_batch"],
            student_info=student_metadata(run),
            objective=objective,
            replicas=replicas,
            stop=stop,
            progress=progress,
        )
        return trainer.fit()


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
    return Labels(run.image_root, run.config["image_size"], config.objects, config.seed)


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
    records, counts = store.records("done"), store.counts()
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
