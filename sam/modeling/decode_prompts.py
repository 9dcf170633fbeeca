"""SAM's head for prompts of several images at once, with gradients; segment_anything's classes take one image.

Shape suffixes: P prompts, N points of one prompt or tokens of a sequence, T mask tokens of a prompt (SAM's single
mask, then its three), C channels, H and W rows and columns of the embedding, h and w those of low-resolution masks
(4g), L positions of the flattened embedding; g is the side of the embedding's grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .head import SamHead


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """P prompts of one kind, each about one object: points, a box, or a box and points.

    Coordinates are x, y in pixels, in floating point, with pixel centres at whole numbers. `embed_prompts` and
    `decode_prompts` take pixels of the encoder's square; evaluations hold pixels of the original image before that.
    """

    points_PN2: Tensor
    """x, y of each point (P, N, 2); N is 0 for prompts that are only boxes."""
    labels_PN: Tensor
    """int64 (P, N): 1 for a point on the object (foreground), 0 for one on the background."""
    boxes_P4: Tensor | None = None
    """x0, y0, x1, y1 (P, 4); None for prompts without boxes."""
    masks_P1hw: Tensor | None = None
    """float32 logits (P, 1, 4g, 4g) that an earlier round decoded for the same objects; None without."""

    @classmethod
    def of_points(cls, points_P2: Tensor | npt.NDArray[np.floating]) -> Prompts:
        """Return prompts of one foreground point each, in the dtype given."""
        points_PN2 = torch.as_tensor(points_P2)[:, None]
        labels_PN = torch.ones(points_PN2.shape[:2], dtype=torch.int64, device=points_PN2.device)
        return cls(points_PN2=points_PN2, labels_PN=labels_PN)

    @classmethod
    def of_boxes(cls, boxes_P4: Tensor | npt.NDArray[np.floating]) -> Prompts:
        """Return prompts of one box each, without points, in the dtype given."""
        boxes_P4 = torch.as_tensor(boxes_P4)
        points_PN2 = boxes_P4.new_empty(len(boxes_P4), 0, 2)
        labels_PN = torch.empty(points_PN2.shape[:2], dtype=torch.int64, device=boxes_P4.device)
        return cls(points_PN2=points_PN2, labels_PN=labels_PN, boxes_P4=boxes_P4)

    def __len__(self) -> int:
        return len(self.points_PN2)

    def take(self, chosen: slice) -> Prompts:
        """Return a slice of the prompts, as views."""
        return Prompts(
            points_PN2=self.points_PN2[chosen],
            labels_PN=self.labels_PN[chosen],
            boxes_P4=None if self.boxes_P4 is None else self.boxes_P4[chosen],
            masks_P1hw=None if self.masks_P1hw is None else self.masks_P1hw[chosen],
        )

    def parts(self, at_once: int) -> Iterator[tuple[slice, Prompts]]:
        """Yield all prompts in order in parts of at most `at_once`, each with its slice."""
        for start in range(0, len(self), at_once):
            chosen = slice(start, min(start + at_once, len(self)))
            yield chosen, self.take(chosen)


def decode_prompts(head: SamHead, emb_PCHW: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Decode all of SAM's masks for each prompt.

    Args:
        head: SAM's head, on the embeddings' device.
        emb_PCHW: float32 (P, 256, g, g), embedding of each prompt's image.
        prompts: P prompts in pixels of the encoder's square, on the same device.

    Returns:
        logits_PThw: float32 (P, 4, 4g, 4g) over the encoder's square. Token 0 is SAM's single mask, tokens 1 to 3
            are the masks of `multimask_output`.
        iou_PT: float32 (P, 4), the predicted IoU of each mask.

    Source: segment_anything/modeling/mask_decoder.py (`predict_masks`), where one image's embedding is repeated.
    """
    decoder, encoder = head.mask_decoder, head.prompt_encoder
    sparse_PNC, dense_PCHW = embed_prompts(head, prompts)
    output_NC = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))
    tokens_PNC = torch.cat((output_NC.expand(len(sparse_PNC), -1, -1), sparse_PNC), dim=1)
    positions_PCHW = encoder.get_dense_pe().expand(len(tokens_PNC), -1, -1, -1)
    tokens_PNC, image_PLC = decoder.transformer(emb_PCHW + dense_PCHW, positions_PCHW, tokens_PNC)
    upscaled_PChw = decoder.output_upscaling(image_PLC.transpose(1, 2).unflatten(2, emb_PCHW.shape[2:]))
    weights_PTC = torch.stack(
        [mlp(tokens_PNC[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1
    )
    assert weights_PTC.shape[1] == decoder.num_mask_tokens
    logits_PThw = (weights_PTC @ upscaled_PChw.flatten(2)).unflatten(2, upscaled_PChw.shape[2:])
    return logits_PThw, decoder.iou_prediction_head(tokens_PNC[:, 0])


def embed_prompts(head: SamHead, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Compute the prompt encoder's embeddings of prompts, without waiting for a GPU.

    The encoder's own `forward` waits, since it selects points by boolean masks.

    Args:
        head: SAM's head, on the prompts' device.
        prompts: P prompts in pixels of the encoder's square.

    Returns:
        sparse_PNC: (P, N, 256), of points and box corners; points without a box are followed by SAM's padding point.
        dense_PCHW: (P, 256, g, g), of masks.

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
    if prompts.masks_P1hw is None:
        grid = encoder.image_embedding_size
        dense_PCHW = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(len(points_PN2), -1, *grid)
    else:
        dense_PCHW = encoder._embed_masks(prompts.masks_P1hw)
    return torch.cat(parts, dim=1), dense_PCHW
