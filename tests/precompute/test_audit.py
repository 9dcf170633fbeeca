"""Audit at the end of a run: embeddings of the teacher are in tolerance, others are not."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from listener import Listener

from mobilesam.precompute import PrecomputeError, PrecomputeInterrupted, Snapshot, audit, shard_task
from mobilesam.precompute.audit import ReservoirSample, compare
from mobilesam.precompute.decode import Batch
from mobilesam.precompute.shard_task import Embeddings, embed
from mobilesam.sam import normalize_and_pad
from mobilesam.sam.teacher import Teacher
from mobilesam.store import EmbeddingStore, RowResult, tolerance

Run = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_random_rows_of_a_run_are_embedded_again_and_match_the_teacher(
    run: Run, tmp_path: Path, dtype: str, listener: Listener
) -> None:
    result = run(audit=3, dtype=dtype, precision="float32", observer=listener)
    audit = result["audit"]
    assert audit["rows"] == 3
    limits = tolerance(dtype, "float32")
    assert limits.cosine <= audit["cosine_min"] <= 1 + 1e-9
    assert 0 <= audit["relative_mse_max"] <= limits.relative_mse
    assert audit["seconds"] > 0
    assert result["out_of_tolerance"] is False
    assert any(message.startswith("audit: 3 rows, cosine at least ") for message in listener.messages)
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        kept = store.manifest.audits()
        assert len({audit.row for audit in kept}) == 3
        assert min(audit.cosine for audit in kept) == audit["cosine_min"]
    again = run(audit=3, dtype=dtype)
    assert (again["audit"], again["out_of_tolerance"]) == (None, False), "nothing was committed"


def test_an_audit_of_more_rows_than_there_are_takes_all_that_were_done(run: Run, photos: Path) -> None:
    (photos / "1-astronaut.png").write_bytes(b"")
    assert run(audit=100)["audit"]["rows"] == 6
    assert run("none.zarr", audit=0)["audit"] is None


def _embed(teacher: Teacher, batch: Batch) -> np.ndarray:
    return embed(teacher, batch).numpy()


def _other_mean(teacher: Teacher, batch: Batch) -> np.ndarray:
    pixels = normalize_and_pad(torch.from_numpy(batch.canvas_BHWC), torch.from_numpy(batch.sizes_B2))
    return teacher.embed(pixels + 0.1).numpy()


def _padding_before_normalising(teacher: Teacher, batch: Batch) -> np.ndarray:
    whole = torch.full((len(batch.sizes_B2), 2), batch.canvas_BHWC.shape[1])
    return teacher.embed(normalize_and_pad(torch.from_numpy(batch.canvas_BHWC), whole)).numpy()


def _blue_for_red(teacher: Teacher, batch: Batch) -> np.ndarray:
    return _embed(teacher, replace(batch, canvas_BHWC=batch.canvas_BHWC[..., ::-1].copy()))


def _another_checkpoint(teacher: Teacher, batch: Batch) -> np.ndarray:
    with torch.no_grad():
        for parameter in teacher.image_encoder.parameters():
            parameter.mul_(1.02)
    return _embed(teacher, batch)


def _swapped_channels(teacher: Teacher, batch: Batch) -> np.ndarray:
    emb_BCHW = _embed(teacher, batch)
    return emb_BCHW[:, [1, 0, *range(2, 256)]]


def _noise_of_one_percent(teacher: Teacher, batch: Batch) -> np.ndarray:
    emb_BCHW = _embed(teacher, batch)
    noise = np.random.default_rng(0).normal(0, 0.01 * emb_BCHW.std(), emb_BCHW.shape)
    return emb_BCHW + noise.astype(np.float32)


@pytest.mark.parametrize(
    "wrong",
    [
        _other_mean,
        pytest.param(_padding_before_normalising, marks=pytest.mark.long),
        pytest.param(_blue_for_red, marks=pytest.mark.long),
        _another_checkpoint,
        _swapped_channels,
        _noise_of_one_percent,
    ],
)
def test_embeddings_that_differ_from_the_teachers_are_out_of_tolerance(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[Teacher, Batch], np.ndarray],
    listener: Listener,
) -> None:
    monkeypatch.setattr(
        shard_task, "embed", lambda teacher, batch: Embeddings(torch.from_numpy(wrong(teacher, batch)))
    )
    result = run(limit=3, precision="float32", observer=listener)
    assert result["out_of_tolerance"] is False, "nobody looked"
    # Always the last row is drawn: padding in another order changes nothing for a square photo, as some are.
    monkeypatch.setattr(
        audit, "random", SimpleNamespace(Random=lambda: SimpleNamespace(randrange=lambda _: 0))
    )
    result = run(limit=6, extend=True, audit=1, observer=listener)
    assert result["out_of_tolerance"] is True
    assert result["audit"]["relative_mse_max"] > tolerance("float16", "float32").relative_mse
    (warning,) = [message for message in listener.messages if message.startswith("WARNING")]
    assert "1 audited row of" in warning
    assert "precompute a new store" in warning
    assert run(limit=6)["out_of_tolerance"] is True, "it stays so"


def test_a_photo_that_changed_during_the_run_is_reported_and_not_counted(
    run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    load = audit.decoded_batches

    def changing(*arguments: Any) -> Any:
        with (photos / "0-admiral.png").open("ab") as file:
            file.write(b"more")
        (photos / "1-astronaut.png").unlink()
        return load(*arguments)

    monkeypatch.setattr(audit, "decoded_batches", changing)
    result = run(audit=7, observer=listener)
    assert result["audit"]["rows"] == 5
    reported = sorted(message for message in listener.messages if message.startswith("not audited"))
    assert reported == [
        "not audited: 0-admiral.png changed during the run",
        "not audited: 1-astronaut.png: the file is missing",
    ]


def test_a_failed_audit_is_an_error_and_what_is_committed_stays(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(audit, "_embed", starved)
    with pytest.raises(PrecomputeError, match=r"audit failed \(MemoryError: no room\).*--audit 0"):
        run(audit=1)
    assert run(audit=1)["done_before"] == 7


class InterruptingAtMessage(Listener):
    """Observer that presses Ctrl-C at a message."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def message(self, text: str) -> None:
        super().message(text)
        if text.startswith(self._start):
            os.kill(os.getpid(), signal.SIGINT)


class InterruptingWhenCommitted(Listener):
    """Observer that presses Ctrl-C once every row is committed; a snapshot already counts computed rows."""

    def __init__(self, store: Path) -> None:
        super().__init__()
        self._store = store

    def progress(self, snapshot: Snapshot) -> None:
        with EmbeddingStore.open(self._store) as store:
            committed = store.manifest.counts().done
        if committed == snapshot.images:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_is_interrupted_is_not_audited(run: Run, tmp_path: Path) -> None:
    listener = InterruptingWhenCommitted(tmp_path / "store.zarr")
    with pytest.raises(PrecomputeInterrupted, match="7 of 7 images are committed"):
        run(audit=2, observer=listener)
    assert not any(message.startswith("audit") for message in listener.messages)


def test_a_signal_ends_a_long_audit(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    embed = audit._embed

    def lasting(*arguments: Any) -> np.ndarray:
        release.wait()
        return embed(*arguments)

    monkeypatch.setattr(audit, "_embed", lasting)
    with pytest.raises(PrecomputeInterrupted, match="7 of 7 images are committed"):
        run(audit=2, observer=InterruptingAtMessage("audit: embedding 2"))
    release.set()
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        assert store.manifest.audits() == []


def _result(row: int, reason: str | None = None) -> RowResult:
    return RowResult(row=row, reason=reason)


def test_every_done_row_has_the_same_chance_to_be_audited() -> None:
    drawn = [0] * 10
    for _ in range(4000):
        sample = ReservoirSample(2)
        sample.add([_result(row) for row in range(5)])
        sample.add([_result(row) for row in range(5, 10)] + [_result(10, "broken")])
        assert len(set(sample.rows)) == 2
        for row in sample.rows:
            drawn[row] += 1
    assert sum(drawn) == 8000
    assert all(640 < count < 960 for count in drawn), "six standard deviations around 800"


def test_cosine_and_relative_mse_of_an_audit_follow_their_definitions() -> None:
    rng = np.random.default_rng(1)
    fresh = rng.normal(2, 1, (256, 4, 4)).astype(np.float32)
    stored = (fresh + rng.normal(0, 0.1, fresh.shape)).astype(np.float16)
    audit = compare(5, stored, fresh)
    cosines, squared, spread = [], 0.0, 0.0
    for y in range(4):
        for x in range(4):
            s, t = stored[:, y, x].astype(float), fresh[:, y, x].astype(float)
            cosines.append(sum(s * t) / math.sqrt(sum(s * s) * sum(t * t)))
            squared += sum((s - t) ** 2)
    for channel in fresh.astype(float):
        spread += ((channel - channel.mean()) ** 2).sum()
    assert audit.row == 5
    assert audit.cosine == pytest.approx(sum(cosines) / 16, abs=1e-12)
    assert audit.relative_mse == pytest.approx(squared / spread, rel=1e-9)


@pytest.mark.parametrize("fresh", [np.full((256, 4, 4), np.nan), np.ones((256, 4, 4))])
def test_a_comparison_that_is_undefined_is_out_of_every_tolerance(fresh: np.ndarray) -> None:
    audit = compare(0, np.zeros((256, 4, 4), np.float16), fresh)
    assert audit.cosine <= 0
    assert math.isfinite(audit.relative_mse)
    assert tolerance("int8", "bfloat16").missed_by(audit)


def test_rows_of_a_bfloat16_run_are_audited_in_float32(run: Run) -> None:
    result = run(limit=1, audit=1, precision="bfloat16")
    # bfloat16 against itself would differ by the rounding to float16 alone.
    assert 1e-6 < result["audit"]["relative_mse_max"] < tolerance("float16", "bfloat16").relative_mse
    assert result["out_of_tolerance"] is False


def test_cells_that_are_zero_in_both_are_equal() -> None:
    fresh = np.random.default_rng(0).standard_normal((256, 4, 4)).astype(np.float32)
    fresh[:, 3] = 0  # padding
    assert compare(0, fresh, fresh).cosine == pytest.approx(1)
    assert compare(0, np.where(np.arange(4) < 1, 0, fresh), fresh).cosine == pytest.approx(13 / 16)
