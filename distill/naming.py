"""What the weights of a student are called in files that others wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Naming = Callable[[str], Iterable[str]]
"""The keys that a file's key may have in a student, the likeliest first."""

ENCODER_PREFIX = "image_encoder."
BACKBONE_PREFIX = "backbone."


def _image_encoder(key: str) -> list[str]:
    """mobile_sam.pt and students' own files: the encoder is a part of SAM."""
    return [key.removeprefix(ENCODER_PREFIX)] if key.startswith(ENCODER_PREFIX) else []


def _plain(key: str) -> list[str]:
    """TinyViT's releases, and a student's bare state dict."""
    return [key]


def _timm_tiny_vit(key: str) -> list[str]:
    """timm's TinyViT, for ours: a downsampling belongs to the stage after it, a convolution is `conv`, not `c`."""
    key = re.sub(r"\.conv\.weight$", ".c.weight", key)
    key = re.sub(r"^patch_embed\.conv([12])\.", lambda m: f"patch_embed.seq.{2 * int(m[1]) - 2}.", key)
    key = re.sub(r"^stages\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", key)
    return [re.sub(r"^stages\.", "layers.", key)]


def _timm(key: str) -> list[str]:
    """timm's networks, for those that are part of a student.

    Where a network was taken apart for its feature maps, the children of its sequences became children of the
    whole (`layer.0` is `layer_0`), or the whole became a child.
    """
    flattened = key.replace(".", "_", 1)
    return [BACKBONE_PREFIX + name for name in (key, flattened, f"model.{key}", f"body.{key}")]


NAMINGS: Mapping[str, Naming] = {
    "image_encoder.*": _image_encoder,
    "plain": _plain,
    "timm's tiny_vit": _timm_tiny_vit,
    "timm": _timm,
}


def renamed(naming: Naming, theirs: Iterable[str], wanted: Mapping[str, Any]) -> dict[str, str]:
    """{a student's key: the file's key} as far as `naming` finds them among the `wanted`."""
    found: dict[str, str] = {}
    for key in theirs:
        ours = next((name for name in naming(key) if name in wanted), None)
        if ours is not None:
            found.setdefault(ours, key)
    return found


def grouped(keys: Iterable[str]) -> dict[str, int]:
    """How many keys there are of each first part: {"head": 2, "mask_decoder": 131}."""
    groups: dict[str, int] = {}
    for key in sorted(keys):
        head = key.split(".")[0][:60]
        groups[head] = groups.get(head, 0) + 1
    return groups
