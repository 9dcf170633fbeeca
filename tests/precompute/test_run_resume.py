"""Runs that resume a store whose files or photos changed, and teachers whose values can't be stored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from listener import Listener
from PIL import Image

from mobilesam.precompute import shard_task
from mobilesam.precompute.decode import Batch
from mobilesam.precompute.shard_task import Embeddings, embed
from mobilesam.sam import ImageError, read_checked
from mobilesam.sam.teacher import Teacher
from mobilesam.store import EmbeddingStore, ImageRecord

Run = Callable[..., dict[str, Any]]


def _embeddings(path: Path) -> dict[str, bytes]:
    with EmbeddingStore.open(path) as store:
        return {
            record.key: store.read([record.row]).values.tobytes() for record in store.manifest.records("done")
        }


@pytest.mark.parametrize("damage", ["missing", "flipped", "short"])
def test_a_damaged_or_missing_head_is_rewritten_from_the_teachers_file(
    run: Run, tmp_path: Path, listener: Listener, damage: str
) -> None:
    run(limit=2)
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        head, whole = store.head_path, store.read_head()
    if damage == "missing":
        head.unlink()
    elif damage == "flipped":
        head.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    else:
        head.write_bytes(whole[:-1])
    result = run(limit=2, observer=listener)
    assert (result["done"], result["done_before"]) == (2, 2)
    assert head.read_bytes() == whole
    (message,) = [message for message in listener.messages if "from the teacher's file" in message]
    assert str(head) in message
    run(limit=2, observer=listener)
    assert len([message for message in listener.messages if "from the teacher's file" in message]) == 1


def _records(path: Path) -> dict[str, ImageRecord]:
    with EmbeddingStore.open(path) as store:
        return {record.key: record for record in store.manifest.records(None)}


def test_photos_that_changed_before_a_resume_are_read_as_they_are_if_pending_and_refused_if_done(
    run: Run, tmp_path: Path, photos: Path
) -> None:
    run("undisturbed.zarr")
    out = tmp_path / "store.zarr"
    run()
    with EmbeddingStore.open(out, writable=True) as store:
        store.withdraw([2])  # as if the run had been cut short
    before = _records(out)
    for name in ("0-admiral.png", "6-cat.png"):
        Image.open(photos / name).convert("RGB").rotate(180).save(photos / name, compress_level=1)
    result = run()
    assert (result["done"], result["done_before"]) == (7, 6)
    after = _records(out)
    assert after["0-admiral.png"] == before["0-admiral.png"]
    cat = (photos / "6-cat.png").read_bytes()
    assert after["6-cat.png"].sha256 == hashlib.sha256(cat).hexdigest()
    assert (after["6-cat.png"].bytes, after["6-cat.png"].size) == (len(cat), len(cat))
    stored, undisturbed = _embeddings(out), _embeddings(tmp_path / "undisturbed.zarr")
    assert {key for key in stored if stored[key] != undisturbed[key]} == {"6-cat.png"}
    for record in after.values():
        arguments = (photos, record.key, record.offset, record.bytes, record.sha256)
        if record.key == "0-admiral.png":
            with pytest.raises(ImageError, match=r"0-admiral\.png changed since precompute"):
                read_checked(*arguments)  # as distill and verify do
        else:
            assert read_checked(*arguments)


def test_the_store_records_the_folders_and_limits_of_each_run(
    run: Run, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = photos / os.fsdecode(b"more \xff")
    more.mkdir()
    Image.new("RGB", (64, 64)).save(more / "9.png")
    run(limit=2)
    monkeypatch.chdir(tmp_path)
    run(images=(Path("photos"), more), extend=True)
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        first, second = store.manifest.selections()
    assert (first.sources, first.limit, first.checkpoint) == ((str(photos),), 2, None)
    assert (second.sources, second.limit) == ((str(photos), str(more)), None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.nan, "the teacher gave NaN or infinite values"),
        (-np.inf, "the teacher gave NaN or infinite values"),
        (1e6, "the teacher's values reach 1e+06, beyond float16's range: store them as float32"),
    ],
)
def test_only_the_image_whose_embedding_cannot_be_stored_fails_and_is_named(
    run: Run,
    tmp_path: Path,
    listener: Listener,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    reason: str,
) -> None:
    run("whole.zarr", batch_size=3)

    def broken(teacher: Teacher, batch: Batch) -> Embeddings:
        emb_BCHW = embed(teacher, batch).numpy().copy()
        for slot, loaded in enumerate(batch.images):
            if loaded.image.ref.key == "4-retina.png":
                emb_BCHW[slot, 200, 3, 1] = value
        return Embeddings(torch.from_numpy(emb_BCHW))

    monkeypatch.setattr(shard_task, "embed", broken)
    result = run(batch_size=3, observer=listener, audit=7)
    assert (result["done"], result["failed"], result["audit"]["rows"]) == (6, 1, 6)
    assert f"failed: 4-retina.png: {reason}" in listener.messages
    record = _records(tmp_path / "store.zarr")["4-retina.png"]
    assert (record.status, record.reason, record.crc32c) == ("failed", reason, None)
    whole = _embeddings(tmp_path / "whole.zarr")
    del whole["4-retina.png"]
    assert _embeddings(tmp_path / "store.zarr") == whole
    monkeypatch.undo()
    assert run(batch_size=3, retry_failed=True)["failed"] == 0
