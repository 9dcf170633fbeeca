from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mobilesam.common.errors import VerifyError
from mobilesam.common.outputs import marked
from mobilesam.verify.gallery import Gallery, Sample, Samples, build_gallery
from mobilesam.verify.rendering.charts import Curves
from mobilesam.verify.report import (
    EVALUATE_REPORT,
    SWEEP_REPORT,
    VERIFY_REPORT,
    ReportData,
    check_report,
    render,
    write_report,
)
from mobilesam.verify.table import table_lines

HOSTILE = 'a/<script>alert("1")</script>&amp;\n\udcff" onload="x.jpg'
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags and text of a page whose elements are all closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def sample(key: str, seed: int) -> Sample:
    rng = np.random.default_rng(seed)
    valid_gg = np.zeros((16, 16), dtype=bool)
    valid_gg[:11] = True
    teacher_CHW, student_CHW = rng.normal(size=(2, 256, 16, 16)).astype(np.float32)
    return Sample(
        key=key,
        photo_HWC=rng.integers(0, 255, (171, 256, 3), dtype=np.uint8),
        valid_gg=valid_gg,
        teacher_CHW=teacher_CHW,
        student_CHW=student_CHW,
        metrics={"cosine": 0.5, "cosine_valid": 0.6, "mse": 0.1, "mse_valid": 0.2},
    )


def gallery(worst: str, best: str | None = None) -> Gallery | None:
    low, high = sample(worst, 0), None if best is None else sample(best, 1)
    samples = Samples(
        worst=[low],
        best=[] if high is None else [high],
        examples={"best": high or low, "median": low, "worst": low},
    )
    return build_gallery(samples)


def result(**changes: object) -> dict:
    subject = {
        "student": "tiny_vit",
        "run": "tiny_vit-0123abcd",
        "teacher": "vit_b",
        "split": "val",
        "notes": [],
        "thresholds": {"min_cosine": None, "min_skill": None},
        "report": None,
    }
    cosine = {"mean": 0.91, "p5": 0.82, "min": 0.73}
    numbers = {"mse": 0.011, "relative_mse": 0.12, "cosine": cosine, "skill": 0.83}
    valid = {f"{name}_valid": value for name, value in numbers.items()}
    base = {"images": 3, **numbers, **valid, "passed": True, "failed_checks": [], "subject": subject}
    return {name: changes.get(name, value) for name, value in base.items()} | {
        "subject": {name: changes.get(name, value) for name, value in subject.items()}
    }


CURVES = Curves(
    train_step=[1, 2, 3, 4],
    train_loss=[1.0, 0.5, 0.2, 0.1],
    val_epoch=[1, 2],
    val_step=[2, 4],
    val_loss=[0.6, 0.2],
    val_cosine=[0.5, 0.9],
    val_skill=[float("nan"), 0.8],
    loss_region="all",
)


def data(**changes: object) -> ReportData:
    values: dict = {
        "result": result(),
        "created": "2025-01-02 03:04 UTC",
        "provenance": {"Store": [("path", "/data/store.zarr")]},
        "cosines": [0.8, 0.9, 0.95],
        "curves": CURVES,
        "gallery": gallery("worst.jpg", "best.jpg"),
    }
    return ReportData(**(values | changes))


def test_the_page_loads_nothing_and_runs_nothing():
    html = render(data())
    page = Page(html)
    assert page.all("script") == []
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert (attrs.get(name) or "data:").startswith(("data:", "#")), (tag, attrs)
    # What is left are the two names that make an element SVG; a browser fetches neither.
    urls = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"')]*", re.sub(r"base64,[\w+/=]+", "", html)))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_every_picture_has_a_text_alternative_and_ids_are_unique():
    page = Page(render(data()))
    assert len(page.all("img")) == 2 * 3 + 2 * 4 + 1
    assert all(attrs.get("alt") for attrs in page.all("img"))
    charts = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(charts) == 3
    assert all(attrs["aria-label"] for attrs in charts)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for name in ("aria-labelledby", "xlink:href"):
            assert (attrs.get(name) or ids[0]).removeprefix("#") in ids


def test_charts_take_their_colours_from_the_page():
    svgs = re.findall(r"<svg.*?</svg>", render(data()), flags=re.DOTALL)
    assert len(svgs) == 3
    for svg in svgs:
        assert "var(--series-1)" in svg
        assert not re.search(r"#[0-9a-f]{6}\b", svg)


def test_rendering_is_repeatable_and_leaves_matplotlib_as_it_was():
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    assert render(data()) == render(data())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("place", ["key", "student", "run", "store", "note"])
def test_names_that_are_markup_are_shown_and_not_obeyed(place, tmp_path):
    changes: dict = {}
    if place == "key":
        changes["gallery"] = gallery(HOSTILE)
    elif place == "store":
        changes["provenance"] = {"Store": [("path", HOSTILE)]}
    else:
        changes["result"] = result(**({"notes": [HOSTILE]} if place == "note" else {place: HOSTILE}))
    write_report(tmp_path / "report.html", data(**changes))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.all("script") == []
    assert not any("onload" in attrs for _, attrs in page.tags)
    assert 'a/<script>alert("1")</script>&amp;\\n\\udcff" onload="x.jpg' in page.text


def test_the_verdict_says_what_failed_with_both_numbers():
    failed = [{"check": "min_skill", "metric": "skill_valid", "value": 0.83, "threshold": 0.9}]
    thresholds = {"min_skill": 0.9, "min_cosine": 0.5}
    page = Page(render(data(result=result(passed=False, failed_checks=failed, thresholds=thresholds))))
    assert "Failed." in page.text
    assert "1 of 2 thresholds missed" in page.text
    assert "skill 0.83 is below 0.9" in page.text
    passed = Page(render(data(result=result(thresholds=thresholds | {"min_skill": 0.8}))))
    assert "Passed." in passed.text
    assert "Both thresholds are" in passed.text
    assert "No thresholds set." in Page(render(data())).text


def test_undefined_numbers_are_shown_as_undefined():
    bare = result(
        skill=None,
        skill_valid=None,
        relative_mse_valid=None,
        cosine_valid={"mean": None, "p5": None, "min": None},
    )
    html = render(data(result=bare, cosines=[]))
    assert "undefined" in Page(html).text
    assert ">nan<" not in html
    assert "None" not in Page(html).text
    *lines, answer = table_lines(bare)
    assert sum("undefined" in line for line in lines) == 5
    assert answer == "The student can't be judged: its skill on 3 held-out photos is undefined."


def test_without_run_and_pictures_the_page_still_stands():
    page = Page(render(data(result=result(run=None), curves=None, gallery=None, cosines=[0.5])))
    assert page.all("svg") == []
    assert "/data/store.zarr" in page.text


def test_a_report_replaces_the_old_one_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    old = marked(b"<html><head></head></html>", VERIFY_REPORT)
    path.write_bytes(old)
    monkeypatch.setattr(
        "mobilesam.common.durable.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space"))
    )
    with pytest.raises(VerifyError, match="No space"):
        write_report(path, data())
    assert path.read_bytes() == old
    monkeypatch.undo()
    write_report(path, data())
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_report_of_the_same_command_is_replaced(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render(data()), encoding="utf-8")  # as a version without marks wrote it
    check_report(path, VERIFY_REPORT)
    for kind in (EVALUATE_REPORT, SWEEP_REPORT):
        with pytest.raises(VerifyError, match=f"exists and is no {kind} of mobilesam"):
            check_report(path, kind)
    write_report(path, data())
    check_report(path, VERIFY_REPORT)
    path.write_bytes(path.read_bytes() + b"my notes")
    with pytest.raises(VerifyError, match="was changed since"):
        write_report(path, data())
    assert path.read_bytes().endswith(b"my notes")


def test_a_report_that_could_not_be_written_is_refused_beforehand(tmp_path):
    check_report(tmp_path / "report.html", VERIFY_REPORT)
    check_report(Path("report.html"), VERIFY_REPORT)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(VerifyError, match="does not exist"):
        check_report(tmp_path / "absent" / "report.html", VERIFY_REPORT)
    with pytest.raises(VerifyError, match="is a folder"):
        check_report(tmp_path, VERIFY_REPORT)
    (tmp_path / "file").touch()
    with pytest.raises(VerifyError, match="does not exist"):
        check_report(tmp_path / "file" / "report.html", VERIFY_REPORT)


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named_with_its_install_command(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(VerifyError, match=rf"{missing}.*pip install 'mobilesam\[report\]'"):
        check_report(tmp_path / "report.html", VERIFY_REPORT)


def test_without_a_report_neither_matplotlib_nor_jinja2_is_imported():
    code = "import sys; from mobilesam.verify import verify; print({'matplotlib', 'jinja2'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
