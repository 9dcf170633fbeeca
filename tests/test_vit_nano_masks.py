"""What vit_nano's masks are worth: on generated pictures of a seed that it was not trained on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mobilesam.verify import EvaluateConfig, evaluate_masks

GENERATOR = Path(__file__).parents[1] / "examples" / "generate_pictures.py"
HELD_OUT_SEED = "2"
# What docs/VIT_NANO.md says, less what so few pictures may differ by.
LEAST = {"center_picked": 0.6, "center_oracle": 0.7}


@pytest.mark.parametrize(
    ("image_size", "pictures"), [(256, 16), pytest.param(1024, 12, marks=pytest.mark.long)]
)
def test_it_segments_pictures_that_it_never_saw(tmp_path: Path, image_size: int, pictures: int) -> None:
    made = ["--out", tmp_path, "--seed", HELD_OUT_SEED, "--count", pictures, "--side", image_size]
    subprocess.run([sys.executable, GENERATOR, *map(str, made)], check=True, capture_output=True)
    config = EvaluateConfig(models=(("nano", "vit_nano"),), images=tmp_path, image_size=image_size)
    (nano,) = evaluate_masks(config)["models"]
    for protocol, least in LEAST.items():
        assert nano["labels"][protocol]["prompts"] > 5 * pictures
        assert nano["labels"][protocol]["miou"] >= least, protocol
