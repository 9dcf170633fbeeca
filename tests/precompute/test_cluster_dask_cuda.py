"""Local workers on several GPUs, with and without dask-cuda; its cluster is a stand-in that records its settings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import dask
import pytest
from distributed import LocalCluster
from precompute_command import contents, preload

from mobilesam.precompute import cluster
from mobilesam.precompute.cluster import _cluster_class

Run = Callable[..., dict[str, Any]]

# In a worker; any other name of a device is an error.
GPU_IS_CPU = """
import torch
import mobilesam.sam.device as precision
precision.resolve_device = lambda device: {"cuda:0": torch.device("cpu"), "cpu": torch.device("cpu")}[str(device)]
"""


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Settings that the stand-in for dask_cuda's LocalCUDACluster was made with."""
    calls: list[dict[str, Any]] = []

    class LocalCUDACluster(LocalCluster):
        def __init__(self, device_memory_limit: str | None = "default", **settings: Any) -> None:
            calls.append(settings | {"device_memory_limit": device_memory_limit})
            super().__init__(**settings)

    module = ModuleType("dask_cuda")
    module.LocalCUDACluster = LocalCUDACluster
    monkeypatch.setitem(sys.modules, "dask_cuda", module)
    return calls


def test_with_dask_cuda_a_run_on_two_gpus_uses_its_cluster(
    run: Run,
    shared_photos: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    given: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "local_devices", lambda _: ("cuda:0", "cuda:1"))
    (script,) = preload(tmp_path, GPU_IS_CPU).values()
    with dask.config.set({"distributed.worker.preload": [script]}):
        result = run(images=(shared_photos,), scheduler=None, workers=2, shard_size=1)
    assert (result["done"], result["failed"]) == (7, 0)
    assert contents(tmp_path / "store.zarr") == undisturbed
    (settings,) = given
    assert settings.pop("local_directory")
    assert settings == {
        "n_workers": 2,
        "threads_per_worker": 2,
        "processes": True,
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "memory_limit": None,
        "device_memory_limit": None,
        "silence_logs": 51,
    }


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    ("devices", "workers"),
    [(("cpu",), 1), (("cpu",), 2), (("cuda:1",), 1), (("cuda:0",), 2), (("cuda:0", "cuda:1"), 4)],
)
def test_the_dask_cuda_cluster_is_used_for_one_worker_a_gpu_only(
    devices: tuple[str, ...], workers: int
) -> None:
    assert _cluster_class(devices, workers) == (LocalCluster, devices)


def test_without_dask_cuda_each_worker_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    assert _cluster_class(("cuda:0", "cuda:1"), 2) == (LocalCluster, ("cuda:0", "cuda:1"))
