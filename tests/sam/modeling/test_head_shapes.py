"""What is written down of SAM's head is what segment_anything's classes have."""

from __future__ import annotations

import subprocess
import sys

from mobilesam.sam.modeling.head import SamHead
from mobilesam.sam.modeling.head_shapes import head_shapes


def test_the_heads_names_and_shapes_are_those_of_segment_anythings_classes_in_their_order() -> None:
    wanted = {key: value.shape for key, value in SamHead(1024).state_dict().items()}
    assert list(head_shapes().items()) == list(wanted.items())


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
