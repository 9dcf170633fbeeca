"""Teachers: image encoders whose embeddings a student learns, and the SAM heads in their checkpoints.

Shape suffixes: B images, C channels, H and W rows and columns.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from ..common.errors import CheckpointError, SamError
from .device import resolve_device, resolve_precision
from .modeling.head_shapes import HEAD_PREFIXES, HQ_PREFIXES, head_shapes
from .registry import EMBEDDED_TEACHER, TeacherInfo, TeacherPackage, find_teacher_info, find_teacher_package
from .teacher_package import build_from_package, package_sha256
from .weights.checkpoint import (
    ENCODER_PREFIX,
    check_weights,
    encoder_state,
    identify_teacher,
    read_weights,
    trained_image_size,
)
from .weights.weight_files import weights_sha256

_EMBEDDED_FILE = files(__package__).joinpath(f"{EMBEDDED_TEACHER}.safetensors")


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """Loaded image encoder."""

    name: str
    """A key of `TEACHERS`, or the name of another package's teacher."""
    package: TeacherPackage | None = None
    """Package that it comes from; None for a teacher of this package."""
    image_size: int
    """Side in pixels of its padded square input, a multiple of 16."""
    device: torch.device
    """Device of the weights."""
    precision: str
    """`float32` or `bfloat16`, never `auto`."""
    checkpoint_sha256: str
    """Hex SHA-256 of the whole checkpoint file, for a folder as `weights_sha256` returns it; for the embedded
    teacher, of the package's file of weights; for another package's, as `package_sha256` returns it."""
    positions_interpolated: bool
    """True if the position tables were resampled for `image_size`."""
    image_encoder: nn.Module
    """The network, in evaluation mode, its parameters frozen. A ViT that computes in bfloat16 holds the weights of
    its linear and convolution layers in bfloat16; all other weights are float32."""
    note: str | None = None
    """Sentence about what was taken of the checkpoint; None for a plain one."""

    @property
    def grid(self) -> int:
        """Side of the embedding's grid."""
        return self.image_size // 16

    @torch.no_grad()
    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Compute the embeddings of normalised, padded images.

        Args:
            pixels_BCHW: float32 (B, 3, S, S), on any device; S is `image_size`.

        Returns:
            emb_BCHW: float32 (B, 256, S/16, S/16), contiguous, on the teacher's device, in any precision.

        Raises:
            SamError: the pixels have another shape.
        """
        if pixels_BCHW.shape[1:] != (3, self.image_size, self.image_size):
            wanted = f"(B, 3, {self.image_size}, {self.image_size})"
            raise SamError(
                f"pixels have shape {tuple(pixels_BCHW.shape)}; {self.name} was built for {wanted}"
            )
        pixels_BCHW = pixels_BCHW.to(self.device, torch.float32, non_blocking=True)
        cast = self.precision == "bfloat16" and (
            self.package is not None or find_teacher_info(self.name).encoder.uses_autocast
        )
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=cast):
            emb_BCHW = self.image_encoder(pixels_BCHW)
        return emb_BCHW.float().contiguous()


def load_teacher(
    name: str,
    checkpoint: Path | None,
    *,
    image_size: int = 1024,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    checkpoint_sha256: str | None = None,
) -> Teacher:
    """Build a teacher and load its weights from its checkpoint.

    On a CPU the weights are mapped from the file, so that memory stays near their size. The file must then not be
    rewritten in place while the teacher exists (replacing it is safe).

    Args:
        name: a key of `TEACHERS`, or the name of another package's teacher.
        checkpoint: path of the file, as `find_checkpoint` returns it; None only for the embedded teacher, and for
            another package's.
        image_size: side in pixels of the square input, a multiple of 16; position tables are resampled if it is not
            the trained one.
        device: `auto`, `cpu`, `cuda` or `cuda:i`.
        precision: `auto`, `float32` or `bfloat16`.
        checkpoint_sha256: hex digest of the file, if it is known already; None to compute it.

    Returns:
        The teacher, ready to embed.

    Raises:
        CheckpointError: the file is unusable or belongs to another teacher.
        SamError: another argument is wrong, or another package's teacher fails or gives something else than
            embeddings.
    """
    if image_size < 16 or image_size % 16:
        raise SamError(f"image size {image_size} is not a positive multiple of 16")
    where = resolve_device(device)
    resolved = resolve_precision(precision, where)
    found = find_teacher_package(name)
    if found is not None:
        sha256 = checkpoint_sha256 or package_sha256(name, found[0], checkpoint)
        encoder = build_from_package(name, found, checkpoint, where, image_size)
        encoder.probe(image_size, where)
        return Teacher(
            name=name,
            package=found[0],
            image_size=image_size,
            device=where,
            precision=resolved,
            checkpoint_sha256=sha256,
            positions_interpolated=False,
            image_encoder=encoder,
        )
    info = find_teacher_info(name)
    checked, note = _read_checked(info, checkpoint, encoder_alone=True)
    state = encoder_state(checked)
    # Half-precision weights are converted to float32; counters of batch norm stay integers.
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    module, interpolated = info.encoder.load(state, image_size, resolved)
    if checkpoint_sha256 is None:
        checkpoint_sha256 = embedded_sha256() if checkpoint is None else weights_sha256(checkpoint)
    return Teacher(
        name=name,
        image_size=image_size,
        device=where,
        precision=resolved,
        checkpoint_sha256=checkpoint_sha256,
        positions_interpolated=interpolated,
        image_encoder=module.requires_grad_(False).eval().to(where),
        note=note,
    )


def load_head(name: str, checkpoint: Path | None, *, with_hq: bool = False) -> dict[str, Tensor]:
    """Read SAM's head, prompt encoder and mask decoder, from a teacher's checkpoint.

    Args:
        name: a key of `TEACHERS`.
        checkpoint: path of the file; None only for the embedded teacher.
        with_hq: True to include SAM-HQ's own layers, which need features that only the teacher's encoder gives. The
            rest of SAM-HQ's head is SAM's, unchanged, and decodes any embedding.

    Returns:
        Copies of `prompt_encoder.*` and `mask_decoder.*` by key, float32, on the CPU.

    Raises:
        CheckpointError: the file is unusable, belongs to another teacher or holds an encoder alone.
        SamError: an unknown teacher.
    """
    state, _ = _read_checked(find_teacher_info(name), checkpoint)
    head = {key: value for key, value in state.items() if key.startswith(HEAD_PREFIXES)}
    return {
        key: value.float().clone()
        for key, value in head.items()
        if with_hq or not key.startswith(HQ_PREFIXES)
    }


def read_package_head(
    name: str, checkpoint: Path | None, image_size: int, device: str
) -> dict[str, Tensor] | None:
    """Build and try another package's teacher, and return SAM's head from it, float32 on the CPU; None without one.

    Args:
        name: name of the teacher.
        checkpoint: path of a file or folder, or None.
        image_size: side of the square input, in pixels.
        device: `auto`, `cpu`, `cuda` or `cuda:i`.

    Raises:
        SamError: the package's function or module fails, or gives something else than embeddings or SAM's head.
    """
    found = find_teacher_package(name)
    assert found is not None, "only called for other packages' teachers"
    where = resolve_device(device)
    encoder = build_from_package(name, found, checkpoint, where, image_size)
    encoder.probe(image_size, where)
    return encoder.head_state()


def positions_interpolated(name: str, image_size: int, trained_image_size: int | None = None) -> bool:
    """Return True if a teacher's position tables have to be resampled for an image size (TinyViT has none).

    Args:
        name: a key of `TEACHERS`.
        image_size: side of the square input, in pixels.
        trained_image_size: image size of the checkpoint's tables; None: that of the teacher's official checkpoint.

    Raises:
        SamError: an unknown teacher.
    """
    info = find_teacher_info(name)
    return info.encoder.has_positions and image_size != (trained_image_size or info.trained_image_size)


def state_shapes(info: TeacherInfo, trained_image_size: int | None = None) -> dict[str, torch.Size]:
    """Return a teacher's checkpoint shapes by key, encoder first.

    Args:
        info: entry of the teacher.
        trained_image_size: image size of the position tables; None: that of the teacher's official checkpoint.
    """
    with torch.device("meta"):
        encoder = info.encoder.build(trained_image_size or info.trained_image_size)
    encoder_shapes = {ENCODER_PREFIX + key: value.shape for key, value in encoder.state_dict().items()}
    return encoder_shapes | head_shapes(info.hq_features)


def read_embedded_weights() -> dict[str, Tensor]:
    """Read all weights of `vit_nano`, the teacher that needs no download, in float32 (5.7 M values), on the CPU.

    They are stored beside this file in float16, with the keys of an official SAM checkpoint, and were trained by
    examples/vit_nano/train.py on pictures of examples/generate_pictures.py; docs/VIT_NANO.md has the commands and
    the quality of the masks.
    """
    return {key: value.float() for key, value in load(_EMBEDDED_FILE.read_bytes()).items()}


@cache
def embedded_sha256() -> str:
    """Return the hex SHA-256 of the embedded teacher's file of weights."""
    return hashlib.sha256(_EMBEDDED_FILE.read_bytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class CheckpointContent:
    """Description of a teacher's checkpoint."""

    has_head: bool
    """True if it has SAM's head, False if it is an encoder alone."""
    trained_image_size: int
    """Side in pixels of the square input that its position tables are for."""
    note: str | None
    """Sentence about what is taken of it; None for a plain one."""


def inspect_checkpoint(name: str, checkpoint: Path | None) -> CheckpointContent:
    """Check a teacher's checkpoint, and describe what is taken of it.

    Args:
        name: a key of `TEACHERS`.
        checkpoint: path of the file or folder; None only for the embedded teacher.

    Raises:
        CheckpointError: the file is unusable or belongs to another teacher.
        SamError: an unknown teacher.
    """
    info = find_teacher_info(name)
    state, note = _read_checked(info, checkpoint, encoder_alone=True)
    return CheckpointContent(
        has_head=any(key.startswith(HEAD_PREFIXES) for key in state),
        trained_image_size=trained_image_size(info, state),
        note=note,
    )


def _read_checked(
    info: TeacherInfo, checkpoint: Path | None, *, encoder_alone: bool = False
) -> tuple[dict[str, Tensor], str | None]:
    """Read and check the encoder and head of a teacher, with the keys of SAM's checkpoints, and the note about them.

    If `encoder_alone`, a file without a head is taken, too.
    """
    if info.checkpoint is None:
        if checkpoint is not None:
            raise CheckpointError(f"{info.name} is embedded and takes no checkpoint; leave out {checkpoint}")
        return read_embedded_weights(), None
    if checkpoint is None:
        raise CheckpointError(
            f"{info.name} needs its checkpoint {info.checkpoint.name}; give --checkpoint FILE"
        )
    weights = read_weights(checkpoint, lambda state: info.encoder.matches(encoder_state(state)))
    trained = trained_image_size(info, weights.state)
    state = check_weights(weights, info, state_shapes(info, trained), encoder_alone=encoder_alone)
    never_used = tuple(ENCODER_PREFIX + prefix for prefix in info.encoder.unused_prefixes)
    note, whole = weights.note(state, never_used), identify_teacher(weights.state)
    if note is not None and whole is not None and find_teacher_info(whole).hq and not info.hq:
        note += f"; --teacher {whole} decodes masks with SAM-HQ's layers"
    if trained != info.trained_image_size:
        note = (
            f"{checkpoint.name + ':' if note is None else note + ';'} trained at {trained} pixels: --image-size "
            f"{trained} uses its positions unchanged, other sizes resample them"
        )
    return state, note
