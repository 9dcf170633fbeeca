"""Weights that a student starts from: ImageNet's, MobileSAM's, or an earlier student's."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...common.errors import DistillError
from ...sam.checkpoint import read_state
from ...sam.modeling.head_shapes import head_shapes
from ...sam.torch_file import in_torch_format
from .registry import outline_student, student_info
from .student_file import (
    MAX_HEADER,
    check_tensors,
    lacks_image_size,
    load_tensors,
    student_path,
    trained_head,
)

logger = logging.getLogger(__name__)

WRAPPERS = ("model", "state_dict")
NECK_PREFIXES = ("neck.", "laterals.")
MIN_SHARE = 0.5
"""Of the encoder's parameters, the neck not counted. A file with fewer is another network's."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """What a file gives to a student.

    `tensors` are keyed and typed as in the student's state. `resized` and `taken` are keys of it, `left` those that
    keep their new weights, `unused` the file's other keys.
    """

    path: Path
    sha256: str
    naming: str
    taken: list[str]
    resized: list[str]
    left: list[str]
    unused: list[str]
    parameters: dict[str, int]
    tensors: dict[str, Tensor] = field(repr=False)
    head: dict[str, Tensor] | None = field(repr=False, default=None)
    """SAM's head, float32, where the file is a student's that was trained with it, or in mobile_sam.pt's format."""

    def report(self) -> dict[str, Any]:
        """JSON values: `file`, `sha256`, `naming`; `taken` {weights, parameters, of_parameters}, `resized` (keys);
        `left_new` and `unused_in_file`, counts of keys by the first part of their names."""
        count = self.parameters
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "naming": self.naming,
            "taken": {
                "weights": len(self.taken),
                "parameters": sum(count.get(key, 0) for key in self.taken),
                "of_parameters": sum(count.values()),
            },
            "resized": self.resized,
            "left_new": grouped(self.left),
            "unused_in_file": grouped(self.unused),
        }

    def apply(self, student: nn.Module) -> None:
        """Puts the weights into `student`, which was built as the one they were read for, and says which."""
        student.load_state_dict(self.tensors, strict=False)
        report = self.report()
        taken = report["taken"]
        logger.info(
            "starting from %s (%s): %d weights, %d of %d parameters taken%s",
            self.path,
            self.naming,
            taken["weights"],
            taken["parameters"],
            taken["of_parameters"],
            f", {len(self.resized)} tables of positions resized" if self.resized else "",
        )
        logger.info(
            "left new: %s; unused in the file: %s",
            _listed(report["left_new"]),
            _listed(report["unused_in_file"]),
        )


def read_initial(path: Path, student: str, image_size: int) -> InitialWeights:
    """Reads what `path` has for the student of that name at `image_size` pixels.

    The file is torch's (a flat state dict, or one under `model` or `state_dict`) or safetensors; its names are
    mobile_sam.pt's, TinyViT's, timm's, or a student's own, whichever fit most of the parameters.

    Raises DistillError when it is missing or damaged, when less than half of the encoder's parameters can be taken
    from it, or when one of those isn't finite. Raises CheckpointError when a file in torch's format is damaged or
    holds other things than tensors.
    """
    # A run's folder means its student.
    path = student_path(path) if Path(path).is_dir() else Path(path)
    sha256, state = _read(path)
    outline = outline_student(student_info(student), image_size)
    wanted = outline.state_dict()
    parameters = {key: value.numel() for key, value in outline.named_parameters()}
    plans = [_matched(name, state, wanted) for name in NAMINGS]
    best = max(plans, key=lambda plan: sum(parameters.get(key, 0) for key in plan.tensors))
    _check_share(path, student, parameters, best)
    for key, value in best.tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise DistillError(
                f"{path} holds values that aren't finite, in {best.theirs[key][:80]}; give a whole one"
            )
    head = _whole_head(state) if lacks_image_size(path) else trained_head(path)
    used = {best.theirs[key] for key in best.tensors}
    return InitialWeights(
        path=path,
        sha256=sha256,
        naming=best.naming,
        taken=list(best.tensors),
        resized=best.resized,
        left=[key for key in wanted if key not in best.tensors],
        unused=[key for key in state if key not in used],
        parameters=parameters,
        tensors=best.tensors,
        head=head,
    )


def _whole_head(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """SAM's head among the tensors of a file in mobile_sam.pt's format, float32; None where there isn't all of it."""
    shapes = head_shapes()
    if any(key not in state or state[key].shape != shape for key, shape in shapes.items()):
        return None
    return {key: state[key].float().clone() for key in shapes}


@dataclass(frozen=True, kw_only=True)
class _Match:
    """What one naming finds: tensors by the student's keys, the file's keys for them, and why others don't fit."""

    naming: str
    tensors: dict[str, Tensor]
    theirs: dict[str, str]
    resized: list[str]
    misfits: list[str]


def _matched(naming: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> _Match:
    theirs = renamed(NAMINGS[naming], state, wanted)
    tensors: dict[str, Tensor] = {}
    resized, misfits = [], []
    for key, like in wanted.items():
        if key not in theirs:
            misfits.append(f"{key} is missing")
            continue
        found, shape = state[theirs[key]], tuple(like.shape)
        fits = found.is_floating_point() == like.is_floating_point()
        table = None if tuple(found.shape) == shape or not fits else resized_table(key, found, shape)
        if table is not None:
            resized.append(key)
            tensors[key] = table.to(like.dtype)
        elif fits and tuple(found.shape) == shape:
            tensors[key] = found.to(like.dtype)
        else:
            misfits.append(f"{theirs[key][:80]} is {found.dtype} {tuple(found.shape)}, wanted {shape}"[:200])
    return _Match(naming=naming, tensors=tensors, theirs=theirs, resized=resized, misfits=misfits)


def _check_share(path: Path, student: str, parameters: Mapping[str, int], match: _Match) -> None:
    encoder = {key: count for key, count in parameters.items() if not key.startswith(NECK_PREFIXES)}
    taken, total = sum(encoder[key] for key in encoder if key in match.tensors), sum(encoder.values())
    if taken < MIN_SHARE * total:
        raise DistillError(
            f"{path} fits no {student}: {taken:,} of the {total:,} parameters of its encoder can be taken from it, "
            "half are needed\n"
            f"({'; '.join(match.misfits[:3])}); give weights of the same network"
        )


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """A file's SHA-256 and tensors."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if in_torch_format(start):
            return sha256, read_state(path, WRAPPERS)
        return sha256, _read_safetensors(path, start[:8])
    except FileNotFoundError:
        raise DistillError(
            f"{path} does not exist; --init takes a file of weights (.pt, .pth, .safetensors)"
        ) from None
    except OSError as error:
        raise DistillError(f"{path} can't be read: {error.strerror or error}") from error


def _read_safetensors(path: Path, start: bytes) -> dict[str, Tensor]:
    """Whoever wrote it; a file with our SHA-256 is checked against that."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_HEADER:
        raise DistillError(
            f"{path} is neither in torch's format nor a safetensors file; --init takes one of these"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise DistillError(f"{path} is damaged or no safetensors file ({str(error)[:100]})") from error
    if "sha256" in metadata and "format" in metadata:
        check_tensors(path)
    return load_tensors(path)


def _listed(groups: Mapping[str, int]) -> str:
    shown: Iterable[str] = (f"{name} ({count})" for name, count in list(groups.items())[:8])
    return (", ".join(shown) + (", ..." if len(groups) > 8 else "")) or "nothing"


# --- What the weights of a student are called in files that others wrote.

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


# --- Learned tables of positions, brought to another size.

MAX_SIDE = 256
"""Largest table that is resized, in rows: four times SAM's grid. A file may claim any."""


def resized_table(key: str, table: Tensor, wanted: tuple[int, ...]) -> Tensor | None:
    """`table` in the shape `wanted`, bicubically, float32; None where `key` is no table or it can't be done.

    TinyViT's `attention_biases` are (heads, side * side). A ViT's `pos_embed` is (1, tokens, width): class and
    distillation tokens come first, of which only as many are kept as are wanted. Both as timm resizes them.
    """
    if key.endswith("attention_biases") and table.ndim == len(wanted) == 2:
        if table.shape[0] != wanted[0] or not _side(table.shape[1]) or not _side(wanted[1]):
            return None
        return _resized(table[:, :, None], _side(wanted[1]))[:, :, 0]
    if key.endswith("pos_embed") and table.ndim == len(wanted) == 3:
        return _positions(table, wanted)
    return None


def _positions(table: Tensor, wanted: tuple[int, ...]) -> Tensor | None:
    tokens, wanted_tokens = _prefix(table.shape[1]), _prefix(wanted[1])
    if table.shape[::2] != wanted[::2] or tokens is None or wanted_tokens is None or wanted_tokens > tokens:
        return None
    grid = _resized(table[:, tokens:], _side(wanted[1] - wanted_tokens))
    return torch.cat([table[:, :wanted_tokens].float(), grid], dim=1)


def _resized(table_BNC: Tensor, side: int) -> Tensor:
    """(B, n * n, C) to (B, side * side, C)."""
    old = _side(table_BNC.shape[1])
    maps = table_BNC.float().transpose(1, 2).unflatten(2, (old, old))
    maps = F.interpolate(maps, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2).contiguous()


def _side(cells: int) -> int:
    """The side of a square of so many cells; 0 where there is none or it is too large."""
    side = math.isqrt(max(cells, 0))
    return side if side * side == cells and side <= MAX_SIDE else 0


def _prefix(tokens: int) -> int | None:
    """How many tokens precede a square of positions: none, a class token, or a distillation token as well."""
    return next((prefix for prefix in range(3) if _side(tokens - prefix)), None)
