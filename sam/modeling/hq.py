"""SAM-HQ: SAM's mask decoder with one more token, whose masks use early features of the ViT.

Source: Segment Anything in High Quality (Ke et al., arXiv 2306.01567); weights have the names of SysCV/sam-hq. The
encoder and SAM's own weights of the decoder are frozen SAM; only the layers of `head_shapes.HQ_PREFIXES` were
trained.

segment_anything's classes hand one tensor from the encoder to the decoder. So the encoder here gives embedding and
features as channels of one tensor, and the decoder takes it apart: `SamPredictor` and `SamAutomaticMaskGenerator`
work as with any SAM.

Shape suffixes: B images, Y and X rows and columns of the grid, C channels, P prompts, N tokens of a prompt, T mask
tokens of a prompt (SAM's single mask, then its three), L positions of the flattened embedding, H and W rows and
columns of the embedding, h and w those of low-resolution masks (4g), 1 one; g is the side of the embedding's grid.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from .head import SamHead, load_into, sam_mask_decoder_sizes
from .neck import EMBEDDING_CHANNELS
from .vit import ViTEncoder

_QUARTER, _EIGHTH = EMBEDDING_CHANNELS // 4, EMBEDDING_CHANNELS // 8


class HqEncoder(nn.Module):
    """SAM's ViT whose result carries the features that SAM-HQ's decoder needs.

    Args:
        encoder: the ViT, loaded.
    """

    def __init__(self, encoder: ViTEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Compute (B, 256 + width, g, g): the embedding, then the output of the first block with global attention."""
        emb_BCHW, features_BYXC = self.encoder.embed_with_features(pixels_BCHW)
        return torch.cat((emb_BCHW, features_BYXC.permute(0, 3, 1, 2).to(emb_BCHW.dtype)), dim=1)


class HqMaskDecoder(MaskDecoder):
    """SAM-HQ's mask decoder: one mask per prompt, the sum of SAM's logits and of the HQ token's.

    Args:
        features: channels of the ViT's features.

    Attributes:
        hq_token_only: if True, masks are the HQ token's alone; upstream's option of this name, False by default.
    """

    def __init__(self, features: int) -> None:
        super().__init__(**sam_mask_decoder_sizes())
        self.hq_token_only = False
        self.hf_token = nn.Embedding(1, EMBEDDING_CHANNELS)
        self.hf_mlp = MLP(EMBEDDING_CHANNELS, EMBEDDING_CHANNELS, _EIGHTH, 3)
        self.compress_vit_feat = _upscaling(features, EMBEDDING_CHANNELS)
        self.embedding_encoder = _upscaling(EMBEDDING_CHANNELS, _QUARTER)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(_EIGHTH, _QUARTER, 3, padding=1),
            LayerNorm2d(_QUARTER),
            nn.GELU(),
            nn.Conv2d(_QUARTER, _EIGHTH, 3, padding=1),
        )

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decode one mask per prompt; arguments as in segment_anything's MaskDecoder.

        Args:
            image_embeddings: (1, 256 + width, g, g), from `HqEncoder`.
            image_pe: (1, 256, g, g).
            sparse_prompt_embeddings: (P, N, 256).
            dense_prompt_embeddings: (P, 256, g, g).
            multimask_output: take the best of SAM's three masks for each prompt, by predicted IoU, instead of its
                single one.

        Returns:
            Logits (P, 1, 4g, 4g) and predicted IoUs of SAM's masks (P, 1).
        """
        emb_1CHW, features_1CHW = image_embeddings.tensor_split([EMBEDDING_CHANNELS], dim=1)
        hq_1Chw = self.embedding_encoder(emb_1CHW) + self.compress_vit_feat(features_1CHW)
        output_NC = torch.cat((self.iou_token.weight, self.mask_tokens.weight, self.hf_token.weight))
        prompts = len(sparse_prompt_embeddings)
        tokens_PNC = torch.cat((output_NC.expand(prompts, -1, -1), sparse_prompt_embeddings), dim=1)
        tokens_PNC, image_PLC = self.transformer(
            emb_1CHW + dense_prompt_embeddings, image_pe.expand(prompts, -1, -1, -1), tokens_PNC
        )
        upscaled_PChw = self.output_upscaling(image_PLC.transpose(1, 2).unflatten(2, emb_1CHW.shape[2:]))
        weights_PTC = torch.stack(
            [mlp(tokens_PNC[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1
        )
        sam_PThw = _product(weights_PTC, upscaled_PChw)
        weights_P1C = self.hf_mlp(tokens_PNC[:, 1 + self.num_mask_tokens])[:, None]
        masks_P1hw = _product(weights_P1C, self.embedding_maskfeature(upscaled_PChw) + hq_1Chw)
        iou_PT = self.iou_prediction_head(tokens_PNC[:, 0])
        if multimask_output:
            chosen_P1 = 1 + iou_PT[:, 1:].argmax(dim=1, keepdim=True)
        else:
            chosen_P1 = torch.zeros(prompts, 1, dtype=torch.int64, device=iou_PT.device)
        if not self.hq_token_only:
            masks_P1hw = masks_P1hw + sam_PThw.take_along_dim(chosen_P1[..., None, None], dim=1)
        return masks_P1hw, iou_PT.take_along_dim(chosen_P1, dim=1)


def build_hq_head(state: Mapping[str, Tensor], image_size: int, features: int) -> SamHead:
    """Build SAM-HQ's head, which uses a state's tensors without a copy.

    Args:
        state: `prompt_encoder.*` and `mask_decoder.*` by key, SAM-HQ's own among them.
        image_size: side in pixels of the encoder's square, a multiple of 16.
        features: channels of the ViT's features.

    Returns:
        The head in evaluation mode, its parameters frozen; its decoder takes the result of `HqEncoder`.

    Raises:
        CheckpointError: a key is missing, unknown, or of another shape.
    """
    with torch.device("meta"):
        head = SamHead(image_size)
        head.mask_decoder = HqMaskDecoder(features)
    return load_into(head, state)


def _upscaling(inputs: int, between: int) -> nn.Sequential:
    """Build a branch from the grid g to 4g, to the channels that masks are products of."""
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, between, kernel_size=2, stride=2),
        LayerNorm2d(between),
        nn.GELU(),
        nn.ConvTranspose2d(between, _EIGHTH, kernel_size=2, stride=2),
    )


def _product(weights_PTC: Tensor, features_PChw: Tensor) -> Tensor:
    """Return logits (P, T, h, w): each token's product with the features of each place."""
    return (weights_PTC @ features_PChw.flatten(2)).unflatten(2, features_PChw.shape[2:])
