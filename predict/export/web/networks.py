"""Networks of the web demo: the encoder, and a decoder that ends at low-resolution masks, with float16 weights.

A photo of 12 megapixels costs a browser one to two seconds a click for masks at its own size, a fifth of that for
low-resolution masks, which the page upscales. Weights are stored as float16 and cast at the start: half the download,
float32 arithmetic.

Shape suffixes: P prompts, N points of one prompt, T mask tokens, h, w rows and columns of low-resolution masks (4g),
C channels, H, W rows and columns of the embedding, 2 (x, y).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ....common.errors import PredictError
from ...model import Model
from ..onnx_decoder import INPUTS as DECODER_INPUTS
from ..onnx_decoder import Decoder, comparison_inputs, example_inputs
from ..onnx_encoder import export_encoder, synthetic_pixels
from ..onnx_graph import (
    STEPS,
    Begin,
    OnnxFile,
    Session,
    check_difference,
    relative_difference,
    serialize,
    to_onnx,
)
from ..onnx_tools import MAX_HALF

HALF_LIMIT = 0.02
"""Largest relative difference from float32 that float16 weights may cause; 1e-3 is usual."""

LEAST_VALUES = 1024
"""Smallest number of values of a weight that is stored as float16; the rest is too little to matter."""

DESCRIPTION = (
    "Prompt encoder and mask decoder, as decoder.onnx without orig_im_size and masks: low_res_masks (prompts, 4, 4g, "
    "4g), logits on the padded square, object above 0; iou_predictions (prompts, 4). mask_input is (1, 1, 4g, 4g)."
)

INPUTS = DECODER_INPUTS[:-1]
OUTPUTS = ("low_res_masks", "iou_predictions")


@dataclass(frozen=True, kw_only=True, eq=False)
class Networks:
    """ONNX files of the page, with half weights."""

    encoder: OnnxFile
    decoder: OnnxFile
    """Decoder that ends at low-resolution masks."""


class LowResolutionDecoder(Decoder):
    """Decoder without upscaling; no shape depends on a value, none has to be computed in double precision."""

    def forward(  # type: ignore[override]
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Predict all four masks of each prompt: logits (P, 4, 4g, 4g) and predicted IoUs (P, 4).

        Args:
            image_embeddings: (1, 256, g, g).
            point_coords: (P, N, 2), x and y in pixels of the resized image.
            point_labels: (P, N), as in `Decoder.forward`.
            mask_input: (1, 1, 4g, 4g), logits for all prompts.
            has_mask_input: (1,), 0 to ignore `mask_input`.
        """
        dense_1CHW = self._embed_masks(mask_input, has_mask_input)
        dense_PCHW = dense_1CHW.expand(point_coords.shape[0], -1, -1, -1)
        return self._decode(image_embeddings, point_coords, point_labels, dense_PCHW)


def export_networks(model: Model, begin: Begin) -> Networks:
    """Export both networks with half weights, and compare them with torch.

    Args:
        model: model on the CPU.
        begin: called with each of NETWORK_STEPS.

    Raises:
        PredictError: torch can't export a network, or its outputs differ from torch's.
    """
    encoder = _halved(
        export_encoder(model, "encoder.onnx", lambda step: begin(f"encoder: {step}")),
        "encoder.onnx",
        [{"pixels": synthetic_pixels(1, model.student_size)}],
    )
    begin(f"decoder: {STEPS[0]}")
    decoder = LowResolutionDecoder(model.sam).eval()
    names = {0: "prompts", 1: "points"}
    proto = to_onnx(
        decoder,
        _for_one_mask(example_inputs(model.image_size)),
        OUTPUTS,
        {"point_coords": names, "point_labels": names},
        "SAM's prompt encoder and mask decoder",
    )
    data = serialize(proto, "prompt encoder and mask decoder", model, DESCRIPTION, model.image_size)
    begin(f"decoder: {STEPS[1]}")
    cases = [_for_one_mask(inputs) for inputs in comparison_inputs(model)]
    session, difference = Session(data), 0.0
    for case in cases:
        with torch.no_grad():
            wanted = decoder(*case.values())
        for mine, theirs in zip(session.run(case), wanted, strict=True):
            difference = max(difference, relative_difference(mine, theirs))
    check_difference("decoder-lowres.onnx", difference, 1e-3)
    exported = OnnxFile(data=data, max_relative_difference=difference, limit=1e-3)
    return Networks(encoder=encoder, decoder=_halved(exported, "decoder-lowres.onnx", cases))


NETWORK_STEPS = (
    *(f"encoder: {step}" for step in STEPS),
    *(f"decoder: {step}" for step in STEPS[:2]),
)
"""Steps of `export_networks`."""


def _halved(file: OnnxFile, name: str, cases: list[dict[str, Tensor]]) -> OnnxFile:
    """Return the file with half weights, compared with the given one."""
    data = half_weights(file.data)
    full, half, difference = Session(file.data), Session(data), 0.0
    for case in cases:
        for mine, theirs in zip(half.run(case), full.run(case), strict=True):
            difference = max(difference, relative_difference(mine, theirs))
    difference += file.max_relative_difference  # from torch, at most
    check_difference(f"{name} with half weights", difference, HALF_LIMIT)
    return OnnxFile(data=data, max_relative_difference=difference, limit=HALF_LIMIT, notes=file.notes)


def half_weights(data: bytes) -> bytes:
    """Return an ONNX file whose large float32 weights are stored as float16 and cast to float32.

    Args:
        data: content of an ONNX file of opset 13 or later.

    Raises:
        PredictError: a weight is beyond float16's range.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.load_from_string(data)
    weights, casts = [], []
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != onnx.TensorProto.FLOAT or values.size < LEAST_VALUES:
            weights.append(copy.copy(tensor))
            continue
        if not np.abs(values).max() <= MAX_HALF:
            raise PredictError(
                f"the weight {tensor.name} has values beyond float16's {MAX_HALF}: it can't be stored in half"
            )
        weights.append(numpy_helper.from_array(values.astype(np.float16), f"{tensor.name}_half"))
        casts.append(
            onnx.helper.make_node(
                "Cast",
                [f"{tensor.name}_half"],
                [tensor.name],
                f"{tensor.name}_cast",
                to=onnx.TensorProto.FLOAT,
            )
        )
    nodes = list(proto.graph.node)
    for field, values_ in (("initializer", weights), ("node", casts + nodes)):
        proto.graph.ClearField(field)
        getattr(proto.graph, field).extend(values_)
    result: bytes = proto.SerializeToString()
    return result


def _for_one_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs of decoder.onnx as those of this decoder: without the photo's size, with the first mask alone."""
    return {name: inputs[name][:1] if name == "mask_input" else inputs[name] for name in INPUTS}
