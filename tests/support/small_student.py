"""Student whose runs take a tenth of a second and whose small files can be flipped bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn

from mobilesam.distill.students.registry import STUDENTS, StudentInfo

SMALL = "small"


@contextmanager
def registered_small_student() -> Iterator[str]:
    """Register the student while the context lasts; yield its name."""
    with pytest.MonkeyPatch.context() as patch:
        info = StudentInfo(name=SMALL, summary="", build=build, training_bytes={"float32": 1, "bfloat16": 1})
        patch.setitem(STUDENTS, SMALL, info)
        yield SMALL


def build(_image_size: int, _student_size: int) -> nn.Module:
    """Build the student, with a batch norm whose statistics depend on earlier batches."""
    return nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 256, 1))
