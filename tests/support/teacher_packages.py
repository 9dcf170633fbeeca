"""Packages with teachers, installed in a folder of the import path, as pip would."""

from __future__ import annotations

from pathlib import Path

AVERAGE = '''
import torch
from torch import nn

class Average(nn.Module):
    """A teacher without a head: means of patches, repeated to 256 channels with other factors."""
    def __init__(self):
        super().__init__()
        self.factors = nn.Parameter(torch.linspace(-1, 1, 256))
    def forward(self, pixels):
        means = nn.functional.avg_pool2d(pixels, 16)
        return means.mean(1, keepdim=True) * self.factors[None, :, None, None] + means[:, :1]

def load(checkpoint, device):
    return Average()
'''
"""Source of a small teacher, whose function takes checkpoint and device alone."""


def install_package(
    site: Path, source: str, *, teacher: str = "theirs", version: str = "1.0", module: str = "their_teacher"
) -> None:
    """Install a distribution named as its module, whose `load` is a teacher; an installed version is replaced.

    Args:
        site: folder in the import path.
        source: source text of the module.
        teacher: name of the entry point.
        version: version of the distribution.
        module: name of the module and distribution.
    """
    site.mkdir(exist_ok=True)
    (site / f"{module}.py").write_text(source)
    for other in site.glob(f"{module}-*.dist-info"):
        for file in other.iterdir():
            file.unlink()
        other.rmdir()
    info = site / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[mobilesam.teachers]\n{teacher} = {module}:load\n")
