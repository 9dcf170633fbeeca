"""SAM-HQ by its authors' own package: random weights, embeddings and masks, computed in a process of its own.

Importing segment_anything_hq replaces TinyViT's entries in timm's registry, which other tests use.

    python upstream_hq.py FOLDER SIZES.json

SIZES has `width`, `depth`, `heads`, `global_blocks`, `image_size`, and `image`, a picture's file. FOLDER gets
`weights.pth`, and `answers.pt` with the embedding, and masks, scores and low-resolution logits by prompt,
`multimask_output` and `hq_token_only`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

PROMPTS: dict[str, dict[str, Any]] = {
    "point": {"point_coords": [[30.0, 40.0]], "point_labels": [1]},
    "points": {"point_coords": [[30.0, 40.0], [50.0, 10.0]], "point_labels": [1, 0]},
    "box": {"box": [10.0, 12.0, 50.0, 44.0]},
}
"""Arguments of `SamPredictor.predict`, for an image of at least 64 x 48 pixels."""


def write_upstream(folder: Path, sizes: Mapping[str, Any], image: Path) -> tuple[Path, dict[str, Any]]:
    """Return the path of SAM-HQ's random weights, and upstream's answers for an image.

    Args:
        folder: folder to write to.
        sizes: width, depth, heads, global_blocks and image_size of the ViT.
        image: picture.
    """
    (folder / "sizes.json").write_text(json.dumps({**sizes, "image": str(image)}))
    done = subprocess.run(
        [sys.executable, __file__, str(folder), str(folder / "sizes.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "weights.pth", torch.load(folder / "answers.pt", weights_only=True)


def _build(sizes: Mapping[str, Any]) -> torch.nn.Module:
    from segment_anything_hq.modeling import (
        ImageEncoderViT,
        MaskDecoderHQ,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    size, width = sizes["image_size"], sizes["width"]
    torch.manual_seed(7)
    encoder = ImageEncoderViT(
        img_size=size, embed_dim=width, depth=sizes["depth"], num_heads=sizes["heads"], mlp_ratio=4, patch_size=16,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), qkv_bias=True, use_rel_pos=True, window_size=14,
        global_attn_indexes=sizes["global_blocks"], out_chans=256,
    )  # fmt: skip
    prompts = PromptEncoder(
        embed_dim=256, image_embedding_size=(size // 16, size // 16), input_image_size=(size, size),
        mask_in_chans=16,
    )  # fmt: skip
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = MaskDecoderHQ(
        num_multimask_outputs=3, transformer=transformer, transformer_dim=256, iou_head_depth=3,
        iou_head_hidden_dim=256, vit_dim=width,
    )  # fmt: skip
    sam = Sam(
        encoder, prompts, decoder, pixel_mean=[123.675, 116.28, 103.53], pixel_std=[58.395, 57.12, 57.375]
    )
    for key, value in sam.state_dict().items():
        if "pos_embed" in key or "rel_pos" in key:  # zeros until trained
            value.normal_(0, 0.2)
    return sam.eval()


def _answers(sam: torch.nn.Module, image: Path) -> dict[str, Any]:
    import numpy as np
    from PIL import Image
    from segment_anything_hq import SamPredictor

    predictor = SamPredictor(sam)
    predictor.set_image(np.asarray(Image.open(image).convert("RGB")))
    answers: dict[str, Any] = {"embedding": predictor.get_image_embedding()}
    for name, prompt in PROMPTS.items():
        arrays = {key: np.array(value) for key, value in prompt.items()}
        for multimask in (False, True):
            for alone in (False, True):
                masks, scores, low = predictor.predict(
                    **arrays, multimask_output=multimask, hq_token_only=alone, return_logits=True
                )
                answers[f"{name} {multimask} {alone}"] = [
                    torch.from_numpy(np.ascontiguousarray(part)) for part in (masks, scores, low)
                ]
    return answers


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder, sizes = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    sam = _build(sizes)
    torch.save(sam.state_dict(), folder / "weights.pth")
    torch.save(_answers(sam, Path(sizes["image"])), folder / "answers.pt")
