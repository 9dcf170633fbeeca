"""Precompute run, entry point of `mobilesam precompute`: plan, teacher, store, cluster, schedule, audit, summary.

The images are embedded in dask tasks, each of which calls `shard.compute_shard`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..common.durable import explain_os_errors
from ..common.errors import PrecomputeError, PrecomputeInterrupted, counted
from ..common.outputs import refuse_foreign, write_output
from ..common.signals import StopFlag, stopped_by_signals
from ..sam.photos.file_kinds import passed_over_line
from ..store import Counts, EmbeddingStore
from ..store.inspection import failed_images, failed_lines
from . import sizing
from .audit import ReservoirSample, run_audit, warn_of_audits
from .cluster import Cluster, connect
from .config import PrecomputeConfig
from .messages import TeacherSetup
from .open_store import TeacherFile, find_teacher, open_store
from .plan import Plan, plan_run
from .progress import Observer, Progress, SilentObserver, begin_phase
from .scheduler import RunTotals, ShardScheduler
from .supervision import ClusterMonitor
from .worker import TeacherPlugin

MOST_FAILED = 100
"""Most failed images, and files that could not be listed, in the result."""

PERFORMANCE_REPORT = "precompute performance report"
"""Kind of output of --performance-report, as its mark names it."""


def precompute(config: PrecomputeConfig, observer: Observer | None = None) -> dict[str, Any]:
    """Embed every selected image that the store lacks, and commit shard by shard.

    Args:
        config: options of the run.
        observer: receives messages and progress.

    Returns:
        `images, done, done_before, failed`: rows in all, done, done before this run, and failed. `failed_images`:
        `key` and `reason` of the first hundred. `passed_over`: number of files that the listing passed over, by kind,
        and `skipped`: the first hundred of those that could not be listed, with the reason. `seconds`: wall time of
        the whole call. `images_per_second`: rate from the start of the first teacher batch to the last commit; None
        if nothing was computed. `teacher_share`: share of that time in which teachers were busy, 0 to 1.
        `decode_seconds`: CPU time of reading and decoding. `audit`: `rows, cosine_min, relative_mse_max, seconds`;
        None if nothing was audited. `out_of_tolerance`: True if an audited row of the store misses its tolerance.

    Raises:
        PrecomputeError, SamError, StoreError: the run can't start or can't continue.
        PrecomputeInterrupted: SIGINT, SIGTERM or SIGHUP came; every shard that was finished is committed.
    """
    began = time.monotonic()
    observer = observer or SilentObserver()
    stop = StopFlag(
        second_kills=False, answer="stopping; finished shards are kept; interrupt again to stop at once"
    )
    message = "interrupted; run the same command to resume"
    with stopped_by_signals(stop, PrecomputeInterrupted, message), ExitStack() as stack:
        _refuse_unwritable_report(config.performance_report)
        plan, cluster = plan_run(config, stack, observer)
        begin_phase(observer, "checking the teacher's file")
        teacher = find_teacher(plan, observer)
        store = stack.enter_context(open_store(plan, teacher, observer))
        before = store.manifest.counts()
        _report_start(store, before, observer)
        totals, audit = RunTotals(), None
        if store.pending_shards():
            begin_phase(observer, "starting the workers")
            cluster = cluster or stack.enter_context(connect(config))
            observer.message(f"{counted(cluster.workers, 'worker')}; dashboard: {cluster.dashboard}")
            totals, audit = _compute(plan, teacher, store, cluster, observer, stop)
        begin_phase(observer, "ending")
        after = store.manifest.counts()
        _refuse_interrupted(stop, after)
        _warn_of_failures(totals, observer)
        return {
            "images": after.rows,
            "done": after.done,
            "done_before": before.done,
            "failed": after.failed,
            "failed_images": failed_images(store.manifest, MOST_FAILED) if after.failed else [],
            "passed_over": dict(plan.listing.passed_over),
            "skipped": [str(problem) for problem in plan.listing.problems[:MOST_FAILED]],
            "seconds": round(time.monotonic() - began, 3),
            **_rates(totals, plan.hardware.workers),
            "audit": audit,
            "out_of_tolerance": warn_of_audits(store, observer),
        }


def summary_lines(out: Path, result: Mapping[str, Any]) -> list[str]:
    """Format the result of `precompute` as lines for people.

    Args:
        out: path of the store.
        result: result of `precompute`.
    """
    images = counted(result["images"], "image")
    line = f"{out}: {result['done']:,} of {images} done ({result['done_before']:,} before)"
    if result["failed"]:
        line += f", {result['failed']:,} failed (try them again with --retry-failed)"
    lines = [line, *failed_lines(result["failed_images"], result["failed"])]
    if result["passed_over"]:
        lines.append(passed_over_line(result["passed_over"]))
    if result["images_per_second"]:
        lines.append(
            f"{result['images_per_second']:.3g} images/s; the teacher was busy {result['teacher_share']:.0%} of "
            f"that time; decoding took {result['decode_seconds']:.1f} s of CPU; "
            f"{timedelta(seconds=round(result['seconds']))} in all"
        )
    return lines


def _refuse_unwritable_report(path: Path | None) -> None:
    """Raise PrecomputeError before the work if dask could not write its report at the end."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise PrecomputeError(
            f"{path} can't be written: --performance-report takes a file in a folder that exists"
        )
    with explain_os_errors(path, PrecomputeError):
        _refuse_foreign_report(path)


def _refuse_foreign_report(path: Path) -> None:
    refuse_foreign(path, PERFORMANCE_REPORT, "--performance-report", PrecomputeError)


def _report_start(store: EmbeddingStore, counts: Counts, observer: Observer) -> None:
    spec = store.spec
    observer.message(
        f"{counted(counts.rows, 'image')}, {counts.done:,} done before; teacher {spec.teacher} at "
        f"{spec.image_size} px in "
        f"{spec.precision}; {spec.dtype} in shards of {spec.shard_size} into {store.path}"
    )


def _compute(
    plan: Plan,
    teacher: TeacherFile,
    store: EmbeddingStore,
    cluster: Cluster,
    observer: Observer,
    stop: StopFlag,
) -> tuple[RunTotals, dict[str, Any] | None]:
    """Compute the pending shards, and audit; return the totals, and the result of the audit."""
    config, root = plan.config, plan.listing.root
    batch_size = sizing.batch_size(config.batch_size, plan.hardware.device_type, store.spec.shard_size)
    if config.compile:
        observer.message("each worker first compiles the teacher with torch.compile, which may take minutes")
    setup = _teacher_setup(plan, teacher, store, cluster, batch_size)
    plugin = TeacherPlugin(uuid.uuid4().hex[:8], setup)
    monitor = ClusterMonitor(cluster, plugin.run, observer, stop)
    sample = ReservoirSample(config.audit)
    before = store.manifest.counts()
    progress = Progress(before.rows, before.done + before.failed, before.failed)
    scheduler = ShardScheduler(store, plugin, monitor, progress, sample, batch_size, config.image_timeout)
    with (
        _performance_report(config, cluster),
        _stopping_gracefully(stop),
        cluster.holding(plugin),
        monitor.listening(),
    ):
        totals = scheduler.run(store.pending_shards(), root)
        if stop.signum is not None:
            return totals, None
        return totals, run_audit(store, sample.rows, root, config.image_timeout, plugin.name, monitor)


def _teacher_setup(
    plan: Plan, teacher: TeacherFile, store: EmbeddingStore, cluster: Cluster, batch_size: int
) -> TeacherSetup:
    return TeacherSetup(
        name=teacher.name,
        checkpoint=teacher.path,
        checkpoint_sha256=teacher.sha256,
        package=teacher.package,
        image_size=plan.image_size,
        precision=store.spec.precision,
        batch_size=batch_size,
        compile=plan.config.compile,
        devices=cluster.devices,
        threads=cluster.threads,
        local=cluster.local,
    )


@contextmanager
def _performance_report(config: PrecomputeConfig, cluster: Cluster) -> Iterator[None]:
    """Have dask write a performance report of the context, if one is asked for."""
    if config.performance_report is None:
        yield
        return
    from distributed import performance_report

    path = config.performance_report
    with TemporaryDirectory(prefix="mobilesam-") as folder:
        draft = Path(folder) / "report.html"
        try:
            with cluster.client.as_current(), performance_report(filename=str(draft), mode="inline"):
                yield
        finally:
            if draft.exists():  # also of a run that was interrupted
                with explain_os_errors(path, PrecomputeError, "--performance-report"):
                    refuse = partial(_refuse_foreign_report, path)
                    write_output(path, draft.read_bytes(), PERFORMANCE_REPORT, refuse)


@contextmanager
def _stopping_gracefully(stop: StopFlag) -> Iterator[None]:
    """Make the first signal in the context only set the flag, which the scheduler and the audit check."""
    stop.graceful = True
    try:
        yield
    finally:
        stop.graceful = False


def _refuse_interrupted(stop: StopFlag, counts: Counts) -> None:
    if stop.signum is not None:
        raise PrecomputeInterrupted(
            f"interrupted: {counts.done + counts.failed:,} of {counted(counts.rows, 'image')} are committed; "
            "run the same command to resume",
            stop.signum,
        )


def _warn_of_failures(totals: RunTotals, observer: Observer) -> None:
    """Warn if every image of the run failed: the run succeeded, but hardly as intended."""
    if totals.committed and totals.failed == totals.committed:
        observer.message(
            f"WARNING: none of this run's {counted(totals.committed, 'image')} could be embedded; the first: "
            f"{totals.first_failure}"
        )


def _rates(totals: RunTotals, workers: int) -> dict[str, float | None]:
    if totals.first_batch is None or totals.last_commit is None:
        return {"images_per_second": None, "teacher_share": None, "decode_seconds": 0.0}
    # On a cluster these times come from the clocks of two machines.
    elapsed = max(totals.last_commit - totals.first_batch, 1e-6)
    return {
        "images_per_second": round(totals.committed / elapsed, 4),
        "teacher_share": round(totals.teacher_seconds / (elapsed * workers), 4),
        "decode_seconds": round(totals.decode_seconds, 3),
    }
