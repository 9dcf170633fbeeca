"""The page in headless Chromium: every control is used once, and its masks are Python's."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pycocotools import mask as coco

from mobilesam.cli import main
from mobilesam.common.errors import DownloadError
from mobilesam.predict import StudentPredictor, load_model
from mobilesam.predict.config import DemoConfig
from mobilesam.predict.export.web.runtime import find_runtime
from mobilesam.predict.export.web.server import DemoServer
from mobilesam.sam.photos.preprocess import load_image
from mobilesam.sam.weights.download import cache_directory

pytestmark = pytest.mark.long

PHOTOS = Path(__file__).parents[4] / "examples" / "photos"
FIRST, SECOND = PHOTOS / "coffee.jpg", PHOTOS / "cat.png"
POINTS = [[290, 130], [60, 60], [200, 150]]
"""On the cup of the first photo; off it; on the cat of the second."""
BOX = [180, 20, 440, 300]
GREY_SIZE = 512
DRIVER = "playwright-core"
DRIVER_VERSION = "1.65.1"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")

Mask = npt.NDArray[np.bool_]


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("there is no Chromium here")
    return found


@pytest.fixture(scope="module")
def driver(browser: str) -> Path:
    """Folder of playwright-core, fetched once into the cache by npm."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node and npm here to drive the browser")
    folder = cache_directory() / f"{DRIVER}-{DRIVER_VERSION}"
    package = folder / "node_modules" / DRIVER
    if not (package / "package.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-save", "--prefix", str(folder), f"{DRIVER}@{DRIVER_VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm can't fetch {DRIVER}: {done.stderr.strip()[-200:]}")
    return package


@pytest.fixture(scope="module")
def student(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of vit_nano's student at 128 pixels, trained for a few steps: its masks follow the photo."""
    folder = tmp_path_factory.mktemp("student")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _mobilesam("precompute", "--images", PHOTOS, "--teacher", "vit_nano", "--image-size", 128)
        _mobilesam("distill", "--epochs", 8, "--batch-size", 4, "--out", "run")
    return folder / "run"


@pytest.fixture(scope="module")
def demo(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        find_runtime()
    except DownloadError as error:
        pytest.skip(f"no onnxruntime-web here: {error}")
    folder = tmp_path_factory.mktemp("export") / "demo"
    told = json.loads(
        _mobilesam("export", "--student", student, "--format", "web", "--out", folder, "--json")
    )
    assert told["kind"] == "web"
    return folder


def _mobilesam(*arguments: object) -> str:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(demo: Path, driver: Path, browser: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of everything that the page gave while each of its controls was used."""
    folder = tmp_path_factory.mktemp("page")
    server = DemoServer(DemoConfig(folder=demo))
    threading.Thread(target=server.serve, args=(False,), daemon=True).start()
    handler = partial(SimpleHTTPRequestHandler, directory=demo)
    plain = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=plain.serve_forever, daemon=True).start()
    request = {
        "url": server.url, "plain": f"http://127.0.0.1:{plain.server_address[1]}/", "browser": browser,
        "photos": {"first": str(FIRST), "second": str(SECOND)}, "points": POINTS, "box": BOX, "out": str(folder),
        "grey": {"paths": list(map(str, _every_photo(folder))), "size": GREY_SIZE},
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("drive_page.mjs")
    command = ["node", str(script), str(driver), str(folder / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    server.close()
    plain.shutdown()
    plain.server_close()
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def _every_photo(folder: Path) -> list[Path]:
    """The example photos, and one that a camera took upright, 12 megapixels."""
    turned = folder / "turned.jpg"
    if not turned.exists():
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(FIRST) as photo:
            photo.resize((4000, 3000)).save(turned, exif=exif, quality=95)
    return [*sorted(PHOTOS.glob("*.[jp][pn]g")), turned]


class _Python:
    """Masks of one photo by Python, as the page asks for them."""

    def __init__(self, student: Path, photo: Path) -> None:
        torch.set_num_threads(1)
        self._predictor = StudentPredictor(load_model(student).sam)
        self._predictor.set_image(np.asarray(Image.open(photo).convert("RGB")))

    def mask(
        self, points: list[list[int]], labels: list[int], box: list[int] | None = None, before: Any = None
    ) -> tuple[Mask, Any]:
        """The mask of a prompt, and its logits, to be given as `before` to the next prompt of the same object."""
        masks, ious, low = self._predictor.predict(
            np.array(points, dtype=float) if points else None,
            np.array(labels) if points else None,
            box=None if box is None else np.array(box, dtype=float),
            mask_input=before,
            multimask_output=len(points) == 1 and box is None,
        )
        best = int(np.argmax(ious))
        return masks[best], low[best : best + 1]


def _masks(file: Path) -> list[Mask]:
    annotations = json.loads(file.read_text())["annotations"]
    return [coco.decode(each["segmentation"]).astype(bool) for each in annotations]


def _iou(one: Mask, other: Mask) -> float:
    assert 0.005 < other.mean() < 0.9, "a mask that means something"
    return float((one & other).sum() / (one | other).sum())


def test_masks_are_pythons_by_points_boxes_and_touch(out: Path, student: Path) -> None:
    python = _Python(student, FIRST)
    first, logits = python.mask(POINTS[:1], [1])
    both, _ = python.mask(POINTS[:2], [1, 0], before=logits)
    boxed, logits = python.mask([], [], BOX)
    refined, _ = python.mask(POINTS[1:2], [0], BOX, before=logits)
    (at,) = json.loads((out / "keys.json").read_text())["annotations"][2]["point_coords"]
    keyed, _ = python.mask([at], [1])
    cat, _ = _Python(student, SECOND).mask(POINTS[2:], [1])
    wanted = {
        "one-point.json": [first],
        "two-points.json": [both],
        "undone.json": [first],
        "touch.json": [both],
        "box.json": [first, boxed],
        "box-and-point.json": [first, refined],
        "keys.json": [first, refined, keyed],
        "dropped.json": [cat],
    }
    for name, masks in wanted.items():
        found = _masks(out / name)
        assert len(found) == len(masks), name
        assert min(map(_iou, found, masks)) >= 0.99, name


def test_the_encoders_pixels_are_pythons_to_the_grey_level(out: Path) -> None:
    photos = _every_photo(out)
    assert len(photos) > 10
    for index, file in enumerate(photos):
        wanted = load_image(file.read_bytes(), GREY_SIZE).pixels_HWC
        found = np.fromfile(out / f"grey-{index}", np.uint8)
        assert np.array_equal(found, wanted.ravel()), file.name


def test_files_are_those_that_segment_writes(out: Path, results: dict[str, Any]) -> None:
    photo = np.asarray(Image.open(FIRST).convert("RGB"))
    mask = _masks(out / "box-and-point.json")[1]
    assert (results["maskName"], results["fileName"]) == ("coffee-mask.png", "coffee-masks.json")
    assert np.array_equal(np.asarray(Image.open(out / "mask.png").convert("L")), mask * np.uint8(255))
    cutout = np.asarray(Image.open(out / "cutout.png"))
    assert np.array_equal(cutout[..., 3], mask * np.uint8(255))
    assert np.array_equal(cutout[mask][:, :3], photo[mask])
    listed = json.loads((out / "one-point.json").read_text())
    assert listed["image"] == {"width": 600, "height": 400, "file_name": "coffee.jpg"}
    (only,) = listed["annotations"]
    assert only["area"] == coco.area(only["segmentation"])
    assert only["bbox"] == coco.toBbox(only["segmentation"]).tolist()
    assert only["point_coords"] == POINTS[:1]
    assert set(only) == {
        "id", "segmentation", "area", "bbox", "predicted_iou", "stability_score", "crop_box", "point_coords",
    }  # fmt: skip


def test_the_page_uses_threads_where_it_may_and_one_where_it_is_told(results: dict[str, Any]) -> None:
    assert results["isolated"] is True
    assert "Runs on the CPU, " in results["runsOn"]
    assert "Runs on the CPU, 1 thread." in results["single"]
    assert "Runs on the CPU, 1 thread. The server sends no COOP and COEP headers" in results["bare"]
    assert results["kept"] == ["1 point", "1 point, box", "box"]
    assert results["encoder"].endswith(" ms")
    assert results["decoder"].endswith(" ms")


def test_the_page_goes_on_while_a_photo_is_encoded(results: dict[str, Any]) -> None:
    assert results["ticks"] >= 5


def test_the_mask_under_the_pointer_is_drawn_and_objects_can_be_hidden(results: dict[str, Any]) -> None:
    assert results["hovered"] != results["plain"]
    assert results["hides"] is True
    assert results["shows"] is True
    assert results["selected"] == ["true", "false"]


def test_photos_are_dropped_pasted_and_examples_and_another_file_is_refused_in_words(
    results: dict[str, Any],
) -> None:
    assert results["dropped"] == "Photo cat.png, 451 by 300 pixels"
    assert results["pasted"] == "Photo coffee.jpg, 600 by 400 pixels"
    assert results["cleared"] == []
    assert results["example"] == "Photo 1.jpg, 960 by 640 pixels"
    assert "Choose a JPEG, PNG, WebP or AVIF file." in results["refused"]
    assert results["calm"] is True


def test_nothing_is_fetched_from_elsewhere_and_nothing_fails(results: dict[str, Any]) -> None:
    places = {
        "/".join(url.split("/")[:3]) for url in results["requests"] if not url.startswith(("data:", "blob:"))
    }
    assert len(places) == 2, "the server, and the one without headers"
    assert all(place.startswith("http://127.0.0.1:") for place in places)
    assert not any("webgpu" in url or "asyncify" in url for url in results["requests"]), "one build is loaded"
    assert results["errors"] == []


def test_every_control_has_a_name_and_the_page_fits_a_narrow_dark_screen(results: dict[str, Any]) -> None:
    assert results["nameless"] == []
    assert results["said"].startswith("x ")
    assert "arrow keys" in results["help"]
    assert results["overflow"] == 0
    assert results["background"] == "rgb(20, 22, 26)"
