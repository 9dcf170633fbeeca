"""`mobilesam precompute` as a function: plan, store, cluster, job, summary."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..common.errors import PrecomputeError, PrecomputeInterrupted
from ..common.signals import StopFlag, stopped_by_signals
from ..sam.device import resolve_precision
from ..store import Counts, EmbeddingStore
from . import sizing
from .audit import Sample, run_audit, warn_of_audits
from .cluster import Cluster, connect, local_devices
from .config import PrecomputeConfig
from .messages import TeacherSetup
from .open_store import TeacherFile, find_teacher, open_store
from .plan import Hardware, Plan, Stored, look_up, make_plan, refuse_contradictions
from .progress import Observer, Progress, Silent
from .scheduler import Job, Tally
from .supervision import Watch
from .worker import TeacherPlugin


def precompute(config: PrecomputeConfig, observer: Observer | None = None) -> dict[str, Any]:
    """Embed every chosen image that the store lacks, and commit shard by shard.

    Returns `images, done, done_before, failed`: rows in all, done, done before this run, and failed; `seconds`:
    wall time of the whole call; `images_per_second`: from the first teacher batch's begin to the last commit (None
    when nothing was computed); `teacher_share`: of that time that teachers were busy; `decode_seconds`: CPU time of
    reading and decoding; `audit`: `rows, cosine_min, relative_mse_max, seconds`, or None when
    nothing was audited; `out_of_tolerance`: whether the store holds an audited row that misses its tolerance.

    Raises PrecomputeError, SamError, StoreError; PrecomputeInterrupted after SIGINT or SIGTERM, with everything
    committed that was finished.
    """
    began = time.monotonic()
    observer = observer or Silent()
    stop = StopFlag(second_kills=False)
    message = "interrupted; run the same command to go on"
    with stopped_by_signals(stop, PrecomputeInterrupted, message), ExitStack() as stack:
        _check_report_place(config.performance_report)
        plan, cluster = planned(config, stack, observer)
        teacher = find_teacher(plan, observer)
        store = stack.enter_context(open_store(plan, teacher, observer))
        before = store.manifest.counts()
        _introduce(store, observer)
        tally, audit = Tally(), None
        if store.pending_shards():
            cluster = cluster or stack.enter_context(connect(config))
            tally, audit = _compute(plan, teacher, store, cluster, observer, stop)
        after = store.manifest.counts()
        _refuse_interrupted(stop, after)
        _warn_of_failures(tally, observer)
        return {
            "images": after.rows,
            "done": after.done,
            "done_before": before.done,
            "failed": after.failed,
            "seconds": round(time.monotonic() - began, 3),
            **_rates(tally, plan.hardware.workers),
            "audit": audit,
            "out_of_tolerance": warn_of_audits(store, observer),
        }


def _refuse_interrupted(stop: StopFlag, counts: Counts) -> None:
    if stop.signum is not None:
        raise PrecomputeInterrupted(
            f"interrupted: {counts.done + counts.failed:,} of {counts.rows:,} images are committed; "
            "run the same command to go on",
            stop.signum,
        )


def _warn_of_failures(tally: Tally, observer: Observer) -> None:
    """A run that embedded nothing is hardly what anybody wanted, though it did what it could."""
    if tally.committed and tally.failed == tally.committed:
        observer.message(
            f"WARNING: none of this run's {tally.committed:,} images could be embedded, the first: "
            f"{tally.first_failure}"
        )


def planned(config: PrecomputeConfig, stack: ExitStack, observer: Observer) -> tuple[Plan, Cluster | None]:
    """The plan of a run, everything that contradicts the store refused; with the cluster at `--scheduler`, if one
    is given, connected for as long as `stack` lasts."""
    stored = look_up(config.out)
    if stored:
        refuse_contradictions(config, stored.spec)
    cluster = stack.enter_context(connect(config)) if config.scheduler else None
    return make_plan(config, stored, find_hardware(config, stored, cluster), observer), cluster


def find_hardware(config: PrecomputeConfig, stored: Stored | None, cluster: Cluster | None) -> Hardware:
    """Devices, workers and precision: of this machine, or of the workers of a cluster that exists. `auto` means a
    store's own precision, else bfloat16 where every worker's hardware accelerates it."""
    asked = stored.spec.precision if stored else config.precision
    measure = stored is None and config.shard_size is None
    if cluster is not None:
        types, precisions = zip(*cluster.describe_workers(asked), strict=True)
        precision = "float32" if "float32" in precisions else "bfloat16"
        return Hardware(
            devices=cluster.devices,
            device_type="cpu" if "cpu" in types else "cuda",
            workers=cluster.workers,
            precision=precision,
            macs_per_second=cluster.measure_worker(precision) if measure else None,
        )
    devices = local_devices(config)
    device = torch.device(devices[0])
    workers = config.workers or len(devices)
    precision = resolve_precision(asked, device)
    sharing = workers if device.type == "cpu" else 1
    return Hardware(
        devices=devices,
        device_type=device.type,
        workers=workers,
        precision=precision,
        macs_per_second=sizing.macs_per_second(device, precision) / sharing if measure else None,
    )


def _check_report_place(path: Path | None) -> None:
    """Before the work, not after it: dask writes the report at the end."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise PrecomputeError(
            f"{path} can't be written: --performance-report takes a file in a folder that exists"
        )


def _introduce(store: EmbeddingStore, observer: Observer) -> None:
    spec, counts = store.spec, store.manifest.counts()
    observer.message(
        f"{counts.rows:,} images, {counts.done:,} done before; teacher {spec.teacher} at {spec.image_size} px in "
        f"{spec.precision}; {spec.dtype} in shards of {spec.shard_size} into {store.path}"
    )


def _compute(
    plan: Plan,
    teacher: TeacherFile,
    store: EmbeddingStore,
    cluster: Cluster,
    observer: Observer,
    stop: StopFlag,
) -> tuple[Tally, dict[str, Any] | None]:
    """Compute and audit what is pending: what the job measured, and what the audit found."""
    observer.message(f"{cluster.workers} worker(s); dashboard: {cluster.dashboard}")
    config, root = plan.config, plan.listing.root
    batch_size = sizing.batch_size(config.batch_size, plan.hardware.device_type, store.spec.shard_size)
    if config.compile:
        observer.message("each worker first translates the teacher by torch.compile, which may take minutes")
    setup = _setup(plan, teacher, store, cluster, batch_size if config.compile else None)
    plugin = TeacherPlugin(uuid.uuid4().hex[:8], setup)
    watch = Watch(cluster, plugin.run, observer, stop)
    sample = Sample(config.audit)
    before = store.manifest.counts()
    progress = Progress(before.rows, before.done + before.failed, before.failed)
    job = Job(
        store, cluster, plugin, batch_size, config.image_timeout, sample, progress, watch, observer, stop
    )
    with _recorded(config, cluster), _graceful(stop), cluster.holding(plugin), watch.listening():
        tally = job.run(store.pending_shards(), root)
        if stop.signum is not None:
            return tally, None
        return tally, run_audit(
            store, sample.rows, root, config.image_timeout, cluster, plugin.name, watch, observer
        )


def _setup(
    plan: Plan, teacher: TeacherFile, store: EmbeddingStore, cluster: Cluster, compiled_batch: int | None
) -> TeacherSetup:
    return TeacherSetup(
        name=teacher.name,
        checkpoint=teacher.path,
        checkpoint_sha256=teacher.sha256,
        image_size=plan.image_size,
        precision=store.spec.precision,
        compiled_batch=compiled_batch,
        devices=cluster.devices,
        threads=cluster.threads,
        local=cluster.local,
    )


@contextmanager
def _graceful(stop: StopFlag) -> Iterator[None]:
    stop.graceful = True
    try:
        yield
    finally:
        stop.graceful = False


@contextmanager
def _recorded(config: PrecomputeConfig, cluster: Cluster) -> Iterator[None]:
    """Write dask's performance report of what happens in the context, if one is asked for."""
    if config.performance_report is None:
        yield
        return
    from distributed import performance_report

    with (
        cluster.client.as_current(),
        performance_report(filename=str(config.performance_report), mode="inline"),
    ):
        yield


def _rates(tally: Tally, workers: int) -> dict[str, float | None]:
    if tally.first_batch is None or tally.last_commit is None:
        return {"images_per_second": None, "teacher_share": None, "decode_seconds": 0.0}
    # On a cluster these are two machines' clocks.
    elapsed = max(tally.last_commit - tally.first_batch, 1e-6)
    return {
        "images_per_second": round(tally.committed / elapsed, 4),
        "teacher_share": round(tally.teacher_seconds / (elapsed * workers), 4),
        "decode_seconds": round(tally.decode_seconds, 3),
    }


# --- What a run, or the plan of one, has come to, as lines for people.

_GIGABYTE = 1e9


def summary_lines(out: Path, result: Mapping[str, Any]) -> list[str]:
    """The result of `precompute`."""
    line = f"{out}: {result['done']:,} of {result['images']:,} images done ({result['done_before']:,} before)"
    if result["failed"]:
        line += f", {result['failed']:,} failed (try them again with --retry-failed)"
    lines = [line]
    if result["images_per_second"]:
        lines.append(
            f"{result['images_per_second']:.3g} images/s; the teacher was busy {result['teacher_share']:.0%} of "
            f"that time; decoding took {result['decode_seconds']:.1f} s of CPU; {_time(result['seconds'])} in all"
        )
    return lines


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The result of `dry_run`."""
    needed, free = plan["bytes_needed"], plan["bytes_free"]
    time = "not measured" if plan["pending"] else "none"
    if plan["pending"] and plan["seconds"] is not None:
        time = f"about {_time(plan['seconds'])} (one image took {plan['seconds_per_image']:.3g} s here)"
    lines = [
        f"images        {plan['images']:,}, of which {plan['pending']:,} to compute",
        f"shards        {plan['shards']:,} of {plan['shard_size']} images",
        f"bytes needed  {needed:,} ({needed / _GIGABYTE:.2f} GB)",
        f"bytes free    {free:,} ({free / _GIGABYTE:.2f} GB)",
        f"time          {time}",
    ]
    if needed > free:
        lines.append(f"There is too little room: {needed - free:,} bytes are missing.")
    return lines


def _time(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))
