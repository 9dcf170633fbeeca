"""SAM's prompt encoder and mask decoder as one ONNX file, with masks upscaled to the photo's resolution.

Inputs and outputs have the names of segment_anything's SamOnnxModel (utils/onnx.py), but the file takes several
prompts at once, and returns all four masks of each.

Shape suffixes: B images, P prompts, p mask inputs (one for all prompts, or P), N points of one prompt, T mask tokens
of a prompt (SAM's single mask, then its three), C channels, H, W rows and columns of an image, map or mask, h, w
those of low-resolution masks (4g), S side of the encoder's square, L entries of a table, 2 (x, y) or (height, width).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from ...sam import resized_size
from ..model import Model
from .onnx_encoder import synthetic_pixels
from .onnx_graph import (
    STEPS,
    Begin,
    OnnxFile,
    Session,
    check_difference,
    relative_difference,
    rename_axes,
    serialize,
    silent,
    to_onnx,
    unusual_parts,
)
from .onnx_tools import tool_limits

M = TypeVar("M", bound=nn.Module)

MAX_SIDE = 1 << 16
"""Longest side of a photo in pixels for which a side that comes out at a half is rounded as SAM rounds it."""

LIMIT = 1e-3
"""Largest difference from torch allowed, relative to the output's largest magnitude."""

ROUNDING = 20
"""The limit is raised to this multiple of torch's own float32 error, measured against float64, if that is above
LIMIT. A trained head amplifies rounding errors little; an untrained one a thousand times more, in torch and in
onnxruntime."""

UPSCALE_LIMIT = 1e-5
"""Largest relative difference allowed for the upscaling of masks alone, which amplifies no rounding errors."""

INPUTS = (
    "image_embeddings",
    "point_coords",
    "point_labels",
    "mask_input",
    "has_mask_input",
    "orig_im_size",
)
OUTPUTS = ("masks", "iou_predictions", "low_res_masks")

DESCRIPTION = (
    "Prompt encoder and mask decoder. S is the encoder's image size, g = S/16; everything is float32. "
    "image_embeddings: (1, 256, g, g). point_coords: (prompts, points, 2), x and y in pixels of the resized image. "
    "point_labels: (prompts, points), 1 on the object, 0 off it, 2 and 3 a box's top left and bottom right corner, "
    "-1 padding: prompts without a box end with one point 0, 0 of label -1. mask_input: (1 or prompts, 1, 4g, 4g), "
    "logits as in low_res_masks; ignored where has_mask_input, (1,), is 0. orig_im_size: (2,), the photo's "
    "height and width. masks: (prompts, 4, height, width), logits, object above 0; 0 is the single mask, 1 to 3 are "
    "for ambiguous prompts. iou_predictions: (prompts, 4). low_res_masks: (prompts, 4, 4g, 4g), logits on the padded "
    "square."
)


class Decoder(nn.Module):
    """Network from an embedding and prompts to masks, made of operations that ONNX has."""

    dense_pe_1CHW: Tensor
    upscale_Sw: Tensor
    halves_L2: Tensor

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.prompt_encoder: PromptEncoder = _with_fused_norms(sam.prompt_encoder)
        self.mask_decoder: MaskDecoder = _with_fused_norms(sam.mask_decoder)
        self.image_size: int = sam.image_encoder.img_size
        self.register_buffer("dense_pe_1CHW", sam.prompt_encoder.get_dense_pe())
        self.register_buffer("upscale_Sw", bilinear_matrix(self.image_size // 4, self.image_size))
        self.register_buffer("halves_L2", halves_rounded_down(self.image_size))

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict all four masks of each prompt.

        Args:
            image_embeddings: (1, 256, g, g).
            point_coords: (P, N, 2), x and y in pixels of the resized image.
            point_labels: (P, N): 1 on the object, 0 off it, 2 and 3 a box's top left and bottom right corner, -1
                padding.
            mask_input: (p, 1, 4g, 4g), logits.
            has_mask_input: (1,), 0 to ignore `mask_input`.
            orig_im_size: (2,), height and width of the photo.

        Returns:
            Logits (P, 4, H, W) at the photo's size, predicted IoUs (P, 4), and logits (P, 4, 4g, 4g) over the
            encoder's square.
        """
        dense_pCHW = self._embed_masks(mask_input, has_mask_input)
        prompts, given = point_coords.shape[0], mask_input.shape[0]
        each = torch.arange(prompts, device=dense_pCHW.device).clamp(max=given - 1)
        low_PThw, iou_PT = self._decode(
            image_embeddings, point_coords, point_labels, dense_pCHW.index_select(0, each)
        )
        return self._upscale(low_PThw, orig_im_size), iou_PT, low_PThw

    def _decode(
        self, emb_1CHW: Tensor, coords_PN2: Tensor, labels_PN: Tensor, dense_PCHW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return low-resolution logits (P, 4, 4g, 4g), and predicted IoUs (P, 4)."""
        low_PThw, iou_PT = self.mask_decoder.predict_masks(
            image_embeddings=emb_1CHW,
            image_pe=self.dense_pe_1CHW,
            sparse_prompt_embeddings=self._embed_points(coords_PN2, labels_PN),
            dense_prompt_embeddings=dense_PCHW,
        )
        return low_PThw, iou_PT

    def _embed_points(self, coords_PN2: Tensor, labels_PN: Tensor) -> Tensor:
        """Compute PromptEncoder's `_embed_points` and `_embed_boxes` without in-place assignments."""
        positions_PNC = self.prompt_encoder.pe_layer._pe_encoding((coords_PN2 + 0.5) / self.image_size)
        labels_PN1 = labels_PN[..., None]
        padding_C = self.prompt_encoder.not_a_point_embed.weight
        points_PNC = torch.where(labels_PN1 == -1, padding_C, positions_PNC)
        for label, kind in enumerate(self.prompt_encoder.point_embeddings):
            points_PNC = torch.where(labels_PN1 == label, points_PNC + kind.weight, points_PNC)
        return points_PNC

    def _embed_masks(self, mask_p1hw: Tensor, has_mask_1: Tensor) -> Tensor:
        given_pCHW = self.prompt_encoder.mask_downscaling(mask_p1hw)
        none_1C11 = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return torch.where(has_mask_1 > 0, given_pCHW, none_1C11)

    def _upscale(self, low_PThw: Tensor, original_2: Tensor) -> Tensor:
        """Resample masks as `Sam.postprocess_masks` does: upscale to the square, crop padding, resize to the photo.

        Each step is linear along each axis, so that their product is one matrix for each axis.
        """
        original_2 = original_2.long()
        resized_2 = self.resized(original_2)
        rows_Hh = self._resampling(original_2[0], resized_2[0])
        columns_Ww = self._resampling(original_2[1], resized_2[1])
        return rows_Hh @ low_PThw @ columns_Ww.T

    def resized(self, original_2: Tensor) -> Tensor:
        """Return the photo's height and width after resizing, int64 (2,), equal to `resized_size`.

        `resized_size` computes in double precision, which TensorRT and browsers don't have. Its result is the exact
        quotient rounded to the nearest integer, since no other quotient is so near to a half that rounding errors
        matter; halves are rounded up, except those in `halves_L2`.
        """
        longest = original_2.max()
        doubled_2 = 2 * self.image_size * original_2 + longest
        rounded_2 = torch.div(doubled_2, 2 * longest, rounding_mode="trunc")
        if len(self.halves_L2):
            down_2L = (self.halves_L2[:, 0] == longest) & (self.halves_L2[:, 1] == original_2[:, None])
            rounded_2 = rounded_2 - down_2L.long().sum(dim=1)
        return rounded_2

    def _resampling(self, original: Tensor, resized: Tensor) -> Tensor:
        """Return the matrix (original side, 4g) that resamples low-resolution masks to the photo along one axis.

        The place of a photo's row in the resized image is a fraction; its integer part and its remainder are computed
        with integers, so that half precision is enough for the rest.
        """
        side = original.item()
        torch._check(side >= 1)
        dtype = self.upscale_Sw.dtype
        twice = 2 * original
        odd_H = 2 * torch.arange(side, dtype=torch.int64, device=original.device) + 1
        centres_H = (odd_H * resized - original).clamp(min=0)  # in units of 1 / twice
        first_H = torch.div(centres_H, twice, rounding_mode="trunc")
        # The padding beyond the resized image is cropped: there the image's last row is repeated.
        second_H = torch.minimum(first_H + 1, resized - 1)
        share_H1 = ((centres_H - first_H * twice).to(dtype) / twice.to(dtype))[:, None]
        first_Hh, second_Hh = (
            self.upscale_Sw.index_select(0, first_H),
            self.upscale_Sw.index_select(0, second_H),
        )
        return first_Hh * (1 - share_H1) + second_Hh * share_H1


class _FusedNorm(nn.Module):
    """SAM's LayerNorm2d by `F.layer_norm`: ONNX has an operator for it, whose sums are float32 in any precision.

    SAM's own squares differences from the mean, which is beyond half precision's 65504 from 256 on.
    """

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise a (B, C, H, W) map over its channels."""
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        x_BHWC = nn.functional.layer_norm(x_BHWC, self.weight.shape, self.weight, self.bias, self.eps)
        return x_BHWC.permute(0, 3, 1, 2)


def _with_fused_norms(network: M) -> M:
    """Return a copy of the network with `_FusedNorm` in place of each LayerNorm2d."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LayerNorm2d):
                setattr(parent, name, _FusedNorm(child))
    return network


def halves_rounded_down(image_size: int) -> Tensor:
    """Find the photos of which `resized_size` rounds down a side that comes out at a half.

    It multiplies by the quotient of the sizes, which is rounded to double precision; the product may be a little less
    than the half.

    Args:
        image_size: side of the encoder's square in pixels.

    Returns:
        int64 (L, 2): the photo's longer side and the side in question, for longer sides up to MAX_SIDE; empty if the
        image size is a power of two from 256 on.
    """
    doubled = 2 * image_size
    step = doubled & -doubled  # only multiples of this power of two have sides that come out at a half
    found = []
    for longest in range(step, MAX_SIDE + 1, step):
        numerators = longest * np.arange(1, doubled, 2, dtype=np.int64)
        sides = numerators[numerators % doubled == 0] // doubled
        down = (sides * (image_size / longest) + 0.5).astype(np.int64) < (sides * doubled + longest) // (
            2 * longest
        )
        found += [(longest, int(side)) for side in sides[down]]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)


def bilinear_matrix(inputs: int, outputs: int) -> Tensor:
    """Return float32 (outputs, inputs): bilinear `F.interpolate` along one axis, align_corners False, as a matrix."""
    eye = torch.eye(inputs)[None]
    return nn.functional.interpolate(eye, size=outputs, mode="linear", align_corners=False)[0].T.contiguous()


def export_decoder(model: Model, name: str = "decoder.onnx", begin: Begin = silent) -> OnnxFile:
    """Export prompt encoder and mask decoder, and compare them in onnxruntime with SamPredictor.

    Inputs and outputs are those of DESCRIPTION. The comparison covers points, boxes and mask inputs, one prompt and
    several, on photos larger and smaller than the encoder's square.

    Args:
        model: model on the CPU.
        name: the file's name, for messages.
        begin: called with each of STEPS.

    Raises:
        PredictError: torch can't export the head, or the outputs differ from SamPredictor's.
    """
    begin(STEPS[0])
    decoder = Decoder(model.sam).eval()
    proto = to_onnx(
        decoder, example_inputs(model.image_size), OUTPUTS, _DYNAMIC, "SAM's prompt encoder and mask decoder"
    )
    masks = proto.graph.output[0].type.tensor_type.shape.dim
    rename_axes(proto, {masks[2].dim_param: "height", masks[3].dim_param: "width"})
    data = serialize(proto, "prompt encoder and mask decoder", model, DESCRIPTION, model.image_size)
    begin(STEPS[1])
    session = Session(data)
    cases = list(comparison_inputs(model))
    check_difference(name, _compare_upscaling(model.sam, session, cases), UPSCALE_LIMIT)
    difference, limit = _compare(model.sam, decoder, session, cases)
    check_difference(name, difference, limit)
    begin(STEPS[2])
    notes = [*unusual_parts(proto), *tool_limits(data, cases[-1])]
    return OnnxFile(data=data, max_relative_difference=difference, limit=limit, notes=notes)


_POINTS = {0: "prompts", 1: "points"}
_DYNAMIC = {"point_coords": _POINTS, "point_labels": _POINTS, "mask_input": {0: "mask_inputs"}}


def example_inputs(size: int) -> dict[str, Tensor]:
    """Return inputs of all dynamic axes' lengths, by name, for an encoder's square of `size` pixels."""
    grid = size // 16
    shapes = ((1, 256, grid, grid), (3, 4, 2), (3, 4), (2, 1, 4 * grid, 4 * grid), (1,))
    tensors = [*(torch.ones(shape) for shape in shapes), torch.tensor([size * 1.0, size * 2.0])]
    return dict(zip(INPUTS, tensors, strict=True))


def _compare(
    sam: Sam, decoder: Decoder, session: Session, cases: Sequence[Mapping[str, Tensor]]
) -> tuple[float, float]:
    """Return the largest relative difference from SamPredictor over all cases, and the limit for it."""
    exact = copy.deepcopy(decoder).double()
    predictor = SamPredictor(sam)
    difference, limit = 0.0, LIMIT
    for inputs in cases:
        wanted = _predict_torch(predictor, inputs)
        with torch.no_grad():
            precise = exact(*(value.double() for value in inputs.values()))
        for mine, theirs, true in zip(session.run(inputs), wanted, precise, strict=True):
            difference = max(difference, relative_difference(mine, theirs))
            limit = max(limit, ROUNDING * relative_difference(theirs, true))
    return difference, limit


def _compare_upscaling(sam: Sam, session: Session, cases: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the largest relative difference of masks from Sam's upscaling of the same low-resolution masks."""
    difference = 0.0
    for inputs in cases:
        masks, _, low = session.run(inputs)
        original = _original_size(inputs)
        resized = resized_size(*original, sam.image_encoder.img_size)
        wanted = sam.postprocess_masks(low, resized, original)
        difference = max(difference, relative_difference(masks, wanted))
    return difference


def comparison_inputs(model: Model) -> Iterator[dict[str, Tensor]]:
    """Generate inputs: points, boxes, both, with and without masks, one prompt and several, several photo sizes."""
    size, half = model.image_size, model.image_size // 2
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        emb_1CHW = model.sam.image_encoder(synthetic_pixels(1, model.student_size))

    def case(labels: list[list[int]], masks: int, height: int, width: int) -> dict[str, Tensor]:
        labels_PN = torch.tensor(labels, dtype=torch.float32)
        coords_PN2 = torch.rand(*labels_PN.shape, 2, generator=generator) * half
        coords_PN2[labels_PN == 3] += half  # right of and below the box's other corner
        mask_p1hw = torch.randn(max(masks, 1), 1, size // 4, size // 4, generator=generator) * 5
        sizes_2 = torch.tensor([float(height), float(width)])
        has_mask_1 = torch.tensor([float(masks > 0)])
        tensors = (emb_1CHW, coords_PN2, labels_PN, mask_p1hw, has_mask_1, sizes_2)
        return dict(zip(INPUTS, tensors, strict=True))

    yield case([[1, -1]], 0, half + 1, half * 2 // 3)
    yield case([[2, 3], [2, 3], [2, 3]], 0, size, size)
    yield case([[1, 0, 0, 2, 3]], 1, size * 3 // 2, size + 7)
    yield case([[1, 0, -1], [0, 1, -1]], 2, size * 3 // 4, size * 5 // 4 + 1)


def _original_size(inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    height, width = (int(side) for side in inputs["orig_im_size"].tolist())
    return height, width


def _predict_torch(predictor: SamPredictor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the file's three outputs with SamPredictor, the single mask first, then the three masks."""
    predictor.features = inputs["image_embeddings"]
    original = _original_size(inputs)
    predictor.original_size = original
    predictor.input_size = resized_size(*original, predictor.model.image_encoder.img_size)
    predictor.is_image_set = True
    labels_PN, coords_PN2 = inputs["point_labels"], inputs["point_coords"]
    points_N = (labels_PN[0] == 0) | (labels_PN[0] == 1)
    corners_N = labels_PN[0] >= 2
    points, boxes = bool(points_N.any()), bool(corners_N.any())
    single, several = (
        predictor.predict_torch(
            point_coords=coords_PN2[:, points_N] if points else None,
            point_labels=labels_PN[:, points_N] if points else None,
            boxes=coords_PN2[:, corners_N].flatten(1) if boxes else None,
            mask_input=inputs["mask_input"] if inputs["has_mask_input"].item() else None,
            multimask_output=multimask,
            return_logits=True,
        )
        for multimask in (False, True)
    )
    masks, iou, low = (torch.cat(pair, dim=1) for pair in zip(single, several, strict=True))
    return masks, iou, low
