"""One batch through the teacher, and its embeddings back in the host's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from ..sam.teachers import Teacher
    from .decoding import Batch

LAUNCHED_AHEAD = {"cpu": 0, "cuda": 1}
"""By type of device, batches given to the teacher while another's embeddings are awaited. A GPU would stand idle
between them; a CPU computes a batch where it is given."""


class Embeddings:
    """A batch's embeddings on their way from the device: nothing waits for them before `numpy` is called."""

    def __init__(self, emb_BCHW: Tensor) -> None:
        import torch

        self._emb_BCHW, self._arrived = emb_BCHW, None
        if emb_BCHW.device.type == "cuda":
            # Only pinned memory is copied to without the host's waiting.
            self._emb_BCHW = torch.empty(emb_BCHW.shape, dtype=emb_BCHW.dtype, pin_memory=True)
            self._emb_BCHW.copy_(emb_BCHW, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(emb_BCHW.device))

    def numpy(self) -> np.ndarray:
        """float32 (B, 256, g, g), once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        emb_BCHW: np.ndarray = self._emb_BCHW.numpy()
        return emb_BCHW


def embed(teacher: Teacher, batch: Batch) -> Embeddings:
    """Give a batch to the teacher. On a GPU this returns before it is computed."""
    import torch

    from ..sam import normalize_and_pad

    canvas_BHWC, sizes_B2 = torch.from_numpy(batch.canvas_BHWC), torch.from_numpy(batch.sizes_B2)
    if teacher.device.type == "cuda":
        canvas_BHWC, sizes_B2 = (
            tensor.pin_memory().to(teacher.device, non_blocking=True) for tensor in (canvas_BHWC, sizes_B2)
        )
    return Embeddings(teacher.embed(normalize_and_pad(canvas_BHWC, sizes_B2)))
