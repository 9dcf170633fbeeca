"""Several processes that train one student together, started by torchrun: who does what, and what they exchange.

Every process takes its share of a step's micro-batches; gradients are summed, so that N processes compute what one
computes that accumulates the same micro-batches. The first one alone writes.
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
from .checkpoint import TrainState

Item = TypeVar("Item")
Shared = TypeVar("Shared")

PATIENCE = datetime.timedelta(days=1)
"""For one process that waits for another: the first one may be reading photos or writing while the rest wait."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """This process among `count`; `rank` 0 is the first. Alone, nothing here costs or changes anything."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that reads checkpoints, writes and reports."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process: `auto` and `cuda` mean one GPU for each process of a machine."""
        if self.count > 1 and asked in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return asked

    def share_of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part: every `count`-th, beginning with its rank."""
        return items[self.rank :: self.count]

    def sum_gradients(self, student: nn.Module, loss: Tensor) -> None:
        """Replaces every parameter's gradient, and `loss`, by their sums over all processes.

        One exchange of one flat tensor, and none that waits for the host. torch's DistributedDataParallel would
        exchange during the backward pass, but can't do with processes that have no micro-batch of a short batch.
        """
        if self.count == 1:
            return
        gradients = []
        for parameter in student.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, "fill_gradients has seen to it"
                gradients.append(parameter.grad)
        _as_one([loss, *gradients], dist.all_reduce)

    def copy_buffers(self, student: nn.Module) -> None:
        """Gives every process the first one's statistics of batch norms (and its other floating-point buffers)."""
        if self.count == 1:
            return
        buffers = [buffer for buffer in student.buffers() if buffer.is_floating_point()]
        if buffers:
            _as_one(buffers, partial(dist.broadcast, src=0))

    def gather_sum(self, total: Tensor, count: int) -> int:
        """Adds up `total` in the first process and zeroes it in the others; likewise the count that is returned."""
        if self.count == 1:
            return count
        counted = torch.tensor([count])
        dist.reduce(total, dst=0)
        dist.reduce(counted, dst=0)
        if self.first:
            return int(counted)
        total.zero_()
        return 0

    def highest(self, *values: int) -> list[int]:
        """Each value's maximum over all processes; a message between hosts that leaves GPUs alone."""
        if self.count == 1:
            return list(values)
        agreed = torch.tensor(values)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return [int(value) for value in agreed]

    def shared(self, value: Shared | None) -> Shared:
        """What the first process passes, in every process. Tensors must be on the CPU."""
        if self.count > 1:
            holder: list[Any] = [value]
            dist.broadcast_object_list(holder, src=0)
            value = holder[0]
        assert value is not None
        return value

    def gathered(self, value: Shared) -> list[Shared]:
        """In the first process what all pass, by rank; in the others an empty list. Tensors must be on the CPU."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.gather_object(value, found if self.first else None, dst=0)
        return found if self.first else []

    def adopt(self, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> TrainState:
        """Makes every process's student, moments, random numbers and state the first one's; the state to use."""
        mine = None
        if self.first:
            moments = _on_cpu(optimizer.state_dict()["state"])
            # The sum of embeddings, and its count, are the first one's to keep: they are added up over all.
            without_sum = replace(state, mean_sum_CHW=torch.empty(0), mean_rows=0)
            mine = _on_cpu(student.state_dict()), moments, torch.get_rng_state(), without_sum
        weights, moments, rng, theirs = self.shared(mine)
        if self.first:
            return state
        student.load_state_dict(weights)
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(rng)
        return replace(theirs, mean_sum_CHW=state.mean_sum_CHW)

    def wait(self) -> None:
        """Until every process has come here."""
        self.highest(0)


def _on_cpu(tree: Any) -> Any:
    """A tree of dictionaries with its tensors on the CPU."""
    if isinstance(tree, dict):
        return {key: _on_cpu(value) for key, value in tree.items()}
    return tree.cpu() if isinstance(tree, Tensor) else tree


def _as_one(tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
    """Exchanges tensors in place, as one flat tensor: a message costs more than its copies."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    exchange(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def joined_replicas() -> Iterator[Replicas]:
    """The processes that torchrun has started with this one, connected for as long as the context lasts; one alone
    where torchrun hasn't.

    Raises DistillError when its variables are incomplete, or the processes don't find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Replicas()
        return
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing:
        raise DistillError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: start several processes "
            "with torchrun --nproc-per-node N -m mobilesam distill"
        )
    replicas = Replicas(
        rank=int(os.environ["RANK"]),
        count=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
    )
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise DistillError(
            f"the {replicas.count} processes did not find each other ({error}): start them with torchrun"
        ) from error
    try:
        yield replicas
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise DistillError(
            f"process {replicas.rank} of {replicas.count} lost another one, whose own message says why; what is "
            "saved stays, run the same command to go on"
        ) from error
    finally:
        dist.destroy_process_group()
