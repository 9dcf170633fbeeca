"""Student and head in mobile_sam.pt's format, which upstream's own code loads."""

from __future__ import annotations

import io

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from ...common.errors import PredictError
from ...sam.checkpoint import ENCODER_PREFIX
from ...sam.modeling.tiny_vit import VARIANTS
from ..model import Model

UPSTREAM_STUDENT = "tiny_vit"
UPSTREAM_IMAGE_SIZE = 1024
CLASSES = 1000
"""Of ImageNet: upstream's TinyViT has a classifier, which SAM never uses and its strict loading asks for."""


def why_not_torch(student: str) -> str | None:
    """Why there is no .pt of this student; None where there is one."""
    if student == UPSTREAM_STUDENT:
        return None
    known = f"only for TinyViT-5M ({UPSTREAM_STUDENT})"
    return f"MobileSAM's own code, which a .pt is for, has no class for {student}, {known}"


def torch_file(model: Model) -> bytes:
    """What torch.save makes of the flat state dict that `mobile_sam.sam_model_registry["vit_t"]` loads strictly.

    Raises PredictError for a student that upstream's code has no class for.
    """
    reason = why_not_torch(model.student)
    if reason is not None:
        raise PredictError(f"{reason}: give --out a folder, whose model.safetensors load_model reads")
    buffer = io.BytesIO()
    torch.save(flat_state(model.sam), buffer)
    return buffer.getvalue()


def flat_state(sam: Sam) -> dict[str, Tensor]:
    """`image_encoder.*`, `prompt_encoder.*` and `mask_decoder.*`: contiguous float32 tensors on the CPU.

    Batch norms' counters stay int64, as upstream has them. The classifier is made up: weights 0, norm 1.
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
    """What a user of the .pt has to know of a student that was trained at another size than 1024; None at that."""
    if model.image_size == UPSTREAM_IMAGE_SIZE:
        return None
    return (
        f"MobileSAM's own code runs at {UPSTREAM_IMAGE_SIZE} pixels always; this student was trained at "
        f"{model.image_size} and may do worse there: mobilesam loads it with --image-size {model.image_size}"
    )
