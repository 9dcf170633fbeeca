"""What is written down of SAM's head is what segment_anything's classes have."""

from __future__ import annotations

import subprocess
import sys

from mobilesam.sam.modeling.head import SamHead
from mobilesam.sam.modeling.head_shapes import HQ_PREFIXES, head_shapes
from mobilesam.sam.modeling.hq import HqMaskDecoder
from mobilesam.sam.registry import TEACHERS


def test_the_heads_names_and_shapes_are_those_of_segment_anythings_classes_in_their_order() -> None:
    wanted = {key: value.shape for key, value in SamHead(1024).state_dict().items()}
    assert list(head_shapes().items()) == list(wanted.items())


def test_sam_hqs_names_and_shapes_are_those_of_the_class() -> None:
    decoder = {f"mask_decoder.{key}": value.shape for key, value in HqMaskDecoder(64).state_dict().items()}
    shapes = head_shapes(64)
    assert {key: shape for key, shape in shapes.items() if key.startswith("mask_decoder.")} == decoder
    added = shapes.keys() - head_shapes().keys()
    assert added == {key for key in shapes if key.startswith(HQ_PREFIXES)}
    # The published file for ViT-H is longer than SAM's by these weights, and by the zip records of 25 tensors.
    longer = (TEACHERS["hq_vit_h"].checkpoint.bytes or 0) - (TEACHERS["vit_h"].checkpoint.bytes or 0)
    weights = sum(4 * shape.numel() for key, shape in head_shapes(1280).items() if key in added)
    assert len(added) == 25
    assert 0 < longer - weights < 25 * 500


def test_a_worker_of_precompute_starts_without_torchvision_and_torchs_compiler() -> None:
    program = (
        "import sys\n"
        "import mobilesam.precompute.worker, mobilesam.precompute.shard_task\n"
        "from mobilesam.sam.teacher import load_teacher\n"
        "load_teacher('vit_nano', None, image_size=64, device='cpu')\n"
        "slow = {'segment_anything', 'torchvision', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
