"""Initial weights of a student, from a file: ImageNet's, MobileSAM's, or an earlier student's.

Four naming schemes are tried on the file's keys, and the one that matches most of the parameters is used. Position
tables of another size are resized. The neck of a new student can start at the teacher's statistics.

Shape suffixes: K attention heads (1 for a ViT's table), L positions of a square table, C channels, H, W rows and
columns of the embedding's grid, N its cells.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.errors import DistillError, counted
from ...sam.modeling.head_shapes import head_shapes
from ...sam.modeling.neck import EMBEDDING_CHANNELS, last_norm
from ...sam.photos.preprocess import valid_cells
from ...sam.weights.checkpoint import ENCODER_PREFIX, read_weights
from ...sam.weights.state_dict import count_by_prefix
from ...sam.weights.weight_files import absent, weights_sha256
from ...store import EmbeddingStore
from ..run_description import student_path
from .registry import outline_student, student_info
from .student_file import describe_student, is_own_file, read_own_tensors, trained_head

logger = logging.getLogger(__name__)

STATISTICS_ROWS = 64
"""Most rows whose statistics are computed: 64 x 64 x 64 cells at an image size of 1024."""
NECK_PREFIXES = ("neck.", "laterals.")
MIN_SHARE = 0.5
"""Smallest share of the encoder's parameters, without the neck, that a file must have; one with fewer belongs to
another network."""
MAX_SIDE = 256
"""Largest side of a position table that is resized: four times SAM's grid. A file may claim any size."""
BACKBONE_PREFIX = "backbone."
MAX_PREFIX = 4
"""Most words before all names that are left out."""

Naming = Callable[[str], Iterable[str]]
"""Naming scheme: returns the student's keys that may correspond to a file's key, the likeliest first."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Initial weights for a student, read from a file."""

    path: Path
    sha256: str
    """SHA-256 of the file, hexadecimal."""
    naming: str
    """Naming scheme of the file, a key of NAMINGS."""
    taken: list[str]
    """Keys of the student that get weights from the file."""
    resized: list[str]
    """Taken keys whose position table was resized."""
    left: list[str]
    """Keys of the student that keep their new weights."""
    unused: list[str]
    """Keys of the file that the student doesn't use."""
    parameters: dict[str, int]
    """Number of parameters by key of the student."""
    tensors: dict[str, Tensor] = field(repr=False)
    """Weights by key of the student, in the student's dtypes."""
    head: dict[str, Tensor] | None = field(repr=False, default=None)
    """SAM's head, float32, if the file is of a student trained together with it, or in mobile_sam.pt's format."""
    student_size: int
    """Side in pixels of the input of the student that gets the weights."""
    file_size: int | None = None
    """Side in pixels of the input of the file's student; None if the file doesn't record it."""
    note: str | None = None
    """Sentence about what was taken of another program's file; None for a plain one."""

    def report(self) -> dict[str, Any]:
        """Return JSON values for the run's description.

        Returns:
            `file`, `sha256`, `note`, `naming`; `taken` {weights, parameters, of_parameters}; `resized`, keys;
            `left_new` and `unused_in_file`, counts of keys by the first part of their names.
        """
        count = self.parameters
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "note": self.note,
            "naming": self.naming,
            "taken": {
                "weights": len(self.taken),
                "parameters": sum(count.get(key, 0) for key in self.taken),
                "of_parameters": sum(count.values()),
            },
            "resized": self.resized,
            "left_new": count_by_prefix(self.left),
            "unused_in_file": count_by_prefix(self.unused),
        }

    def apply(self, student: nn.Module) -> None:
        """Load the weights into a student of the name and sizes they were read for, and log a summary."""
        student.load_state_dict(self.tensors, strict=False)
        report = self.report()
        taken = report["taken"]
        if self.note is not None:
            logger.info("%s", self.note)
        if self.file_size not in (None, self.student_size):
            logger.warning(
                "%s was trained on inputs of %s pixels, this student gets %s: --student-size decides",
                self.path,
                self.file_size,
                self.student_size,
            )
        logger.info(
            "starting from %s (%s): took %s, %s of the student's %s%s",
            self.path,
            self.naming,
            counted(taken["weights"], "weight"),
            f"{taken['parameters']:,}",
            counted(taken["of_parameters"], "parameter"),
            f", {counted(len(self.resized), 'table')} of positions resized" if self.resized else "",
        )
        logger.info(
            "left new: %s; unused in the file: %s",
            _listed(report["left_new"]),
            _listed(report["unused_in_file"]),
        )


def read_initial(
    path: Path, student: str, image_size: int, student_size: int | None = None
) -> InitialWeights:
    """Read a file's weights for a student.

    Args:
        path: file or folder of a student, or of weights from any program (`read_weights`). Its keys are named as in
            mobile_sam.pt, TinyViT's releases, timm, or a student, perhaps with the same words before all of them.
        student: name in the registry, or `timm:NAME`.
        image_size: side of SAM's square in pixels.
        student_size: side of the student's input in pixels, for which position tables are resized; None:
            `image_size`.

    Raises:
        DistillError: the file is missing or damaged, has less than half of the encoder's parameters, or has values
            that aren't finite.
        CheckpointError: a file of another program is missing, damaged, or holds no tensors by name.
    """
    path = student_path(path) if Path(path).is_dir() else Path(path)
    sha256, state, note = _read(path)
    outline = outline_student(student_info(student), image_size, student_size)
    wanted = outline.state_dict()
    parameters = {key: value.numel() for key, value in outline.named_parameters()}
    matches = [_match(name, names, wanted) for names in _shortened(state) for name in NAMINGS]
    best = max(matches, key=lambda match: sum(parameters.get(key, 0) for key in match.tensors))
    _check_share(path, student, parameters, best)
    for key, value in best.tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise DistillError(
                f"{path} holds values that aren't finite, in {best.theirs[key][:80]}; give a whole one"
            )
    own = is_own_file(path)
    head = trained_head(path) if own else _whole_head(state)
    described = describe_student(path) if own else None
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
        student_size=student_size or image_size,
        file_size=None if described is None else described["student_size"],
        note=note,
    )


def start_neck(
    student: nn.Module, share: float, store: EmbeddingStore, rows: Sequence[int], region: str
) -> None:
    """Set the last norm of a new student's neck to the teacher's statistics, in place.

    Its biases become the means of the channels, its weights a share of their standard deviations, over at most
    `STATISTICS_ROWS` rows that are spread over all of them. So the student starts near a constant, its outputs have
    the scale of the teacher's, whatever that is, and its error is about 1 + share^2 times the constant's. A student
    that doesn't end with SAM's neck stays as it is.

    Args:
        student: encoder.
        share: share of the deviations.
        store: store open for reading.
        rows: committed rows to learn from, in order.
        region: cells that count: "all", or those that are "valid".

    Raises:
        StoreDamaged: a row's embedding is damaged.
    """
    norm = last_norm(student)
    if norm is None:
        return
    count, sum_C, squares_C = 0, np.zeros(EMBEDDING_CHANNELS), np.zeros(EMBEDDING_CHANNELS)
    for row in rows[:: math.ceil(len(rows) / STATISTICS_ROWS)]:
        (record,) = store.manifest.records("done", range(row, row + 1))
        assert record.resized_size is not None, "only committed rows are learned from"
        emb_CHW = store.read([record.row]).to_float32()[0].astype(np.float64)
        values_CN = emb_CHW.reshape(EMBEDDING_CHANNELS, -1)
        if region == "valid":
            values_CN = values_CN[:, valid_cells(record.resized_size, store.spec.image_size).ravel()]
        count += values_CN.shape[1]
        sum_C += values_CN.sum(1)
        squares_C += np.square(values_CN).sum(1)
    mean_C = sum_C / max(count, 1)
    deviation_C = np.sqrt(np.maximum(squares_C / max(count, 1) - mean_C**2, 0))
    with torch.no_grad():
        norm.bias.copy_(torch.from_numpy(mean_C))
        norm.weight.copy_(torch.from_numpy(share * deviation_C))


def _read(path: Path) -> tuple[str, dict[str, Tensor], str | None]:
    """Return a file's SHA-256 and tensors, and a note about what was taken of a file of another program."""
    if not path.exists():
        wanted = "--init takes a file of weights (.pt, .pth, .safetensors)"
        raise DistillError(f"{path} {absent(path, wanted)}")
    try:
        if is_own_file(path):
            return weights_sha256(path), read_own_tensors(path), None
    except OSError as error:
        raise DistillError(f"{path} can't be read: {error.strerror or error}") from error
    weights = read_weights(path)
    return weights_sha256(path), weights.state, weights.note()


def _shortened(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return a state dict, and with the words left out that stand before all of its names (`model.`, `backbone.`)."""
    found = [state]
    while len(firsts := {key.partition(".")[0] for key in found[-1]}) == 1 and len(found) <= MAX_PREFIX:
        (first,) = firsts
        if not all(key.startswith(f"{first}.") for key in found[-1]):
            break
        found.append({key.removeprefix(f"{first}."): value for key, value in found[-1].items()})
    return found


@dataclass(frozen=True, kw_only=True)
class _Match:
    """Result of one naming scheme: tensors and the file's keys, by the student's keys, and reasons for mismatches."""

    naming: str
    tensors: dict[str, Tensor]
    theirs: dict[str, str]
    resized: list[str]
    misfits: list[str]


def _match(naming: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> _Match:
    theirs = _match_keys(NAMINGS[naming], state, wanted)
    tensors: dict[str, Tensor] = {}
    resized, misfits = [], []
    for key, like in wanted.items():
        if key not in theirs:
            misfits.append(f"{key} is missing")
            continue
        found, shape = state[theirs[key]], tuple(like.shape)
        fits = found.is_floating_point() == like.is_floating_point()
        table = None if tuple(found.shape) == shape or not fits else resize_table(key, found, shape)
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
            f"{path} doesn't fit {student}: it has {taken:,} of the encoder's {total:,} parameters, at least half "
            "are needed\n"
            f"({'; '.join(match.misfits[:3])}); give weights of the same network"
        )


def _image_encoder(key: str) -> list[str]:
    """Translate keys of mobile_sam.pt and of student files, where the encoder is a part of SAM."""
    return [key.removeprefix(ENCODER_PREFIX)] if key.startswith(ENCODER_PREFIX) else []


def _plain(key: str) -> list[str]:
    """Translate keys of TinyViT's releases and of a student's bare state dict: they are the same."""
    return [key]


def _timm_tiny_vit(key: str) -> list[str]:
    """Translate keys of timm's TinyViT, where a downsampling belongs to the stage after it.

    A convolution is `conv` there, not `c`.
    """
    key = re.sub(r"\.conv\.weight$", ".c.weight", key)
    key = re.sub(r"^patch_embed\.conv([12])\.", lambda m: f"patch_embed.seq.{2 * int(m[1]) - 2}.", key)
    key = re.sub(r"^stages\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", key)
    return [re.sub(r"^stages\.", "layers.", key)]


def _timm(key: str) -> list[str]:
    """Translate keys of timm's networks, for the backbone of a student.

    timm rebuilds a network for feature maps: the children of its sequences become children of the whole (`layer.0`
    is `layer_0`), or the network becomes a child of a wrapper (`model`, `body`).
    """
    key = key.removeprefix(ENCODER_PREFIX)  # of SAM's ViT, which timm has as samvit
    flattened = key.replace(".", "_", 1)
    return [BACKBONE_PREFIX + name for name in (key, flattened, f"model.{key}", f"body.{key}")]


NAMINGS: Mapping[str, Naming] = {
    "image_encoder.*": _image_encoder,
    "plain": _plain,
    "timm's tiny_vit": _timm_tiny_vit,
    "timm": _timm,
}


def _match_keys(naming: Naming, theirs: Iterable[str], wanted: Mapping[str, Any]) -> dict[str, str]:
    """Return {student's key: file's key} for the `wanted` keys that `naming` finds among `theirs`."""
    found: dict[str, str] = {}
    for key in theirs:
        ours = next((name for name in naming(key) if name in wanted), None)
        if ours is not None:
            found.setdefault(ours, key)
    return found


def resize_table(key: str, table: Tensor, wanted: tuple[int, ...]) -> Tensor | None:
    """Resize a learned position table bicubically, as timm does.

    Args:
        key: the table's key in the student. TinyViT's `attention_biases` are (heads, side * side). A ViT's
            `pos_embed` is (1, tokens, width), class and distillation tokens first; the student's number of them is
            kept.
        table: tensor of the file.
        wanted: shape in the student.

    Returns:
        float32 of shape `wanted`; None if `key` is no position table or its shape can't be resized.
    """
    if key.endswith("attention_biases") and table.ndim == len(wanted) == 2:
        if table.shape[0] != wanted[0] or not _side(table.shape[1]) or not _side(wanted[1]):
            return None
        return _resize_square(table[:, :, None], _side(wanted[1]))[:, :, 0]
    if key.endswith("pos_embed") and table.ndim == len(wanted) == 3:
        return _resize_tokens(table, wanted)
    return None


def _resize_tokens(table: Tensor, wanted: tuple[int, ...]) -> Tensor | None:
    tokens, wanted_tokens = _prefix_tokens(table.shape[1]), _prefix_tokens(wanted[1])
    if table.shape[::2] != wanted[::2] or tokens is None or wanted_tokens is None or wanted_tokens > tokens:
        return None
    grid = _resize_square(table[:, tokens:], _side(wanted[1] - wanted_tokens))
    return torch.cat([table[:, :wanted_tokens].float(), grid], dim=1)


def _resize_square(table_KLC: Tensor, side: int) -> Tensor:
    """Resize square position tables to side * side positions."""
    old = _side(table_KLC.shape[1])
    maps = table_KLC.float().transpose(1, 2).unflatten(2, (old, old))
    maps = F.interpolate(maps, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2).contiguous()


def _side(cells: int) -> int:
    """Return the side of a square of `cells` cells; 0 if there is none, or it exceeds MAX_SIDE."""
    side = math.isqrt(max(cells, 0))
    return side if side * side == cells and side <= MAX_SIDE else 0


def _prefix_tokens(tokens: int) -> int | None:
    """Return the number of tokens before a square of positions: 0, 1 (class) or 2 (class, distillation), or None."""
    return next((prefix for prefix in range(3) if _side(tokens - prefix)), None)


def _whole_head(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return SAM's head from a file in mobile_sam.pt's format, float32; None unless it is complete."""
    shapes = head_shapes()
    if any(key not in state or state[key].shape != shape for key, shape in shapes.items()):
        return None
    return {key: state[key].float().clone() for key in shapes}


def _listed(groups: Mapping[str, int]) -> str:
    shown: Iterable[str] = (f"{name} ({count})" for name, count in list(groups.items())[:8])
    return (", ".join(shown) + (", ..." if len(groups) > 8 else "")) or "nothing"
