"""Shards on a worker: while the teacher computes one, others are decoded and written."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from mobilesam.precompute import shard_task
from mobilesam.precompute.messages import ShardResult, ShardTask, Span, TaskImage, TeacherSetup
from mobilesam.precompute.shard_task import Embeddings, compute_shard
from mobilesam.precompute.worker import TeacherPlugin
from mobilesam.sam import list_images
from mobilesam.sam.teacher import embedded_sha256
from mobilesam.store import array_layouts

SHARDS, SIZE, SIDE = 5, 3, 256

THREADS: set[int] = set()
"""Threads that the teacher computed in."""


@pytest.fixture
def results(
    scheduler: str, shared_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[list[ShardResult], list[dict]]]:
    """Five shards computed by one worker, and their entries in dask's task stream."""
    # A teacher that takes a while: the smallest could be through before another thread gets a turn.
    embed = shard_task.embed
    THREADS.clear()

    def slowly(*what: Any) -> Embeddings:
        THREADS.add(threading.get_ident())
        time.sleep(0.05)
        return embed(*what)

    monkeypatch.setattr(shard_task, "embed", slowly)
    setup = TeacherSetup(
        name="vit_nano", checkpoint=None, checkpoint_sha256=embedded_sha256(), image_size=SIDE,
        precision="float32", batch_size=2, compile=False, devices=("cpu",), threads=1, local=False,
    )  # fmt: skip
    layouts = array_layouts("float16", SIDE, SIZE)
    (tmp_path / "embeddings").mkdir()
    files = itertools.cycle(list_images([shared_photos]).files)
    tasks = [
        ShardTask(
            shard=shard,
            store=tmp_path,
            layouts=layouts,
            image_root=shared_photos,
            images=tuple(
                TaskImage(row=row, ref=file)
                for row, file in zip(range(shard * SIZE, (shard + 1) * SIZE), files, strict=False)
            ),
            batch_size=1,
            image_timeout=60,
            batch_timeout=60,
        )
        for shard in range(SHARDS)
    ]
    plugin = TeacherPlugin("overlap", setup)
    with Client(scheduler, set_as_default=False) as client:
        client.register_plugin(plugin)
        client.get_task_stream(count=0)
        futures = [client.submit(compute_shard, task, plugin.name, pure=False) for task in tasks]
        computed = client.gather(futures)
        yield computed, [entry for entry in client.get_task_stream() if "compute_shard" in str(entry["key"])]
        client.unregister_worker_plugin(plugin.name)


def _spans(results: list[ShardResult], phase: str) -> list[tuple[int, Span]]:
    return [(result.shard, span) for result in results for span in result.spans if span.phase == phase]


def _under(phases: list[tuple[int, Span]], teacher: list[tuple[int, Span]]) -> bool:
    """True if a phase of one shard overlapped the teacher's work on another."""
    return any(
        mine != other and span.start < busy.stop and busy.start < span.stop
        for (mine, span), (other, busy) in itertools.product(phases, teacher)
    )


def test_decoding_and_writing_happen_under_the_teacher_of_another_shard(
    results: tuple[list[ShardResult], list[dict]],
) -> None:
    computed, stream = results
    teacher = _spans(computed, "teacher")
    assert len(teacher) == SHARDS * SIZE
    assert _under(_spans(computed, "decode"), teacher)
    assert _under(_spans(computed, "write"), teacher)
    ordered = sorted((span for _, span in teacher), key=lambda span: span.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ordered)), "one batch at a time"
    assert len(THREADS) == 1, "and all of them in one thread"
    actions = [{part["action"] for part in entry["startstops"]} for entry in stream]
    assert len(actions) == SHARDS
    assert all({"compute", "disk-read", "disk-write"} <= found for found in actions)
