"""SAM in an evaluation: with an encoder of any kind, or with a store's embeddings in an encoder's place."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from ...distill.students.cost import count_macs, median_seconds
from ...sam import image_pixels
from ...sam.modeling.head import SamHead, assemble
from ...sam.modeling.masks import PIXELS_AT_ONCE, PROMPTS_AT_ONCE, to_square, upscale_masks
from ...store import EmbeddingStore
from .images import Scene
from .predictor import LIMIT, Answer, Cost, Floats
from .prompts import Prompts


class SamMasks:
    """A SAM's head over one image's embedding: what `SamPredictor.predict_torch` gives, in bounded memory."""

    several = True

    def __init__(self, name: str, sam: Sam) -> None:
        self.name = name
        self.sam = sam
        self._emb_1CHW: Tensor | None = None
        self._original_size = self._resized_size = (0, 0)

    @property
    def image_size(self) -> int:
        """Side in pixels of the encoder's square."""
        return self.sam.image_encoder.img_size

    def set_embedding(
        self, emb_1CHW: Tensor, original_size: tuple[int, int], resized_size: tuple[int, int]
    ) -> bool:
        """Takes an image's embedding, float32 (1, 256, g, g); whether it is finite."""
        self._emb_1CHW = emb_1CHW.float().contiguous()
        self._original_size, self._resized_size = original_size, resized_size
        return bool(torch.isfinite(emb_1CHW).all())

    @torch.no_grad()
    def answer(self, prompts: Prompts, several: bool) -> list[Answer]:
        """Masks, logits above 0, and predicted IoUs, for each prompt."""
        logits_nChw, scores_nC = self.decode(prompts, several)
        masks_nCHW = torch.stack([self._upscale(logits_Chw) for logits_Chw in logits_nChw])
        scores = scores_nC.double().cpu().numpy()
        return [Answer(masks_CHW=m, scores_C=s) for m, s in zip(masks_nCHW, scores, strict=True)]

    def decode(self, prompts: Prompts, several: bool) -> tuple[Tensor, Tensor]:
        """Logits (n, C, 4g, 4g) over the encoder's square, and predicted IoUs (n, C)."""
        assert self._emb_1CHW is not None, "an image comes first"
        encoder, decoder = self.sam.prompt_encoder, self.sam.mask_decoder
        device = self._emb_1CHW.device
        points, boxes = None, None
        if prompts.points_NP2 is not None:
            labels_NP = torch.as_tensor(prompts.labels_NP, dtype=torch.int, device=device)
            points = (self._to_square(prompts.points_NP2).to(device), labels_NP)
        if prompts.boxes_N4 is not None:
            boxes = self._to_square(prompts.boxes_N4.reshape(-1, 2, 2)).reshape(-1, 4).to(device)
        with torch.autocast(device.type, enabled=False):
            sparse, dense = encoder(points=points, boxes=boxes, masks=None)
            return decoder(
                image_embeddings=self._emb_1CHW,
                image_pe=encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=several,
            )

    def _to_square(self, points: Floats) -> Tensor:
        return to_square(points, self._original_size, self._resized_size)

    def _upscale(self, logits_Chw: Tensor) -> Tensor:
        """One by one, since logits at an image's full size take four bytes a pixel."""
        sizes = self.image_size, self._original_size, self._resized_size
        return torch.cat([upscale_masks(one_1hw[None], *sizes) for one_1hw in logits_Chw.split(1)])


class SamContender(SamMasks):
    """A whole SAM, in float32: it embeds each image itself."""

    def __init__(self, name: str, sam: Sam, outline: Callable[[], nn.Module], device: torch.device) -> None:
        super().__init__(name, sam)
        self._outline = outline
        self._device = device

    @torch.no_grad()
    def look(self, scene: Scene) -> bool:
        """Resizes, normalises and embeds."""
        image = scene.resized(self.image_size)
        emb_1CHW = self.sam.image_encoder(image_pixels(image, self.image_size, self._device))
        return self.set_embedding(emb_1CHW, scene.original_size, image.resized_size)

    @torch.no_grad()
    def cost(self) -> Cost:
        """Times one image and one point, on what doesn't matter."""
        size = self.image_size
        pixels_1CHW = torch.zeros(1, 3, size, size, device=self._device)
        encoder_seconds = median_seconds(lambda: self.sam.image_encoder(pixels_1CHW), self._device, LIMIT)
        self.set_embedding(
            torch.zeros(1, 256, size // 16, size // 16, device=self._device), (size, size), (size, size)
        )
        prompt = Prompts.of_points(np.array([[size / 2, size / 2]]))
        outline = self._outline()
        encoder = sum(parameter.numel() for parameter in outline.parameters())
        head = (*self.sam.prompt_encoder.parameters(), *self.sam.mask_decoder.parameters())
        return Cost(
            parameters=encoder + sum(parameter.numel() for parameter in head),
            encoder_parameters=encoder,
            encoder_macs=count_macs(outline, size),
            encoder_ms=1000 * encoder_seconds,
            decoder_ms=1000 * median_seconds(lambda: self.decode(prompt, False), self._device, LIMIT),
        )


class StoreContender(SamMasks):
    """A store's embeddings behind its head: the teacher, without running it."""

    def __init__(self, store: EmbeddingStore, head: SamHead, device: torch.device) -> None:
        super().__init__(store.spec.teacher, assemble(nn.Identity(), head))
        self._store = store
        self._device = device

    def look(self, scene: Scene) -> bool:
        """Reads the image's embedding."""
        assert scene.row is not None, "scenes of the store"
        emb_1CHW = torch.from_numpy(self._store.read([scene.row]).to_float32()).to(self._device)
        resized_size = scene.resized(self.image_size).resized_size
        return self.set_embedding(emb_1CHW, scene.original_size, resized_size)

    def cost(self) -> Cost:
        """Nothing that would say something of the teacher."""
        return Cost()


def prompts_at_once(size: tuple[int, int], device: torch.device) -> int:
    """How many prompts are answered together, so that masks of an image of (height, width) fit into memory."""
    fitting = math.ceil(PIXELS_AT_ONCE / (size[0] * size[1]))
    return min(PROMPTS_AT_ONCE[device.type], fitting)
