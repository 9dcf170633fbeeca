"""A worker's teacher, translated by torch.compile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import PrecomputeError

if TYPE_CHECKING:
    from ..sam.teachers import Teacher


def compile_teacher(teacher: Teacher, batch_size: int) -> None:
    """Translate the teacher for batches of `batch_size` images, now, by a first batch of nothing: no image waits for
    it then, nor does its time limit run. Weights keep their names.

    Raises PrecomputeError when torch.compile can't do it here.
    """
    import torch

    side = teacher.image_size
    try:
        # For this one shape: every batch of a job has it.
        teacher.image_encoder.compile(dynamic=False)
        teacher.embed(torch.zeros(batch_size, 3, side, side))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # As all of dynamo's and inductor's own are.
        fact = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PrecomputeError(
            f"torch.compile can't translate {teacher.name} on a worker ({fact}); leave out --compile, which changes "
            "no embedding by more than rounding"
        ) from error
