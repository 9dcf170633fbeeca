"""Damage to what a training leaves, and to teachers' checkpoints: an error, or a fall back; never read as data."""

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


class Paused:
    """A training that was stopped one step before its end, with both checkpoints; and one that was not."""

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
        """A copy of a run; only `real` files, and those that are written in place, take room of their own."""
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
def paused(tmp_path_factory: pytest.TempPathFactory, scheduler: str) -> Iterator[Paused]:
    torch.set_num_threads(1)
    before = Path.cwd()
    yield Paused(tmp_path_factory.mktemp("runs"), scheduler)
    os.chdir(before)


def parts(run: Path) -> dict[str, bytes | None]:
    """What every reader of a run's folder gets, as bytes; None where it gets an error."""

    def told(read: Callable[[], object]) -> bytes | None:
        try:
            return as_bytes(read())
        except DistillError:
            return None

    opened = told(lambda: Run.open(run).description)
    if opened is None:
        return dict.fromkeys(("config", "split", "student", "mean", "head", "history", "result"))
    return {
        "config": opened,
        "split": told(lambda: (Run.open(run).split.train, Run.open(run).split.val)),
        "student": told(lambda: Run.open(run).student()[0].state_dict()),
        "mean": told(lambda: Run.open(run).mean_embedding()),
        "head": told(lambda: Run.open(run).read_head()),
        "history": told(lambda: Run.open(run).history()),
        # That a damaged result counts as none makes the run go on, so it is no error.
        "result": told(lambda: Run.open(run).result() or b""),
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
    """Parts that were read without an error as something else."""
    return [
        name
        for name, value in found.items()
        if value not in (None, whole[name]) and not (name == "result" and value == b"")
    ]


# ---- bits, read by every reader


@pytest.mark.parametrize("file", [name for name in FILES if not name.endswith(".pt")])
def test_a_flipped_bit_or_a_cut_of_a_runs_file_is_never_read_as_data(
    paused: Paused, fault_log: FaultLog, many: Many, file: str
) -> None:
    run = paused.copy("whole", real=[file])
    whole, good = parts(run), (run / file).read_bytes()
    assert None not in whole.values()
    whole_lines = whole["history"] or b""
    harm: list[tuple[str, int, Callable[[Path], None]]] = [
        ("flip", 8 * offset + bit, lambda path, at=(offset, bit): flip(path, *at))
        for offset, bit in [
            *bits(range(len(good)), many(24, 3), file),
            *bits(range(min(len(good), 4096)), many(24, 3), f"start of {file}"),
        ]
    ]
    harm += [
        ("truncate", length, lambda path, length=length: cut(path, length))
        for length in lengths(len(good), 4096, 0, file)[:: many(1, 3)]
        if length >= 0
    ]
    harm += [("zeros", 0, zero), ("delete", 0, Path.unlink)]
    for action, ordinal, damage in harm:
        damage(run / file)
        found = parts(run)
        wrong = misread(found, whole)
        # The last line of a log may be half, and is then none; those before it are what they were.
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
    """Offsets in a file of torch.save, by what stands there."""
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


class Reader:
    """Loads checkpoints of the paused run as a rerun does, and tells whether it got what was saved."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._student = build_student("tiny_vit", 64, 0)
        self._optimizer = torch.optim.AdamW(parameter_groups(self._student, 0.1))

    def read(self, folder: Path) -> bytes | None:
        """Everything in the newest whole checkpoint; None when there is none."""
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
    paused: Paused, fault_log: FaultLog, many: Many, byte_class: str
) -> None:
    """With nothing to fall back on, so that it is this file that is read or refused."""
    run = paused.copy(real=["last.pt"])
    (run / "previous.pt").unlink()
    reader = Reader(Run.open(run).id)
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


# ---- whole files, and going on


HARM: dict[str, Callable[[Path], object]] = {
    "flip": lambda path: flip(path, path.stat().st_size // 2),
    "truncate": lambda path: cut(path, path.stat().st_size // 2),
    "empty": lambda path: cut(path, 0),
    "zeros": zero,
    "delete": Path.unlink,
}


def go_on(paused: Paused, fault_log: FaultLog, run: Path, action: str, phase: str, **options: Any) -> None:
    """The same command again: the run must end as the undisturbed one did, and with the same files."""
    distill(paused.config(run, **options))
    outcome = RunContents.of(run)
    lost = outcome.lines != paused.outcome.lines or outcome.weights != paused.outcome.weights
    fault_log.record(
        call=action, ordinal=0, file=phase, phase=f"going on, {phase}", fired=True, lost=int(lost), wrong=0,
        role="trainer",
    )  # fmt: skip
    assert not lost
    assert outcome.files == paused.outcome.files
    shutil.rmtree(run)


@pytest.mark.parametrize("action", HARM)
def test_the_checkpoint_before_the_last_is_gone_on_from(
    paused: Paused, fault_log: FaultLog, caplog: pytest.LogCaptureFixture, action: str
) -> None:
    run = paused.copy(real=["last.pt"])
    HARM[action](run / "last.pt")
    go_on(paused, fault_log, run, action, "last.pt")
    assert [
        record for record in caplog.records if "previous.pt" in record.message and "last.pt" in record.message
    ]


def test_a_damaged_checkpoint_before_the_last_is_not_needed(paused: Paused, fault_log: FaultLog) -> None:
    run = paused.copy(real=["previous.pt"])
    HARM["flip"](run / "previous.pt")
    go_on(paused, fault_log, run, "flip", "previous.pt")


def test_two_checkpoints_swapped_cost_one_step(paused: Paused, fault_log: FaultLog) -> None:
    run = paused.copy(real=["last.pt", "previous.pt"])
    swap(run / "last.pt", run / "previous.pt")
    go_on(paused, fault_log, run, "swap", "checkpoints swapped")


def test_two_damaged_checkpoints_are_told_and_nothing_is_changed(paused: Paused, fault_log: FaultLog) -> None:
    run = paused.copy(real=["last.pt", "previous.pt"])
    HARM["flip"](run / "last.pt")
    HARM["truncate"](run / "previous.pt")
    before = contents(run)
    with pytest.raises(DistillError, match=r"(?s)last\.pt .*previous\.pt .*--restart"):
        distill(paused.config(run))
    assert contents(run).keys() - {"run.lock"} >= before.keys() - {"run.lock"}
    assert (run / "last.pt").read_bytes() == before["last.pt"]
    go_on(paused, fault_log, run, "flip", "both checkpoints, --restart", restart=True)


def test_another_runs_checkpoint_is_not_gone_on_from(paused: Paused, fault_log: FaultLog) -> None:
    """Whole, of the very same shapes, but learned from other options."""
    other = paused.folder / "other"
    distill(paused.config(other, lr=1e-4))
    run = paused.copy(real=["last.pt"])
    shutil.copy(other / "last.pt", run / "last.pt")
    go_on(paused, fault_log, run, "copy", "another run's last.pt")
    shutil.rmtree(other)


@pytest.mark.parametrize("of", ["paused", "whole"])
@pytest.mark.parametrize(
    "file", ["student.safetensors", "mean_embedding.safetensors", "sam_head.safetensors", "split.json"]
)
def test_what_can_be_written_anew_is(paused: Paused, fault_log: FaultLog, file: str, of: str) -> None:
    run = paused.copy(of, real=[file])
    HARM["flip"](run / file)
    go_on(paused, fault_log, run, "flip", f"{file} of a {of} run")


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl"])
def test_what_only_the_run_knew_is_told_with_the_mend(paused: Paused, fault_log: FaultLog, file: str) -> None:
    run = paused.copy(real=[file])
    flip(run / file, 60)
    with pytest.raises(DistillError, match=rf"{file} is .*damaged(.|\n)*--restart"):
        distill(paused.config(run))
    go_on(paused, fault_log, run, "flip", f"{file}, --restart", restart=True)


def test_a_result_cut_off_is_computed_again(paused: Paused, fault_log: FaultLog) -> None:
    run = paused.copy("whole", real=["metrics.jsonl"])
    cut(run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 5)
    go_on(paused, fault_log, run, "truncate", "metrics.jsonl of a whole run")


def test_the_commands_say_so_with_exit_code_3(paused: Paused, fault_log: FaultLog) -> None:
    run = paused.copy("whole", real=["student.safetensors"])
    HARM["flip"](run / "student.safetensors")
    refused(
        mobilesam("verify", "--student", run, "--split", "all", "--json"), "student.safetensors", "damaged"
    )
    HARM["flip"](run / "config.json")
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
    """A mobile_sam of random weights."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {f"image_encoder.{key}": value for key, value in TinyViT(1024).state_dict().items()}
        state |= {key: torch.rand(shape) for key, shape in head_shapes().items()}
    torch.save(state, path)
    return path


def weights(path: Path) -> bytes | None:
    """Encoder and head; None when the file is refused."""
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
def test_a_teacher_of_another_length(teacher: Path, tmp_path: Path, fault_log: FaultLog, action: str) -> None:
    path = Path(shutil.copy(teacher, tmp_path / "teacher.pt"))
    HARM[action](path)
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
    """torch's older format has no checksums: there the store's SHA-256 is what tells."""
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
