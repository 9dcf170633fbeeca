"""Data-parallel training by processes that torchrun started: their ranks, and the collectives between them.

Every process takes its share of a step's micro-batches, and gradients are summed, so that N processes compute the
same as one process that accumulates all micro-batches. Only rank 0 reads checkpoints, writes files and reports.

Shape suffixes: C channels, H, W rows and columns of the embedding (g each).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common.errors import DistillError
from .checkpoint import EmbeddingSum, TrainState

Item = TypeVar("Item")
Value = TypeVar("Value")

TIMEOUT = datetime.timedelta(days=1)
"""Longest time that a process waits for another: rank 0 may be reading images or writing while the rest wait."""

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """Group of processes that train together, as seen by this one. A single process exchanges nothing.

    Collectives (all methods but `local_device` and `share_of`) must be called by every process, in the same order.
    """

    rank: int = 0
    world_size: int = 1
    """Number of processes, on all machines."""
    local_rank: int = 0
    """Number of this process on its machine."""

    @property
    def is_main(self) -> bool:
        """True for rank 0, which reads checkpoints, writes files and reports."""
        return self.rank == 0

    def local_device(self, device: str) -> str:
        """Return the device of this process: `auto` and `cuda` mean one GPU for each process of a machine."""
        if self.world_size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return device

    def share_of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of a list: every `world_size`-th item, beginning with its rank."""
        return items[self.rank :: self.world_size]

    def all_reduce_gradients(self, module: nn.Module, loss: Tensor) -> None:
        """Replace the gradients of all trained parameters, and `loss`, by their sums over all processes, in place.

        One all-reduce of one flat tensor, without synchronising with the host. torch's DistributedDataParallel would
        overlap it with the backward pass, but needs a micro-batch in every process; a short batch has too few.

        Args:
            module: what is trained; each trained parameter has a gradient (`fill_gradients`).
            loss: float32 scalar on the same device.
        """
        if self.world_size == 1:
            return
        gradients = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, "set by fill_gradients"
                gradients.append(parameter.grad)
        _flattened([loss, *gradients], dist.all_reduce)

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Broadcast rank 0's floating-point buffers, the running statistics of batch norms, into `module`."""
        if self.world_size == 1:
            return
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        if buffers:
            _flattened(buffers, partial(dist.broadcast, src=0))

    def reduce_sum(self, total: Tensor, count: int) -> int:
        """Move sums to rank 0: add up `total` there in place, and set it to zero in the other processes.

        Args:
            total: float tensor of the same shape in every process.
            count: number of items in this process's total.

        Returns:
            The sum of `count` in rank 0, 0 in the others.
        """
        if self.world_size == 1:
            return count
        counted = torch.tensor([count])
        dist.reduce(total, dst=0)
        dist.reduce(counted, dst=0)
        if self.is_main:
            return int(counted)
        total.zero_()
        return 0

    def all_reduce_max(self, *values: int) -> list[int]:
        """Return the maximum of each value over all processes; the exchange uses CPU tensors only."""
        if self.world_size == 1:
            return list(values)
        maxima = torch.tensor(values)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        return [int(value) for value in maxima]

    def broadcast(self, value: Value | None) -> Value:
        """Return rank 0's value in every process. Tensors in it must be on the CPU; it must not be None."""
        if self.world_size > 1:
            holder: list[Any] = [value]
            dist.broadcast_object_list(holder, src=0)
            value = holder[0]
        assert value is not None
        return value

    def gather(self, value: Value) -> list[Value]:
        """Return all processes' values by rank in rank 0, an empty list elsewhere. Tensors must be on the CPU."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.gather_object(value, gathered if self.is_main else None, dst=0)
        return gathered if self.is_main else []

    def broadcast_training(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
    ) -> TrainState:
        """Broadcast rank 0's weights, the optimizer's moments, state of random numbers, and `TrainState`.

        Args:
            module: what is trained; gets rank 0's weights.
            optimizer: its optimizer; gets rank 0's moments.
            state: this process's state.

        Returns:
            Rank 0's state. Other processes keep their own tensor for the sum of embeddings, with a count of 0, since
            the sums of all processes are added up later.
        """
        mine = None
        if self.is_main:
            moments = _on_cpu(optimizer.state_dict()["state"])
            without_sum = replace(state, embeddings=EmbeddingSum(sum_CHW=torch.empty(0)))
            mine = _on_cpu(module.state_dict()), moments, torch.get_rng_state(), without_sum
        weights, moments, rng, main_state = self.broadcast(mine)
        if self.is_main:
            return state
        module.load_state_dict(weights)
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(rng)
        return replace(main_state, embeddings=EmbeddingSum(sum_CHW=state.embeddings.sum_CHW))

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        self.all_reduce_max(0)


@contextmanager
def join_process_group() -> Iterator[ProcessGroup]:
    """Connect this process with the others that torchrun started, for the duration of the context.

    Without torchrun's environment variables, yield a group of one.

    Raises:
        DistillError: the variables are incomplete, the processes don't find each other, or one of them is lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ProcessGroup()
        return
    missing = [name for name in _TORCHRUN_VARIABLES if name not in os.environ]
    if missing:
        raise DistillError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: start several processes "
            "with torchrun --nproc-per-node N -m mobilesam distill"
        )
    processes = ProcessGroup(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
    )
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise DistillError(
            f"the {processes.world_size} processes did not find each other ({error}): start them with torchrun"
        ) from error
    try:
        yield processes
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise DistillError(
            f"process {processes.rank} of {processes.world_size} lost another one, whose own message says why; "
            "the last checkpoint is kept: run the same command to resume"
        ) from error
    finally:
        dist.destroy_process_group()


def _on_cpu(tree: Any) -> Any:
    """Return a tree of dictionaries with its tensors on the CPU."""
    if isinstance(tree, dict):
        return {key: _on_cpu(value) for key, value in tree.items()}
    return tree.cpu() if isinstance(tree, Tensor) else tree


def _flattened(tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
    """Exchange tensors in place as one flat tensor: a message costs more than the copies."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    exchange(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
