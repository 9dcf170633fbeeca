"""SAM's head over prompts of several images at once, with gradients: what the mask decoder's own class does for one
image at a time.

Shape suffixes: P prompts, N points a prompt, T mask tokens (SAM's single mask, then its three), g the grid's side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .head import SamHead


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """P prompts of one kind, each about one object: points, a box, or a box and points.

    points_PN2: float32, x and y in pixels of the encoder's square, centres of pixels being whole numbers. N may be 0.
    labels_PN: int64, 1 on the object, 0 beside it.
    boxes_P4: float32, x0 y0 x1 y1 in the same pixels, or None.
    masks_P1hw: float32 (P, 1, 4g, 4g), logits of an earlier answer, or None.
    """

    points_PN2: Tensor
    labels_PN: Tensor
    boxes_P4: Tensor | None = None
    masks_P1hw: Tensor | None = None


def embed_prompts(head: SamHead, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """What the prompt encoder makes of prompts: (P, N', 256) of points and corners, (P, 256, g, g) of masks.

    Points without a box are followed by SAM's padding point. Nothing here waits for a GPU, which the encoder's own
    `forward` does: it picks points by boolean masks.

    Source: segment_anything/modeling/prompt_encoder.py (`_embed_points`, `_embed_boxes`).
    """
    encoder = head.prompt_encoder
    points_PN2, labels_PN = prompts.points_PN2, prompts.labels_PN
    parts = []
    if points_PN2.shape[1]:
        if prompts.boxes_P4 is None:
            points_PN2 = torch.cat((points_PN2, points_PN2.new_full((len(points_PN2), 1, 2), -0.5)), dim=1)
            labels_PN = torch.cat((labels_PN, labels_PN.new_full((len(labels_PN), 1), -1)), dim=1)
        places_PNC = encoder.pe_layer.forward_with_coords(points_PN2 + 0.5, encoder.input_image_size)
        parts.append(torch.where(labels_PN[..., None] < 0, 0, places_PNC))
        kinds = (encoder.not_a_point_embed, encoder.point_embeddings[0], encoder.point_embeddings[1])
        for label, kind in zip((-1, 0, 1), kinds, strict=True):
            parts[0] = parts[0] + (labels_PN == label)[..., None] * kind.weight
    if prompts.boxes_P4 is not None:
        parts.append(encoder._embed_boxes(prompts.boxes_P4))
    grid = encoder.image_embedding_size
    if prompts.masks_P1hw is None:
        dense_PCHW = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(len(points_PN2), -1, *grid)
    else:
        dense_PCHW = encoder._embed_masks(prompts.masks_P1hw)
    return torch.cat(parts, dim=1), dense_PCHW


def decode_prompts(head: SamHead, emb_PCHW: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """All of SAM's masks for each prompt.

    Args:
        head: on the embeddings' device.
        emb_PCHW: float32 (P, 256, g, g), the embedding of each prompt's image.

    Returns:
        logits (P, 4, 4g, 4g) over the encoder's square, and the predicted IoU of each (P, 4), both float32. Token 0
        is SAM's single mask, 1 to 3 are those of `multimask_output`.

    Source: segment_anything/modeling/mask_decoder.py (`predict_masks`), where one image's embedding is repeated.
    """
    decoder, encoder = head.mask_decoder, head.prompt_encoder
    sparse_PNC, dense_PCHW = embed_prompts(head, prompts)
    own_TC = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))
    tokens_PNC = torch.cat((own_TC.expand(len(sparse_PNC), -1, -1), sparse_PNC), dim=1)
    positions_PCHW = encoder.get_dense_pe().expand(len(tokens_PNC), -1, -1, -1)
    out_PNC, image_PLC = decoder.transformer(emb_PCHW + dense_PCHW, positions_PCHW, tokens_PNC)
    mask_tokens = decoder.num_mask_tokens
    upscaled_PCHW = decoder.output_upscaling(image_PLC.transpose(1, 2).unflatten(2, emb_PCHW.shape[2:]))
    weights_PTC = torch.stack(
        [mlp(out_PNC[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1
    )
    assert weights_PTC.shape[1] == mask_tokens
    logits_PThw = (weights_PTC @ upscaled_PCHW.flatten(2)).unflatten(2, upscaled_PCHW.shape[2:])
    return logits_PThw, decoder.iou_prediction_head(out_PNC[:, 0])
