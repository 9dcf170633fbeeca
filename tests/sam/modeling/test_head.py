from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from segment_anything import sam_model_registry

from mobilesam.common.errors import CheckpointError
from mobilesam.sam.modeling.head import build_head
from mobilesam.sam.teacher import load_head


def masks(head: torch.nn.Module, emb_1CHW: torch.Tensor) -> torch.Tensor:
    point = torch.tensor([[[100.0, 80.0]]]), torch.ones(1, 1)
    sparse, dense = head.prompt_encoder(points=point, boxes=None, masks=None)
    low_res_masks, _ = head.mask_decoder(
        image_embeddings=emb_1CHW,
        image_pe=head.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )
    return low_res_masks


def test_the_head_decodes_as_segment_anythings_own(vit_b_file: Path) -> None:
    reference = sam_model_registry["vit_b"]()
    reference.load_state_dict(torch.load(vit_b_file, weights_only=True, mmap=True))
    head = build_head(load_head("vit_b", vit_b_file), 1024)
    embedding = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        wanted = masks(reference.eval(), embedding)
        found = masks(head, embedding)
    assert found.shape == (1, 3, 256, 256)
    torch.testing.assert_close(found, wanted)


def test_a_head_decodes_at_other_image_sizes() -> None:
    head = build_head(load_head("vit_nano", None), 256)
    with torch.no_grad():
        assert masks(head, torch.zeros(1, 256, 16, 16)).shape == (1, 3, 64, 64)


Spoil = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("mask_decoder.iou_token.weight"),
        lambda state: state.update(extra=torch.zeros(1)),
        lambda state: state.update({"mask_decoder.iou_token.weight": torch.zeros(1, 7)}),
    ],
)
def test_another_head_is_refused_in_one_line(spoil: Spoil) -> None:
    state = load_head("vit_nano", None)
    spoil(state)
    with pytest.raises(CheckpointError, match="not a SAM head") as caught:
        build_head(state, 256)
    assert len(str(caught.value).splitlines()) == 1
