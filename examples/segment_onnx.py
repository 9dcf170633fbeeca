"""Segment a photo by one point, with onnxruntime, numpy and Pillow alone: no torch, no mobilesam.

    python examples/segment_onnx.py encoder.onnx decoder.onnx photo.jpg X Y mask.png

X and Y are pixels of the photo. `mobilesam export --out FOLDER` makes the two ONNX files.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read_photo(file: str) -> Image.Image:
    """Return a photo upright in RGB; grey of 12 or 16 bits is scaled to 8, where Pillow would clip it to white."""
    with open(file, "rb") as stream:  # of a file that it opens itself, Pillow doesn't turn some TIFFs
        opened = Image.open(io.BytesIO(stream.read()))
    tags = getattr(opened, "tag_v2", {})  # of a TIFF
    white = 2 ** tags.get(258, (16,))[0] - 1
    white_is_zero = tags.get(262) == 0
    photo = ImageOps.exif_transpose(opened)
    if photo.mode in ("I", "F"):
        sys.exit(
            f"{file}: pixels of 32 bits or signed ones have no known white level: convert them to 8 or 16 bits"
        )
    if photo.mode.startswith("I;16"):
        grey = (np.asarray(photo, dtype=np.uint32) * 255 + white // 2) // white
        photo = Image.fromarray((255 - grey if white_is_zero else grey).astype(np.uint8))
    photo.info.pop("transparency", None)  # alpha is dropped, the colours below it are used
    return photo.convert("RGB")


def resized_size(photo: Image.Image, size: int) -> tuple[int, int]:
    """Return width and height of a photo whose longer side is resized to `size`."""
    scale = size / max(photo.size)
    width, height = (int(side * scale + 0.5) for side in photo.size)
    return width, height


def prepare(photo: Image.Image, recipe: dict) -> np.ndarray:
    """Return the encoder's input, float32 (1, 3, size, size)."""
    size = recipe["resize"]["image_size"]
    width, height = resized_size(photo, size)
    resized_HWC = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    mean_C, std_C = (np.array(recipe["normalize"][name], dtype=np.float32) for name in ("mean", "std"))
    pixels_BCHW = np.zeros((1, 3, size, size), dtype=np.float32)
    pixels_BCHW[0, :, :height, :width] = ((resized_HWC - mean_C) / std_C).transpose(2, 0, 1)
    return pixels_BCHW


def prompt(x: float, y: float, photo: Image.Image, side: int) -> dict[str, np.ndarray]:
    """Return the decoder's inputs for one point on the object, x and y in pixels of the photo.

    `side` is that of the decoder's low-resolution masks: a quarter of SAM's square, on which the decoder takes
    points. The encoder may take a smaller photo.
    """
    width, height = resized_size(photo, 4 * side)
    return {
        # A prompt without a box ends with a point of label -1.
        "point_coords": np.array(
            [[[x * width / photo.width, y * height / photo.height], [0, 0]]], dtype=np.float32
        ),
        "point_labels": np.array([[1, -1]], dtype=np.float32),
        "mask_input": np.zeros((1, 1, side, side), dtype=np.float32),
        "has_mask_input": np.zeros(1, dtype=np.float32),
        "orig_im_size": np.array([photo.height, photo.width], dtype=np.float32),
    }


def main(encoder_file: str, decoder_file: str, photo_file: str, x: str, y: str, mask_file: str) -> None:
    if os.path.exists(mask_file):
        sys.exit(f"{mask_file} exists: give another name")
    encoder, decoder = (
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for file in (encoder_file, decoder_file)
    )
    recipe = json.loads(encoder.get_modelmeta().custom_metadata_map["preprocessing"])
    photo = read_photo(photo_file)

    started = time.perf_counter()
    (embeddings,) = encoder.run(None, {"pixels": prepare(photo, recipe)})
    embedded = time.perf_counter()
    inputs = prompt(float(x), float(y), photo, 4 * embeddings.shape[-1])
    masks, iou, _ = decoder.run(None, {"image_embeddings": embeddings, **inputs})
    # One point is ambiguous: take the best rated of the three masks for such prompts.
    best = 1 + int(iou[0, 1:].argmax())
    decoded = time.perf_counter()

    Image.fromarray((masks[0, best] > 0).astype(np.uint8) * 255).save(mask_file)
    print(f"embedding {embedded - started:.3f} s, mask {decoded - embedded:.3f} s")
    print(f"predicted IoU {iou[0, best]:.3f}, {(masks[0, best] > 0).mean():.1%} of the photo: {mask_file}")


if __name__ == "__main__":
    if len(sys.argv) != 7:
        sys.exit(__doc__)
    main(*sys.argv[1:])
