"""SAM's encoders on a device, against segment_anything's there, with the same random weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from upstream_vit import randomise, upstream_vit

from mobilesam.sam.device import resolve_device
from mobilesam.sam.registry import TEACHERS


def _cosine(found: Tensor, expected: Tensor) -> float:
    return float(torch.cosine_similarity(found.float(), expected.float(), dim=1).mean())


@pytest.mark.parametrize(("precision", "least"), [("float32", 0.99999), ("bfloat16", 0.999)])
@pytest.mark.parametrize("image_size", [240, 256])
def test_vit_b_gives_segment_anythings_embedding(
    image_size: int, precision: str, least: float, device: torch.device
) -> None:
    resolve_device(device)
    theirs = upstream_vit("vit_b", image_size)
    randomise(theirs, 0)
    theirs = theirs.to(device)
    ours = TEACHERS["vit_b"].encoder.build(image_size).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    pixels = torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        expected = theirs(pixels)
        found = (ours.hold_in_bfloat16() if precision == "bfloat16" else ours)(pixels)
    assert _cosine(found, expected) > least


@pytest.mark.cuda
@pytest.mark.parametrize("teacher", ["vit_b", "vit_l", "vit_h"])
def test_a_whole_teacher_at_batch_8_gives_segment_anythings_embeddings(teacher: str) -> None:
    device = resolve_device("cuda")
    theirs = upstream_vit(teacher, 1024)
    randomise(theirs, 0)
    theirs = theirs.to(device)
    ours = TEACHERS[teacher].encoder.build(1024).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    pixels = torch.randn(8, 3, 1024, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        expected = torch.cat([theirs(one[None]) for one in pixels])
        assert _cosine(ours(pixels), expected) > 0.99999
        assert _cosine(ours.hold_in_bfloat16()(pixels), expected) > 0.999


@pytest.mark.cuda
def test_a_batch_at_1024_pixels_never_waits_for_the_gpu() -> None:
    device = resolve_device("cuda")
    encoder = TEACHERS["vit_nano"].encoder.build(1024).eval().to(device).hold_in_bfloat16()
    pixels = torch.randn(2, 3, 1024, 1024, device=device)
    with torch.no_grad():
        encoder(pixels)  # kernels load and compile
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = encoder(pixels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bool(found.isfinite().all())
