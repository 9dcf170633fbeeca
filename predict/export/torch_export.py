"""Student and head as a checkpoint in mobile_sam.pt's format, which upstream's own code loads."""

from __future__ import annotations

import io

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from ...common.errors import PredictError
from ...sam.modeling.tiny_vit import VARIANTS
from ...sam.weights.checkpoint import ENCODER_PREFIX
from ..model import Model

UPSTREAM_STUDENT = "tiny_vit"
UPSTREAM_IMAGE_SIZE = 1024
CLASSES = 1000
"""Number of ImageNet's classes: upstream's TinyViT has a classifier, unused in SAM but required by strict loading."""


def export_torch(model: Model) -> bytes:
    """Return `torch.save` of the flat state dict that `mobile_sam.sam_model_registry["vit_t"]` loads strictly.

    Raises:
        PredictError: upstream's code has no class for the student.
    """
    reason = unsupported_reason(model)
    if reason is not None:
        raise PredictError(f"{reason}: give --out a folder, whose model.safetensors load_model reads")
    buffer = io.BytesIO()
    torch.save(flat_state(model.sam), buffer)
    return buffer.getvalue()


def unsupported_reason(model: Model) -> str | None:
    """Return the reason why a student has no .pt file; None if it has one."""
    if model.student != UPSTREAM_STUDENT:
        known = f"only for TinyViT-5M ({UPSTREAM_STUDENT})"
        return f"MobileSAM's own code, which a .pt is for, has no class for {model.student}, {known}"
    if model.student_size != model.image_size:
        sizes = f"{model.student_size} pixels instead of {model.image_size}"
        return f"MobileSAM's own code, which a .pt is for, has no encoder of a smaller input, as this one of {sizes}"
    return None


def flat_state(sam: Sam) -> dict[str, Tensor]:
    """Return the tensors `image_encoder.*`, `prompt_encoder.*` and `mask_decoder.*`, float32 on the CPU, contiguous.

    Batch norms' counters stay int64, as in upstream's file. The classifier is filled with constants: linear weights
    and biases 0, norm weights 1.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in sam.state_dict().items()}
    width = VARIANTS["5m"].widths[-1]
    classifier = {
        "norm_head.weight": torch.ones(width),
        "norm_head.bias": torch.zeros(width),
        "head.weight": torch.zeros(CLASSES, width),
        "head.bias": torch.zeros(CLASSES),
    }
    return state | {ENCODER_PREFIX + key: value for key, value in classifier.items()}


def size_warning(model: Model) -> str | None:
    """Return a warning for a .pt file if the student wasn't trained at 1024 pixels, else None."""
    if model.image_size == UPSTREAM_IMAGE_SIZE:
        return None
    return (
        f"MobileSAM's own code always runs at {UPSTREAM_IMAGE_SIZE} pixels; this student was trained at "
        f"{model.image_size} and may do worse there: mobilesam loads it with --image-size {model.image_size}"
    )
