"""Teachers: image encoders whose embeddings a student learns, with the head that belongs to them."""

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
from .checkpoint import ENCODER_PREFIX, check_state, read_state
from .device import resolve_device, resolve_precision
from .download import file_sha256
from .modeling.head_shapes import HEAD_PREFIXES, head_shapes
from .modeling.tiny_vit import TinyViT
from .modeling.vit import VITS, ViTEncoder, build_vit, fit_positions
from .registry import TEACHERS, TeacherInfo

__all__ = ["TEACHERS", "Teacher", "TeacherInfo", "load_head", "load_teacher"]

# The side that the official checkpoints' position tables are for.
TRAINED_IMAGE_SIZE = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """An image encoder ready to embed.

    Attributes:
        name: a key of ``TEACHERS``.
        image_size: side in pixels of the padded square it takes; the grid is image_size / 16.
        device: where the weights are.
        precision: ``float32`` or ``bfloat16``, as resolved.
        checkpoint_sha256: of the whole file; for the embedded teacher, of the package's.
        positions_interpolated: its position tables were resampled for ``image_size``.
        image_encoder: the network, in evaluation mode, parameters frozen. A ViT that computes in bfloat16 holds the
            weights of its products in it; all other weights are float32.
    """

    name: str
    image_size: int
    device: torch.device
    precision: str
    checkpoint_sha256: str
    positions_interpolated: bool
    image_encoder: nn.Module

    @property
    def grid(self) -> int:
        return self.image_size // 16

    @torch.no_grad()
    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Embeddings of normalised, padded images.

        Args:
            pixels_BCHW: (B, 3, S, S) float32, on any device; S is ``image_size``.

        Returns:
            (B, 256, S/16, S/16) float32, contiguous, on the teacher's device, whatever the precision.

        Raises:
            SamError: the pixels have another shape.
        """
        if pixels_BCHW.shape[1:] != (3, self.image_size, self.image_size):
            wanted = f"(B, 3, {self.image_size}, {self.image_size})"
            raise SamError(
                f"pixels have shape {tuple(pixels_BCHW.shape)}; {self.name} was built for {wanted}"
            )
        pixels_BCHW = pixels_BCHW.to(self.device, torch.float32, non_blocking=True)
        # A ViT is bfloat16 by its own weights: casting them in each call would cost as much again as reading them.
        cast = self.precision == "bfloat16" and not isinstance(self.image_encoder, ViTEncoder)
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
    """Build a teacher and fill it from its checkpoint.

    The weights stay mapped from the file on a CPU, so memory stays near their own size and the file must
    not be rewritten in place while the teacher lives (replacing it is fine).

    Args:
        name: a key of ``TEACHERS``.
        checkpoint: as ``find_checkpoint`` gives it; None for the embedded teacher, and only for it.
        image_size: a multiple of 16; position tables are resampled where it is not the trained one.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:i``.
        precision: ``auto``, ``float32``, ``bfloat16``.
        checkpoint_sha256: the file's digest where it is already known, to save reading it once more.

    Raises:
        CheckpointError: the file is unusable or belongs to another teacher.
        SamError: another argument is wrong.
    """
    info = _info(name)
    if image_size < 16 or image_size % 16:
        raise SamError(f"image size {image_size} is not a positive multiple of 16")
    where = resolve_device(device)
    resolved = resolve_precision(precision, where)
    state = _encoder_state(info, checkpoint)
    encoder, interpolated = _build_encoder(name, state, image_size)
    if isinstance(encoder, ViTEncoder) and resolved == "bfloat16":
        encoder.hold_in_bfloat16()
    if checkpoint_sha256 is None:
        checkpoint_sha256 = weights_sha256() if checkpoint is None else file_sha256(checkpoint)
    return Teacher(
        name=name,
        image_size=image_size,
        device=where,
        precision=resolved,
        checkpoint_sha256=checkpoint_sha256,
        positions_interpolated=interpolated,
        image_encoder=encoder.requires_grad_(False).eval().to(where),
    )


def positions_interpolated(name: str, image_size: int) -> bool:
    """Whether a teacher's position tables have to be resampled for ``image_size`` (TinyViT has none)."""
    if name not in VITS:
        return False
    return image_size != (STORED_IMAGE_SIZE if TEACHERS[name].embedded else TRAINED_IMAGE_SIZE)


def load_head(name: str, checkpoint: Path | None) -> dict[str, Tensor]:
    """The teacher's own head: ``prompt_encoder.*`` and ``mask_decoder.*``, float32, on the CPU, copied.

    The encoder's part of the file is mapped and never touched.

    Raises:
        CheckpointError: as ``load_teacher``.
    """
    state = _state(_info(name), checkpoint)
    return {key: value.float().clone() for key, value in state.items() if key.startswith(HEAD_PREFIXES)}


def _info(name: str) -> TeacherInfo:
    if name not in TEACHERS:
        raise SamError(f"unknown teacher {name!r}: use {', '.join(TEACHERS)}")
    return TEACHERS[name]


def _state(info: TeacherInfo, checkpoint: Path | None) -> dict[str, Tensor]:
    """Encoder and head of one teacher, keyed as in its checkpoint, checked."""
    if info.embedded:
        if checkpoint is not None:
            raise CheckpointError(f"{info.name} is embedded and takes no checkpoint; leave out {checkpoint}")
        return read_weights()
    if checkpoint is None:
        raise CheckpointError(f"{info.name} needs its checkpoint {info.file}; give --checkpoint FILE")
    return check_state(checkpoint, info.name, read_state(checkpoint), _expected_shapes(info.name))


def _encoder_state(info: TeacherInfo, checkpoint: Path | None) -> dict[str, Tensor]:
    state = _state(info, checkpoint)
    prefix = len(ENCODER_PREFIX)
    return {key[prefix:]: value for key, value in state.items() if key.startswith(ENCODER_PREFIX)}


def _expected_shapes(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        encoder = build_vit(name, TRAINED_IMAGE_SIZE) if name in VITS else TinyViT(TRAINED_IMAGE_SIZE)
    encoder_shapes = {ENCODER_PREFIX + key: value.shape for key, value in encoder.state_dict().items()}
    return encoder_shapes | head_shapes()


def _build_encoder(name: str, state: dict[str, Tensor], image_size: int) -> tuple[nn.Module, bool]:
    """The encoder holding ``state``'s own tensors, and whether its positions were resampled."""
    # Half-precision checkpoints are computed with in float32; counters of batch norm stay integers.
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    if name in VITS:
        state, interpolated = fit_positions(state, VITS[name], image_size)
        with torch.device("meta"):
            encoder = build_vit(name, image_size)
        encoder.load_state_dict(state, assign=True)
        return encoder, interpolated
    # Not on meta: TinyViT has index buffers that no checkpoint holds. It is small, and has no table of
    # positions. The fork keeps its initial values out of the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        tiny_vit = TinyViT(image_size)
    tiny_vit.load_state_dict(state, assign=True)
    return tiny_vit, False


# --- The weights of ``vit_nano``, the teacher that needs no download: SAM's architecture with a tiny encoder.
#
# They lie beside this file in float16, keyed as in an official SAM checkpoint, and were trained by
# examples/train_vit_nano.py on pictures of examples/generate_pictures.py; docs/VIT_NANO.md has the commands and what
# the masks are worth.
#

WEIGHTS = files(__package__).joinpath("vit_nano.safetensors")
# The grid that the position tables are stored for: between the 16 of 256 px and the 64 of 1024 px, so that
# both are one halving or doubling away.
STORED_IMAGE_SIZE = 512


def read_weights() -> dict[str, Tensor]:
    """All of vit_nano's weights, keyed as in an official SAM checkpoint; about 5.7 M float32 values."""
    return {key: value.float() for key, value in load(WEIGHTS.read_bytes()).items()}


@cache
def weights_sha256() -> str:
    """Hex SHA-256 of the file of weights."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def shapes() -> dict[str, torch.Size]:
    """Every key of vit_nano's state and its shape, positions for ``STORED_IMAGE_SIZE``."""
    with torch.device("meta"):
        encoder = build_vit("vit_nano", STORED_IMAGE_SIZE)
    found = {f"image_encoder.{key}": value.shape for key, value in encoder.state_dict().items()}
    return found | head_shapes()
