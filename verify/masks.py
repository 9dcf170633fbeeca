"""The heads that masks are compared with."""

from __future__ import annotations

from pathlib import Path

import torch

from ..distill import DistillError
from ..distill.heads import store_head
from ..distill.student_file import trained_head
from ..sam.head import SamHead, build_head
from ..store import EmbeddingStore
from .errors import VerifyError


def open_head(store: EmbeddingStore, device: torch.device) -> SamHead:
    """As `store_head`; VerifyError says how to go on without masks."""
    try:
        return store_head(store, device)
    except DistillError as error:
        raise VerifyError(f"{error}, so masks can't be compared: --points 0 goes on without them") from error


def own_head(student: Path, image_size: int, device: torch.device) -> SamHead | None:
    """The head that was trained with a student, on `device`, frozen; None where it has the teacher's.

    `student` was read by `load_student`, which has checked it.
    """
    state = trained_head(student)
    return None if state is None else build_head(state, image_size).to(device)
