"""Images that kill or hang workers or give NaN, and changed photos: reported by name, other embeddings untouched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.fault_log import FaultLog
from faults.fixtures import Done, contents, environment, mobilesam, refused, save_pictures
from faults.recovery import Snapshot, missing_rows, stray_files, wrong_reads
from listener import Listener
from PIL import Image
from torch import Tensor

from mobilesam.distill import DistillConfig, distill
from mobilesam.precompute import decode
from mobilesam.sam import ImageError
from mobilesam.sam.teacher import Teacher
from mobilesam.store import EmbeddingStore
from mobilesam.verify import VerifyConfig, verify

pytestmark = pytest.mark.fault

Run = Callable[..., dict[str, Any]]

BAD = "3.png"
"""White image, which can be recognised in any batch."""
WHITE = 2.2
"""Lower limit of a white image's red channel, which is 2.249 after normalisation; no other image reaches it."""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Folder of seven pictures, one of them white."""
    folder = save_pictures(tmp_path / "photos")
    Image.new("RGB", (64, 64), (255, 255, 255)).save(folder / BAD)
    return folder


def without_bad(undisturbed: Snapshot) -> Snapshot:
    """Return the expected snapshot when the white image has failed."""
    rows = {key: value for key, value in undisturbed.rows.items() if key != BAD}
    return Snapshot(rows, frozenset({BAD}), undisturbed.files)


def failed(store: Path) -> dict[str, str | None]:
    """Return {key: reason} of the failed images."""
    with EmbeddingStore.open(store) as opened:
        return {record.key: record.reason for record in opened.manifest.records("failed")}


# ---- the teacher's values


def put(value: float) -> Callable[[Tensor], Tensor]:
    """Return a function that sets one value of an embedding."""

    def poison(emb_CHW: Tensor) -> Tensor:
        emb_CHW = emb_CHW.clone()
        emb_CHW[255, 3, 2] = value
        return emb_CHW

    return poison


INVALID_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "one NaN": put(torch.nan),
    "all NaN": lambda emb_CHW: emb_CHW * torch.nan,
    "one infinity": put(torch.inf),
    "minus infinity": put(-torch.inf),
    "far past float16": lambda emb_CHW: emb_CHW * 1e7,
    "just past float16": put(65520.0),
}


# Values beyond float16's range are valid in the other dtypes.
CASES = [
    (poison, dtype)
    for poison in INVALID_VALUES
    for dtype in ("float16", "float32", "int8")
    if dtype == "float16" or not poison.endswith("past float16")
]


@pytest.mark.parametrize(("poison", "dtype"), CASES)
def test_a_teacher_that_gives_invalid_values_for_one_image_fails_that_image_alone(
    run: Run, fault_log: FaultLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str, dtype: str
) -> None:
    run("undisturbed.zarr", dtype=dtype, batch_size=2)
    undisturbed = Snapshot.of(tmp_path / "undisturbed.zarr")
    embed, hits = Teacher.embed, []

    def poisoned(teacher: Teacher, pixels_BCHW: Tensor) -> Tensor:
        emb_BCHW = embed(teacher, pixels_BCHW)
        for slot in range(len(pixels_BCHW)):
            if pixels_BCHW[slot, 0].min() > WHITE:
                hits.append(slot)
                emb_BCHW[slot] = INVALID_VALUES[poison](emb_BCHW[slot])
        return emb_BCHW

    listener, store = Listener(), tmp_path / "store.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "embed", poisoned)
        result = run(dtype=dtype, batch_size=2, observer=listener)
    wrong, lost = wrong_reads(store, without_bad(undisturbed)), missing_rows(store, without_bad(undisturbed))
    fault_log.record(
        call="teacher", ordinal=hits[0], file=BAD, phase=f"{poison}, {dtype}", fired=bool(hits), lost=len(lost),
        wrong=len(wrong), role="worker",
    )  # fmt: skip
    assert (wrong, lost) == ([], [])
    assert (result["done"], result["failed"]) == (6, 1)
    expected = "beyond float16's range" if poison.endswith("past float16") else "NaN or infinite"
    assert expected in str(failed(store)[BAD])
    assert [line for line in listener.messages if line.startswith(f"failed: {BAD}: ")]
    assert run(dtype=dtype, batch_size=2)["failed"] == 1, "a plain rerun leaves it"
    assert run(dtype=dtype, batch_size=2, retry_failed=True)["done"] == 7
    assert missing_rows(store, undisturbed) == []
    assert wrong_reads(store, undisturbed) == []
    assert stray_files(store, undisturbed) == []


# ---- images that hang or kill


def test_an_image_that_hangs_fails_after_the_timeout(
    run: Run, fault_log: FaultLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("undisturbed.zarr")
    undisturbed = without_bad(Snapshot.of(tmp_path / "undisturbed.zarr"))
    load_image, release, hits = decode.load_image, threading.Event(), []

    def hanging(data: bytes, image_size: int) -> Any:
        decoded = load_image(data, image_size)
        if decoded.pixels_HWC.min() == 255:
            hits.append(1)
            release.wait()
        return decoded

    store = tmp_path / "store.zarr"
    try:
        with monkeypatch.context() as patch:
            patch.setattr(decode, "load_image", hanging)
            result = run(image_timeout=1.0)
    finally:
        release.set()
    wrong, lost = wrong_reads(store, undisturbed), missing_rows(store, undisturbed)
    fault_log.record(
        call="hang", ordinal=0, file=BAD, phase="decoding", fired=bool(hits), lost=len(lost), wrong=len(wrong),
        role="worker",
    )  # fmt: skip
    assert (wrong, lost) == ([], [])
    assert (result["done"], result["failed"]) == (6, 1)
    assert "1 s" in str(failed(store)[BAD])
    assert run(retry_failed=True)["done"] == 7


# dask runs a preload more than once in a process: the import gets the unwrapped function every time.
KILLER = """
import os
import mobilesam.precompute.decode as decode
from mobilesam.sam import load_image
def deadly(data, image_size):
    decoded = load_image(data, image_size)
    if data.endswith(b"DIE"):
        os.abort()
    return decoded
decode.load_image = deadly
"""


def test_an_image_that_kills_every_worker_is_found(
    run: Run, fault_log: FaultLog, tmp_path: Path, pictures: Path
) -> None:
    """Uses real worker processes."""
    with (pictures / BAD).open("ab") as file:
        file.write(b"DIE")
    run("undisturbed.zarr", precision="float32")
    undisturbed = without_bad(Snapshot.of(tmp_path / "undisturbed.zarr"))
    (tmp_path / "preload.py").write_text(KILLER)
    store = tmp_path / "store.zarr"
    done = mobilesam(
        "precompute", "--images", pictures, "--out", store, "--teacher", "vit_nano", "--image-size", "64",
        "--shard-size", "3", "--precision", "float32", "--audit", "0", "--json",
        env=environment(DASK_DISTRIBUTED__WORKER__PRELOAD=str(tmp_path / "preload.py")),
    )  # fmt: skip
    assert done.code == 0, done.err
    wrong, lost = wrong_reads(store, undisturbed), missing_rows(store, undisturbed)
    fault_log.record(
        call="abort", ordinal=0, file=BAD, phase="decoding", fired="workers died" in done.err, lost=len(lost),
        wrong=len(wrong), role="worker",
    )  # fmt: skip
    assert (wrong, lost) == ([], [])
    assert (done.json["done"], done.json["failed"]) == (6, 1)
    assert failed(store) == {BAD: "a worker process died each time it processed this image"}
    assert f"excluded: {BAD}" in done.err
    assert stray_files(store, undisturbed) == []


# ---- photos that changed


def same_length(path: Path) -> None:
    """Change one byte; the file is still a picture of the same length."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x20  # the end chunk's checksum, which decoders ignore
    path.write_bytes(data)


def other_length(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def another_picture(path: Path) -> None:
    Image.new("RGB", (64, 64), (0, 90, 0)).save(path)


CHANGES = [same_length, other_length, another_picture]


@pytest.mark.parametrize("change", CHANGES)
def test_a_pending_photo_that_changed_is_embedded_as_it_is_now(
    run: Run, fault_log: FaultLog, tmp_path: Path, pictures: Path, change: Callable[[Path], None]
) -> None:
    """A finished photo keeps its embedding, which training then refuses (see below)."""
    store = tmp_path / "store.zarr"
    run()
    with EmbeddingStore.open(store, writable=True) as opened:
        opened.withdraw([1])
    change(pictures / "4.png")
    run()
    run("again.zarr")
    undisturbed = Snapshot.of(tmp_path / "again.zarr")
    wrong, lost = wrong_reads(store, undisturbed), missing_rows(store, undisturbed)
    fault_log.record(
        call="photo", ordinal=0, file="4.png", phase=f"before precompute resumes, {change.__name__}", fired=True,
        lost=len(lost), wrong=len(wrong), role="coordinator",
    )  # fmt: skip
    assert (wrong, lost) == ([], [])
    with EmbeddingStore.open(store) as opened, EmbeddingStore.open(tmp_path / "again.zarr") as again:
        assert [record.sha256 for record in opened.manifest.records()] == [
            record.sha256 for record in again.manifest.records()
        ]


@pytest.fixture
def trained(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DistillConfig:
    """Store and a run of one epoch; returns the run's config."""
    monkeypatch.chdir(tmp_path)
    run()
    config = DistillConfig(
        store=Path("store.zarr"), out=Path("run"), epochs=1, batch_size=4, device="cpu", precision="float32"
    )
    distill(config)
    return config


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_photo_that_changed_stops_training_and_verify(
    trained: DistillConfig,
    run: Run,
    fault_log: FaultLog,
    tmp_path: Path,
    pictures: Path,
    change: Callable[[Path], None],
) -> None:
    """The error names the photo: no embedding is ever paired with other pixels."""
    good = {path.name: path.read_bytes() for path in pictures.iterdir()}
    store, before = tmp_path / "store.zarr", contents(tmp_path / "store.zarr")
    undisturbed = Snapshot.of(store)
    change(pictures / BAD)
    assert run()["done_before"] == 7, "precompute leaves a finished photo alone"
    again = DistillConfig(**{**vars(trained), "out": Path("again")})
    for phase, attempt in (
        ("distill", lambda: distill(again)),
        ("verify", lambda: verify(VerifyConfig(student=Path("run"), split="all"))),
    ):
        with pytest.raises(ImageError, match=r"3\.png.*changed since precompute"):
            attempt()
        wrong, lost = wrong_reads(store, undisturbed), missing_rows(store, undisturbed)
        fault_log.record(
            call="photo", ordinal=0, file=BAD, phase=f"before {phase}, {change.__name__}", fired=True,
            lost=len(lost), wrong=len(wrong), role=phase,
        )  # fmt: skip
        assert (wrong, lost) == ([], [])
    assert contents(store) == before
    # With the original photo, training gives the undisturbed result.
    (pictures / BAD).write_bytes(good[BAD])
    result, expected = distill(again), distill(trained)
    assert result["val"] == expected["val"]


def test_the_commands_stop_at_a_changed_photo_with_exit_code_3(
    trained: DistillConfig, fault_log: FaultLog, tmp_path: Path, pictures: Path
) -> None:
    same_length(pictures / BAD)
    options = ("--batch-size", "4", "--device", "cpu", "--precision", "float32", "--json")
    attempts: list[tuple[str, Done]] = [
        ("distill", mobilesam("distill", "--out", "other", "--epochs", "1", *options, cwd=tmp_path)),
        ("verify", mobilesam("verify", "--student", "run", "--split", "all", "--json", cwd=tmp_path)),
    ]
    for phase, done in attempts:
        refused(done, BAD, "changed since precompute")
        fault_log.record(
            call="photo",
            ordinal=0,
            file=BAD,
            phase=f"command line, {phase}",
            fired=True,
            lost=0,
            wrong=0,
            role=phase,
        )
