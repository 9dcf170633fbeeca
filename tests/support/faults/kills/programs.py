"""What the fork_server's processes do: a scheduler, a worker, a coordinator, a trainer, an inspector.

The commands are the real ones, called as the command line calls them. What they are in the middle of they say to a
file (see stages.py), which a trace of their system calls shows too.
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
    """Import everything, and compute once what every process would compute again. No thread is started."""
    import distributed  # noqa: F401
    import torch
    import torch.utils.tensorboard
    import zarr

    import mobilesam.cli
    import mobilesam.distill.run
    import mobilesam.precompute.run
    import mobilesam.precompute.shard  # noqa: F401
    from mobilesam.sam.teacher import embedded_sha256

    torch.set_num_threads(1)
    zarr.create_group({}, zarr_format=3)
    embedded_sha256()
    _shrink_head()
    _add_small_student()
    stages.watch()


def _shrink_head() -> None:
    """SAM's head is 16 MB, which nothing here looks into: two small tensors stand for it."""
    import torch

    from mobilesam.precompute import open_store as opening

    opening.load_head = lambda *_: {
        "mask_decoder.weight": torch.arange(4.0),
        "prompt_encoder.weight": torch.arange(3.0),
    }


def _add_small_student() -> None:
    """A student of two convolutions, with a batch norm: its checkpoints take 0.4 MB instead of 70."""
    from torch import nn

    from mobilesam.distill.students import registry as students

    def build(_image_size: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Conv2d(8, 256, 4, stride=4))

    info = students.StudentInfo(
        name="two_convs",
        summary="for the fault suite",
        build=build,
        training_bytes={"float32": 1, "bfloat16": 1},
    )
    students.STUDENTS = {**students.STUDENTS, "two_convs": info}


def apply_mutation(mutation: str | None) -> None:
    """Leave out one of the safeguards, if asked to; see mutations.py."""
    if mutation is not None:
        MUTATIONS[mutation](setattr)


def scheduler(place: str) -> int:
    """dask's scheduler until it is killed; its address goes into the file `place`."""
    import dask
    from distributed import Scheduler

    async def run() -> None:
        # As precompute sets it for a cluster of its own.
        with dask.config.set({"distributed.scheduler.allowed-failures": 2}):
            async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as running:
                draft = Path(f"{place}.draft")
                draft.write_text(running.address)
                draft.rename(place)
                await running.finished()

    asyncio.run(run())
    return 0


def worker(address: str, stage_file: str, local: str, slow: float = 0.0, mutation: str | None = None) -> int:
    """One of dask's workers, with one thread, until it is killed. Every row is written `slow` seconds late."""
    from distributed import Worker

    apply_mutation(mutation)
    stages.log_stages_to(stage_file, slow=slow)

    async def run() -> None:
        async with Worker(address, nthreads=1, local_directory=local, dashboard=False) as running:
            await running.finished()

    asyncio.run(run())
    return 0


def coordinator(arguments: list[str], stage_file: str, mutation: str | None = None) -> int:
    """`mobilesam precompute` with these arguments."""
    apply_mutation(mutation)
    stages.log_stages_to(stage_file)
    return _command(["precompute", *arguments])


def inspector(arguments: list[str], stage_file: str) -> int:
    """`mobilesam inspect` with these arguments."""
    stages.log_stages_to(stage_file)
    return _command(["inspect", *arguments])


def trainer(stage_file: str, mutation: str | None = None, **settings: Any) -> int:
    """`mobilesam distill` with these settings, those that the command line doesn't have among them."""
    from mobilesam import cli
    from mobilesam.distill import DistillConfig, distill

    apply_mutation(mutation)
    stages.log_stages_to(stage_file)
    try:
        distill(DistillConfig(device="cpu", precision="float32", workers=1, **settings))
    except Exception as error:  # noqa: BLE001 - told as the command line tells it
        message, code = cli._explain(error)
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


ROLES: dict[str, Callable[..., int]] = {
    role.__name__: role for role in (scheduler, worker, coordinator, inspector, trainer)
}
