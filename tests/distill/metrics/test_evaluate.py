from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mobilesam.distill import ComputeSettings, Loader, embed
from mobilesam.distill.data.rows import RecordsByRow
from mobilesam.store import EmbeddingStore


def test_an_int8_row_becomes_values_times_scales(images: Path, make_store: Callable[..., Path]) -> None:
    with EmbeddingStore.open(make_store(images, dtype="int8")) as store:
        loader = Loader(store, RecordsByRow(store), images, workers=1)
        batch = next(loader.batches([[2, 4]]))
        loader.close()
        _, teacher_BCHW = embed(
            nn.Identity(),
            batch,
            ComputeSettings(device=torch.device("cpu"), precision="float32", batch_size=2),
        )
        wanted = torch.from_numpy(store.read([2, 4]).to_float32())
    assert torch.equal(teacher_BCHW, wanted)
