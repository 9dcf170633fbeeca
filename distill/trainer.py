"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from ..common.errors import DistillError, DistillInterrupted
from ..common.signals import StopFlag
from .checkpoint import CHECKPOINT_FILE, TrainState
from .config import DistillConfig
from .data.loader import Batch, Loader
from .data.sampler import epoch_order, split_batches
from .distributed import ProcessGroup
from .loss.base import (
    HEAD_LR_SHARE,
    BatchTotals,
    MicroBatch,
    Objective,
    make_micro_batch,
    micro_batch_generator,
)
from .loss.decoupled import Decoupled, loss_elements
from .loss.head import head_state
from .metrics.evaluate import ComputeSettings, Validation, embed
from .optimizer import learning_rate, parameter_groups
from .run_folder import Run
from .students.student_file import TRAINED_HEAD, save_student
from .train_log import Meter, Progress, Recorder

logger = logging.getLogger(__name__)

LINES_PER_EPOCH = 50
TRAIN_EVAL_ROWS = 1024


class Trainer:
    """Fits a student to a store's embeddings; `fit` is the whole story.

    `student` is on `device`, and so are the heads of `objective` (None: the decoupled one). `micro_batch` and
    `precision` are resolved values. The loop never waits for a GPU except where it logs, saves or validates. With
    `processes`, each process has its trainer, and all of them call the same methods; the first one's alone writes.
    """

    def __init__(
        self,
        config: DistillConfig,
        run: Run,
        student: nn.Module,
        loader: Loader,
        *,
        compute: ComputeSettings,
        student_info: dict[str, Any],
        stop: StopFlag,
        objective: Objective | None = None,
        processes: ProcessGroup | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.config, self.run, self.loader = config, run, loader
        self.compute, device = compute, compute.device
        self.student_info, self.stop, self.progress = student_info, stop, progress
        self.processes = processes or ProcessGroup()
        self.student = student.to(memory_format=compute.memory_format)
        self.objective = objective or Decoupled(config.loss_region)
        self.student.requires_grad_(self.objective.trains_encoder)
        self.trained = self.objective.trained(self.student)
        self.batch_norms = BatchNorms(student)
        groups = parameter_groups(self.student, config.weight_decay)
        if self.objective.head is not None:
            groups += parameter_groups(self.objective.head, config.weight_decay, HEAD_LR_SHARE)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=device.type == "cuda")
        self.validation = Validation(
            self.student,
            loader,
            run,
            self.objective,
            compute=compute,
            processes=self.processes,
        )
        self.steps_per_epoch = math.ceil(len(run.split.train) / config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.log_every = max(1, self.steps_per_epoch // LINES_PER_EPOCH)
        grid = run.description.image_size // 16
        self.state = TrainState(mean_sum_CHW=torch.zeros(256, grid, grid, dtype=torch.float64, device=device))
        self.meter = Meter(self.state, loader)

    def fit(self) -> dict[str, Any]:
        """Trains, from the last checkpoint if there is one; the result as `distill` returns it.

        Raises DistillInterrupted after saving when the stop flag is set, DistillError when the loss isn't finite.
        """
        self.go_on()
        state = self.state
        self.meter, self.saved_at = Meter(state, self.loader), time.monotonic()
        with ExitStack() as stack:
            self.recorder: Recorder | None = None
            if self.processes.is_main:
                self.recorder = stack.enter_context(
                    Recorder(self.run.path, keep_bytes=state.metrics_bytes, next_step=state.step + 1)
                )
            self.stop.graceful = True
            while state.epoch < self.config.epochs:
                self.train_epoch()
                self.share_labels()
                self.validate()
                state.epoch, state.batch = state.epoch + 1, 0
                self.save_student()
                self.save()
            return self.finish()

    def go_on(self) -> None:
        """Takes up the last checkpoint, if the run has come to one: the first process reads it for all."""
        if self.processes.is_main:
            self.load()
        if self.processes.world_size > 1:
            self.state = self.processes.broadcast_training(self.trained, self.optimizer, self.state)

    def load(self) -> None:
        """Reads the last checkpoint, if there is one, and writes anew what was lost beside it."""
        checkpoints = self.run.checkpoints
        if not checkpoints.exist():
            if self.run.student_path.exists():
                raise DistillError(
                    f"{self.run.path} has a student but no {CHECKPOINT_FILE} to go on from: put it back, or give "
                    "--restart to start over, which keeps the old run beside the new one"
                )
            return
        self.state = state = checkpoints.load(self.trained, self.optimizer, self.state, self.compute.device)
        logger.info("going on after epoch %d, step %d of %d", state.epoch, state.step, self.steps)
        if state.epoch:
            self.write_mean()
        if state.epoch and not state.batch:
            self.save_student()

    def train_epoch(self) -> None:
        """The batches of one epoch that are still to do."""
        order = epoch_order(self.run.split.train, self.config.seed, self.state.epoch)
        batches = split_batches(order, self.config.batch_size)[self.state.batch :]
        micro_batches = [
            self.processes.share_of(split_batches(rows, self.compute.batch_size)) for rows in batches
        ]
        # An encoder that isn't trained keeps its statistics, too.
        self.student.train(self.objective.trains_encoder)
        self.loader.epoch = self.state.epoch
        self.meter.start()
        with closing(self.loader.batches(chain.from_iterable(micro_batches), with_masks=True)) as coming:
            for rows, mine in zip(batches, micro_batches, strict=True):
                self.step(rows, islice(coming, len(mine)))
                self.after_step(last=self.state.step % self.steps_per_epoch == 0)
        if self.state.epoch == 0:
            self.save_mean()

    def step(self, rows: list[int], micro_batches: Iterable[Batch]) -> None:
        """One optimizer step on one batch, its gradient accumulated over micro-batches."""
        config, state = self.config, self.state
        rate = learning_rate(state.step, self.steps, config.lr, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_share"]
        elements = loss_elements(self.loader.valid(rows), 256, config.loss_region)
        whole = BatchTotals(elements=elements, images=len(rows))
        self.processes.broadcast_buffers(self.student)
        loss = torch.zeros((), device=self.compute.device)
        for batch in micro_batches:
            state.micro_steps += 1
            part = self.embedded(batch)
            share = self.objective.loss(part, whole)
            share.backward()
            loss += share.detach()
            if state.epoch == 0:
                state.mean_sum_CHW += part.teacher_BCHW.double().sum(dim=0)
                state.mean_rows += len(batch.rows)
        fill_gradients(self.trained)
        self.processes.all_reduce_gradients(self.trained, loss)
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(loss, norm)
        state.step, state.batch, state.images = state.step + 1, state.batch + 1, state.images + len(rows)

    def embedded(self, batch: Batch) -> MicroBatch:
        """A micro-batch on the device, with the student's embeddings of it."""
        trains, state = self.objective.trains_encoder, self.state
        if trains:
            frozen = state.step >= self.config.freeze_norm * self.steps
            self.batch_norms.prepare(state.micro_steps, frozen=frozen)
        with torch.set_grad_enabled(trains):
            student_BCHW, teacher_BCHW = embed(self.student, batch, self.compute)
        generator = micro_batch_generator(self.config.seed, state.epoch, batch.rows[0])
        return make_micro_batch(batch, student_BCHW, teacher_BCHW, generator)

    def after_step(self, *, last: bool) -> None:
        """Logs, shows, saves, stops: whatever is due."""
        if last or self.state.batch % self.log_every == 0:
            line = {"epoch": self.state.epoch + 1, "step": self.state.step, **self.rates()}
            self.log("train", {**line, **self.meter.take_window()})
        self.show("train")
        due = time.monotonic() - self.saved_at > self.config.checkpoint_seconds and not last
        self.save_and_stop_if_asked(due)

    def rates(self) -> dict[str, float]:
        """The learning rates of the last step: `lr` of the encoder, `lr_head` of a head, where they are trained."""
        rates = {"lr": self.optimizer.param_groups[0]["lr"]} if self.objective.trains_encoder else {}
        if self.objective.head is not None:
            rates["lr_head"] = self.optimizer.param_groups[-1]["lr"]
        return rates

    def share_labels(self) -> None:
        """Has the first process name the images whose annotations were no use to any of them: it alone reports."""
        labels = self.loader.labels
        if labels is None:
            return
        for broken, empty in self.processes.gather((dict(labels.broken), set(labels.empty)))[1:]:
            for key, reason in broken.items():
                labels.mark_broken(key, reason)
            labels.empty |= empty

    def validate(self) -> None:
        """Measures the validation rows and logs them."""
        metrics = self.evaluate(self.run.split.val, "validate")
        epoch = self.state.epoch + 1
        self.log("val", {"epoch": epoch, "step": self.state.step, "rows": len(self.run.split.val), **metrics})
        score = self.validation.score(metrics)
        if score < self.state.best_score:
            self.state.best_epoch, self.state.best_score = epoch, score

    def evaluate(self, rows: Iterable[int], phase: str) -> dict[str, Any]:
        """The metrics of the student as it is; saves and stops when asked to.

        Nothing of an evaluation is kept then, so the state is whole.
        """

        def before_batch() -> None:
            self.show(phase)
            self.save_and_stop_if_asked(due=False)

        return self.validation.measure(rows, before_batch)

    def finish(self) -> dict[str, Any]:
        """Measures the student on what it learned from, and closes the run with its result."""
        state, config = self.state, self.config
        # Those of an epoch that will never be trained: as good as any, and the same every time.
        rows = sorted(epoch_order(self.run.split.train, config.seed, config.epochs)[:TRAIN_EVAL_ROWS])
        metrics = self.evaluate(rows, "evaluate")
        self.log("train_eval", {"epoch": state.epoch, "step": state.step, "rows": len(rows), **metrics})
        return self.processes.broadcast(self.close_run() if self.processes.is_main else None)

    def close_run(self) -> dict[str, Any]:
        """Logs the result; the checkpoint before the last is needed no more."""
        state = self.state
        assert self.recorder is not None
        val = self.run.last("val")
        assert val is not None, "every epoch validates"
        if state.best_epoch != state.epoch:
            logger.info("epoch %d was better on the validation rows than the last one", state.best_epoch)
        self.meter.count_elapsed()
        result = {
            "run": str(self.run.path),
            "epochs": state.epoch,
            "steps": state.step,
            "seconds": state.elapsed,
            "images_per_second": state.images / state.seconds,
            "data_wait_share": state.waited / state.seconds,
            "val": {
                name: value for name, value in val.items() if name not in ("kind", "epoch", "step", "rows")
            },
        }
        if self.loader.labels is not None:
            result["labels"] = {
                "annotated": self.run.description.data.annotated,
                "images": self.run.description.data.rows,
                "empty": len(self.loader.labels.empty),
                "broken": len(self.loader.labels.broken),
            }
        self.recorder.line("result", result)
        self.recorder.sync()
        self.run.checkpoints.drop_previous()
        return result

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """Appends a line to the run's metrics."""
        if self.recorder is not None:
            self.recorder.line(kind, values)

    def save(self) -> None:
        """Writes a checkpoint; what was logged before it is durable first."""
        self.meter.fetch()
        self.meter.count_elapsed()
        self.gather_mean()
        if self.recorder is not None:
            self.state.metrics_bytes = self.recorder.sync()
            self.run.checkpoints.save(self.trained, self.optimizer, self.state, self.compute.device)
        self.saved_at = time.monotonic()

    def save_student(self) -> None:
        """Writes the student as of the last complete epoch."""
        if not self.processes.is_main:
            return
        state = self.state
        save_student(
            self.student,
            self.run.student_path,
            self.config.student,
            self.run.description.image_size,
            {
                **self.student_info,
                "epoch": state.epoch,
                "step": state.step,
                TRAINED_HEAD: self.objective.head is not None,
            },
            None if self.objective.head is None else head_state(self.objective.head),
        )

    def gather_mean(self) -> None:
        """Brings the sum of the embeddings that the processes have seen to the first one."""
        state = self.state
        if state.epoch == 0:
            state.mean_rows = self.processes.reduce_sum(state.mean_sum_CHW, state.mean_rows)

    def save_mean(self) -> None:
        """Keeps the mean of the training rows' embeddings: what skill is measured against."""
        self.gather_mean()
        if self.processes.is_main:
            self.write_mean()
        self.processes.barrier()

    def write_mean(self) -> None:
        """Writes the mean of what has been gathered."""
        self.run.save_mean_embedding((self.state.mean_sum_CHW / self.state.mean_rows).float().cpu())

    def save_and_stop_if_asked(self, due: bool) -> None:
        """Saves when that is due, and ends the run when a stop is asked for, once its state is saved.

        Processes agree on both; none ends before the first one has saved, since torchrun then ends the others.
        """
        signum, due_now = self.processes.all_reduce_max(self.stop.signum or 0, int(due and self.processes.is_main))
        if signum or due_now:
            self.save()
        if not signum:
            return
        self.processes.barrier()
        raise DistillInterrupted(
            f"stopped after step {self.state.step} of {self.steps}, saved in {self.run.path}\n"
            "run the same command again to go on",
            signum,
        )

    def show(self, phase: str) -> None:
        """Tells whoever displays it; without waiting for the device."""
        if self.progress is None:
            return
        state, rate = self.state, self.meter.images_per_second()
        left = self.config.epochs * len(self.run.split.train) - state.images
        self.progress(
            Progress(
                phase=phase,
                epoch=min(state.epoch + 1, self.config.epochs),
                epochs=self.config.epochs,
                step=state.step,
                steps=self.steps,
                loss=self.meter.last_loss,
                images_per_second=rate,
                eta_seconds=left / rate if rate else 0.0,
            )
        )


def fill_gradients(trained: nn.Module) -> None:
    """Gives parameters that a step had no use for a gradient of 0.

    AdamW would pass them over, but one process among several can't know that the others had no use for them either:
    so they decay, and their moments fade, however many processes there are.
    """
    for parameter in trained.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


# --- What a student's batch norms do in training: whose statistics they use, and how they keep them.

BATCH_NORM_MOMENTUM = 0.1


class BatchNorms:
    """The batch norms of a student; none, for some."""

    def __init__(self, student: nn.Module) -> None:
        self._modules = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def prepare(self, micro_steps: int, *, frozen: bool) -> None:
        """For a forward pass in training, the `micro_steps`-th: statistics of the micro-batch at first, fixed ones
        where they are `frozen`.

        A micro-batch of two images normalises each by the other: noise that a student, which is judged with
        fixed statistics, needn't learn to bear. Wu and Johnson find fixed ones best for the end of training with
        small batches ("Rethinking Batch in BatchNorm", arXiv 2105.07576).
        """
        for module in self._modules:
            module.train(not frozen)
            module.momentum = batch_norm_momentum(micro_steps)


def batch_norm_momentum(micro_steps: int) -> float:
    """Plain averages over the first forward passes, moving ones after.

    With a constant momentum of 0.1 a short run would be judged with statistics that still hold much of their
    initial 0 and 1: 35% of it after ten forward passes.
    """
    return max(BATCH_NORM_MOMENTUM, 1 / micro_steps)
