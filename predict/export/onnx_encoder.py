"""A student's image encoder as an ONNX file, checked against torch.

Shape suffixes: B images of a batch, C channels, H, W rows and columns of an image or map, S side of SAM's square
(pixels), 2 (height, width). A student's input, s pixels, may be smaller than S.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sam import normalize_and_pad
from ..model import Model
from .onnx_graph import (
    STEPS,
    Begin,
    OnnxFile,
    Session,
    check_difference,
    relative_difference,
    serialize,
    silent,
    to_onnx,
    unusual_parts,
)
from .onnx_tools import tool_limits

LIMIT = 1e-4
"""Largest difference from torch allowed, relative to the embedding's largest magnitude. The same float32 arithmetic
in another order gives 2e-6 for every kind of student (measured)."""

INPUT, OUTPUT = "pixels", "image_embeddings"
BATCHES = (1, 3)

DESCRIPTION = (
    f"Image encoder. {INPUT}: float32 (batch, 3, s, s), RGB, normalised, then padded with zeros right and bottom, as "
    f"the metadata `preprocessing` describes. {OUTPUT}: float32 (batch, 256, S/16, S/16). s and S are the metadata "
    "`student_size` and `image_size`."
)


def export_encoder(model: Model, name: str = "encoder.onnx", begin: Begin = silent) -> OnnxFile:
    """Export the encoder, and compare it in onnxruntime with torch on batches of 1 and 3 synthetic photos.

    The file has the input `pixels`, float32 (B, 3, s, s), normalised and padded, for any B, and the output
    `image_embeddings`, float32 (B, 256, S/16, S/16).

    Args:
        model: model on the CPU.
        name: the file's name, for messages.
        begin: called with each of STEPS.

    Raises:
        PredictError: torch can't export the encoder, or the outputs differ from torch's.
    """
    encoder, size = model.sam.image_encoder, model.student_size
    begin(STEPS[0])
    proto = to_onnx(
        encoder,
        {INPUT: torch.zeros(2, 3, size, size)},
        [OUTPUT],
        {INPUT: {0: "batch"}},
        f"the encoder {model.student}",
    )
    data = serialize(proto, "image encoder", model, DESCRIPTION, size)
    begin(STEPS[1])
    session = Session(data)
    difference = 0.0
    for batch in BATCHES:
        pixels_BCHW = synthetic_pixels(batch, size)
        with torch.no_grad():
            wanted_BCHW = encoder(pixels_BCHW)
        (found_BCHW,) = session.run({INPUT: pixels_BCHW})
        difference = max(difference, relative_difference(found_BCHW, wanted_BCHW))
    check_difference(name, difference, LIMIT)
    begin(STEPS[2])
    notes = [*unusual_parts(proto), *tool_limits(data, {INPUT: synthetic_pixels(1, size)})]
    return OnnxFile(data=data, max_relative_difference=difference, limit=LIMIT, notes=notes)


def synthetic_pixels(batch: int, size: int, seed: int = 0) -> Tensor:
    """Generate pictures with smooth areas, edges and noise, like photos, in three aspect ratios.

    Args:
        batch: number of pictures, B.
        size: side of the encoder's input in pixels, s.
        seed: seed of the random numbers; equal seeds give equal pictures.

    Returns:
        float32 (B, 3, s, s), normalised and padded.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse_BCHW = torch.rand(batch, 3, 8, 8, generator=generator) * 255
    smooth_BCHW = F.interpolate(coarse_BCHW, size=(size, size), mode="bicubic", align_corners=False)
    edges_BCHW = F.interpolate(coarse_BCHW.flip(0, 2), size=(size, size), mode="nearest")
    grain_BCHW = torch.randn(batch, 3, size, size, generator=generator) * 8
    canvas_BCHW = (0.6 * smooth_BCHW + 0.4 * edges_BCHW + grain_BCHW).clamp(0, 255).to(torch.uint8)
    shapes = [(size, size * 2 // 3), (size * 3 // 4, size), (size, size)]
    sizes_B2 = torch.tensor([shapes[index % len(shapes)] for index in range(batch)])
    return normalize_and_pad(canvas_BCHW.permute(0, 2, 3, 1).contiguous(), sizes_B2)
