"""Damage to a run's files and to teachers' checkpoints: an error or a fallback, never read as data."""

from __future__ import annotations

import os
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.damage.corruption import bits, cut, flip, lengths, swap, zero
from faults.fault_log import FaultLog
from faults.fixtures import contents, mobilesam, refused, save_pictures
from faults.kills.training import RunContents
from torch import Tensor

from mobilesam.distill import (
    DistillConfig,
    DistillError,
    DistillInterrupted,
    Progress,
    Run,
    StopFlag,
    distill,
)
from mobilesam.distill.checkpoint import Checkpoints, EmbeddingSum, TrainState
from mobilesam.distill.optimizer import parameter_groups
from mobilesam.distill.students.registry import build_student
from mobilesam.precompute import PrecomputeConfig, precompute
from mobilesam.sam import SamError
from mobilesam.sam.modeling.head_shapes import head_shapes
from mobilesam.sam.modeling.tiny_vit import TinyViT
from mobilesam.sam.teacher import load_head, load_teacher
from mobilesam.store import StoreMismatch

pytestmark = pytest.mark.fault

Many = Callable[[int, int], int]

FILES = (
    "last.pt", "previous.pt", "student.safetensors", "mean_embedding.safetensors", "sam_head.safetensors",
    "config.json", "split.json", "metrics.jsonl",
)  # fmt: skip


class StoppedRun:
    """Run stopped one step before its end, with both checkpoints, and a complete run of the same config."""

    def __init__(self, folder: Path, scheduler: str) -> None:
        self.folder = folder
        store = folder / "store.zarr"
        precompute(
            PrecomputeConfig(
                images=(save_pictures(folder / "photos"),), out=store, teacher="vit_nano", image_size=64,
                scheduler=scheduler, audit=0,
            )
        )  # fmt: skip
        self._config: dict[str, Any] = {
            "store": store, "epochs": 2, "batch_size": 3, "device": "cpu", "precision": "float32",
            "checkpoint_seconds": 1e-9,
        }  # fmt: skip
        os.chdir(folder)
        distill(self.config(folder / "whole"))
        self.outcome = RunContents.of(folder / "whole")
        flag = StopFlag()

        def stop(progress: Progress) -> None:
            if progress.step == progress.steps - 1:
                flag.set(signal.SIGTERM)

        with pytest.raises(DistillInterrupted):
            distill(self.config(folder / "paused"), progress=stop, stop=flag)
        assert {"last.pt", "previous.pt"} <= {path.name for path in (folder / "paused").iterdir()}
        self._number = 0

    def config(self, out: Path, **changes: Any) -> DistillConfig:
        return DistillConfig(**(self._config | {"out": out} | changes))

    def copy(self, of: str = "paused", real: Sequence[str] = ()) -> Path:
        """Copy a run; only `real` files and small ones are copied, the others are hard links."""
        self._number += 1
        place = self.folder / f"{of}-{self._number}"
        place.mkdir()
        for file in (self.folder / of).iterdir():
            if file.name in real or file.stat().st_size < 1 << 20:
                shutil.copy(file, place)
            else:
                os.link(file, place / file.name)
        return place


@pytest.fixture(scope="module")
def paused(tmp_path_factory: pytest.TempPathFactory, scheduler: str) -> Iterator[StoppedRun]:
    folder, threads = Path.cwd(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield StoppedRun(tmp_path_factory.mktemp("runs"), scheduler)
    torch.set_num_threads(threads)
    os.chdir(folder)


def parts(run: Path) -> dict[str, bytes | None]:
    """Return the result of every reader of a run's folder as bytes; None for an error."""

    def read_or_none(read: Callable[[], object]) -> bytes | None:
        try:
            return as_bytes(read())
        except DistillError:
            return None

    opened = read_or_none(lambda: Run.open(run).description)
    if opened is None:
        return dict.fromkeys(("config", "split", "student", "mean", "head", "history", "result"))
    return {
        "config": opened,
        "split": read_or_none(lambda: (Run.open(run).split.train, Run.open(run).split.val)),
        "student": read_or_none(lambda: Run.open(run).student()[0].state_dict()),
        "mean": read_or_none(lambda: Run.open(run).mean_embedding()),
        "head": read_or_none(lambda: Run.open(run).read_head()),
        "history": read_or_none(lambda: Run.open(run).history()),
        # A damaged result counts as none, so that the run is resumed: not an error.
        "result": read_or_none(lambda: Run.open(run).result() or b""),
    }


def as_bytes(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Tensor):
        return value.numpy().tobytes()
    if isinstance(value, Mapping):
        return b"|".join(repr(name).encode() + as_bytes(value[name]) for name in sorted(value))
    return repr(value).encode()


def misread(found: Mapping[str, bytes | None], whole: Mapping[str, bytes | None]) -> list[str]:
    """Return the parts that were read without an error but differ."""
    return [
        name
        for name, value in found.items()
        if value not in (None, whole[name]) and not (name == "result" and value == b"")
    ]


# ---- flipped bits


@pytest.mark.parametrize("file", [name for name in FILES if not name.endswith(".pt")])
def test_a_flipped_bit_or_a_cut_of_a_runs_file_is_never_read_as_data(
    paused: StoppedRun, fault_log: FaultLog, many: Many, file: str
) -> None:
    run = paused.copy("whole", real=[file])
    whole, good = parts(run), (run / file).read_bytes()
    assert None not in whole.values()
    whole_lines = whole["history"] or b""
    damages: list[tuple[str, int, Callable[[Path], None]]] = [
        ("flip", 8 * offset + bit, lambda path, at=(offset, bit): flip(path, *at))
        for offset, bit in [
            *bits(range(len(good)), many(24, 3), file),
            *bits(range(min(len(good), 4096)), many(24, 3), f"start of {file}"),
        ]
    ]
    damages += [
        ("truncate", length, lambda path, length=length: cut(path, length))
        for length in lengths(len(good), 4096, 0, file)[:: many(1, 3)]
        if length >= 0
    ]
    damages += [("zeros", 0, zero), ("delete", 0, Path.unlink)]
    for action, ordinal, damage in damages:
        damage(run / file)
        found = parts(run)
        wrong = misread(found, whole)
        # A truncated last line of the log is ignored; the lines before it must be unchanged.
        if "history" in wrong and whole_lines.startswith((found["history"] or b"")[:-1]):
            wrong.remove("history")
        fault_log.record(
            call=action,
            ordinal=ordinal,
            file=file,
            phase=file,
            fired=True,
            lost=0,
            wrong=len(wrong),
            role="run",
        )
        assert not wrong, (action, ordinal)
        (run / file).write_bytes(good)
    assert parts(run) == whole
    shutil.rmtree(run)


def zip_classes(path: Path) -> dict[str, Sequence[int]]:
    """Return the offsets in a file of torch.save, by kind of content."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        directory = archive.start_dir
    data, description, headers = [], [], []
    for entry in entries:
        with path.open("rb") as file:
            file.seek(entry.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
        start = entry.header_offset + 30 + name + extra
        headers += range(entry.header_offset, start)
        (description if entry.filename.endswith("data.pkl") else data).append(
            range(start, start + entry.file_size)
        )
    big = max(data, key=len)
    return {
        "tensor": big,
        "other records": [
            offset for record in data if record is not big and len(record) < 100_000 for offset in record
        ],
        "description": description[0],
        "local headers": headers,
        "directory": range(directory, path.stat().st_size - 22),
        "end": range(path.stat().st_size - 22, path.stat().st_size),
    }  # fmt: skip


ZIP_CLASSES = ("tensor", "other records", "description", "local headers", "directory", "end")


class CheckpointReader:
    """Reader that loads a run's checkpoints as a rerun does."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._student = build_student("tiny_vit", 64, 0)
        self._optimizer = torch.optim.AdamW(parameter_groups(self._student, 0.1))

    def read(self, folder: Path) -> bytes | None:
        """Return the contents of the newest intact checkpoint as bytes; None if there is none."""
        fresh = TrainState(embeddings=EmbeddingSum(sum_CHW=torch.zeros(256, 4, 4, dtype=torch.float64)))
        try:
            state = Checkpoints(folder=folder, run_id=self._run_id).load(
                self._student, self._optimizer, fresh, torch.device("cpu")
            )
        except DistillError as error:
            assert "--restart" in str(error)  # noqa: PT017 - most damages give an error, some harmless ones none
            return None
        moments = self._optimizer.state_dict()["state"]
        return b"".join(
            as_bytes(part)
            for part in (self._student.state_dict(), moments, state.to_saved(), torch.get_rng_state())
        )


@pytest.mark.parametrize("byte_class", ZIP_CLASSES)
def test_a_flipped_bit_of_a_checkpoint_is_never_read_as_data(
    paused: StoppedRun, fault_log: FaultLog, many: Many, byte_class: str
) -> None:
    """Without a previous.pt, so that this file itself is read or refused."""
    run = paused.copy(real=["last.pt"])
    (run / "previous.pt").unlink()
    reader = CheckpointReader(Run.open(run).id)
    whole = reader.read(run)
    assert whole is not None
    refusals = 0
    for offset, bit in bits(zip_classes(run / "last.pt")[byte_class], many(16, 3), byte_class):
        flip(run / "last.pt", offset, bit)
        found = reader.read(run)
        wrong = found not in (None, whole)
        refusals += found is None
        fault_log.record(
            call="flip", ordinal=8 * offset + bit, file="last.pt", phase=f"checkpoint {byte_class}", fired=True,
            lost=0, wrong=int(wrong), role="trainer",
        )  # fmt: skip
        assert not wrong, offset
        flip(run / "last.pt", offset, bit)
    assert reader.read(run) == whole
    assert refusals or byte_class == "local headers"
    shutil.rmtree(run)


# ---- damaged files and resuming


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flip": lambda path: flip(path, path.stat().st_size // 2),
    "truncate": lambda path: cut(path, path.stat().st_size // 2),
    "empty": lambda path: cut(path, 0),
    "zeros": zero,
    "delete": Path.unlink,
}


def resume_and_compare(
    paused: StoppedRun, fault_log: FaultLog, run: Path, action: str, phase: str, **options: Any
) -> None:
    """Run the same command again; the run must end like the undisturbed one, with the same files."""
    distill(paused.config(run, **options))
    outcome = RunContents.of(run)
    lost = outcome.lines != paused.outcome.lines or outcome.weights != paused.outcome.weights
    fault_log.record(
        call=action, ordinal=0, file=phase, phase=f"resume, {phase}", fired=True, lost=int(lost), wrong=0,
        role="trainer",
    )  # fmt: skip
    assert not lost
    assert outcome.files == paused.outcome.files
    shutil.rmtree(run)


@pytest.mark.parametrize("action", DAMAGES)
def test_a_damaged_last_checkpoint_falls_back_to_the_previous_one(
    paused: StoppedRun, fault_log: FaultLog, caplog: pytest.LogCaptureFixture, action: str
) -> None:
    run = paused.copy(real=["last.pt"])
    DAMAGES[action](run / "last.pt")
    resume_and_compare(paused, fault_log, run, action, "last.pt")
    assert [
        record for record in caplog.records if "previous.pt" in record.message and "last.pt" in record.message
    ]


def test_a_damaged_previous_checkpoint_is_not_needed(paused: StoppedRun, fault_log: FaultLog) -> None:
    run = paused.copy(real=["previous.pt"])
    DAMAGES["flip"](run / "previous.pt")
    resume_and_compare(paused, fault_log, run, "flip", "previous.pt")


def test_two_swapped_checkpoints_cost_one_step(paused: StoppedRun, fault_log: FaultLog) -> None:
    run = paused.copy(real=["last.pt", "previous.pt"])
    swap(run / "last.pt", run / "previous.pt")
    resume_and_compare(paused, fault_log, run, "swap", "checkpoints swapped")


def test_two_damaged_checkpoints_are_an_error_that_changes_nothing(
    paused: StoppedRun, fault_log: FaultLog
) -> None:
    run = paused.copy(real=["last.pt", "previous.pt"])
    DAMAGES["flip"](run / "last.pt")
    DAMAGES["truncate"](run / "previous.pt")
    before = contents(run)
    with pytest.raises(DistillError, match=r"(?s)last\.pt .*previous\.pt .*--restart"):
        distill(paused.config(run))
    assert contents(run).keys() - {"run.lock"} >= before.keys() - {"run.lock"}
    assert (run / "last.pt").read_bytes() == before["last.pt"]
    resume_and_compare(paused, fault_log, run, "flip", "both checkpoints, --restart", restart=True)


def test_another_runs_checkpoint_is_not_resumed(paused: StoppedRun, fault_log: FaultLog) -> None:
    """The checkpoint is intact and has the same shapes, but was trained with other options."""
    other = paused.folder / "other"
    distill(paused.config(other, lr=1e-4))
    run = paused.copy(real=["last.pt"])
    shutil.copy(other / "last.pt", run / "last.pt")
    resume_and_compare(paused, fault_log, run, "copy", "another run's last.pt")
    shutil.rmtree(other)


@pytest.mark.parametrize("of", ["paused", "whole"])
@pytest.mark.parametrize(
    "file", ["student.safetensors", "mean_embedding.safetensors", "sam_head.safetensors", "split.json"]
)
def test_files_that_can_be_written_again_are_replaced(
    paused: StoppedRun, fault_log: FaultLog, file: str, of: str
) -> None:
    run = paused.copy(of, real=[file])
    DAMAGES["flip"](run / file)
    resume_and_compare(paused, fault_log, run, "flip", f"{file} of a {of} run")


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl"])
def test_a_file_that_cannot_be_written_again_is_an_error_with_its_remedy(
    paused: StoppedRun, fault_log: FaultLog, file: str
) -> None:
    run = paused.copy(real=[file])
    flip(run / file, 60)
    with pytest.raises(DistillError, match=rf"{file} is .*damaged(.|\n)*--restart"):
        distill(paused.config(run))
    resume_and_compare(paused, fault_log, run, "flip", f"{file}, --restart", restart=True)


def test_a_truncated_result_is_computed_again(paused: StoppedRun, fault_log: FaultLog) -> None:
    run = paused.copy("whole", real=["metrics.jsonl"])
    cut(run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 5)
    resume_and_compare(paused, fault_log, run, "truncate", "metrics.jsonl of a whole run")


def test_the_commands_report_damaged_runs_with_exit_code_3(paused: StoppedRun, fault_log: FaultLog) -> None:
    run = paused.copy("whole", real=["student.safetensors"])
    DAMAGES["flip"](run / "student.safetensors")
    refused(
        mobilesam("verify", "--student", run, "--split", "all", "--json"), "student.safetensors", "damaged"
    )
    DAMAGES["flip"](run / "config.json")
    refused(mobilesam("verify", "--student", run, "--split", "all", "--json"), "config.json", "damaged")
    fault_log.record(
        call="flip",
        ordinal=0,
        file="student.safetensors",
        phase="command line",
        fired=True,
        lost=0,
        wrong=0,
        role="run",
    )
    shutil.rmtree(run)


# ---- teachers' checkpoints


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a mobile_sam with random weights."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {f"image_encoder.{key}": value for key, value in TinyViT(1024).state_dict().items()}
        state |= {key: torch.rand(shape) for key, shape in head_shapes().items()}
    torch.save(state, path)
    return path


def weights(path: Path) -> bytes | None:
    """Return encoder and head as bytes; None if the file is refused."""
    try:
        encoder = load_teacher("mobile_sam", path, image_size=64).image_encoder.state_dict()
        return as_bytes(encoder) + as_bytes(dict(load_head("mobile_sam", path)))
    except SamError as error:
        assert str(path) in str(error)  # noqa: PT017 - most damages give an error, some harmless ones none
        return None


@pytest.mark.parametrize("byte_class", ZIP_CLASSES)
def test_a_flipped_bit_of_a_teacher_is_never_read_as_data(
    teacher: Path, tmp_path: Path, fault_log: FaultLog, many: Many, byte_class: str
) -> None:
    path = Path(shutil.copy(teacher, tmp_path / "teacher.pt"))
    whole = weights(path)
    assert whole is not None
    for offset, bit in bits(zip_classes(path)[byte_class], many(10, 2), byte_class):
        flip(path, offset, bit)
        found = weights(path)
        wrong = found not in (None, whole)
        fault_log.record(
            call="flip", ordinal=8 * offset + bit, file="teacher.pt", phase=f"teacher {byte_class}", fired=True,
            lost=0, wrong=int(wrong), role="worker",
        )  # fmt: skip
        assert not wrong, offset
        flip(path, offset, bit)


@pytest.mark.parametrize("action", ["truncate", "empty", "zeros", "delete"])
def test_a_truncated_empty_zeroed_or_missing_teacher_is_refused(
    teacher: Path, tmp_path: Path, fault_log: FaultLog, action: str
) -> None:
    path = Path(shutil.copy(teacher, tmp_path / "teacher.pt"))
    DAMAGES[action](path)
    found = weights(path)
    fault_log.record(
        call=action, ordinal=0, file="teacher.pt", phase="teacher", fired=True, lost=0, wrong=int(found is not None),
        role="worker",
    )  # fmt: skip
    assert found is None


@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_store_refuses_its_teacher_with_a_bit_flipped(
    run: Callable[..., dict[str, Any]], teacher: Path, tmp_path: Path, fault_log: FaultLog, form: str
) -> None:
    """torch's older format has no checksums: there the store's SHA-256 finds the flip."""
    path = tmp_path / "teacher.pt"
    torch.save(torch.load(teacher), path, _use_new_zipfile_serialization=form == "zip")
    options = {"teacher": "mobile_sam", "checkpoint": path}
    run(limit=3, **options)
    before = contents(tmp_path / "store.zarr")
    flip(path, path.stat().st_size // 2, 6)
    with pytest.raises((StoreMismatch, SamError), match=r"checkpoint_sha256: store|damaged"):
        run(extend=True, **options)
    fault_log.record(
        call="flip", ordinal=0, file="teacher.pt", phase=f"teacher of a store, {form}", fired=True, lost=0, wrong=0,
        role="coordinator",
    )  # fmt: skip
    assert contents(tmp_path / "store.zarr") == before
    flip(path, path.stat().st_size // 2, 6)
    assert run(extend=True, **options)["done"] == 7
