"""Dask cluster whose one worker runs in the test's own process, so that nothing has to start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
import pytest
import torch
from distributed import LocalCluster

from mobilesam.precompute import PrecomputeConfig, precompute, worker
from mobilesam.precompute.messages import TeacherSetup
from mobilesam.sam.teacher import Teacher


@contextmanager
def one_process_cluster() -> Iterator[LocalCluster]:
    """Run the cluster while the context lasts.

    Its teacher keeps this process's number of threads, so that other tests in the process keep theirs. The worker is
    not profiled, as in a run's own cluster: sys._current_frames, which dask calls for that a hundred times a second,
    may deadlock on Python before 3.11.9 (cpython #106883).
    """
    load = worker._load

    def load_for_this_process(setup: TeacherSetup, device: str, _threads: int) -> Teacher:
        return load(setup, device, torch.get_num_threads())

    with (
        pytest.MonkeyPatch.context() as patch,
        dask.config.set({"distributed.worker.profile.enabled": False}),
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
    ):  # fmt: skip
        patch.setattr(worker, "_load", load_for_this_process)
        yield cluster


def precompute_small(**options: Any) -> dict[str, Any]:
    """Precompute with vit_nano at 64 pixels, three images a shard, without an audit; takes about a second.

    `options` override the settings and may contain `observer`.
    """
    settings: dict[str, Any] = {"teacher": "vit_nano", "image_size": 64, "shard_size": 3, "audit": 0}
    observer = options.pop("observer", None)
    return precompute(PrecomputeConfig(**(settings | options)), observer)
