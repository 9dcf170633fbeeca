from __future__ import annotations

import torch

from mobilesam.distill.loss.base import micro_batch_generator


def test_a_micro_batchs_random_numbers_depend_on_seed_epoch_and_row_alone():
    drawn = [torch.rand(4, generator=micro_batch_generator(0, 1, 7)) for _ in range(2)]
    assert torch.equal(*drawn)
    others = [(1, 1, 7), (0, 2, 7), (0, 1, 8)]
    assert not any(
        torch.equal(drawn[0], torch.rand(4, generator=micro_batch_generator(*other))) for other in others
    )
