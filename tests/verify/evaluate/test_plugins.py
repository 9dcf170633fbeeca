from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from mobilesam.verify import EvaluateConfig, VerifyError, evaluate_masks, evaluation_lines
from mobilesam.verify.evaluate import plugins


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An image whose left half is dark, with a label for just that half."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.full((40, 60, 3), 250, dtype=np.uint8)
    pixels[:, :30] = (20, 40, 60)
    Image.fromarray(pixels).save(folder / "a.png")
    left = np.zeros((40, 60), dtype=np.uint8, order="F")
    left[:, :30] = 1
    one = {
        "segmentation": {"size": [40, 60], "counts": coco.encode(left)["counts"].decode()},
        "bbox": [0, 0, 30, 40],
    }
    (folder / "a.json").write_text(json.dumps({"image": {"width": 60, "height": 40}, "annotations": [one]}))
    return folder


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a distribution `theirs` whose module has this source and the entry point `dark` for its `open_it`."""

    def install_source(source: str) -> None:
        site = tmp_path / "site"
        info = site / "theirs-1.0.dist-info"
        info.mkdir(parents=True)
        (site / "theirs.py").write_text(source)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[mobilesam.predictors]\ndark = theirs:open_it\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "theirs", raising=False)
        importlib.invalidate_caches()

    return install_source


DARK = '''
import numpy as np

class Dark:
    """Segments all pixels that are as dark as the point, or as the middle of the box."""
    def __init__(self, file, device):
        assert device == "cpu"
        self.threshold = int(file.read_text())
    def set_image(self, image):
        assert image.dtype == np.uint8 and image.shape[2] == 3
        self.red = image[..., 0]
    def predict(self, point_coords=None, point_labels=None, box=None, multimask_output=True):
        x, y = point_coords[0] if box is None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        assert box is not None or point_labels[0] == 1
        like = (self.red < self.threshold) == (self.red[int(y), int(x)] < self.threshold)
        masks = np.stack([~like, like, like & False]) if multimask_output else like[None]
        return masks, np.array([0.1, 0.2, 0.9])[: len(masks)], None

def open_it(file, device):
    return Dark(file, device)
'''


def config(photos: Path, model: str, **options: Any) -> EvaluateConfig:
    defaults = {"images": photos, "points": 0, "device": "cpu"}
    return EvaluateConfig(models=(("other", model),), **(defaults | options))


def test_an_installed_packages_predictor_takes_part(
    photos: Path, tmp_path: Path, install: Callable[[str], None]
) -> None:
    install(DARK)
    (tmp_path / "threshold.txt").write_text("100")
    result = evaluate_masks(config(photos, f"dark:{tmp_path / 'threshold.txt'}", report=tmp_path / "r.html"))
    (model,) = result["models"]
    assert (model["kind"], model["file"]) == ("dark", str(tmp_path / "threshold.txt"))
    ious = {name: found["miou"] for name, found in model["labels"].items()}
    assert ious == {"box": 1.0, "center": 1.0, "center_picked": 0.0, "center_oracle": 1.0}
    assert model["parameters"] is None
    assert model["encoder_ms"] > 0
    assert model["decoder_ms"] > 0
    assert any(line.split()[:3] == ["other", "dark", "-"] for line in evaluation_lines(result))


def test_a_predictor_is_timed_on_the_device_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has to be waited for: calls return when its work is queued."""
    devices: list[torch.device] = []
    monkeypatch.setattr(plugins, "median_seconds", lambda call, device, limit: devices.append(device) or 1.0)
    given = torch.device("meta")
    plugins.PluginPredictor("other", object(), given).cost()
    assert devices == [given, given]


def test_a_predictor_that_is_not_installed_is_refused_with_those_that_are(
    photos: Path, install: Callable[[str], None]
) -> None:
    with pytest.raises(VerifyError, match=r"no installed package has a predictor 'dark' \(there are: none\)"):
        evaluate_masks(config(photos, "dark:x"))
    install(DARK)
    with pytest.raises(
        VerifyError, match=r"no installed package has a predictor 'light' \(there are: dark\)"
    ):
        evaluate_masks(config(photos, "light:x"))


BROKEN = {
    "can't be loaded": ("import nowhere", "the entry point dark of mobilesam.predictors failed with ModuleNotFound"),
    "can't open": ("def open_it(file, device): raise OSError('no weights')", "failed with OSError: no weights"),
    "is none": ("def open_it(file, device): return object()", "has no method set_image"),
    "fails at an image": (DARK.replace("assert image.dtype", "assert 0 and image.dtype"), "other's set_image failed"),
    "fails at a prompt": (DARK.replace("x, y = point", "boom, y = point"), "other's predict failed with NameError"),
    "gives masks of another size": (DARK.replace("like[None]", "like[None, :5]"), r"gave masks \(1, 5, 60\)"),
    "gives more scores": (DARK.replace("[: len(masks)]", ""), r"and scores \(3,\), not masks \(C, 40, 60\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_predictor_that_misbehaves_is_an_error_that_names_it(
    name: str, photos: Path, tmp_path: Path, install: Callable[[str], None]
) -> None:
    source, message = BROKEN[name]
    install(source)
    (tmp_path / "threshold.txt").write_text("100")
    with pytest.raises(VerifyError, match=message):
        evaluate_masks(config(photos, f"dark:{tmp_path / 'threshold.txt'}"))


ULTRALYTICS = '''
"""As much of ultralytics' interface as FastSAM is used through: quadrants, and a fifth mask of everything."""
import os
import sys
import numpy as np
import torch

SETTINGS = dict(os.environ)
print("ultralytics says hello")

class Masks:
    def __init__(self, data): self.data = data

class Results:
    def __init__(self, masks): self.masks = None if masks is None else Masks(masks)

class Predictor:
    def prompt(self, results, bboxes=None, points=None, labels=None):
        masks = results.masks.data
        chosen = torch.zeros(len(masks), dtype=torch.bool)
        if points is not None:
            assert points.dtype == np.int64
            inside = torch.stack([masks[:, y, x] for x, y in points])
            labels = torch.as_tensor(labels)
            chosen = inside[labels == 1].any(dim=0) & ~inside[labels == 0].any(dim=0)
        if bboxes is not None:
            x0, y0, x1, y1 = map(int, bboxes)
            chosen[int(masks[:, y0:y1, x0:x1].flatten(1).sum(dim=1).argmax())] = True
        print("prompted")
        return [Results(masks[chosen] if chosen.any() else None)]

class FastSAM:
    def __init__(self, file):
        assert open(file).read() == "weights"
        self.model = torch.nn.Linear(3, 4)
        self.predictor = Predictor()
    def predict(self, source, device, imgsz, conf, iou, retina_masks, verbose):
        assert retina_masks and not verbose and device == "cpu"
        assert source.flags.c_contiguous
        if source.shape == (40, 60, 3):
            assert source[0, 0].tolist() == [60, 40, 20]  # BGR
        height, width = source.shape[:2]
        masks = torch.zeros(3, height, width, dtype=torch.bool)
        masks[0, : height // 2, : width // 2] = True
        masks[1, height // 2 :, : width // 2] = True
        masks[2, :, width // 2 :] = True
        return [Results(masks)]
'''


@pytest.fixture
def ultralytics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in module and a file of weights for it."""
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "ultralytics.py").write_text(ULTRALYTICS)
    monkeypatch.syspath_prepend(str(tmp_path / "stand-in"))
    for name in ("YOLO_AUTOINSTALL", "YOLO_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "ultralytics", raising=False)
    (tmp_path / "FastSAM.pt").write_text("weights")
    yield tmp_path / "FastSAM.pt"
    sys.modules.pop("ultralytics", None)


@pytest.mark.parametrize("prefix", ["fastsam:", ""])
def test_fastsam_chooses_among_its_masks_of_everything(
    prefix: str, photos: Path, ultralytics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "quick" if prefix else "fastsam"
    result = evaluate_masks(
        EvaluateConfig(
            models=((name, f"{prefix}{ultralytics}"),),
            images=photos,
            teacher="vit_nano",
            image_size=64,
            points=2,
            distances=(20,),
            device="cpu",
        )
    )
    (model,) = result["models"]
    assert (model["kind"], model["licence"]) == ("FastSAM", "ultralytics: AGPL-3.0")
    assert (model["parameters"], model["encoder_macs"], model["decoder_ms"]) == (16, None, None)
    assert model["encoder_ms"] > 0
    # The label is the left half, of which the box and the innermost point choose a quarter of the picture.
    assert {key: found and found["miou"] for key, found in model["labels"].items()} == {
        "box": 0.5, "center": 0.5, "center_picked": None, "center_oracle": None,
    }  # fmt: skip
    assert model["teacher"]["point"]["prompts"] == 4
    assert model["teacher"]["pair_20"]["prompts"] + result["left_out"]["pair_20"] == 4
    assert f"licence of {name}: ultralytics: AGPL-3.0" in evaluation_lines(result)
    # Only results go to standard output, and nothing is installed or sent.
    assert capsys.readouterr().out == ""
    settings = sys.modules["ultralytics"].SETTINGS
    assert (settings["YOLO_AUTOINSTALL"], settings["YOLO_OFFLINE"]) == ("false", "true")


def test_without_ultralytics_the_refusal_names_the_command_and_the_licence(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(VerifyError) as refused:
        evaluate_masks(config(photos, "fastsam:FastSAM-s.pt"))
    assert "licence AGPL-3.0), which is not installed: pip install 'mobilesam[fastsam]'" in str(refused.value)


@pytest.mark.usefixtures("ultralytics")
def test_weights_that_are_not_there_are_not_downloaded(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"--model other: there is no file .*FastSAM-s.pt"):
        evaluate_masks(config(photos, f"fastsam:{tmp_path / 'FastSAM-s.pt'}"))
    (tmp_path / "FastSAM-s.pt").write_text("other bytes")
    with pytest.raises(VerifyError, match=r"--model other: ultralytics failed with AssertionError"):
        evaluate_masks(config(photos, f"fastsam:{tmp_path / 'FastSAM-s.pt'}"))


def test_the_help_names_fastsams_licence() -> None:
    from click.testing import CliRunner

    from mobilesam.cli import main

    page = " ".join(CliRunner().invoke(main, ["evaluate", "--help"]).output.split())
    assert (
        "fastsam:FILE (or the name fastsam) is FastSAM through ultralytics, whose licence is AGPL-3.0" in page
    )
