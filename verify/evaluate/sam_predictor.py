"""SAM as a predictor: with an encoder of any kind, or with a store's embeddings instead of an encoder.

Shape suffixes: P prompts, N points of one prompt, T masks of one prompt (one, or three), C channels, H and W rows and
columns of an embedding or mask, h and w those of low-resolution masks (4g), g side of the embedding's grid, 1 one,
2 (x, y), 4 (x0, y0, x1, y1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from ...distill.students.cost import count_macs, median_seconds
from ...sam import image_pixels, resized_size
from ...sam.modeling.decode_prompts import Prompts
from ...sam.modeling.head import SamHead, assemble
from ...sam.modeling.masks import PIXELS_AT_ONCE, PROMPTS_AT_ONCE, to_square, upscale_masks
from ...sam.modeling.neck import input_side
from ...store import EmbeddingStore
from .images import LazyImage
from .predictor import TIMING_SECONDS, Cost, PredictedMasks


class HeadPredictor:
    """SAM's head on one image's embedding: same results as `SamPredictor.predict_torch`, in bounded memory.

    Args:
        name: name of the model in the evaluation.
        sam: SAM in evaluation mode, float32.
    """

    multimask = True

    def __init__(self, name: str, sam: Sam) -> None:
        self.name = name
        self.sam = sam
        self._emb_1CHW: Tensor | None = None
        self._original_size = self._resized_size = (0, 0)

    @property
    def image_size(self) -> int:
        """Side in pixels of SAM's square."""
        return self.sam.image_encoder.img_size

    def set_embedding(
        self, emb_1CHW: Tensor, original_size: tuple[int, int], resized_size: tuple[int, int]
    ) -> bool:
        """Set the embedding of the next prompts' image.

        Args:
            emb_1CHW: float (1, 256, g, g), on the head's device; for SAM-HQ's head with more channels (`HqEncoder`).
            original_size: height and width of the image in pixels.
            resized_size: height and width in pixels of the image in the encoder's square.

        Returns:
            True if the embedding is finite.
        """
        self._emb_1CHW = emb_1CHW.float().contiguous()
        self._original_size, self._resized_size = original_size, resized_size
        return bool(torch.isfinite(emb_1CHW).all())

    @torch.no_grad()
    def predict(self, prompts: Prompts, multimask_output: bool) -> list[PredictedMasks]:
        """See `Predictor.predict`; masks are where logits are above 0, scores are predicted IoUs."""
        logits_PThw, scores_PT = self.decode(prompts, multimask_output)
        masks_PTHW = torch.stack([self._upscale(logits_Thw) for logits_Thw in logits_PThw])
        scores = scores_PT.double().cpu().numpy()
        return [PredictedMasks(masks_THW=m, scores_T=s) for m, s in zip(masks_PTHW, scores, strict=True)]

    def decode(self, prompts: Prompts, multimask_output: bool) -> tuple[Tensor, Tensor]:
        """Decode low-resolution masks.

        Args:
            prompts: P prompts, coordinates in pixels of the original image, on the CPU.
            multimask_output: True for SAM's three masks per prompt (T = 3), False for its single mask (T = 1).
                SAM-HQ's head gives one, either way.

        Returns:
            Logits over the encoder's square, (P, T, 4g, 4g), and predicted IoUs, (P, T), float32 on the head's
            device.
        """
        assert self._emb_1CHW is not None, "an image must be set first"
        encoder, decoder = self.sam.prompt_encoder, self.sam.mask_decoder
        device = self._emb_1CHW.device
        points, boxes = None, None
        if prompts.points_PN2.shape[1]:
            labels_PN = prompts.labels_PN.to(device, torch.int)
            points = (self._to_square(prompts.points_PN2).to(device), labels_PN)
        if prompts.boxes_P4 is not None:
            boxes = self._to_square(prompts.boxes_P4.reshape(-1, 2, 2)).reshape(-1, 4).to(device)
        with torch.autocast(device.type, enabled=False):
            sparse, dense = encoder(points=points, boxes=boxes, masks=None)
            return decoder(
                image_embeddings=self._emb_1CHW,
                image_pe=encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask_output,
            )

    def _to_square(self, points: Tensor) -> Tensor:
        return to_square(points.numpy(), self._original_size, self._resized_size)

    def _upscale(self, logits_Thw: Tensor) -> Tensor:
        """Upscale masks one by one: logits at an image's full size take four bytes per pixel."""
        sizes = self.image_size, self._original_size, self._resized_size
        return torch.cat([upscale_masks(one_1hw[None], *sizes) for one_1hw in logits_Thw.split(1)])


class EncoderPredictor(HeadPredictor):
    """Whole SAM with its own encoder, in float32.

    Args:
        name: name of the model in the evaluation.
        sam: SAM in evaluation mode, on `device`.
        outline: function that builds its encoder on the meta device, for counting parameters and operations; None to
            count those of the encoder itself.
        device: device that it computes on.
    """

    def __init__(
        self, name: str, sam: Sam, outline: Callable[[], nn.Module] | None, device: torch.device
    ) -> None:
        super().__init__(name, sam)
        self._outline = outline
        self._device = device

    @property
    def student_size(self) -> int:
        """Side in pixels of the encoder's input."""
        return input_side(self.sam.image_encoder, self.image_size)

    @torch.no_grad()
    def set_image(self, image: LazyImage) -> bool:
        """Resize, normalise and embed an image. See `Predictor.set_image`."""
        resized = image.resized(self.student_size)
        emb_1CHW = self.sam.image_encoder(image_pixels(resized, self.student_size, self._device))
        on_square = resized_size(*resized.original_size, self.image_size)
        return self.set_embedding(emb_1CHW, image.original_size, on_square)

    @torch.no_grad()
    def cost(self) -> Cost:
        """Count parameters and multiply-accumulates; time one image and one point, on zeros. See `Predictor.cost`."""
        size, side = self.image_size, self.student_size
        pixels_1CHW = torch.zeros(1, 3, side, side, device=self._device)
        embeddings: list[Tensor] = []

        def embed() -> None:
            embeddings[:] = [self.sam.image_encoder(pixels_1CHW)]

        encoder_seconds = median_seconds(embed, self._device, TIMING_SECONDS)
        self.set_embedding(embeddings[0], (size, size), (size, size))
        prompt = Prompts.of_points(np.array([[size / 2, size / 2]]))
        decoder_seconds = median_seconds(lambda: self.decode(prompt, False), self._device, TIMING_SECONDS)
        outline = self.sam.image_encoder if self._outline is None else self._outline()
        where = self._device if self._outline is None else "meta"
        encoder = sum(parameter.numel() for parameter in outline.parameters())
        head = (*self.sam.prompt_encoder.parameters(), *self.sam.mask_decoder.parameters())
        return Cost(
            parameters=encoder + sum(parameter.numel() for parameter in head),
            encoder_parameters=encoder,
            encoder_macs=count_macs(outline, side, where),
            encoder_ms=1000 * encoder_seconds,
            decoder_ms=1000 * decoder_seconds,
        )


class StorePredictor(HeadPredictor):
    """Teacher without its encoder: the store's head on the store's embeddings.

    Args:
        store: store open for reading.
        head: the store's head, on `device`.
        device: device that it computes on.
    """

    def __init__(self, store: EmbeddingStore, head: SamHead, device: torch.device) -> None:
        super().__init__(store.spec.teacher, assemble(nn.Identity(), head))
        self._store = store
        self._device = device

    def set_image(self, image: LazyImage) -> bool:
        """Read the embedding of an image of the store. See `Predictor.set_image`."""
        assert image.row is not None, "only images of the store have embeddings"
        emb_1CHW = torch.from_numpy(self._store.read([image.row]).to_float32()).to(self._device)
        resized_size = image.resized(self.image_size).resized_size
        return self.set_embedding(emb_1CHW, image.original_size, resized_size)

    def cost(self) -> Cost:
        """Return an empty cost: the time to read embeddings isn't the teacher's."""
        return Cost()


def prompts_at_once(size: tuple[int, int], device: torch.device) -> int:
    """Return the number of prompts to decode together, so that their masks fit into memory.

    Args:
        size: height and width of the masks in pixels.
        device: device that decodes.
    """
    fitting = math.ceil(PIXELS_AT_ONCE / (size[0] * size[1]))
    return min(PROMPTS_AT_ONCE[device.type], fitting)
