"""Where the work is done: a local cluster of this machine's own, or a dask cluster that exists."""

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

import dask
from distributed import Client, LocalCluster

from .. import __version__
from ..common.dask_client import DASK_CLIENT_LOG, connected
from ..common.errors import PrecomputeError
from ..common.signals import starting_processes
from .config import PrecomputeConfig
from .worker import TASKS_PER_WORKER, TeacherPlugin, describe_worker, measure_worker

WORKER_DEATHS_ALLOWED = 2
"""Deaths of a worker under one shard that are taken for bad luck; at the next, its images are suspected."""
START_SECONDS = 300.0
"""For a worker that died to be there again; dask alone would give it up for good after fifteen seconds, which a busy
machine needs for starting one."""
SILENCE_SECONDS = 10.0
"""On top of the time that an image may take: a local worker that has not been heard of for so long is replaced.

Workers report twice a second from a thread of their own, however long the teacher takes. What silences one is code
that holds Python's lock, as an image's decoder may: for no longer than any image is given.
"""

LOGGED = 20
"""Messages, events and state changes that each part of a local cluster remembers, for dask's developers. With dask's
own 1,000, memory grew by 1 KB an image for 64,000 images: a shard's messages hold a line for each of its images."""

_QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
}
"""Dask's processes look at themselves a hundred times a second. On a CPU that takes time from the teacher, and more
than its own: where a product is divided among all cores, all of them wait for the one that was disturbed."""

_SILENT = logging.CRITICAL + 1
"""For a local cluster's log: what is wrong with it is raised here, and dask logs it in tracebacks, as critical."""

_LOOPBACK = "127.0.0.1"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """A connected cluster: `devices` are those that its workers take by turns, `threads` what each has for torch
    on a CPU and for decoding (None: as many as it was started with). `local` ones are this run's own."""

    client: Client
    address: str
    workers: int
    devices: tuple[str, ...]
    threads: int | None
    local: bool

    @property
    def dashboard(self) -> str:
        """The address of dask's dashboard."""
        return str(self.client.dashboard_link)

    def describe_workers(self, precision: str) -> set[tuple[str, str]]:
        """Device type and precision that are meant on the workers by what is asked for (`auto` included)."""
        try:
            answers = self.client.run(describe_worker, self.devices[0], precision, __version__)
        except ModuleNotFoundError as error:
            raise PrecomputeError(
                f"the cluster's workers lack {error.name}: install mobilesam there"
            ) from error
        return set(answers.values())

    def measure_worker(self, precision: str) -> float:
        """Multiply-accumulates per second of one of the workers."""
        measured = self.client.submit(measure_worker, self.devices[0], precision, pure=False)
        return float(measured.result())

    def count_workers(self) -> int:
        """Workers that the scheduler has now."""
        return len(self.client.scheduler_info(n_workers=-1)["workers"])

    @contextmanager
    def holding(self, plugin: TeacherPlugin) -> Iterator[None]:
        """Give the plugin to all workers, and those to come, for the length of the context."""
        self.client.register_plugin(plugin)
        try:
            yield
        finally:
            if not self.local and self.client.status == "running":
                # A cluster of somebody else's is left without our teacher in its memory.
                self._take_back(plugin)

    def _take_back(self, plugin: TeacherPlugin) -> None:
        try:
            self.client.unregister_worker_plugin(plugin.name)
        except OSError as error:
            # The work is done, and a worker that dies now takes its teacher along.
            logger.warning("a worker couldn't be told to let go of the teacher (%s)", error)

    def refuse_lost_connection(self) -> None:
        """PrecomputeError when the scheduler has gone away: dask would wait for its answers for ever."""
        if self.client.status != "running":
            DASK_CLIENT_LOG.setLevel(logging.CRITICAL)  # it says the same, in a traceback
            raise PrecomputeError(
                f"the connection to the dask scheduler at {self.address} was lost; what is committed stays, run the "
                "same command to go on"
            )


def local_devices(config: PrecomputeConfig) -> tuple[str, ...]:
    """The devices that a local cluster uses: every GPU for `auto` and `cuda`, else the one that is named."""
    import torch

    from ..sam.device import resolve_device

    device = resolve_device(config.device)
    if device.type == "cuda" and config.device in ("auto", "cuda"):
        return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    return (str(device),)


@contextmanager
def connect(config: PrecomputeConfig) -> Iterator[Cluster]:
    """A cluster for the length of the context. PrecomputeError when there is none at `--scheduler`."""
    if config.scheduler:
        with _remote(config) as cluster:
            yield cluster
    else:
        with _local(config) as cluster:
            yield cluster


@contextmanager
def _local(config: PrecomputeConfig) -> Iterator[Cluster]:
    found = local_devices(config)
    workers = config.workers or len(found)
    make_cluster, devices = _kind(found, workers)
    cores = len(os.sched_getaffinity(0))
    settings = {
        "distributed.scheduler.allowed-failures": WORKER_DEATHS_ALLOWED,
        "distributed.deploy.lost-worker-timeout": f"{START_SECONDS}s",
        "distributed.scheduler.work-stealing": False,
        "distributed.scheduler.worker-ttl": f"{config.image_timeout + SILENCE_SECONDS}s",
        "distributed.worker.daemon": True,
    }
    if config.performance_report is None:  # which is drawn from what is remembered and profiled
        settings["distributed.admin.low-level-log-length"] = LOGGED
        settings |= _QUIET
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        stack.enter_context(dask.config.set(settings))
        with starting_processes():
            cluster = stack.enter_context(_start(make_cluster, workers, scratch))
        yield Cluster(
            client=stack.enter_context(Client(cluster, set_as_default=False)),
            address=cluster.scheduler_address,
            workers=workers,
            devices=devices,
            threads=max(1, cores // workers),
            local=True,
        )


def _kind(devices: tuple[str, ...], workers: int) -> tuple[Callable[..., LocalCluster], tuple[str, ...]]:
    """What starts the workers, and the devices that they take by turns.

    Where dask-cuda is installed, its cluster for one worker each on several GPUs: it keeps a worker to the cores that
    are next to its GPU, and shows it that GPU first.
    """
    if len(devices) > 1 and workers <= len(devices):
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError:
            return LocalCluster, devices
        # Tasks give back numbers, nothing that would have to move out of a GPU's memory.
        return partial(LocalCUDACluster, device_memory_limit=None), ("cuda:0",)
    return LocalCluster, devices


def _start(make_cluster: Callable[..., LocalCluster], workers: int, scratch: str) -> LocalCluster:
    try:
        return make_cluster(
            n_workers=workers,
            threads_per_worker=TASKS_PER_WORKER,
            processes=True,
            host=_LOOPBACK,
            dashboard_address=f"{_LOOPBACK}:0",
            # The teacher is most of a worker's memory, and is no reason to kill it.
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


# --- A folder for what workers keep on disk while a run lasts; those of runs that were killed are removed.

_PREFIX = "mobilesam-"
_UNREADY = ".mobilesam-"
_LOCK = "coordinator.lock"


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A new folder in the system's place for temporary files, removed at the context's end.

    While its process lives, it holds a lock on a file in it, which the kernel lets go of when it dies, however it
    dies: by that an abandoned folder is known, and removed here first.
    """
    place = Path(tempfile.gettempdir())
    _remove_abandoned(place)
    # Nobody looks at the folder under this name: it gets its own once the lock is held.
    folder = Path(tempfile.mkdtemp(prefix=_UNREADY))
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = folder.rename(place / f"{_PREFIX}{folder.name.removeprefix(_UNREADY)}")
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _remove_abandoned(place: Path) -> None:
    """Only this user's own real folders with our lock file in them, and only once the lock is ours; whatever can't be
    had or removed is left: it is in nobody's way."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
