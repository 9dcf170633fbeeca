"""`precompute --compile`: the shards' teacher is compiled, the audit's is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from listener import Listener
from precompute_command import run_command
from torch._dynamo.exc import TorchDynamoException

from mobilesam.precompute import PrecomputeError, audit, worker
from mobilesam.precompute.worker import TeacherPlugin
from mobilesam.sam.teacher import Teacher
from mobilesam.store import EmbeddingStore

Run = Callable[..., dict[str, Any]]


def test_a_workers_teacher_is_compiled_once_for_its_batches_and_the_audits_is_not(
    run: Run, monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    compiled: list[tuple[Teacher, int]] = []
    audited: list[Teacher] = []
    embed = audit._embed

    def watched(teacher: Teacher, *image: Any) -> np.ndarray:
        audited.append(teacher)
        return embed(teacher, *image)

    monkeypatch.setattr(worker, "compile_teacher", lambda *what: compiled.append(what))
    monkeypatch.setattr(audit, "_embed", watched)
    result = run(compile=True, batch_size=2, audit=1, observer=listener)
    assert (result["done"], result["audit"]["rows"]) == (7, 1)
    ((teacher, batch_size),) = compiled
    assert (teacher.name, batch_size) == ("vit_nano", 2)
    assert [one is teacher for one in audited] == [False]
    assert sum("torch.compile" in message for message in listener.messages) == 1
    again = run()
    assert (again["done_before"], len(compiled)) == (7, 1), "it isn't part of what a store is"


def test_compiling_has_a_time_limit_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[float, str]] = []

    @contextmanager
    def time_limit(_: TeacherPlugin, seconds: float, what: str = "a batch") -> Iterator[None]:
        limits.append((seconds, what))
        yield

    monkeypatch.setattr(TeacherPlugin, "time_limit", time_limit)
    monkeypatch.setattr(worker, "compile_teacher", lambda *_: None)
    run(compile=True)
    assert limits[:2] == [(3600 + 1800, "torch.compile"), (1800, "a batch")]
    assert len(limits) == 1 + 2 * 7, "each batch when it is launched, and when it is awaited"


@pytest.mark.parametrize(("device", "expected"), [("cuda", [2]), ("cpu", [])])
def test_a_gpus_teacher_embeds_a_batch_of_zeros_before_the_first_shard(
    run: Run, monkeypatch: pytest.MonkeyPatch, device: str, expected: list[int]
) -> None:
    warmed: list[int] = []
    load = worker._load

    def loaded(*setup: Any) -> Teacher:
        teacher = load(*setup)
        object.__setattr__(teacher, "device", torch.device(device))
        return teacher

    def warm_up(teacher: Teacher, batch_size: int) -> None:
        warmed.append(batch_size)
        object.__setattr__(teacher, "device", torch.device("cpu"))

    monkeypatch.setattr(worker, "_load", loaded)
    monkeypatch.setattr(worker, "warm_up", warm_up)
    result = run(batch_size=2)
    assert result["done"] == 7
    assert warmed == expected


@pytest.mark.parametrize("place", ["torch.nn.Module.compile", "mobilesam.sam.teacher.Teacher.embed"])
@pytest.mark.parametrize("kind", [TorchDynamoException, RuntimeError])
def test_a_failing_torch_compile_ends_the_run_and_names_the_option_to_leave_out(
    run: Run, monkeypatch: pytest.MonkeyPatch, place: str, kind: type[Exception]
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise kind("no C++ compiler\nand much more")

    monkeypatch.setattr(place, failing)
    with pytest.raises(
        PrecomputeError,
        match=r"torch\.compile failed for vit_nano on a worker \(no C\+\+ compiler\); leave out --compile",
    ):
        run(compile=True, shard_size=7)


def test_too_little_memory_for_a_compiled_batch_is_reported_as_such(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("20 GiB")

    monkeypatch.setattr(Teacher, "embed", starved)
    with pytest.raises(PrecomputeError, match="no memory for 2 images at once: lower --batch-size"):
        # One shard: the task of another would go on to compile, in earnest, when this test is over.
        run(compile=True, batch_size=2, shard_size=7)


@pytest.mark.long
def test_a_compiled_teacher_gives_the_same_embeddings(shared_photos: Path, tmp_path: Path) -> None:
    found = []
    for name, options in (("eager", []), ("compiled", ["--compile"])):
        out = tmp_path / f"{name}.zarr"
        options = ["--dtype", "float32", "--precision", "float32", "--batch-size", "3", *options]
        result = run_command(shared_photos, out, *options)
        assert (result["done"], result["audit"]["rows"], result["out_of_tolerance"]) == (7, 2, False)
        with EmbeddingStore.open(out) as store:
            found.append(store.read(range(7)).to_float32())
    eager, compiled = found
    assert np.abs(compiled - eager).max() <= 1e-4 * np.ptp(eager)
    assert not np.array_equal(compiled, eager), "another program made them"
