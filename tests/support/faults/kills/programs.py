"""Programs that the fork server runs: scheduler, worker, coordinator, inspector, trainer.

They call the real commands as the command line does. The stages of a job are written to a file (stages.py), so that
they also appear in a trace of system calls.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.kills import stages
from faults.kills.mutations import MUTATIONS


def prepare() -> None:
    """Import everything, and compute once what every process would compute again; start no thread."""
    import distributed  # noqa: F401
    import torch
    import torch.utils.tensorboard
    import zarr

    import mobilesam.cli
    import mobilesam.distill.run
    import mobilesam.precompute.run
    import mobilesam.precompute.shard_task  # noqa: F401
    from mobilesam.sam.teacher import embedded_sha256

    torch.set_num_threads(1)
    zarr.create_group({}, zarr_format=3)
    embedded_sha256()
    _shrink_head()
    _add_small_student()
    stages.wrap_stages()


def _shrink_head() -> None:
    """Replace SAM's head (16 MB, which no test here reads) by two small tensors."""
    import torch

    from mobilesam.precompute import open_store

    open_store.load_head = lambda *_: {
        "mask_decoder.weight": torch.arange(4.0),
        "prompt_encoder.weight": torch.arange(3.0),
    }


def _add_small_student() -> None:
    """Register a student of two convolutions with a batch norm: its checkpoints take 0.4 MB instead of 70."""
    from torch import nn

    from mobilesam.distill.students import registry

    def build(_image_size: int, _student_size: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Conv2d(8, 256, 4, stride=4))

    info = registry.StudentInfo(
        name="two_convs",
        summary="for the fault suite",
        build=build,
        training_bytes={"float32": 1, "bfloat16": 1},
    )
    registry.STUDENTS = {**registry.STUDENTS, "two_convs": info}


def apply_mutation(mutation: str | None) -> None:
    """Remove one safeguard of the package (mutations.py); None removes none."""
    if mutation is not None:
        MUTATIONS[mutation](setattr)


def scheduler(address_file: str) -> int:
    """Run dask's scheduler until it is killed; write its address to `address_file`."""
    import dask
    from distributed import Scheduler

    async def run() -> None:
        # As precompute sets it for a cluster of its own.
        with dask.config.set({"distributed.scheduler.allowed-failures": 2}):
            async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as running:
                draft = Path(f"{address_file}.draft")
                draft.write_text(running.address)
                draft.rename(address_file)
                await running.finished()

    asyncio.run(run())
    return 0


def worker(address: str, stage_file: str, local: str, slow: float = 0.0, mutation: str | None = None) -> int:
    """Run a dask worker with one thread until it is killed; delay each row by `slow` seconds."""
    from distributed import Worker

    apply_mutation(mutation)
    stages.log_stages_to(stage_file, slow=slow)

    async def run() -> None:
        async with Worker(address, nthreads=1, local_directory=local, dashboard=False) as running:
            await running.finished()

    asyncio.run(run())
    return 0


def coordinator(arguments: list[str], stage_file: str, mutation: str | None = None) -> int:
    """Run `mobilesam precompute` with these arguments."""
    apply_mutation(mutation)
    stages.log_stages_to(stage_file)
    return _command(["precompute", *arguments])


def inspector(arguments: list[str], stage_file: str) -> int:
    """Run `mobilesam inspect` with these arguments."""
    stages.log_stages_to(stage_file)
    return _command(["inspect", *arguments])


def trainer(stage_file: str, mutation: str | None = None, **settings: Any) -> int:
    """Run `mobilesam distill` with these settings, which include some that the command line lacks."""
    from mobilesam.common import command
    from mobilesam.distill import DistillConfig, distill

    apply_mutation(mutation)
    stages.log_stages_to(stage_file)
    try:
        distill(DistillConfig(device="cpu", precision="float32", workers=1, **settings))
    except Exception as error:  # noqa: BLE001 - reported as the command line does
        message, code = command.explain(error)
        os.write(2, f"error: {message}\n".encode())
        return code
    return 0


def _command(arguments: list[str]) -> int:
    from mobilesam import cli

    try:
        cli.main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


PROGRAMS: dict[str, Callable[..., int]] = {
    program.__name__: program for program in (scheduler, worker, coordinator, inspector, trainer)
}
