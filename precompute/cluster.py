"""Dask cluster that a run computes on: a local one of its own, or one that exists (`--scheduler`)."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster

from .. import __version__
from ..common.dask_client import DASK_CLIENT_LOG, connected, dashboard_link
from ..common.dask_settings import WORKER_PRELOAD, own_dask_settings
from ..common.errors import PrecomputeError
from ..common.signals import starting_processes
from .config import PrecomputeConfig
from .worker import TASKS_PER_WORKER, TeacherPlugin, describe_worker, measure_worker

WORKER_DEATHS_ALLOWED = 2
"""Deaths of workers under one shard that are tolerated; after one more, the shard's images are tested."""
START_SECONDS = 300.0
"""Time for a worker that died to be restarted. dask's default is 15 seconds, which a busy machine may need for a
start."""
SILENCE_SECONDS = 10.0
"""Time, on top of an image's time limit, after which a silent local worker is replaced.

Workers report twice a second from a separate thread, however long the teacher takes. Only code that holds Python's
global interpreter lock silences one, such as an image's decoder, which may take as long as the image's time limit.
"""
LOG_LENGTH = 20
"""Messages, events and state changes that each part of a local cluster keeps for debugging dask. With dask's default
of 1,000, memory grew by 1 KB per image for 64,000 images: a shard's messages hold a line for each of its images."""

_LOW_OVERHEAD = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
}
"""Settings that reduce dask's profiling, which runs a hundred times a second. On a CPU it costs the teacher more than
its own time: when a matrix product is divided among all cores, all of them wait for the one that was interrupted."""

_SILENT = logging.CRITICAL + 1
"""Log level of a local cluster: its failures are reported here; dask would log them as critical, with tracebacks."""

_LOOPBACK = "127.0.0.1"

_SCRATCH_PREFIX = "mobilesam-"
_UNLOCKED_PREFIX = ".mobilesam-"
_SCRATCH_LOCK = "coordinator.lock"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """Connected dask cluster."""

    client: Client
    address: str
    """Address of the scheduler."""
    workers: int
    """Worker processes at the start."""
    devices: tuple[str, ...]
    """Devices that the workers take in turn."""
    threads: int | None
    """Threads of each worker, for torch on a CPU and for decoding; None for as many as it was started with."""
    local: bool
    """True if this run started the cluster and ends it."""

    @property
    def dashboard(self) -> str:
        """Address of dask's dashboard."""
        return dashboard_link(self.client)

    def describe_workers(self, precision: str) -> set[tuple[str, str]]:
        """Resolve device and precision on every worker.

        Args:
            precision: precision asked for, one of `AUTO_PRECISIONS`.

        Returns:
            The distinct pairs of device type ("cpu" or "cuda") and precision ("float32" or "bfloat16").

        Raises:
            PrecomputeError: a worker lacks mobilesam, or has another version.
        """
        try:
            answers = self.client.run(describe_worker, self.devices[0], precision, __version__)
        except ModuleNotFoundError as error:
            raise PrecomputeError(
                f"the cluster's workers lack {error.name}: install mobilesam there"
            ) from error
        return set(answers.values())

    def measure_worker(self, precision: str) -> float:
        """Measure the multiply-accumulates per second of one worker in this precision ("float32" or "bfloat16")."""
        measured = self.client.submit(measure_worker, self.devices[0], precision, pure=False)
        return float(measured.result())

    def count_workers(self) -> int:
        """Count the workers that the scheduler has now."""
        return len(self.client.scheduler_info(n_workers=-1)["workers"])

    @contextmanager
    def holding(self, plugin: TeacherPlugin) -> Iterator[None]:
        """Register the plugin with all workers, present and future, for the context."""
        self.client.register_plugin(plugin)
        try:
            yield
        finally:
            if not self.local and self.client.status == "running":
                # A cluster that outlives this run must not keep its teacher in memory.
                self._take_back(plugin)

    def _take_back(self, plugin: TeacherPlugin) -> None:
        try:
            self.client.unregister_worker_plugin(plugin.name)
        except OSError as error:
            # The work is done, and a worker that has died holds no memory.
            logger.warning("a worker could not be asked to release the teacher (%s)", error)

    def refuse_lost_connection(self) -> None:
        """Raise PrecomputeError if the connection to the scheduler is lost: dask would wait for ever."""
        if self.client.status != "running":
            DASK_CLIENT_LOG.setLevel(logging.CRITICAL)  # it reports the same with a traceback
            raise PrecomputeError(
                f"the connection to the dask scheduler at {self.address} was lost; what is committed stays, run the "
                "same command to resume"
            )


@contextmanager
def connect(config: PrecomputeConfig) -> Iterator[Cluster]:
    """Connect to the cluster at `--scheduler`, or start a local one, for the context.

    Raises:
        PrecomputeError: no scheduler answers, it has no workers, or the local workers don't start.
    """
    with _remote(config) if config.scheduler else _local(config) as cluster:
        yield cluster


def local_devices(config: PrecomputeConfig) -> tuple[str, ...]:
    """Return the devices that a local cluster uses: every GPU for `auto` and `cuda`, else the device named."""
    import torch

    from ..sam.device import resolve_device

    device = resolve_device(config.device)
    if device.type == "cuda" and config.device in ("auto", "cuda"):
        return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    return (str(device),)


@contextmanager
def _remote(config: PrecomputeConfig) -> Iterator[Cluster]:
    with connected(str(config.scheduler), PrecomputeError) as client:
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        yield Cluster(
            client=client,
            address=str(config.scheduler),
            workers=workers,
            devices=(config.device,),
            threads=None,
            local=False,
        )


@contextmanager
def _local(config: PrecomputeConfig) -> Iterator[Cluster]:
    found = local_devices(config)
    workers = config.workers or len(found)
    make_cluster, devices = _cluster_class(found, workers)
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        stack.enter_context(own_dask_settings(_settings(config)))
        with starting_processes():
            cluster = stack.enter_context(_start_with_preloads(make_cluster, workers, scratch))
        yield Cluster(
            client=stack.enter_context(Client(cluster, set_as_default=False)),
            address=cluster.scheduler_address,
            workers=workers,
            devices=devices,
            threads=max(1, cores // workers),
            local=True,
        )


def _settings(config: PrecomputeConfig) -> dict[str, Any]:
    """Return dask's settings for a local cluster."""
    settings = {
        "distributed.scheduler.allowed-failures": WORKER_DEATHS_ALLOWED,
        "distributed.deploy.lost-worker-timeout": f"{START_SECONDS}s",
        "distributed.scheduler.work-stealing": False,
        "distributed.scheduler.worker-ttl": f"{config.image_timeout + SILENCE_SECONDS}s",
        "distributed.worker.daemon": True,
    }
    if config.performance_report is None:  # the report needs dask's profiles and logs
        settings["distributed.admin.low-level-log-length"] = LOG_LENGTH
        settings |= _LOW_OVERHEAD
    return settings


def _cluster_class(
    devices: tuple[str, ...], workers: int
) -> tuple[Callable[..., LocalCluster], tuple[str, ...]]:
    """Choose the class that starts the workers, and the devices that they take in turn.

    If dask-cuda is installed, its cluster serves several GPUs with one worker each: it binds a worker to the cores
    near its GPU, and lists that GPU first in the worker's CUDA_VISIBLE_DEVICES.
    """
    if len(devices) > 1 and workers <= len(devices):
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError:
            return LocalCluster, devices
        # Tasks return no GPU arrays that dask would have to spill.
        return partial(LocalCUDACluster, device_memory_limit=None), ("cuda:0",)
    return LocalCluster, devices


def _start_with_preloads(
    make_cluster: Callable[..., LocalCluster], workers: int, scratch: str
) -> LocalCluster:
    """Start the workers; without the site's preloaded modules if they don't start with them."""
    if dask.config.get(WORKER_PRELOAD):
        try:
            return _start(make_cluster, workers, scratch)
        except PrecomputeError as error:
            logger.warning("%s; trying without dask's setting %s", error, WORKER_PRELOAD)
            dask.config.set({WORKER_PRELOAD: []})
    return _start(make_cluster, workers, scratch)


def _start(make_cluster: Callable[..., LocalCluster], workers: int, scratch: str) -> LocalCluster:
    try:
        return make_cluster(
            n_workers=workers,
            threads_per_worker=TASKS_PER_WORKER,
            processes=True,
            host=_LOOPBACK,
            dashboard_address=f"{_LOOPBACK}:0",
            # dask must not kill a worker for its memory, most of which is the teacher.
            memory_limit=None,
            local_directory=scratch,
            silence_logs=_SILENT,
        )
    except (RuntimeError, OSError, TimeoutError) as error:
        raise PrecomputeError(
            f"the {workers} worker process(es) did not start ({error}): is there memory for them, may this user run "
            "processes, and is a script that calls this guarded by `if __name__ == '__main__'`?"
        ) from error


@contextmanager
def scratch_folder() -> Iterator[str]:
    """Make a folder for the workers' files in the system's temporary folder, and remove it when the context ends.

    Folders that killed runs left are removed first.

    The process holds a lock on a file in its folder as long as it lives. The kernel releases the lock when the
    process ends in any way, so a folder whose lock is free is abandoned.
    """
    place = Path(tempfile.gettempdir())
    _remove_abandoned(place)
    # Other runs ignore this name. The folder gets its final name once the lock is held.
    folder = Path(tempfile.mkdtemp(prefix=_UNLOCKED_PREFIX))
    descriptor = os.open(folder / _SCRATCH_LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = folder.rename(place / f"{_SCRATCH_PREFIX}{folder.name.removeprefix(_UNLOCKED_PREFIX)}")
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _remove_abandoned(place: Path) -> None:
    """Remove this user's folders (no links) that have our lock file, each after taking its lock. A folder that can't
    be locked or removed is left alone: it does no harm."""
    for folder in place.glob(f"{_SCRATCH_PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(folder / _SCRATCH_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
