"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from .checkpoint import CHECKPOINT_FILE, TrainState
from .config import DistillConfig
from .errors import DistillError, DistillInterrupted
from .evaluation import embed, evaluate_batches
from .loader import Batch, Loader
from .meter import Meter
from .objective import decoupled_loss, loss_elements
from .progress import Progress
from .recorder import Recorder
from .run import Run
from .sampler import epoch_order, split_batches
from .schedule import learning_rate
from .stop import StopFlag
from .students import save_student

logger = logging.getLogger(__name__)

LINES_PER_EPOCH = 50
TRAIN_EVAL_ROWS = 1024
BATCH_NORM_MOMENTUM = 0.1


class Trainer:
    """Fits a student to a store's embeddings; `fit` is the whole story.

    `student` is on `device`. `micro_batch` and `precision` are resolved values. The loop never waits for a GPU
    except where it logs, saves or validates.
    """

    def __init__(
        self,
        config: DistillConfig,
        run: Run,
        student: nn.Module,
        loader: Loader,
        *,
        device: torch.device,
        precision: str,
        micro_batch: int,
        student_info: dict[str, Any],
        stop: StopFlag,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.config, self.run, self.loader = config, run, loader
        self.device, self.precision, self.micro_batch = device, precision, micro_batch
        self.student_info, self.stop, self.progress = student_info, stop, progress
        # Channels last: 2.2 times faster in bfloat16, 1.1 to 1.2 times in float32 at two images (measured on CPUs).
        self.student = student.to(memory_format=torch.channels_last)
        self.batch_norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(student, config.weight_decay), lr=config.lr, fused=device.type == "cuda"
        )
        self.steps_per_epoch = math.ceil(len(run.split.train) / config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.log_every = max(1, self.steps_per_epoch // LINES_PER_EPOCH)
        grid = run.config["image_size"] // 16
        self.state = TrainState(mean_sum_CHW=torch.zeros(256, grid, grid, dtype=torch.float64, device=device))
        self.meter = Meter(self.state, loader)

    def fit(self) -> dict[str, Any]:
        """Trains, from the last checkpoint if there is one; the result as `distill` returns it.

        Raises DistillInterrupted after saving when the stop flag is set, DistillError when the loss isn't finite.
        """
        self.go_on()
        state = self.state
        self.meter, self.saved_at = Meter(state, self.loader), time.monotonic()
        with Recorder(
            self.run.path, keep_bytes=state.metrics_bytes, next_step=state.step + 1
        ) as self.recorder:
            self.stop.saves = True
            while state.epoch < self.config.epochs:
                self.train_epoch()
                self.validate()
                state.epoch, state.batch = state.epoch + 1, 0
                self.save_student()
                self.save()
            return self.finish()

    def go_on(self) -> None:
        """Takes up the last checkpoint, if the run has come to one, and writes anew what was lost beside it."""
        checkpoints = self.run.checkpoints
        if not checkpoints.exist():
            if self.run.student_path.exists():
                raise DistillError(
                    f"{self.run.path} has a student but no {CHECKPOINT_FILE} to go on from: put it back, or give "
                    "--restart to start over, which keeps the old run beside the new one"
                )
            return
        self.state = state = checkpoints.load(self.student, self.optimizer, self.state, self.device)
        logger.info("going on after epoch %d, step %d of %d", state.epoch, state.step, self.steps)
        if state.epoch:
            self.save_mean()
        if state.epoch and not state.batch:
            self.save_student()

    def train_epoch(self) -> None:
        """The batches of one epoch that are still to do."""
        order = epoch_order(self.run.split.train, self.config.seed, self.state.epoch)
        batches = split_batches(order, self.config.batch_size)[self.state.batch :]
        micro_batches = chain.from_iterable(split_batches(rows, self.micro_batch) for rows in batches)
        self.student.train()
        self.meter.start()
        with closing(self.loader.batches(micro_batches)) as coming:
            for rows in batches:
                self.step(rows, islice(coming, math.ceil(len(rows) / self.micro_batch)))
                self.after_step(last=self.state.step % self.steps_per_epoch == 0)
        if self.state.epoch == 0:
            self.save_mean()

    def step(self, rows: list[int], micro_batches: Iterable[Batch]) -> None:
        """One optimizer step on one batch, its gradient accumulated over micro-batches."""
        config, state = self.config, self.state
        rate = learning_rate(state.step, self.steps, config.lr, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        elements = loss_elements(self.loader.valid(rows), 256, config.loss_region)
        loss = torch.zeros((), device=self.device)
        for batch in micro_batches:
            state.micro_steps += 1
            self.set_batch_norms()
            student_BCHW, teacher_BCHW = embed(self.student, batch, self.device, self.precision)
            valid_BHW = batch.valid_BHW.to(self.device, non_blocking=True)
            part = decoupled_loss(student_BCHW, teacher_BCHW, valid_BHW, elements, config.loss_region)
            part.backward()
            loss += part.detach()
            if state.epoch == 0:
                state.mean_sum_CHW += teacher_BCHW.double().sum(dim=0)
                state.mean_rows += len(batch.rows)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(loss, norm)
        state.step, state.batch, state.images = state.step + 1, state.batch + 1, state.images + len(rows)

    def set_batch_norms(self) -> None:
        """Statistics of the micro-batch at first, fixed ones later.

        A micro-batch of two images normalises each by the other: noise that a student, which is judged with
        fixed statistics, needn't learn to bear. Wu and Johnson find fixed ones best for the end of training with
        small batches ("Rethinking Batch in BatchNorm", arXiv 2105.07576).
        """
        frozen = self.state.step >= self.config.freeze_norm * self.steps
        for batch_norm in self.batch_norms:
            batch_norm.train(not frozen)
            batch_norm.momentum = batch_norm_momentum(self.state.micro_steps)

    def after_step(self, *, last: bool) -> None:
        """Logs, shows, saves, stops: whatever is due."""
        if last or self.state.batch % self.log_every == 0:
            line = {
                "epoch": self.state.epoch + 1,
                "step": self.state.step,
                "lr": self.optimizer.param_groups[0]["lr"],
            }
            self.recorder.line("train", {**line, **self.meter.take_window()})
        self.show("train")
        if self.stop.signum is not None or (
            time.monotonic() - self.saved_at > self.config.checkpoint_seconds and not last
        ):
            self.save()
        self.stop_if_asked()

    def validate(self) -> None:
        """Measures the validation rows and logs them."""
        metrics = self.evaluate(self.run.split.val, "validate")
        epoch = self.state.epoch + 1
        self.recorder.line(
            "val", {"epoch": epoch, "step": self.state.step, "rows": len(self.run.split.val), **metrics}
        )
        if metrics["mse_valid"] < self.state.best_mse_valid:
            self.state.best_epoch, self.state.best_mse_valid = epoch, metrics["mse_valid"]

    def evaluate(self, rows: Iterable[int], phase: str) -> dict[str, Any]:
        """The metrics of the student as it is; saves and stops between batches when asked to."""
        batches = split_batches(list(rows), self.micro_batch)
        with closing(self.loader.batches(batches)) as coming:
            return evaluate_batches(
                self.student,
                self.until_stopped(coming, phase),
                mean_embedding=self.run.mean_embedding(),
                device=self.device,
                precision=self.precision,
            ).result()

    def until_stopped(self, batches: Iterable[Batch], phase: str) -> Generator[Batch]:
        """The batches, until a stop is asked for: nothing of an evaluation is kept, so the state is whole."""
        for batch in batches:
            self.show(phase)
            if self.stop.signum is not None:
                self.save()
            self.stop_if_asked()
            yield batch

    def finish(self) -> dict[str, Any]:
        """Measures the student on what it learned from, and closes the run with its result."""
        state, config = self.state, self.config
        # Those of an epoch that will never be trained: as good as any, and the same every time.
        rows = sorted(epoch_order(self.run.split.train, config.seed, config.epochs)[:TRAIN_EVAL_ROWS])
        metrics = self.evaluate(rows, "evaluate")
        self.recorder.line(
            "train_eval", {"epoch": state.epoch, "step": state.step, "rows": len(rows), **metrics}
        )
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
        self.recorder.line("result", result)
        self.recorder.sync()
        self.run.checkpoints.drop_previous()
        return result

    def save(self) -> None:
        """Writes a checkpoint; what was logged before it is durable first."""
        self.meter.fetch()
        self.meter.count_elapsed()
        self.state.metrics_bytes = self.recorder.sync()
        self.run.checkpoints.save(self.student, self.optimizer, self.state, self.device)
        self.saved_at = time.monotonic()

    def save_student(self) -> None:
        """Writes the student as of the last complete epoch."""
        state = self.state
        save_student(
            self.student,
            self.run.student_path,
            self.config.student,
            self.run.config["image_size"],
            {**self.student_info, "epoch": state.epoch, "step": state.step},
        )

    def save_mean(self) -> None:
        """Keeps the mean of the training rows' embeddings: what skill is measured against."""
        self.run.save_mean_embedding((self.state.mean_sum_CHW / self.state.mean_rows).float().cpu())

    def stop_if_asked(self) -> None:
        """Ends a run whose state has just been saved."""
        if self.stop.signum is not None:
            raise DistillInterrupted(
                f"stopped after step {self.state.step} of {self.steps}, saved in {self.run.path}\n"
                "run the same command again to go on",
                self.stop.signum,
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


def batch_norm_momentum(micro_steps: int) -> float:
    """Plain averages over the first forward passes, moving ones after.

    With a constant momentum of 0.1 a short run would be judged with statistics that still hold much of their
    initial 0 and 1: 35% of it after ten forward passes.
    """
    return max(BATCH_NORM_MOMENTUM, 1 / micro_steps)


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: matrices and kernels decay; vectors (norms, biases) and attention biases don't."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        (free if parameter.ndim <= 1 or "bias" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
