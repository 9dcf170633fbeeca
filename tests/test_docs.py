"""Every page of docs/ that tells how to do something is run as it stands.

The short suite parses every command and follows every link; the long one runs the pages from first to last block.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from official_checkpoints import write_checkpoint
from PIL import Image

from mobilesam.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TASKS = (
    "YOUR_PHOTOS.md", "SA1B_CLUSTER.md", "TRAINING.md", "COMPARING.md", "APPLICATION.md", "WEB_DEMO.md",
    "PYTHON_API.md", "DOCTOR.md",
)  # fmt: skip
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's blocks."""
    return BLOCK.findall((DOCS / page).read_text())


def _commands(page: str) -> list[str]:
    return [
        line.partition("  #")[0].strip()
        for language, text in _blocks(page)
        if language == "sh"
        for line in text.splitlines()
    ]


@pytest.mark.parametrize("line", [line for page in TASKS for line in _commands(page)])
def test_every_command_line_in_the_pages_is_accepted(line: str) -> None:
    words = shlex.split(line)
    if "mobilesam" not in words:
        assert words[0] in ("dask", "python"), f"{line}: a command that no test runs"
        return
    name, *arguments = words[words.index("mobilesam") + 1 :]
    assert main.commands[name].make_context(name, arguments).params


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == set(PAGES) - {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_somewhere(page: str) -> None:
    text = (DOCS / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (DOCS / target).exists(), target


@pytest.mark.parametrize(
    "page", ["ARCHITECTURE.md", "RELIABILITY.md", "PERFORMANCE.md", "SCALE.md", "VIT_NANO.md"]
)
def test_every_source_file_that_a_page_names_exists(page: str) -> None:
    rooms = "common|store|sam|precompute|distill|predict|verify|doctor|tests|benchmarks|examples"
    for name in re.findall(rf"`((?:{rooms})/[\w/.]+)`", (DOCS / page).read_text()):
        assert (ROOT / name).exists(), name


def _photos(folder: Path, count: int = 6) -> None:
    """Smooth pictures of many colours, 60 to 100 pixels a side."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        size = tuple(int(side) for side in rng.integers(60, 100, 2))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")


def _run_page(page: str, adapt: Callable[[list[str]], list[str] | None]) -> None:
    """Run a page's blocks in order, in the current directory. `adapt` makes a command's words fit for a test; None
    leaves the command out."""
    names: dict[str, object] = {"__name__": "__main__"}
    for language, text in _blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), names)
            continue
        for line in text.splitlines():
            words = adapt(shlex.split(line.partition("  #")[0]))
            if words is None:
                continue
            if words[0] == "mobilesam":
                with contextlib.suppress(SystemExit):
                    assert main(words[1:], standalone_mode=False) in (None, 0), line
            else:
                subprocess.run(words, check=True)


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.mark.long
def test_the_python_page_runs_from_its_first_block_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilesam.distill import STUDENTS

    monkeypatch.setattr("mobilesam.distill.students.registry.STUDENTS", dict(STUDENTS))
    _photos(tmp_path / "photos")
    _run_page("PYTHON_API.md", lambda words: words)
    assert (tmp_path / "exported" / "encoder.onnx").exists()
    assert (tmp_path / "overlay.png").exists()


def _small(words: list[str]) -> list[str]:
    """The same command at 128 pixels, a few steps long, on the CPU."""
    if words[:2] == ["mobilesam", "precompute"]:
        return [*words, "--image-size", "128", "--device", "cpu", "--audit", "1"]
    if words[:2] == ["mobilesam", "distill"]:
        words = [
            "1" if before == "--epochs" else word for before, word in zip(["", *words], words, strict=False)
        ]
        return [*words, "--val-fraction", "0.3", "--device", "cpu"]
    return words


@pytest.mark.long
def test_the_page_on_your_own_photos_runs_with_a_checkpoint_in_sams_format(tmp_path: Path) -> None:
    _photos(tmp_path / "photos")
    write_checkpoint("vit_b", tmp_path / "my_sam.pth")
    _run_page("YOUR_PHOTOS.md", _small)
    for page in ("report.html", "masks.html"):
        assert (tmp_path / page).read_text().count("data:image/") >= 3, f"{page} shows pictures"


@pytest.mark.long
def test_the_page_on_sa_1b_runs_on_two_small_tars(tmp_path: Path) -> None:
    _photos(tmp_path / "photos", 12)
    for number in range(2):
        with tarfile.open(f"sa_00000{number}.tar", "w") as tar:
            for photo in sorted((tmp_path / "photos").iterdir())[number::2]:
                tar.add(photo, photo.name)
    shutil.rmtree(tmp_path / "photos")

    def adapt(words: list[str]) -> list[str] | None:
        if "10.0.0.1:8786" in " ".join(words) or words[0] == "dask" or not words:
            return None  # a cluster: tests/precompute and tests/verify/sweep run those
        if words[0] == "torchrun":
            words = [*words, "--val-fraction", "0.3", "--device", "cpu", "--student", "timm:test_resnet"]
            return [str(Path(sys.executable).parent / "torchrun"), *words[1:2], "2", *words[3:]]
        if words[1] == "sweep":
            return [
                *words,
                "--student",
                "timm:test_resnet",
                "--val-fraction",
                "0.3",
                "--points",
                "2",
                "--device",
                "cpu",
            ]
        return [*_small(words), *(["--teacher", "vit_nano"] if words[1] == "precompute" else [])]

    _run_page("SA1B_CLUSTER.md", adapt)
    assert (tmp_path / "sweeps" / "length" / "report.html").exists()


@pytest.mark.long
def test_the_page_on_applications_runs_with_a_student(tmp_path: Path) -> None:
    _photos(tmp_path / "photos")
    given = ["--images", "photos", "--teacher", "vit_nano", "--image-size", "256", "--device", "cpu"]
    main(["precompute", *given], standalone_mode=False)
    options = ["--epochs", "1", "--val-fraction", "0.3", "--device", "cpu", "--out", "runs/mine"]
    main(["distill", *options], standalone_mode=False)
    shutil.copy(ROOT / "examples" / "photos" / "coffee.jpg", tmp_path / "photo.jpg")

    def adapt(words: list[str]) -> list[str]:
        return [sys.executable, str(ROOT / words[1]), *words[2:]] if words[0] == "python" else words

    _run_page("APPLICATION.md", adapt)
    assert (tmp_path / "mask.png").exists()
    assert (tmp_path / "overlay.png").exists()
