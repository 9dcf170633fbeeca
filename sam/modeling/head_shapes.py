"""Names and shapes of the weights of SAM's head, written down.

segment_anything's classes would tell them too, but to import them takes torchvision and torch's compiler along, which
doubles the time that a process takes to start: workers of precompute need no head, only to know a whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

HEAD_PREFIXES = ("prompt_encoder.", "mask_decoder.")
WIDTH = 256
_INNER = 128
_MLP = 2048
_MASKS = 4  # three, and the one for when the prompt leaves no doubt

_Shapes = Iterator[tuple[str, tuple[int, ...]]]


def head_shapes() -> dict[str, torch.Size]:
    """Every key of the head's state, prompt encoder first, and its shape; no image size changes them."""
    return {key: torch.Size(shape) for key, shape in (*_prompt_encoder(), *_mask_decoder())}


def _prompt_encoder() -> _Shapes:
    prefix = "prompt_encoder"
    yield f"{prefix}.pe_layer.positional_encoding_gaussian_matrix", (2, WIDTH // 2)
    for point in range(4):
        yield f"{prefix}.point_embeddings.{point}.weight", (1, WIDTH)
    yield f"{prefix}.not_a_point_embed.weight", (1, WIDTH)
    # Convolutions of stride 2, 2 and 1, a norm after each of the first two.
    yield from _layer(f"{prefix}.mask_downscaling.0", (4, 1, 2, 2))
    yield from _layer(f"{prefix}.mask_downscaling.1", (4,))
    yield from _layer(f"{prefix}.mask_downscaling.3", (16, 4, 2, 2))
    yield from _layer(f"{prefix}.mask_downscaling.4", (16,))
    yield from _layer(f"{prefix}.mask_downscaling.6", (WIDTH, 16, 1, 1))
    yield f"{prefix}.no_mask_embed.weight", (1, WIDTH)


def _mask_decoder() -> _Shapes:
    prefix = "mask_decoder"
    for block in range(2):
        yield from _block(f"{prefix}.transformer.layers.{block}")
    yield from _attention(f"{prefix}.transformer.final_attn_token_to_image", _INNER)
    yield from _layer(f"{prefix}.transformer.norm_final_attn", (WIDTH,))
    yield f"{prefix}.iou_token.weight", (1, WIDTH)
    yield f"{prefix}.mask_tokens.weight", (_MASKS, WIDTH)
    # Transposed convolutions, whose outputs come second.
    yield from _layer(f"{prefix}.output_upscaling.0", (WIDTH, WIDTH // 4, 2, 2), WIDTH // 4)
    yield from _layer(f"{prefix}.output_upscaling.1", (WIDTH // 4,))
    yield from _layer(f"{prefix}.output_upscaling.3", (WIDTH // 4, WIDTH // 8, 2, 2), WIDTH // 8)
    for mask in range(_MASKS):
        yield from _mlp(f"{prefix}.output_hypernetworks_mlps.{mask}", WIDTH // 8)
    yield from _mlp(f"{prefix}.iou_prediction_head", _MASKS)


def _block(name: str) -> _Shapes:
    """A layer of the two-way transformer."""
    yield from _attention(f"{name}.self_attn", WIDTH)
    yield from _layer(f"{name}.norm1", (WIDTH,))
    yield from _attention(f"{name}.cross_attn_token_to_image", _INNER)
    yield from _layer(f"{name}.norm2", (WIDTH,))
    yield from _layer(f"{name}.mlp.lin1", (_MLP, WIDTH))
    yield from _layer(f"{name}.mlp.lin2", (WIDTH, _MLP))
    yield from _layer(f"{name}.norm3", (WIDTH,))
    yield from _layer(f"{name}.norm4", (WIDTH,))
    yield from _attention(f"{name}.cross_attn_image_to_token", _INNER)


def _attention(name: str, inner: int) -> _Shapes:
    for projection in ("q_proj", "k_proj", "v_proj"):
        yield from _layer(f"{name}.{projection}", (inner, WIDTH))
    yield from _layer(f"{name}.out_proj", (WIDTH, inner))


def _mlp(name: str, outputs: int) -> _Shapes:
    yield from _layer(f"{name}.layers.0", (WIDTH, WIDTH))
    yield from _layer(f"{name}.layers.1", (WIDTH, WIDTH))
    yield from _layer(f"{name}.layers.2", (outputs, WIDTH))


def _layer(name: str, weight: tuple[int, ...], outputs: int | None = None) -> _Shapes:
    """A weight and its bias, which has as many values as the weight's first side, where nothing else is said."""
    yield f"{name}.weight", weight
    yield f"{name}.bias", (weight[0] if outputs is None else outputs,)
