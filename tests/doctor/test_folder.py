"""The current folder: photos, stores and runs, and the command that comes next."""

from __future__ import annotations

import fcntl
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mobilesam.cli import main
from mobilesam.distill import DistillConfig, Run
from mobilesam.distill.checksummed_json import encode_line
from mobilesam.doctor import folder
from mobilesam.sam.teacher import load_head
from mobilesam.store import encode_head
from mobilesam.store.layout import HEAD, MANIFEST

ARCHIVE = Path(__file__).parents[1] / "data" / "written_by_4c4873a.tar.xz"
FACTS = {"disk_free": 10**10, "memory": 8 * 10**9, "gpu": False, "cached": [], "report": True}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores and runs; some of them finished."""
    place = tmp_path_factory.mktemp("folder")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(place, filter="data")
    head, _ = encode_head({key: value.numpy() for key, value in load_head("vit_nano", None).items()})
    for name in ("store.zarr", "kept.zarr"):
        (place / "legacy" / name / HEAD).write_bytes(head)
    return place / "legacy"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _next(**changes: Any) -> dict[str, Any]:
    found = {"photos": folder.photos(Path()), "stores": folder.stores(Path()), "runs": folder.runs()}
    return folder.next_step(found, FACTS | changes)


def _photos(place: Path, count: int) -> None:
    place.mkdir(exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8)).save(place / f"{number}.png")


def _parsed(command: str) -> DistillConfig:
    """The config that a distill command line makes."""
    given = main.commands["distill"].make_context("distill", shlex.split(command)[2:]).params
    return DistillConfig(
        **{key: v for key, v in given.items() if v is not None and key not in ("as_json", "debug")}
    )


def test_photos_are_counted_here_and_below_each_folder_but_not_in_what_mobilesam_made(
    here: Path, unpacked: Path
) -> None:
    _photos(here / "holiday", 1)
    _photos(here / "holiday" / "beach", 2)
    shutil.copytree(unpacked / "kept.zarr", here / "holiday" / "kept.zarr")
    (here / "holiday" / "again").symlink_to(here / "holiday")
    _photos(here, 1)
    _photos(here / ".thumbs", 5)
    (here / "holiday" / "notes.txt").write_text("none")
    (here / "sa_000000.tar").write_bytes(b"")
    shutil.copytree(unpacked / "store.zarr", here / "store.zarr")
    assert folder.photos(Path()) == [
        {"path": "holiday", "images": 3, "all": True},
        {"path": ".", "images": 1, "all": True},
        {"path": "sa_000000.tar", "images": None, "all": False},
    ]


def test_of_a_huge_folder_only_so_many_names_are_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MOST_NAMES", 4)
    _photos(here / "huge", 9)
    assert folder.photos(Path()) == [{"path": "huge", "images": 4, "all": False}]


def test_an_empty_folder_is_told_what_precompute_needs() -> None:
    step = _next()
    assert step["command"] == "mobilesam precompute --images DIR --out store.zarr --teacher vit_b"
    assert step["needs"][0].startswith("a folder or a .tar of photos")


def test_the_disk_that_photos_need_is_told_with_what_is_missing(here: Path) -> None:
    _photos(here / "my photos", 3)
    step = _next(disk_free=5_000_000, cached=["vit_l"])
    assert step["command"] == "mobilesam precompute --images 'my photos' --out store.zarr --teacher vit_l"
    # 256 channels of 64 x 64 cells of 2 bytes, and alignment.
    assert step["needs"] == [
        "sam_vit_l_0b3195.pth, which is in the cache",
        "6.3 MB of disk for 3 images at 1024 pixels, 2.1 MB each; 5.0 MB are free, 1.3 MB too little",
    ]
    assert _next(gpu=True)["command"].endswith("--teacher vit_h")


def test_a_whole_store_is_followed_by_distill_and_by_its_photos_new_place_if_they_moved(
    here: Path, unpacked: Path
) -> None:
    shutil.copytree(unpacked / "store.zarr", here / "store.zarr")
    (store,) = folder.stores(Path())
    for root, images in ((here, ""), (here / "gone", " --images DIR")):
        found = {"photos": [], "stores": [store | {"image_root": str(root)}], "runs": []}
        step = folder.next_step(found, FACTS)
        assert step["command"] == f"mobilesam distill --epochs auto{images}"
        assert ("which is not there" in step["needs"][0]) == bool(images)
    shutil.rmtree(here / "store.zarr")
    shutil.copytree(unpacked / "kept.zarr", here / "kept.zarr")
    assert _next()["command"] == "mobilesam distill --epochs auto --store kept.zarr"


def test_a_damaged_store_is_repaired_first_and_an_unreadable_one_is_looked_into(
    here: Path, unpacked: Path
) -> None:
    shutil.copytree(unpacked / "store.zarr", here / "store.zarr")
    (here / "store.zarr" / "embeddings" / "zarr.json").unlink()
    step = _next()
    assert step["command"] == "mobilesam inspect store.zarr --repair"
    assert "damaged: 1 problem" in step["state"]
    (here / "store.zarr" / MANIFEST).write_bytes(b"not a database" * 100)
    assert folder.stores(Path())[0]["error"]
    assert _next()["command"] == "mobilesam inspect store.zarr"


def test_an_unfinished_run_is_resumed_by_the_options_that_it_was_begun_with(
    here: Path, unpacked: Path
) -> None:
    shutil.copytree(unpacked / "runs" / "interrupted", here / "runs" / "interrupted")
    run = Run.open(Path("runs/interrupted"))
    (found,) = folder.runs()
    assert (found["finished"], found["trainer"]) == (None, None)
    step = _next()
    config = _parsed(step["command"])
    assert config.out == Path("runs/interrupted")
    saved = {name: value for name, value in run.description.identity.items() if not name.endswith("sha256")}
    assert {name: config.identity()[name] for name in saved} == saved
    assert config.epochs == run.description.options["epochs"]


@pytest.mark.parametrize("options", [{"loss": "huber", "lr": 3e-4, "student_size": 128}, {"compile": True}])
def test_options_apart_from_the_recipes_are_in_the_command_and_the_recipes_are_not(
    here: Path, unpacked: Path, options: dict[str, Any]
) -> None:
    wanted = DistillConfig(store=here / "store.zarr", epochs=4, batch_size=2, **options)
    place = shutil.copytree(unpacked / "runs" / "interrupted", here / "runs" / "interrupted")
    run = Run.open(place)
    object.__setattr__(run.description, "options", wanted.to_json())
    object.__setattr__(run.description.store, "path", here / "store.zarr")
    command = folder.resume_command(run, Path("runs/a b"))
    assert _parsed(command).identity() == wanted.identity()
    assert _parsed(command).out == Path("runs/a b")
    flags = {word for word in shlex.split(command) if word.startswith("--")}
    given = {f"--{name.replace('_', '-')}" for name in options}
    assert flags == {"--epochs", "--batch-size", "--out", *given}


def test_a_run_that_is_being_trained_is_waited_for(here: Path, unpacked: Path) -> None:
    shutil.copytree(unpacked / "runs" / "interrupted", here / "runs" / "interrupted")
    with open("runs/interrupted/run.lock", "w") as lock:
        lock.write("process 7 on host\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        step = _next()
    assert step["command"] is None
    assert step["state"] == "runs/interrupted is being trained by process 7 on host: wait for it"
    assert _next()["command"] is not None


def test_a_finished_run_is_verified_and_then_used(here: Path, unpacked: Path) -> None:
    shutil.copytree(unpacked / "runs" / "interrupted", here / "runs" / "mine")
    with open("runs/mine/metrics.jsonl", "ab") as log:
        log.write(encode_line({"kind": "result", "finished": "2026-01-31T23:59:00+00:00"}))
    assert folder.runs()[0]["finished"] == "2026-01-31T23:59:00+00:00"
    step = _next()
    assert step["command"] == "mobilesam verify --student runs/mine --report report.html"
    assert [line.split()[1] for line in step["then"]] == ["segment", "export"]
    step = _next(report=False)
    assert step["command"] == "mobilesam verify --student runs/mine"
    assert step["needs"] == ["--report report.html also needs the extra report"]


def test_a_damaged_run_is_named_with_its_error(here: Path, unpacked: Path) -> None:
    shutil.copytree(unpacked / "runs" / "interrupted", here / "runs" / "interrupted")
    Path("runs/interrupted/split.json").write_text("{}")
    assert "split.json is" in folder.runs()[0]["error"]
    step = _next()
    assert step["command"] is None  # the error says what to do
    assert "split.json is" in step["state"]
