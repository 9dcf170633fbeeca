"""last.pt and previous.pt: flipped, cut, lost, another run's, or left by a kill between two renames."""

from __future__ import annotations

import logging
import math
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flips import flipped
from torch import nn

from mobilesam.distill import DistillError
from mobilesam.distill.checkpoint import Checkpoints, EmbeddingSum, ExactSum, LogState, TrainState, Window

CPU = torch.device("cpu")


class Scene:
    """A small student with its optimizer after some steps, and a folder of checkpoints."""

    def __init__(self, folder: Path, steps: int = 1) -> None:
        torch.manual_seed(steps)
        self.student = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.optimizer = torch.optim.AdamW(self.student.parameters())
        for _ in range(steps):
            self.student(torch.randn(4, 2)).square().sum().backward()
            self.optimizer.step()
        self.state = TrainState(
            embeddings=EmbeddingSum(sum_CHW=torch.ones(2, 1, 1).double()),
            step=steps,
            log=LogState(window=Window.from_saved([(0.5, 1.5)])),
        )
        self.checkpoints = Checkpoints(folder=folder, run_id="mine")

    def save(self) -> None:
        self.checkpoints.save(self.student, self.optimizer, self.state, CPU)

    def load(self) -> TrainState:
        self.state = self.checkpoints.load(self.student, self.optimizer, self.state, CPU)
        return self.state

    def bytes(self) -> list[bytes]:
        moments = self.optimizer.state_dict()["state"]
        tensors = [*self.student.state_dict().values(), self.state.embeddings.sum_CHW, torch.get_rng_state()]
        tensors += [moments[i][name] for i in sorted(moments) for name in sorted(moments[i])]
        numbers = {**self.state.to_saved(), "mean_sum_CHW": None}
        return [repr(numbers).encode(), *(tensor.numpy().tobytes() for tensor in tensors)]


def unused_bits(path: Path) -> set[int]:
    """Bits of a zip file that don't decide what is read: local headers but for their lengths, descriptors, padding;
    and the directory, in which dates and the like may be anything."""
    data = path.read_bytes()
    used = set()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            at = entry.header_offset
            name, extra = struct.unpack("<2H", data[at + 26 : at + 30])
            begin = at + 30 + name + extra
            for first, last in ((at, at + 4), (at + 26, at + 30), (begin, begin + entry.file_size)):
                used |= set(range(8 * first, 8 * last))
    return set(range(8 * len(data))) - used


def check_flips(folder: Path, bits: Callable[[int], list[int]]) -> None:
    scene = Scene(folder)
    scene.save()
    path = folder / "last.pt"
    data, wanted, unused = path.read_bytes(), scene.bytes(), unused_bits(path)
    refused = 0
    other = Scene(folder, steps=2)
    untouched = other.bytes()
    for bit in bits(8 * len(data)):
        path.write_bytes(flipped(data, bit))
        try:
            other.load()
        except DistillError as error:
            refused += str(path) in str(error)
            if other.bytes() != untouched:
                pytest.fail(f"bit {bit}: half of the file was loaded")
            continue
        assert other.bytes() == wanted
        assert bit in unused, f"bit {bit} was used and not checked"
        other = Scene(folder, steps=2)
        untouched = other.bytes()
    assert refused


def test_a_flipped_bit_in_a_checkpoint_is_an_error_or_in_bytes_that_nobody_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    check_flips(tmp_path, lambda count: sorted(rng.choice(count, 600, replace=False).tolist()))


@pytest.mark.long
def test_a_flipped_bit_in_each_byte_of_a_checkpoint_is_an_error_or_in_bytes_that_nobody_reads(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(1)
    check_flips(tmp_path, lambda count: [8 * i + int(rng.integers(8)) for i in range(count // 8)])


def test_an_exact_sum_is_the_sum_that_fsum_gives_of_all_numbers_also_after_it_was_saved() -> None:
    rng = np.random.default_rng(0)
    for exponents in (1, 30, 300):
        numbers = (rng.standard_normal(3000) * 10.0 ** rng.integers(-exponents, exponents, 3000)).tolist()
        total = ExactSum()
        for number in numbers[:2000]:
            total.add(number)
        total = ExactSum(total.parts)
        for number in numbers[2000:]:
            total.add(number)
        assert total.value == math.fsum(numbers)
        assert len(total.parts) < 100


def test_a_checkpoint_does_not_grow_with_the_steps_since_the_last_logged_line(tmp_path: Path) -> None:
    rng, sizes = np.random.default_rng(0), []
    for steps in (1, 100_000):
        scene = Scene(tmp_path)
        scene.state.log.window = Window()
        for loss, norm in rng.random((steps, 2)).tolist():
            scene.state.log.window.add(loss, norm)
        scene.save()
        sizes.append((tmp_path / "last.pt").stat().st_size)
        loaded = Scene(tmp_path, 2).load().log.window
        assert loaded.to_saved() == scene.state.log.window.to_saved()
        assert loaded.steps == steps
    assert sizes[1] - sizes[0] < 500


def test_a_checkpoint_of_the_format_before_has_pairs_whose_sums_are_read(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.save()
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    pairs = [(0.1 * i, 1e-9 * i) for i in range(1000)]
    saved["format"], saved["state"]["window"] = 3, pairs
    torch.save(saved, tmp_path / "last.pt")
    window = Scene(tmp_path, 2).load().log.window
    assert (window.steps, window.loss.value) == (1000, math.fsum(loss for loss, _ in pairs))
    assert window.grad_norm.value == math.fsum(norm for _, norm in pairs)


def test_a_window_that_is_no_window_is_refused(tmp_path: Path) -> None:
    for wrong in (
        [(1, 2.0)],
        [(0.5,)],
        {"steps": -1, "loss": [], "grad_norm": []},
        {"steps": 1},
        5,
        [(0.5, math.nan)],
    ):
        Scene(tmp_path).save()
        saved = torch.load(tmp_path / "last.pt", weights_only=True)
        saved["state"]["window"] = wrong
        torch.save(saved, tmp_path / "last.pt")
        with pytest.raises(DistillError, match="no checkpoint of this run"):
            Scene(tmp_path, 2).load()


def test_a_student_of_thousands_of_parameters_resumes(tmp_path: Path) -> None:
    def many() -> Scene:
        scene = Scene(tmp_path)
        scene.student = nn.ParameterDict(
            {f"blocks_{i:04d}_attention_weight": torch.ones(1) for i in range(3000)}
        )
        scene.optimizer = torch.optim.AdamW(scene.student.parameters())
        return scene

    scene = many()
    sum(parameter.sum() for parameter in scene.student.values()).backward()
    scene.optimizer.step()
    scene.save()
    other = many()
    other.load()
    assert other.bytes() == scene.bytes()


def test_a_checkpoint_that_could_not_be_read_is_refused_and_replaces_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scene(tmp_path).save()
    monkeypatch.setattr("mobilesam.sam.weights.torch_file.MAX_PICKLE", 1000)
    with pytest.raises(DistillError, match=r"last\.pt can't be saved .* at most 1,000 are read"):
        Scene(tmp_path, 2).save()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert Scene(tmp_path, 3).load().step == 1


def test_torch_itself_reads_a_flipped_weight_without_an_error(tmp_path: Path) -> None:
    """Why checksums are verified by us."""
    weights = torch.arange(1000.0)
    torch.save({"a": weights}, tmp_path / "last.pt")
    data = (tmp_path / "last.pt").read_bytes()
    at = data.index(weights.numpy().tobytes()) + 400
    (tmp_path / "last.pt").write_bytes(flipped(data, 8 * at))
    assert not torch.equal(torch.load(tmp_path / "last.pt", weights_only=True)["a"], weights)


def test_the_checkpoint_before_a_damaged_one_is_resumed_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for steps in (1, 2):
        Scene(tmp_path, steps).save()
    (tmp_path / "last.pt").write_bytes(flipped((tmp_path / "last.pt").read_bytes(), 8 * 200))
    other = Scene(tmp_path, 3)
    with caplog.at_level(logging.WARNING):
        assert other.load().step == 1
    assert "last.pt" in caplog.text
    assert "previous.pt" in caplog.text
    assert (tmp_path / "last.pt.damaged").exists()
    # The damaged one never takes the place of the whole one.
    other.state.step = 4
    other.save()
    (tmp_path / "last.pt").unlink()
    assert Scene(tmp_path, 5).load().step == 1


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_save_that_dies_at_any_rename_leaves_a_checkpoint_to_resume_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """`calls` renames happen before the process dies."""
    for steps in (1, 2):
        Scene(tmp_path, steps).save()
    rename, left = os.rename, [calls]

    def dying(*names: Path) -> None:
        # The first two are those of the checkpoint under its other name.
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        rename(*names)

    monkeypatch.setattr("os.rename", dying)
    with pytest.raises(KeyboardInterrupt):
        Scene(tmp_path, 3).save()
    monkeypatch.undo()
    assert Scene(tmp_path, 4).load().step == 2


def test_the_new_checkpoint_is_durable_before_the_old_one_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scene(tmp_path, 1).save()
    did: list[str] = []
    rename, fsync = os.rename, os.fsync
    monkeypatch.setattr("os.rename", lambda a, b: (did.append(f"{Path(b).name}"), rename(a, b)))
    monkeypatch.setattr("os.fsync", lambda fd: (did.append("fsync"), fsync(fd)))
    Scene(tmp_path, 2).save()
    assert did == ["fsync", "next.pt.partial", "fsync", "previous.pt", "last.pt", "fsync"]


def test_two_damaged_checkpoints_are_one_error_with_the_mend_and_nothing_is_moved(tmp_path: Path) -> None:
    for steps in (1, 2):
        Scene(tmp_path, steps).save()
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-50])
    with pytest.raises(DistillError, match=r"(?s)last\.pt.*previous\.pt.*--restart"):
        Scene(tmp_path).load()
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "previous.pt"}


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    Checkpoints(folder=tmp_path, run_id="other").save(scene.student, scene.optimizer, scene.state, CPU)
    with pytest.raises(DistillError, match="is another run's"):
        scene.load()
