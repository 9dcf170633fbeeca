"""Photos and folders as people bring them, through the commands."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from gradient_photo import gradient_photo
from one_process import one_process_cluster
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from random_student import save_random_student
from tiff_writer import write_tiff

from mobilesam.cli import main
from mobilesam.sam.photos import file_kinds
from mobilesam.store import EmbeddingStore, ImageRecord, ImageRef

TRAIN = ["distill", "--store", "t4.zarr", "--epochs", "1", "--batch-size", "2", "--student", "timm:resnet18"]
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    with one_process_cluster() as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


Precompute = Callable[..., dict[str, Any]]


@pytest.fixture
def run_precompute(scheduler: str, place: Path) -> Callable[..., Result]:
    def run(*args: object) -> Result:
        words = ["precompute", *map(str, args), "--teacher", "vit_nano", "--image-size", "64", "--audit", "0"]
        words += ["--scheduler", scheduler, "--shard-size", "4"]
        return CliRunner().invoke(main, words)

    return run


@pytest.fixture
def precompute(run_precompute: Callable[..., Result]) -> Precompute:
    """precompute(*options) -> its JSON, after exit code 0."""

    def run(*args: object) -> dict[str, Any]:
        done = run_precompute(*args, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run


def _photos(folder: Path, numbers: range) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        gradient_photo(number).save(folder / f"p{number}.jpg")
    return folder


def _records(store: Path | str) -> dict[str, ImageRecord]:
    with EmbeddingStore.open(store) as opened:
        return {record.key: record for record in opened.manifest.records(None)}


def _checksums(store: Path | str) -> dict[str, int | None]:
    return {key: record.crc32c for key, record in _records(store).items()}


# ---- outputs of mobilesam inside the photo folder


def test_a_store_in_the_photo_folder_is_never_embedded(
    place: Path, run_precompute: Callable[..., Result]
) -> None:
    """T5: its kept images are no photos, with --extend and without; neither are those of another store."""
    _photos(place, range(6))
    shutil.copytree(_photos(place / "elsewhere", range(1)), place / "more")
    first = run_precompute("--images", ".", "--keep-images", "--json")
    assert json.loads(first.stdout)["images"] == 8
    for options in ((), ("--extend",), ("--retry-failed",)):
        again = run_precompute("--images", ".", *options, "--json")
        assert again.exit_code == 0, again.output
        result = json.loads(again.stdout)
        assert (result["images"], result["done"], result["done_before"]) == (8, 8, 8)
        assert result["passed_over"] == {"folder of mobilesam": 1}
        assert "store.zarr: a store, no folder of photos: passed over" in again.stderr
    shutil.copytree("store.zarr", "more/copy")
    (place / "more/copy/zarr.json").unlink()  # a damaged store is one still
    other = run_precompute("--images", ".", "--out", "new.zarr", "--keep-images", "--json")
    assert json.loads(other.stdout)["images"] == 8
    assert json.loads(other.stdout)["passed_over"] == {"folder of mobilesam": 2}
    for inside in ("store.zarr", "store.zarr/embeddings/mobilesam/images"):
        refused = run_precompute("--images", inside, "--out", "third.zarr")
        assert refused.exit_code == 3
        assert "store.zarr" in refused.stderr
        assert "no folder of photos" in refused.stderr


def test_runs_sweeps_exports_and_pictures_in_the_photo_folder_are_never_embedded(
    place: Path, precompute: Precompute
) -> None:
    """T5: they are recognised by the files that mark them, not by their names."""
    _photos(place, range(3))
    run = {"config.json": {"student": "x", "identity": {}, "split_sha256": ""}, "split.json": {}}
    sweep = {"results.json": {"format": 1, "runs": []}}
    export = {"model.json": {"format": "mobilesam model 1"}}
    strangers = {
        "config.json": {"model_type": "sam"},
        "model.json": {"format": "layers-model"},
        "split.json": {},
    }
    for name, files in {"a": run, "b": sweep, "c": export, "holiday": strangers}.items():
        _photos(place / name / "runs", range(1))
        _photos(place / name, range(1))
        for file, value in files.items():
            (place / name / file).write_text(json.dumps(value))
    student = save_random_student(
        place / "student.safetensors", "timm:resnet18", image_size=64, teacher="vit_nano"
    )
    segment = ["segment", "p0.jpg", "--student", str(student), "--point", "20", "20", "--masks", "masks"]
    done = CliRunner().invoke(main, segment)
    assert done.exit_code == 0, done.output
    assert (place / "overlay.png").exists()
    assert (place / "masks" / "000.png").exists()
    result = precompute("--images", ".", "--out", "s.zarr")
    assert sorted(_records("s.zarr")) == [
        "holiday/p0.jpg",
        "holiday/runs/p0.jpg",
        "p0.jpg",
        "p1.jpg",
        "p2.jpg",
    ]
    assert result["passed_over"] == {
        "folder of mobilesam": 3,
        "picture of mobilesam": 2,
        "array or weights": 1,
        "JSON": 3,
    }


def test_a_store_is_no_folder_of_photos_for_any_command(place: Path, precompute: Precompute) -> None:
    """T5: evaluate lists as precompute does, and distill and verify take no store for the folder of photos."""
    _photos(place / "p", range(4))
    precompute("--images", "p", "--out", "p/s.zarr", "--keep-images")
    evaluate = ["evaluate", "--images", "p", "--teacher", "vit_nano", "--image-size", "64", "--points", "1"]
    done = CliRunner().invoke(main, [*evaluate, "--model", "a=vit_nano", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["images"] == 4
    assert any("s.zarr: a store" in note for note in result["notes"])
    for images, fact in (("p/s.zarr", "a store, no folder of photos"), ("gone", "no such folder")):
        words = ["distill", "--store", "p/s.zarr", "--images", images, "--out", "run", "--epochs", "1"]
        refused = CliRunner().invoke(main, words)
        assert refused.exit_code == 3
        assert f"--images {images}: {fact}" in refused.stderr


# ---- what counts as an image


def _png_texts(place: Path) -> None:
    picture, text = gradient_photo(0), "x" * (2 << 20)

    def info(kind: str, times: int = 1, size: int = 2 << 20) -> PngInfo:
        made = PngInfo()
        for _ in range(times):
            (made.add_itxt if kind == "iTXt" else made.add_text)(
                "prompt", text[: 1 << 20 if times > 1 else None], zip=True
            )
        return made

    (place / "i1").mkdir()
    picture.save(place / "i1" / "control.png")
    picture.save(place / "i1" / "ztxt.png", pnginfo=info("zTXt"))
    picture.save(place / "i1" / "itxt.png", pnginfo=info("iTXt"))
    picture.save(place / "i1" / "many.png", pnginfo=info("zTXt", 70, 1 << 20))
    picture.save(place / "i1" / "icc.png", icc_profile=bytes(2 << 20))


def test_a_png_with_large_metadata_has_the_embedding_of_one_without(
    place: Path, precompute: Precompute
) -> None:
    """I1: compressed texts and profiles of megabytes."""
    _png_texts(place)
    assert precompute("--images", "i1", "--out", "i1.zarr")["done"] == 5
    assert len(set(_checksums("i1.zarr").values())) == 1


def test_tiffs_are_embedded_by_a_policy_or_called_what_they_are(place: Path, precompute: Precompute) -> None:
    """I2: layouts of satellites and microscopes."""
    (place / "i2").mkdir()
    bands = np.random.default_rng(0).integers(0, 256, (48, 64, 5), dtype=np.uint8)
    wide = bands.astype("<u2") * 257
    good = {
        "rgb16": write_tiff(wide[..., :3], photometric=2),
        "three_bands16_blackiszero": write_tiff(wide[..., :3], extra=[0, 0]),
        "four_bands8_blackiszero": write_tiff(bands[..., :4], extra=[0] * 3),
        "planes16": write_tiff(wide[..., :3], extra=[0, 0], planes=True),
        "rgb_nir8": write_tiff(bands[..., :4], photometric=2, extra=[0]),
        "five_bands8": write_tiff(bands, photometric=2, extra=[0, 0]),
    }
    bad = {"int16": bands[..., :1].astype("<i2"), "uint32": bands[..., :1].astype("<u4")}
    bad |= {"float32": bands[..., :1].astype("<f4"), "five16": wide}
    for name, data in {**good, **{name: write_tiff(value) for name, value in bad.items()}}.items():
        (place / "i2" / f"{name}.tif").write_bytes(data)
    result = precompute("--images", "i2", "--out", "i2.zarr")
    assert len({value for value in _checksums("i2.zarr").values() if value is not None}) == 1
    reasons = {image["key"].removesuffix(".tif"): image["reason"] for image in result["failed_images"]}
    assert reasons.keys() == bad.keys()
    for name, layout in {
        "int16": "1 band, 16-bit signed",
        "uint32": "1 band, 32-bit",
        "float32": "1 band, 32-bit float",
        "five16": "5 bands, 16-bit",
    }.items():
        assert reasons[name].startswith(f"TIFF of {layout}, BlackIsZero: ")


@pytest.mark.parametrize("with_heif", [True, False])
def test_names_that_say_nothing_are_judged_by_content_and_all_that_is_passed_over_is_told(
    place: Path, run_precompute: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, with_heif: bool
) -> None:
    """I3: a phone's folder."""
    folder = place / "i3"
    folder.mkdir()
    for number, name in enumerate(["a.jpg", "b.JPG", "c.jfif", "d.jpe", "noext", "wrong.png", "e.jpg_large"]):
        gradient_photo(number).save(folder / name, "JPEG")
    for number in range(20):
        (folder / f"IMG_{number:04}.HEIC").write_bytes(HEIC)
    (folder / "renamed.jpg").write_bytes(HEIC)
    (folder / "._a.jpg").write_bytes(b"\0\5\26\7")
    for name in ("clip.MOV", "raw.CR2", "a.xmp", "a.zip", "Thumbs.db"):
        (folder / name).write_bytes(b"x")
    monkeypatch.setattr(file_kinds, "find_spec", lambda _: object() if with_heif else None)
    file_kinds.decodable.cache_clear()
    try:
        done = run_precompute("--images", "i3", "--out", "i3.zarr", "--json")
        text = run_precompute("--images", "i3", "--out", "i3.zarr")
    finally:
        file_kinds.decodable.cache_clear()
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    others = {"Mac's ._ twin": 1, "video": 1, "RAW photo": 1, "XMP": 1, "ZIP archive": 1, "system file": 1}
    assert result["done"] == 7
    assert result["failed"] == (21 if with_heif else 1)
    assert result["passed_over"] == others | ({} if with_heif else {"HEIC": 20})
    reason = {image["key"]: image["reason"] for image in result["failed_images"]}["renamed.jpg"]
    assert ("HEIF" if with_heif else "an image in HEIC, which can't be decoded here: pip install") in reason
    if not with_heif:
        assert "passed over: 20 HEIC (pip install 'mobilesam[heif]' reads them), 1 " in text.stdout


def test_heic_and_avif_photos_are_embedded(place: Path, precompute: Precompute) -> None:
    """I3: where pillow-heif is installed, and Pillow is built with AVIF."""
    pillow_heif = pytest.importorskip("pillow_heif")
    (place / "i3").mkdir()
    pillow_heif.from_pillow(gradient_photo(0)).save(place / "i3" / "IMG_0001.HEIC")
    gradient_photo(0).save(place / "i3" / "a.avif")
    shutil.copy(place / "i3" / "IMG_0001.HEIC", place / "i3" / "renamed.jpg")
    assert precompute("--images", "i3", "--out", "i3.zarr")["done"] == 3
    sums = _checksums("i3.zarr")
    assert sums["IMG_0001.HEIC"] == sums["renamed.jpg"]


def test_a_jpeg_that_lacks_only_its_end_mark_is_embedded_and_a_cut_one_never(
    place: Path, precompute: Precompute
) -> None:
    """I7: one answer for a smooth photo and for noise."""
    (place / "i7").mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    for name, picture in {"noise": noise, "smooth": gradient_photo(0)}.items():
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG")
        for cut in (0, 1, 2, 3, 20, 300):
            (place / "i7" / f"{name}-{cut}.jpg").write_bytes(
                buffer.getvalue()[: len(buffer.getvalue()) - cut]
            )
    precompute("--images", "i7", "--out", "i7.zarr")
    sums = _checksums("i7.zarr")
    for name in ("noise", "smooth"):
        whole = sums[f"{name}-0.jpg"]
        assert [sums[f"{name}-{cut}.jpg"] for cut in (1, 2)] == [whole, whole]
        assert [sums[f"{name}-{cut}.jpg"] for cut in (3, 20, 300)] == [None, None, None]


def test_joined_tars_are_read_whole_and_compressed_ones_named(
    place: Path, run_precompute: Callable[..., Result]
) -> None:
    """I8: `cat a.tar b.tar`, and tars that are gzip."""
    _photos(place / "p", range(4))
    for name, numbers in {"a.tar": [0], "b.tar": [1, 2, 3]}.items():
        with tarfile.open(place / name, "w") as tar:
            for number in numbers:
                tar.add(place / "p" / f"p{number}.jpg", f"p{number}.jpg")
    (place / "i8").mkdir()
    (place / "i8" / "joined.tar").write_bytes((place / "a.tar").read_bytes() + (place / "b.tar").read_bytes())
    for name in ("c.tgz", "d.tar"):
        (place / "i8" / name).write_bytes(gzip.compress((place / "a.tar").read_bytes()))
    done = run_precompute("--images", "i8", "--out", "i8.zarr", "--json")
    result = json.loads(done.stdout)
    assert (result["images"], result["done"]) == (4, 4)
    assert result["passed_over"] == {"compressed tar": 2}
    assert all("decompress it to a .tar" in line for line in result["skipped"])
    assert len(result["skipped"]) == 2
    assert _checksums("i8.zarr").keys() == {f"joined.tar/p{number}.jpg" for number in range(4)}


def test_one_image_a_pattern_and_a_missing_path(place: Path, run_precompute: Callable[..., Result]) -> None:
    """I3: `--images photo.jpg`, `--images 'photos/*.jpg'`; a message names the option."""
    _photos(place / "p", range(3))
    (place / "p" / "notes.txt").write_text("x")
    for images, count in ((["p/p1.jpg"], 1), (["p/*.jpg"], 3), (["p/p0.jpg", "p/p2.jpg"], 2)):
        out = f"{count}.zarr"
        done = run_precompute("--images", *images, "--out", out, "--json")
        assert json.loads(done.stdout)["images"] == count, done.output
        assert all(key.startswith("p") and "/" not in key for key in _records(out))
    for images, message in {
        "q": "--images", "q/*.jpg": "no file matches --images q/*.jpg", "p/notes.txt": "by its kind (text)",
    }.items():  # fmt: skip
        done = run_precompute("--images", images, "--out", "none.zarr")
        assert done.exit_code == 3
        assert message in done.stderr
        assert len(done.stderr.splitlines()) <= 2


# ---- more photos in another folder


def test_photos_of_a_sibling_folder_are_appended_under_keys_of_the_first_root(
    place: Path, precompute: Precompute, run_precompute: Callable[..., Result]
) -> None:
    """T4: both folders, the second alone, and the first one archived."""
    day1, day2 = _photos(place / "t4/day1", range(3)), _photos(place / "t4/day2", range(2, 6))
    precompute("--images", day1, "--out", "t4.zarr")
    before = _records("t4.zarr")
    assert precompute("--images", day1, day2, "--out", "t4.zarr", "--extend")["done"] == 7
    after = _records("t4.zarr")
    # p2.jpg is in both folders.
    assert [key for key in after if key.startswith("../")] == [
        f"../day2/p{number}.jpg" for number in range(2, 6)
    ]
    assert {key: after[key] for key in before} == before
    for images in ([day2], [place / "t4"], [day2, day1]):
        result = precompute("--images", *images, "--out", "t4.zarr", "--extend")
        assert (result["images"], result["done_before"]) == (7, 7)
    wrong = run_precompute("--images", day2, "--out", "t4.zarr")
    assert wrong.exit_code == 3
    assert "3 of the store's 7 images lie outside what --images names" in wrong.stderr
    # Students are trained on photos of both folders, and on the moved ones where the folders moved together.
    done = CliRunner().invoke(main, [*TRAIN, "--out", "run", "--json"])
    assert done.exit_code == 0, done.output
    (place / "t4").rename(place / "moved")
    done = CliRunner().invoke(main, [*TRAIN, "--out", "run2", "--images", "moved/day1", "--json"])
    assert done.exit_code == 0, done.output
    moved = run_precompute("--images", "moved/day1", "moved/day2", "--out", "t4.zarr", "--json")
    assert moved.exit_code == 0, moved.output
    assert json.loads(moved.stdout)["images"] == 7


@pytest.mark.parametrize("options", [(), ("--keep-images",), ("--dtype", "int8")])
def test_a_first_folder_that_is_archived_keeps_its_rows_when_others_are_appended(
    place: Path, run_precompute: Callable[..., Result], precompute: Precompute, options: tuple[str, ...]
) -> None:
    """T4: the last shard grows, though the photos of its first rows are gone."""
    _photos(place / "t4/day1", range(3))
    _photos(place / "t4/day2", range(3, 6))
    precompute("--images", "t4/day1", "--out", "t4.zarr", *options)
    before = _records("t4.zarr")
    (place / "t4/day1").rename(place / "t4/archive")
    done = run_precompute("--images", "t4/day2", "--out", "t4.zarr", "--extend", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["done"] == 6
    assert "3 of the store's 3 images are not among those listed" in done.stderr
    after = _records("t4.zarr")
    assert {key: after[key] for key in before} == before
    checked = CliRunner().invoke(main, ["inspect", "t4.zarr", "--check", "--json"])
    assert checked.exit_code == 0, checked.output
    assert not (place / "t4.zarr/embeddings/mobilesam/carried").exists()
    done = CliRunner().invoke(main, [*TRAIN, "--out", "run", "--json"])
    if options == ("--keep-images",):
        assert done.exit_code == 0, done.output
    else:
        assert done.exit_code == 3
        assert "t4/day1; say where they are with --images DIR" in done.stderr
        done = CliRunner().invoke(main, [*TRAIN, "--out", "run", "--images", "t4/archive", "--json"])
        assert done.exit_code == 0, done.output


def test_an_extension_that_was_cut_short_goes_on_when_the_first_folder_is_archived_meanwhile(
    place: Path, precompute: Precompute
) -> None:
    """T4: the rows of the withdrawn shard are carried over if they are whole, and else they fail."""
    _photos(place / "day1", range(3))
    day2 = _photos(place / "day2", range(3, 6))
    precompute("--images", "day1", "--out", "s.zarr")
    before = _records("s.zarr")
    with EmbeddingStore.open("s.zarr", writable=True) as store:
        more = [ImageRef(key=f"../day2/{file.name}", size=1) for file in sorted(day2.iterdir())]
        store.extend(more, store.manifest.selections()[0])
    (place / "day1").rename(place / "archive")
    with open("s.zarr/embeddings/c.0.0.0.0", "r+b") as shard:
        shard.seek(100)
        byte = shard.read(1)[0]
        shard.seek(100)
        shard.write(bytes([byte ^ 1]))  # in the first row
    result = precompute("--images", "day2", "--out", "s.zarr", "--extend")
    assert (result["done"], result["failed"]) == (5, 1)
    assert result["failed_images"] == [{"key": "p0.jpg", "reason": "the file is missing"}]
    after = _records("s.zarr")
    assert [after[key] for key in ("p1.jpg", "p2.jpg")] == [before[key] for key in ("p1.jpg", "p2.jpg")]


def test_a_sibling_folder_with_the_same_names_is_not_taken_for_the_first_one_moved(
    place: Path, precompute: Precompute
) -> None:
    """T4: cameras count from IMG_0001 in every folder; BMPs of one size have one length, too."""
    for day, numbers in {"day1": range(3), "day2": range(5, 8)}.items():
        (place / day).mkdir()
        for index, number in enumerate(numbers):
            gradient_photo(number).save(place / day / f"IMG_{index}.bmp")
    precompute("--images", "day1", "--out", "s.zarr")
    assert precompute("--images", "day2", "--out", "s.zarr", "--extend")["images"] == 6
    assert len(set(_checksums("s.zarr").values())) == 6
    shutil.copytree(place / "day1", place / "copy")
    assert precompute("--images", "copy", "day2", "--out", "s2.zarr")["images"] == 6
    assert (
        precompute("--images", "copy", "--out", "s.zarr", "--extend")["images"] == 6
    )  # the same photos elsewhere


# ---- failed images


def test_failed_images_are_named_with_their_reasons_whenever_asked(
    place: Path, run_precompute: Callable[..., Result]
) -> None:
    """R8: by precompute, by its rerun and by inspect."""
    _photos(place / "bad", range(2))
    for number in range(12):
        (place / "bad" / f"x{number:02}.jpg").write_text("x")
    results = [run_precompute("--images", "bad", "--out", "bad.zarr", "--json") for _ in range(2)]
    results.append(CliRunner().invoke(main, ["inspect", "bad.zarr", "--json"]))
    for done in results:
        result = json.loads(done.stdout)
        assert (result["failed"] if "failed" in result else result["rows"]["failed"]) == 12
        failed = {image["key"]: image["reason"] for image in result["failed_images"]}
        assert failed.keys() == {f"x{number:02}.jpg" for number in range(12)}
        assert all(reason.startswith("not a JPEG") for reason in failed.values())
    again = run_precompute("--images", "bad", "--out", "bad.zarr").stdout
    for text in (again, CliRunner().invoke(main, ["inspect", "bad.zarr"]).stdout):
        lines = [line for line in text.splitlines() if line.startswith("failed ")]
        assert len(lines) == 11
        assert "x00.jpg: not a JPEG" in lines[0]
        assert "and 2 more" in lines[-1]
