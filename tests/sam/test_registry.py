from __future__ import annotations

import subprocess
import sys
from pathlib import PurePosixPath

import pytest
import torch

from mobilesam.common.errors import SamError
from mobilesam.sam.registry import EMBEDDED_TEACHER, TEACHERS, find_teacher_info


@pytest.mark.parametrize("name", TEACHERS)
def test_the_registry_counts_each_encoders_parameters(name: str) -> None:
    info = TEACHERS[name]
    with torch.device("meta"):
        encoder = info.encoder.build(info.trained_image_size)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == info.parameters


def test_only_the_embedded_teacher_has_no_checkpoint_file() -> None:
    assert [name for name, info in TEACHERS.items() if info.embedded] == [EMBEDDED_TEACHER]
    for info in TEACHERS.values():
        if info.checkpoint is not None:
            assert PurePosixPath(info.checkpoint.url).name == info.checkpoint.name
            assert (info.checkpoint.sha256 is None) == (info.checkpoint.bytes is None)
            assert len(bytes.fromhex(info.checkpoint.sha256 or "00" * 32)) == 32


def test_teachers_are_found_by_name_in_the_order_of_the_command_line() -> None:
    assert list(TEACHERS) == [
        "vit_h", "vit_l", "vit_b", "hq_vit_h", "hq_vit_l", "hq_vit_b", "mobile_sam", "vit_nano",
    ]  # fmt: skip
    assert all(find_teacher_info(name).name == name for name in TEACHERS)
    with pytest.raises(
        SamError, match=r"unknown teacher 'vit_x': use vit_h, vit_l, vit_b, hq_vit_h, .*, vit_nano"
    ):
        find_teacher_info("vit_x")


def test_reading_the_registry_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from mobilesam.sam.registry import TEACHERS\n"
        "print(len(TEACHERS), sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "8 []\n"
