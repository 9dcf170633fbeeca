"""Names and shapes of the weights of SAM's head, as constants.

They could be read from segment_anything's classes, but importing those imports torchvision and torch's compiler,
which doubles the start time of a process. Workers of precompute need no head, only its shapes to check a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .neck import EMBEDDING_CHANNELS

HEAD_PREFIXES = ("prompt_encoder.", "mask_decoder.")
"""Prefixes of the head's keys in a SAM checkpoint."""

HQ_PREFIXES = tuple(
    f"mask_decoder.{layer}."
    for layer in ("hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature")
)
"""Prefixes of the keys that SAM-HQ's mask decoder has in addition; its other weights are SAM's own, frozen."""

_WIDTH = EMBEDDING_CHANNELS
_INNER = 128  # channels inside the transformer's cross-attention
_MLP = 2048
_MASKS = 4  # the single mask for unambiguous prompts, and the three of `multimask_output`

_Shapes = Iterator[tuple[str, tuple[int, ...]]]


def head_shapes(hq_features: int | None = None) -> dict[str, torch.Size]:
    """Return the shapes of the head's weights by key, prompt encoder first; the image size doesn't matter.

    Args:
        hq_features: channels of the encoder's features that SAM-HQ's decoder takes; None for SAM's own head.
    """
    hq = () if hq_features is None else _hq_layers(hq_features)
    return {key: torch.Size(shape) for key, shape in (*_prompt_encoder(), *_mask_decoder(), *hq)}


def _prompt_encoder() -> _Shapes:
    prefix = "prompt_encoder"
    yield f"{prefix}.pe_layer.positional_encoding_gaussian_matrix", (2, _WIDTH // 2)
    for point in range(4):
        yield f"{prefix}.point_embeddings.{point}.weight", (1, _WIDTH)
    yield f"{prefix}.not_a_point_embed.weight", (1, _WIDTH)
    # Convolutions of stride 2, 2 and 1, with a norm after each of the first two.
    yield from _layer(f"{prefix}.mask_downscaling.0", (4, 1, 2, 2))
    yield from _layer(f"{prefix}.mask_downscaling.1", (4,))
    yield from _layer(f"{prefix}.mask_downscaling.3", (16, 4, 2, 2))
    yield from _layer(f"{prefix}.mask_downscaling.4", (16,))
    yield from _layer(f"{prefix}.mask_downscaling.6", (_WIDTH, 16, 1, 1))
    yield f"{prefix}.no_mask_embed.weight", (1, _WIDTH)


def _mask_decoder() -> _Shapes:
    prefix = "mask_decoder"
    for block in range(2):
        yield from _block(f"{prefix}.transformer.layers.{block}")
    yield from _attention(f"{prefix}.transformer.final_attn_token_to_image", _INNER)
    yield from _layer(f"{prefix}.transformer.norm_final_attn", (_WIDTH,))
    yield f"{prefix}.iou_token.weight", (1, _WIDTH)
    yield f"{prefix}.mask_tokens.weight", (_MASKS, _WIDTH)
    # Transposed convolutions: the output channels are the second axis of their weights.
    yield from _layer(f"{prefix}.output_upscaling.0", (_WIDTH, _WIDTH // 4, 2, 2), _WIDTH // 4)
    yield from _layer(f"{prefix}.output_upscaling.1", (_WIDTH // 4,))
    yield from _layer(f"{prefix}.output_upscaling.3", (_WIDTH // 4, _WIDTH // 8, 2, 2), _WIDTH // 8)
    for mask in range(_MASKS):
        yield from _mlp(f"{prefix}.output_hypernetworks_mlps.{mask}", _WIDTH // 8)
    yield from _mlp(f"{prefix}.iou_prediction_head", _MASKS)


def _hq_layers(features: int) -> _Shapes:
    """Yield the weights that SAM-HQ's decoder adds: its token, and three branches of the features of its masks."""
    prefix, quarter, eighth = "mask_decoder", _WIDTH // 4, _WIDTH // 8
    yield f"{prefix}.hf_token.weight", (1, _WIDTH)
    yield from _mlp(f"{prefix}.hf_mlp", eighth)
    for name, inputs, between in (
        ("compress_vit_feat", features, _WIDTH),
        ("embedding_encoder", _WIDTH, quarter),
    ):
        yield from _layer(f"{prefix}.{name}.0", (inputs, between, 2, 2), between)
        yield from _layer(f"{prefix}.{name}.1", (between,))
        yield from _layer(f"{prefix}.{name}.3", (between, eighth, 2, 2), eighth)
    yield from _layer(f"{prefix}.embedding_maskfeature.0", (quarter, eighth, 3, 3))
    yield from _layer(f"{prefix}.embedding_maskfeature.1", (quarter,))
    yield from _layer(f"{prefix}.embedding_maskfeature.3", (eighth, quarter, 3, 3))


def _block(name: str) -> _Shapes:
    """Yield the weights of one layer of the two-way transformer."""
    yield from _attention(f"{name}.self_attn", _WIDTH)
    yield from _layer(f"{name}.norm1", (_WIDTH,))
    yield from _attention(f"{name}.cross_attn_token_to_image", _INNER)
    yield from _layer(f"{name}.norm2", (_WIDTH,))
    yield from _layer(f"{name}.mlp.lin1", (_MLP, _WIDTH))
    yield from _layer(f"{name}.mlp.lin2", (_WIDTH, _MLP))
    yield from _layer(f"{name}.norm3", (_WIDTH,))
    yield from _layer(f"{name}.norm4", (_WIDTH,))
    yield from _attention(f"{name}.cross_attn_image_to_token", _INNER)


def _attention(name: str, inner: int) -> _Shapes:
    for projection in ("q_proj", "k_proj", "v_proj"):
        yield from _layer(f"{name}.{projection}", (inner, _WIDTH))
    yield from _layer(f"{name}.out_proj", (_WIDTH, inner))


def _mlp(name: str, outputs: int) -> _Shapes:
    yield from _layer(f"{name}.layers.0", (_WIDTH, _WIDTH))
    yield from _layer(f"{name}.layers.1", (_WIDTH, _WIDTH))
    yield from _layer(f"{name}.layers.2", (outputs, _WIDTH))


def _layer(name: str, weight: tuple[int, ...], outputs: int | None = None) -> _Shapes:
    """Yield a weight and its bias, which has `outputs` values, by default as many as the weight's first axis."""
    yield f"{name}.weight", weight
    yield f"{name}.bias", (weight[0] if outputs is None else outputs,)
