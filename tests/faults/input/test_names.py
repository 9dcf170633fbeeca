"""Unusual file names: each gets its own embedding under its own key, and none has any other effect."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.fault_log import FaultLog
from faults.fixtures import environment, mobilesam
from listener import Listener
from PIL import Image

from mobilesam.distill import DistillConfig, distill
from mobilesam.store import EmbeddingStore
from mobilesam.verify import VerifyConfig, verify

pytestmark = pytest.mark.fault

Run = Callable[..., dict[str, Any]]

NAMES = {
    "newline": b"new\nline.png",
    "carriage return and escape": b"\r\x1b[31mred.png",
    "not UTF-8": b"caf\xe9\xff.png",
    "surrogate in UTF-8": b"\xed\xa0\x80.png",
    "leading dash": b"--help.png",
    "255 bytes": b"n" * 251 + b".png",
    "quotes": b"'a\" $(touch pwned) `b`.png",
    "hash, question mark, percent": b"#a?b%20c%00.png",
    "HTML": b"<img src=x onerror=alert(1)>.png",
    "HTML that closes things": b"\"><script>alert(1)<&#47;script>'-->.png",
    "markup of rich": b"[bold red]x[&#47;].png",
    "template": b"{{ 7*7 }}{% raw %}.png",
    "backslash": b"a\\..\\b.png",
    "spaces and colon": b" C: .png",
    "right to left": "\u202egnp.cod.png".encode(),
    "dots": b"...png",
    "plain": b"plain.png",
}
# Names that only a tar can hold.
TAR_NAMES = {
    "parent": b"../x.png",
    "parents": b"a/../../../x.png",
    "absolute": b"/etc/x.png",
    "two slashes": b"a//b.png",
    "longer than a file's name": b"l" * 300 + b"/" + b"m" * 300 + b".png",
}
HIDDEN = {"dots"}


def picture(number: int) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((64, 40 + number), Image.Resampling.BICUBIC).save(buffer, "png")
    return buffer.getvalue()


def in_a_folder(folder: Path) -> dict[str, bytes]:
    """Write the pictures, half of them in a folder with an unusual name; return {key: file's bytes}."""
    below = os.fsencode(folder) + b"/<b>\n\xff"
    os.makedirs(below)
    files = {}
    for number, name in enumerate(NAMES.values()):
        place = below if number % 2 else os.fsencode(folder)
        with open(place + b"/" + name, "wb") as file:
            file.write(picture(number))
        if not name.startswith(b"."):
            files[os.fsdecode(name if place != below else b"<b>\n\xff/" + name)] = picture(number)
    return files


def in_a_tar(path: Path) -> dict[str, bytes]:
    """Write the pictures into a tar, with names that only a tar can hold; return {key: file's bytes}."""
    files = {}
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as tar:
        for number, name in enumerate([*NAMES.values(), *TAR_NAMES.values()]):
            member = tarfile.TarInfo(os.fsdecode(name))
            member.size = len(picture(number))
            tar.addfile(member, io.BytesIO(picture(number)))
            if not name.startswith(b".") or name.startswith(b".."):
                files[f"{path.name}/{os.fsdecode(name)}"] = picture(number)
    files.pop(f"{path.name}/...png", None)
    return files


class Elements(HTMLParser):
    """Elements of a page in order, each with the names of its attributes; text and links of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.made: list[tuple[str, ...]] = []
        self.links: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.made.append((tag, *(name for name, _ in attrs)))
        self.links |= {str(value) for name, value in attrs if name in ("src", "href")}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("where", ["folder", "tar"])
def test_every_name_gets_its_own_embedding(
    run: Run, fault_log: FaultLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Compares with the same pictures under plain names."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "names" if where == "folder" else tmp_path / "names.tar"
    files = in_a_folder(source) if where == "folder" else in_a_tar(source)
    plain = tmp_path / "plain"
    plain.mkdir()
    order = sorted(files, key=os.fsencode)
    for number, key in enumerate(order):
        (plain / f"{number:03d}.png").write_bytes(files[key])
    outside = set(tmp_path.iterdir())
    run("plain.zarr", images=(plain,))
    result = run(images=(source,))
    assert (result["images"], result["failed"]) == (len(files), 0)
    wrong = 0
    with EmbeddingStore.open("store.zarr") as store, EmbeddingStore.open("plain.zarr") as twin:
        records = store.manifest.records()
        assert [record.key for record in records] == order
        for record in records:
            same = store.read([record.row]).values.tobytes() == twin.read([record.row]).values.tobytes()
            wrong += not same
            fault_log.record(
                call="name", ordinal=record.row, file=ascii(record.key), phase=f"in a {where}", fired=True, lost=0,
                wrong=int(not same), role="coordinator",
            )  # fmt: skip
    assert wrong == 0
    made = {path.name for path in set(tmp_path.iterdir()) - outside}
    assert made == {"plain.zarr", "store.zarr"}, "a name made a file somewhere else"

    # A rerun finds all of them by key, and training and report work with them.
    assert run(images=(source,))["done_before"] == len(files)
    elements = Elements(report_on("store.zarr", len(files)))
    assert "script" not in {name for name, *_ in elements.made}


def report_on(store: str, count: int) -> str:
    """Train on a store's pictures but one, and return the report's HTML on all."""
    distill(
        DistillConfig(
            store=Path(store),
            out=Path(f"{store}.run"),
            epochs=1,
            batch_size=8,
            device="cpu",
            precision="float32",
        )
    )
    report = Path(f"{store}.html")
    assert verify(VerifyConfig(report=report, split="all"))["images"] == count
    return report.read_text(encoding="utf-8")


def test_a_name_is_only_text_in_the_report(
    run: Run, fault_log: FaultLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page has the same elements and attributes as for the same pictures under plain names."""
    monkeypatch.chdir(tmp_path)
    names = [
        "HTML",
        "HTML that closes things",
        "template",
        "newline",
        "quotes",
        "markup of rich",
        "not UTF-8",
    ]
    for folder, files in (
        ("<i>photos<i>", [NAMES[name] for name in sorted(names, key=NAMES.__getitem__)]),
        ("plain", [b"%d.png" % number for number in range(len(names))]),
    ):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(files):
            Path(os.fsdecode(os.fsencode(tmp_path / folder) + b"/" + name)).write_bytes(picture(number))
        run(f"{folder}.zarr", images=(tmp_path / folder,))
    page = report_on("<i>photos<i>.zarr", len(names))
    elements, expected = Elements(page), Elements(report_on("plain.zarr", len(names)))
    extra = len(elements.made) != len(expected.made)
    fault_log.record(
        call="name", ordinal=len(names), file="report.html", phase="report", fired=True, lost=0, wrong=int(extra),
        role="verify",
    )  # fmt: skip
    assert elements.made == expected.made
    assert all(link.startswith(("data:", "#")) for link in elements.links)
    for text in (
        "<img src=x onerror=alert(1)>.png", "<script>alert(1)<&#47;script>'-->.png", "{{ 7*7 }}{% raw %}.png",
        r"new\nline.png", "'a\" $(touch pwned) `b`.png", r"caf\udce9\udcff.png", "<i>photos<i>",
    ):  # fmt: skip
        assert text in elements.text, text


def test_a_failed_images_name_stays_on_one_line(run: Run, fault_log: FaultLog, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    in_a_folder(folder)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no picture")
    listener = Listener()
    result = run(images=(folder,), observer=listener)
    assert result["failed"] == result["images"] == len(NAMES) - len(HIDDEN)
    failed = [line for line in listener.messages if line.startswith("failed: ")]
    assert len(failed) == result["failed"]
    for line in listener.messages:
        assert "\n" not in line
        assert line.isprintable(), ascii(line)
    fault_log.record(
        call="name", ordinal=len(failed), file="standard error", phase="messages", fired=True, lost=0, wrong=0,
        role="coordinator",
    )  # fmt: skip


def test_the_command_line_accepts_and_prints_unusual_names(fault_log: FaultLog, tmp_path: Path) -> None:
    """The folder's name begins with a dash and is not UTF-8, and the locale cannot print it."""
    folder = tmp_path / os.fsdecode(b"-dash\n\xff")
    in_a_folder(folder)
    (folder / "broken\n<b>.png").write_bytes(b"no picture")
    env = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii:strict")
    options = ("--teacher", "vit_nano", "--image-size", "64", "--out", "store.zarr", "--json")
    done = mobilesam("precompute", f"--images={folder}", *options, env=env, cwd=tmp_path)
    assert done.code == 0, done.err
    assert (done.json["done"], done.json["failed"]) == (len(NAMES) - len(HIDDEN), 1)
    assert r"failed: broken\n<b>.png: " in done.err
    assert done.err.replace("\n", "").isprintable()
    again = mobilesam("precompute", "--images", f"./{folder.name}", *options, env=env, cwd=tmp_path)
    assert again.json["done_before"] == done.json["done"]
    fault_log.record(
        call="name", ordinal=0, file=ascii(folder.name), phase="command line", fired=True, lost=0, wrong=0,
        role="coordinator",
    )  # fmt: skip
