"""Where the work is done: a local cluster of this machine's own, or a dask cluster that exists."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import dask
from distributed import Client, LocalCluster

from .. import __version__
from .config import PrecomputeConfig
from .errors import PrecomputeError
from .worker import TASKS_PER_WORKER, describe_worker

CONNECT_SECONDS = 30
WORKER_DEATHS_ALLOWED = 2
"""Deaths of a worker under one shard that are taken for bad luck; at the next, its images are suspected."""

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Cluster:
    """A connected cluster: `devices` are those that its workers take by turns, `threads` what each has for torch
    on a CPU and for decoding (None: as many as it was started with). `local` ones are this run's own."""

    client: Client
    workers: int
    devices: tuple[str, ...]
    threads: int | None
    local: bool

    @property
    def dashboard(self) -> str:
        """The address of dask's dashboard."""
        return str(self.client.dashboard_link)

    def resolve_precisions(self, precision: str) -> set[str]:
        """What a precision that is asked for (`auto` included) means on the workers."""
        try:
            answers = self.client.run(describe_worker, self.devices[0], precision, __version__)
        except ModuleNotFoundError as error:
            raise PrecomputeError(
                f"the cluster's workers lack {error.name}: install mobilesam there"
            ) from error
        return set(answers.values())


def local_devices(config: PrecomputeConfig) -> tuple[str, ...]:
    """The devices that a local cluster uses: every GPU for `auto` and `cuda`, else the one that is named."""
    import torch

    from ..sam.precision import resolve_device

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
    devices = local_devices(config)
    workers = config.workers or len(devices)
    cores = len(os.sched_getaffinity(0))
    settings = {
        "distributed.scheduler.allowed-failures": WORKER_DEATHS_ALLOWED,
        "distributed.scheduler.work-stealing": False,
        "distributed.worker.daemon": True,
    }
    with (
        tempfile.TemporaryDirectory(prefix="mobilesam-", ignore_cleanup_errors=True) as scratch,
        dask.config.set(settings),
    ):
        with _sigint_ignored():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=TASKS_PER_WORKER,
                processes=True,
                host=_LOOPBACK,
                dashboard_address=f"{_LOOPBACK}:0",
                # The teacher is most of a worker's memory, and is no reason to kill it.
                memory_limit=None,
                local_directory=scratch,
                silence_logs=logging.CRITICAL,
            )
        try:
            with Client(cluster, set_as_default=False) as client:
                yield Cluster(
                    client=client,
                    workers=workers,
                    devices=devices,
                    threads=max(1, cores // workers),
                    local=True,
                )
        finally:
            cluster.close()


@contextmanager
def _sigint_ignored() -> Iterator[None]:
    """For starting workers: Ctrl-C reaches the whole process group, and they inherit that it isn't for them.
    (A worker that is replaced later ignores it once it has its plugin.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _remote(config: PrecomputeConfig) -> Iterator[Cluster]:
    try:
        client = Client(config.scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise PrecomputeError(
            f"no dask scheduler at {config.scheduler} ({error}): start one with `dask scheduler`, or leave out "
            "--scheduler"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError as error:
            raise PrecomputeError(
                f"the scheduler at {config.scheduler} has no workers after {CONNECT_SECONDS} s: start some with "
                f"`dask worker {config.scheduler}`"
            ) from error
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        yield Cluster(
            client=client,
            workers=workers,
            devices=(config.device,),
            threads=None,
            local=False,
        )
