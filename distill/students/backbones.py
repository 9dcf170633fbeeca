"""timm's networks as students: DeiT-Tiny, and any network with feature maps of stride 16 or 32.

Shape suffixes: B images, C channels, H and W rows and columns of an image or feature map, N tokens. S is the side of
SAM's square in pixels. A student's input, `student_size` pixels, may be smaller.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...common.errors import DistillError
from ...sam.modeling.neck import (
    EMBEDDING_CHANNELS,
    finest_stride,
    fuse_maps,
    neck_projection,
    neck_rest,
)
from ...sam.photos.preprocess import PATCH

DEIT_TINY = "deit_tiny_patch16_224"
STRIDES = (4, 8, 16, 32)
MAX_BUFFER_BYTES = 64 << 20
"""Largest total size of a network's non-persistent buffers (positions, masks): more than any needs at 1024 pixels."""


class DeiT(nn.Module):
    """Plain ViT of patch 16 with SAM's neck: normalised pixels to a (B, 256, S/16, S/16) embedding.

    DeiT-Tiny (arXiv 2012.12877) without its class token. It has one map, of stride 16, which is resized to the
    embedding's grid if the input is smaller than SAM's square.

    Args:
        image_size: side of SAM's square in pixels, S.
        student_size: side of the input in pixels.
    """

    def __init__(self, image_size: int, student_size: int) -> None:
        super().__init__()
        self.image_size, self.student_size = image_size, student_size
        self.backbone = _constructor(DEIT_TINY)(
            pretrained=False, img_size=student_size, class_token=False, num_classes=0, global_pool=""
        )
        self.neck = nn.Sequential(neck_projection(self.backbone.num_features), *neck_rest())

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        _check_pixels(pixels_BCHW, self.student_size, "deit_tiny")
        tokens_BNC, cells = self.backbone.forward_features(pixels_BCHW), self.student_size // PATCH
        map_BCHW = self.neck[0](tokens_BNC.transpose(1, 2).unflatten(2, (cells, cells)))
        return self.neck[1:](fuse_maps([map_BCHW], self.image_size // PATCH))


class TimmStudent(nn.Module):
    """timm backbone with SAM's neck: normalised pixels to a (B, 256, S/16, S/16) embedding.

    The deepest map of each stride that the backbone has, from that of the embedding's grid to 32, is projected to 256
    channels and resized to the grid; the sum goes through the rest of the neck. With an input of S pixels these are
    the strides 16 and 32, with half of them also 8.

    Args:
        name: timm's name of the network, without a tag for weights.
        image_size: side of SAM's square in pixels, S.
        student_size: side of the input in pixels.
    """

    def __init__(self, name: str, image_size: int, student_size: int) -> None:
        super().__init__()
        self.name, self.image_size, self.student_size = name, image_size, student_size
        found = _create_features(name, student_size).feature_info
        finest = finest_stride(image_size, student_size)
        indices = _deepest(name, found.reduction(), found.out_indices, finest)
        # Built again for these maps alone, without the layers after them.
        self.backbone = _create_features(name, student_size, out_indices=tuple(indices.values()))
        widths = self.backbone.feature_info.channels()
        # Networks without this attribute return channels first.
        self.channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")
        self.laterals = nn.ModuleDict(
            {str(stride): neck_projection(width) for stride, width in zip(indices, widths, strict=True)}
        )
        self.neck = nn.Sequential(*neck_rest())
        _disable_dropout(self)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        _check_pixels(pixels_BCHW, self.student_size, f"timm's {self.name}")
        projected = [
            lateral(map_BCHW.permute(0, 3, 1, 2) if self.channels_last else map_BCHW)
            for map_BCHW, lateral in zip(self.backbone(pixels_BCHW), self.laterals.values(), strict=True)
        ]
        return self.neck(fuse_maps(projected, self.image_size // PATCH))


def build_deit_tiny(image_size: int, student_size: int) -> nn.Module:
    """Build DeiT-Tiny with SAM's neck.

    Args:
        image_size: side of SAM's square in pixels.
        student_size: side of the input in pixels.

    Raises:
        DistillError: timm isn't installed.
    """
    _timm()
    return DeiT(image_size, student_size)


def build_timm(name: str, image_size: int, student_size: int) -> nn.Module:
    """Build one of timm's networks with SAM's neck, after a trial on the meta device.

    Args:
        name: timm's name of the network, without a tag for weights.
        image_size: side of SAM's square in pixels.
        student_size: side of the input in pixels.

    Raises:
        DistillError: the network has no feature maps of stride 16 or 32, or doesn't take images of that size; or timm
            isn't installed or has no such network.
    """
    check_timm_name(name)
    _check_backbone(name, image_size, student_size)
    return TimmStudent(name, image_size, student_size)


def check_timm_name(name: str) -> None:
    """Refuse a name that isn't in timm's list.

    Only plain names are accepted: `hf-hub:`, `local-dir:` and tags would read weights from elsewhere.

    Raises:
        DistillError: timm isn't installed, or has no such network; the message lists similar names.
    """
    timm = _timm()
    shown = repr(name[:60])
    plain = re.fullmatch(r"[A-Za-z0-9_]+", name) is not None
    if plain and timm.is_model(name) and hasattr(timm.models, name):
        return
    base = name.split(".")[0]
    if re.fullmatch(r"[A-Za-z0-9_]+\.[A-Za-z0-9_.]+", name) and timm.is_model(base):
        raise DistillError(
            f"{shown} names weights; give timm:{base}, and a file with its weights with --init FILE"
        )
    if not plain:
        raise DistillError(
            f"{shown} is not a name in timm's list: nothing is downloaded or read from folders; give a name such as "
            "timm:resnet18"
        )
    close = get_close_matches(name[:60], timm.list_models(), n=4)
    meant = f"similar: {', '.join(close)}" if close else "timm.list_models() lists them"
    raise DistillError(f"timm has no network {shown}; {meant}")


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise DistillError(
            f"this student needs timm, which can't be imported ({error}): pip install 'mobilesam[students]'"
        ) from None
    return timm


def _constructor(name: str) -> Callable[..., Any]:
    """Return timm's own constructor of a network.

    timm's registry would return the constructor of another package that registered the same name.
    """
    constructor: Callable[..., Any] = getattr(_timm().models, name)
    return constructor


def _check_pixels(pixels_BCHW: Tensor, student_size: int, name: str) -> None:
    if pixels_BCHW.shape[1:] != (3, student_size, student_size):
        wanted = f"(B, 3, {student_size}, {student_size})"
        raise ValueError(f"pixels have shape {tuple(pixels_BCHW.shape)}, this {name} takes {wanted}")


def _create_features(name: str, student_size: int, **options: Any) -> Any:
    """Build timm's network with a list of feature maps as output.

    The size of its input is passed if the constructor accepts it, which only a trial shows.
    """
    create = _constructor(name)
    options = {"pretrained": False, "features_only": True, **options}
    try:
        return create(img_size=student_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return create(**options)


def _deepest(name: str, reductions: list[int], indices: tuple[int, ...], finest: int) -> dict[int, int]:
    """Return the index of the deepest map of each stride in STRIDES from `finest` on, {stride: index}, by increasing
    index."""
    found = {
        stride: index
        for index, stride in zip(indices, reductions, strict=True)
        if stride in STRIDES and stride >= finest
    }
    if not found.keys() & {16, 32}:
        strides = ", ".join(map(str, dict.fromkeys(reductions)))
        raise DistillError(
            f"timm's {name} gives maps of stride {strides}; a student needs one of stride 16 or 32: choose another"
        )
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _disable_dropout(network: nn.Module) -> None:
    """Switch off dropout: in regression to fixed embeddings it would only add noise."""
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif "drop_prob" in vars(module):
            vars(module)["drop_prob"] = 0.0  # timm's DropPath and DropBlock


def _check_backbone(name: str, image_size: int, student_size: int) -> None:
    """Build and run the student on the meta device, which takes no memory, and refuse it if that fails."""
    try:
        with torch.device("meta"), torch.no_grad():
            student = TimmStudent(name, image_size, student_size).eval()
            out_BCHW = student(torch.empty(1, 3, student_size, student_size))
            saved = student.state_dict()
            extra = sum(b.nbytes for key, b in student.named_buffers() if key not in saved)
    except DistillError:
        raise
    # timm's networks have many authors: any exception means that the network can't be used at this size.
    except Exception as error:  # noqa: BLE001
        reason = (str(error).strip().splitlines() or [""])[0][:120] or type(error).__name__
        raise DistillError(
            f"timm's {name} can't be a student of {student_size} x {student_size} pixels ({reason}); choose another, "
            "or another size"
        ) from None
    grid = image_size // PATCH
    if out_BCHW.shape != (1, EMBEDDING_CHANNELS, grid, grid):
        raise DistillError(f"timm's {name} gives {tuple(out_BCHW.shape)} at {student_size} pixels")
    if extra > MAX_BUFFER_BYTES:
        raise DistillError(
            f"timm's {name} keeps {extra:,} bytes beside its weights at {student_size} pixels, at most "
            f"{MAX_BUFFER_BYTES:,} are allowed: choose another"
        )
