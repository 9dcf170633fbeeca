"""Trainer: epochs of optimizer steps over accumulated micro-batches, with validation, checkpoints, a graceful stop.

Read `Trainer.fit` first. Beside it: checkpoint.py (resuming), optimizer.py (learning rate, parameter groups), loss/
(objectives), metrics/evaluate.py (validation), train_log.py (metrics and progress).

Shape suffixes: B images of a micro-batch, C channels, H, W rows and columns of the embedding (g each).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from itertools import chain, count, islice
from typing import Any

import torch
from torch import nn

from ..common.errors import DistillError, DistillInterrupted
from ..common.signals import StopFlag
from ..sam.modeling.neck import EMBEDDING_CHANNELS
from .batch_norm import BatchNorms
from .checkpoint import CHECKPOINT_FILE, BestEpoch, EmbeddingSum, TrainState
from .config import DistillConfig
from .data.loader import Batch, Loader
from .data.sampler import each_batch, epoch_order, split_batches
from .distributed import ProcessGroup
from .loss.base import (
    BatchTotals,
    MicroBatch,
    Objective,
    make_micro_batch,
    micro_batch_generator,
)
from .loss.coupled import head_state
from .loss.decoupled import Decoupled, loss_elements
from .metrics.evaluate import ComputeSettings, Validation, embed
from .optimizer import build_optimizer, learning_rate
from .run_folder import Run
from .students.student_file import TRAINED_HEAD, save_student
from .train_log import Meter, Progress, Recorder

logger = logging.getLogger(__name__)

LINES_PER_EPOCH = 50
"""Most lines of kind "train" that are logged in an epoch."""
TRAIN_EVAL_ROWS = 1024
"""Most training rows that the finished student is measured on."""


class Trainer:
    """Trainer of one student, or of its head alone, on the embeddings of a store.

    The loop synchronises with a GPU only where it logs, saves or validates. With several processes, each has its own
    trainer and all of them call the same methods; only rank 0 writes files.

    Args:
        config: options given at this start; `DistillConfig.identity` equals the run's.
        run: folder to train in.
        student: encoder on the device of `compute`.
        loader: loader of the rows in the run's split.
        compute: device, precision, and the micro-batch size as `batch_size`.
        objective: training objective; its head, if it has one, is on the device of `compute`. None: decoupled.
        processes: processes that train together; None: this process alone.
    """

    def __init__(
        self,
        config: DistillConfig,
        run: Run,
        student: nn.Module,
        loader: Loader,
        *,
        compute: ComputeSettings,
        objective: Objective | None = None,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.config, self.run, self.loader, self.compute = config, run, loader, compute
        self.epochs, self.batch_size = config.length
        self.processes = processes or ProcessGroup()
        self.student = student.to(memory_format=compute.memory_format)
        self.batch_norms = BatchNorms(student, config.student, run.description.image_size, compute.batch_size)
        self.recipe = recipe = config.resolved_recipe
        self.objective = objective or Decoupled(recipe.loss_region, recipe.loss)
        self.student.requires_grad_(self.objective.trains_encoder)
        self.trained = self.objective.trained(self.student)
        self.optimizer = build_optimizer(
            recipe, self.student, self.objective.head, fused=compute.device.type == "cuda"
        )
        self.validation = Validation(
            self.student, loader, run, self.objective, compute=compute, processes=self.processes
        )
        self.steps_per_epoch = math.ceil(len(run.split.train) / self.batch_size)
        self.steps = self.steps_per_epoch * self.epochs
        self.log_every = max(1, self.steps_per_epoch // LINES_PER_EPOCH)
        grid = run.description.image_size // 16
        shape = (EMBEDDING_CHANNELS, grid, grid)
        sum_CHW = torch.zeros(shape, dtype=torch.float64, device=compute.device)
        self.state = TrainState(embeddings=EmbeddingSum(sum_CHW=sum_CHW))
        self.meter = Meter(self.state, loader)
        self.recorder: Recorder | None = None

    def fit(
        self,
        stop: StopFlag,
        progress: Callable[[Progress], None] | None = None,
        on_student: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Train to the last epoch, from the last checkpoint if there is one.

        Args:
            stop: stop request, checked after each step and before each batch of an evaluation.
            progress: callback for display, called at the same points.
            on_student: called in rank 0 after each write of the student.

        Returns:
            The run's result, with the keys that `distill` documents.

        Raises:
            DistillInterrupted: a stop was requested; a checkpoint has been saved.
            DistillError: a loss or a gradient is not finite, or the run has a student but no checkpoint.
        """
        self.stop, self.progress, self.on_student = stop, progress, on_student
        self.resume()
        state = self.state
        if state.step:
            self.tell_kept()
        else:
            self.stop.kept = "there is no checkpoint yet"
        self.meter, self.saved_at = Meter(state, self.loader), time.monotonic()
        with ExitStack() as stack:
            if self.processes.is_main:
                self.recorder = stack.enter_context(
                    Recorder(self.run.path, keep_bytes=state.log.metrics_bytes, next_step=state.step + 1)
                )
            self.stop.graceful = True
            while state.epoch < self.epochs:
                self.train_epoch()
                self.gather_label_faults()
                self.validate()
                state.epoch, state.batch = state.epoch + 1, 0
                # In this order: after a kill in between, the checkpoint writes the student again.
                self.save_checkpoint()
                self.save_student()
            return self.finish()

    def train_epoch(self) -> None:
        """Train on the remaining batches of the current epoch."""
        order = epoch_order(self.run.split.train, self.config.seed, self.state.epoch)
        first = self.state.batch

        def mine(rows: list[int]) -> Sequence[list[int]]:
            return self.processes.share_of(split_batches(rows, self.compute.batch_size))

        coming_rows = chain.from_iterable(map(mine, each_batch(order, self.batch_size, first)))
        # A frozen encoder keeps the running statistics of its batch norms too.
        self.student.train(self.objective.trains_encoder)
        self.loader.epoch = self.state.epoch
        self.meter.start()
        with closing(self.loader.batches(coming_rows, with_masks=True)) as coming:
            for rows in each_batch(order, self.batch_size, first):
                self.step(rows, islice(coming, len(mine(rows))))
                self.after_step(last=self.state.step % self.steps_per_epoch == 0)
        if self.state.epoch == 0:
            self.gather_and_write_mean_embedding()

    def step(self, rows: list[int], micro_batches: Iterable[Batch]) -> None:
        """Make one optimizer step on one batch.

        Args:
            rows: all rows of the batch, in every process.
            micro_batches: this process's share of the batch, over which gradients are accumulated.
        """
        recipe, state = self.recipe, self.state
        rate = learning_rate(state.step, self.steps, recipe, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_share"]
        elements = loss_elements(self.loader.valid(rows), EMBEDDING_CHANNELS, recipe.loss_region)
        totals = BatchTotals(elements=elements, images=len(rows))
        self.processes.broadcast_buffers(self.student)
        batch_loss = torch.zeros((), device=self.compute.device)
        for batch in micro_batches:
            state.micro_steps += 1
            micro_batch = self.forward(batch)
            loss = self.objective.loss(micro_batch, totals)
            loss.backward()
            self.batch_norms.settle()
            batch_loss += loss.detach()
            if state.epoch == 0:
                state.embeddings.sum_CHW += micro_batch.teacher_BCHW.double().sum(dim=0)
                state.embeddings.rows += len(batch.rows)
        fill_gradients(self.trained)
        self.processes.all_reduce_gradients(self.trained, batch_loss)
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), recipe.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(batch_loss, norm)
        state.step, state.batch = state.step + 1, state.batch + 1
        state.throughput.images += len(rows)

    def forward(self, batch: Batch) -> MicroBatch:
        """Run the student on a loader's batch, and return it as a micro-batch on the device."""
        trains, state = self.objective.trains_encoder, self.state
        if trains:
            frozen = state.step >= self.recipe.freeze_norm * self.steps
            self.batch_norms.prepare(state.micro_steps, frozen=frozen, images=len(batch.rows))
        with torch.set_grad_enabled(trains):
            student_BCHW, teacher_BCHW = embed(self.student, batch, self.compute)
        generator = micro_batch_generator(self.config.seed, state.epoch, batch.rows[0])
        return make_micro_batch(batch, student_BCHW, teacher_BCHW, generator)

    def after_step(self, *, last: bool) -> None:
        """Log, report progress, save and stop where each is due; `last` is True after the last step of an epoch."""
        if last or self.state.batch % self.log_every == 0:
            line = {"epoch": self.state.epoch + 1, "step": self.state.step, **self.learning_rates()}
            self.log("train", {**line, **self.meter.take_window()})
        self.report_progress("train")
        due = time.monotonic() - self.saved_at > self.config.checkpoint_seconds and not last
        self.save_or_stop(due)

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rates of the last step: `lr` if the encoder is trained, `lr_head` if the head is."""
        first = self.optimizer.param_groups[0]
        rates = {"lr": first["lr"] / first["lr_share"]} if self.objective.trains_encoder else {}
        if self.objective.head is not None:
            rates["lr_head"] = self.optimizer.param_groups[-1]["lr"]
        return rates

    def validate(self) -> None:
        """Measure the validation rows and log their metrics."""
        metrics = self.evaluate(self.run.split.val, "validate")
        epoch = self.state.epoch + 1
        self.log("val", {"epoch": epoch, "step": self.state.step, "rows": len(self.run.split.val), **metrics})
        score = self.validation.score(metrics)
        if score < self.state.best.score:
            self.state.best = BestEpoch(epoch=epoch, score=score)

    def evaluate(self, rows: Sequence[int], phase: str) -> dict[str, Any]:
        """Return the student's metrics over `rows`; on a stop request, save a checkpoint and stop.

        An unfinished evaluation changes nothing in the state, so the checkpoint resumes at its beginning.
        """
        in_round = self.compute.batch_size * self.processes.world_size
        begun, rounds, meter = time.perf_counter(), count(), self.meter
        evaluated, evaluating = meter.evaluated, meter.evaluating

        def count_done(done: int) -> None:
            meter.evaluated, meter.evaluating = evaluated + done, evaluating + time.perf_counter() - begun

        def before_batch() -> None:
            done = min(next(rounds) * in_round, len(rows))
            count_done(done)
            self.report_progress(phase, done, len(rows))
            self.save_or_stop(due=False)

        metrics = self.validation.measure(rows, before_batch)
        count_done(len(rows))
        return metrics

    def finish(self) -> dict[str, Any]:
        """Measure the student on training rows; write and return the run's result."""
        state, config = self.state, self.config
        # The first rows of the epoch after the last one: a random sample that is reproducible.
        rows = sorted(epoch_order(self.run.split.train, config.seed, self.epochs)[:TRAIN_EVAL_ROWS])
        metrics = self.evaluate(rows, "evaluate")
        self.log("train_eval", {"epoch": state.epoch, "step": state.step, "rows": len(rows), **metrics})
        return self.processes.broadcast(self.write_result() if self.processes.is_main else None)

    def write_result(self) -> dict[str, Any]:
        """Log the result durably and delete previous.pt, which is no longer needed."""
        state = self.state
        assert self.recorder is not None
        val = self.run.last("val")
        assert val is not None, "every epoch validates"
        if state.best.epoch != state.epoch:
            logger.info("epoch %d was better than the last one on the validation rows", state.best.epoch)
        self.meter.count_elapsed()
        result = {
            "run": str(self.run.path),
            "epochs": state.epoch,
            "steps": state.step,
            "seconds": state.throughput.elapsed,
            "images_per_second": state.throughput.images / state.throughput.seconds,
            "data_wait_share": state.throughput.waited / state.throughput.seconds,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "val": {
                name: value for name, value in val.items() if name not in ("kind", "epoch", "step", "rows")
            },
        }
        if self.loader.labels is not None:
            described = self.run.description.labels or {}
            result["labels"] = {
                "annotated": self.run.description.data.annotated,
                "images": self.run.description.data.rows,
                **self.loader.labels.to_json(),
                **({"names": described["names"]} if "names" in described else {}),
            }
        self.recorder.line("result", result)
        self.recorder.sync()
        self.run.checkpoints.drop_previous()
        return result

    def resume(self) -> None:
        """Load the last checkpoint, if the run has one: rank 0 reads it and broadcasts it."""
        if self.processes.is_main:
            self.load_checkpoint()
        if self.processes.world_size > 1:
            self.state = self.processes.broadcast_training(self.trained, self.optimizer, self.state)

    def load_checkpoint(self) -> None:
        """Load the last checkpoint, if any, and write again the files that a kill after it may have prevented."""
        checkpoints = self.run.checkpoints
        if not checkpoints.exist():
            if self.run.student_path.exists():
                raise DistillError(
                    f"{self.run.path} has a student but no {CHECKPOINT_FILE} to resume from: put it back, or give "
                    "--restart to start over, which keeps the old run beside the new one"
                )
            return
        self.state = state = checkpoints.load(self.trained, self.optimizer, self.state, self.compute.device)
        logger.info("resuming after epoch %d, step %d of %d", state.epoch, state.step, self.steps)
        if state.epoch:
            self.write_mean_embedding()
        if state.epoch and not state.batch:
            self.save_student()

    def save_or_stop(self, due: bool) -> None:
        """Save a checkpoint if it is due or a stop was requested; raise DistillInterrupted after a stop request.

        The processes agree on both. No process exits before rank 0 has saved: torchrun kills the others when one
        exits.
        """
        signum, due_now = self.processes.all_reduce_max(
            self.stop.signum or 0, int(due and self.processes.is_main)
        )
        if signum or due_now:
            self.save_checkpoint()
        if not signum:
            return
        self.processes.barrier()
        raise DistillInterrupted(
            f"stopped after step {self.state.step} of {self.steps}, saved in {self.run.path}\n"
            "run the same command again to resume",
            signum,
        )

    def save_checkpoint(self) -> None:
        """Save a checkpoint, after making the metrics logged so far durable."""
        self.meter.fetch()
        self.meter.count_elapsed()
        self.gather_embedding_sum()
        if self.recorder is not None:
            self.state.log.metrics_bytes = self.recorder.sync()
            self.run.checkpoints.save(self.trained, self.optimizer, self.state, self.compute.device)
        self.saved_at = time.monotonic()
        self.tell_kept()

    def tell_kept(self) -> None:
        """Tell the stop flag what a kill leaves."""
        self.stop.kept = f"the last checkpoint is of step {self.state.step:,} of {self.steps:,}"

    def save_student(self) -> None:
        """Write the student of the last complete epoch, with its head if that is trained."""
        if not self.processes.is_main:
            return
        head = self.objective.head
        save_student(
            self.student,
            self.run.student_path,
            self.config.student,
            self.run.description.image_size,
            {
                **self.run.student_metadata(),
                "epoch": self.state.epoch,
                "step": self.state.step,
                TRAINED_HEAD: head is not None,
            },
            None if head is None else head_state(head),
        )
        self.on_student()

    def gather_and_write_mean_embedding(self) -> None:
        """After the first epoch, write the mean of the training rows' embeddings, the baseline of skill.

        All processes call this together, and none continues before rank 0 has written.
        """
        self.gather_embedding_sum()
        if self.processes.is_main:
            self.write_mean_embedding()
        self.processes.barrier()

    def gather_embedding_sum(self) -> None:
        """During the first epoch, add the processes' sums of embeddings into rank 0's; all call this together."""
        state = self.state
        if state.epoch == 0:
            state.embeddings.rows = self.processes.reduce_sum(state.embeddings.sum_CHW, state.embeddings.rows)

    def write_mean_embedding(self) -> None:
        """Write the mean from this process's sum, which must be complete: rank 0's, or a checkpoint's."""
        self.run.save_mean_embedding(
            (self.state.embeddings.sum_CHW / self.state.embeddings.rows).float().cpu()
        )

    def gather_label_faults(self) -> None:
        """Collect the images with broken or empty annotations of all processes in rank 0, which reports them."""
        labels = self.loader.labels
        if labels is None:
            return
        mine = dict(labels.broken), set(labels.empty), dict(labels.read)
        for broken, empty, read in self.processes.gather(mine)[1:]:
            for key, reason in broken.items():
                labels.mark_broken(key, reason)
            labels.empty |= empty
            labels.read |= read

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """Append a line to the run's metrics; ranks other than 0 do nothing."""
        if self.recorder is not None:
            self.recorder.line(kind, values)

    def report_progress(self, phase: str, evaluated: int = 0, to_evaluate: int = 0) -> None:
        """Call `progress`, without waiting for the device.

        Args:
            phase: `Progress.phase`.
            evaluated: images done in the evaluation.
            to_evaluate: images of the evaluation.
        """
        if self.progress is None:
            return
        state, split, epochs = self.state, self.run.split, self.epochs
        to_train = epochs * len(split.train) - state.throughput.images
        validations = epochs - state.epoch - (phase == "validate")
        last = 0 if phase == "evaluate" else min(TRAIN_EVAL_ROWS, len(split.train))
        waiting = to_evaluate - evaluated + validations * len(split.val) + last
        self.progress(
            Progress(
                phase=phase,
                epoch=min(state.epoch + 1, epochs),
                epochs=epochs,
                step=state.step,
                steps=self.steps,
                loss=self.meter.last_loss,
                images_per_second=self.meter.images_per_second(),
                eta_seconds=self.meter.seconds_left(to_train, waiting),
                evaluated=evaluated,
                to_evaluate=to_evaluate,
            )
        )


def fill_gradients(module: nn.Module) -> None:
    """Set the gradient of trained parameters that a step didn't use to 0.

    AdamW skips parameters without a gradient, but a process can't know whether the others used one. With zeros,
    weight decay and the decay of the moments apply equally with any number of processes.
    """
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
