"""examples/quickstart.ipynb: the outputs that are stored in it, and a run of it from its first cell to its last."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image

from examples.run_notebook import run_notebook

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
MOST_BYTES = 300_000


def _outputs(notebook: nbformat.NotebookNode) -> list[dict[str, Any]]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def _pictures(notebook: nbformat.NotebookNode) -> list[Image.Image]:
    found = [output["data"]["image/jpeg"] for output in _outputs(notebook) if "data" in output]
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


def _text(notebook: nbformat.NotebookNode) -> str:
    return "".join(output["text"] for output in _outputs(notebook) if output["output_type"] == "stream")


def _check_figures(notebook: nbformat.NotebookNode) -> None:
    """The student has learned its photos: skill, the IoU of all their masks, and of the three that are shown."""
    text = _text(notebook)
    figures = re.findall(r"(\d+) photos? (it learned from|held out): skill (-?[\d.]+), mIoU ([\d.]+)", text)
    assert [(int(count), kind) for count, kind, _, _ in figures] == [(11, "it learned from"), (1, "held out")]
    skill, miou = map(float, figures[0][2:])
    assert skill >= 0.8
    assert miou >= 0.55
    ious = [float(iou) for iou in re.findall(r"student's; IoU ([\d.]+)$", text, re.MULTILINE)]
    assert len(ious) == 3
    assert sum(ious) / 3 >= 0.7
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
    assert losses[-1] < losses[0] / 3


def test_the_stored_outputs_are_there_and_small_and_without_errors() -> None:
    assert NOTEBOOK.stat().st_size <= MOST_BYTES
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output["output_type"], output.get("name")) for output in _outputs(notebook)}
    assert kinds == {("display_data", None), ("stream", "stdout")}
    pictures = _pictures(notebook)
    assert len(pictures) == 5
    assert all(picture.width > 2 * picture.height for picture in pictures)
    _check_figures(notebook)


def test_the_notebook_opens_with_what_it_is_and_names_files_that_are_there() -> None:
    first = nbformat.read(NOTEBOOK, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert len(first.source.splitlines()) == 3  # a title, and two lines
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", NOTEBOOK.read_text()):
        assert (EXAMPLES / link).exists(), link


@pytest.mark.long
def test_the_notebook_runs_from_its_first_cell_to_its_last_and_the_student_follows_its_teacher(
    tmp_path: Path,
) -> None:
    shutil.copytree(EXAMPLES / "photos", tmp_path / "photos")
    shutil.copy(NOTEBOOK, tmp_path / "quickstart.ipynb")
    out = tmp_path / "out.ipynb"
    run_notebook(tmp_path / "quickstart.ipynb", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ipynb", "photos", "quickstart.ipynb"]
    notebook = nbformat.read(out, as_version=4)
    assert out.stat().st_size <= MOST_BYTES
    assert len(_pictures(notebook)) == 5
    _check_figures(notebook)
