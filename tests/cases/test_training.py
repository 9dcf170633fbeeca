"""Runs: batches of one image, more epochs, the latest run, long ones, and what `verify` says of a perfect student."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from gradient_photo import gradient_photo
from photo_store import make_photo_store
from PIL import Image
from small_student import registered_small_student

from mobilesam.cli import main
from mobilesam.distill import Run, build_student
from mobilesam.distill.checksummed_json import encode_line
from mobilesam.distill.trainer import Trainer
from mobilesam.sam import load_image, normalize_and_pad, place_on_canvas
from mobilesam.sam.teacher import Teacher, load_head, load_teacher


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    torch.set_num_threads(1)
    with registered_small_student():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight photos and their store: seven to train on, one held out."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos").mkdir()
    for i in range(8):
        gradient_photo(i, steepness=4).save(folder / "photos" / f"p{i}.png")
    write_store(folder / "store.zarr", folder / "photos", load_teacher("vit_nano", None, image_size=64))
    return folder


def write_store(path: Path, photos: Path, teacher: Teacher, dtype: str = "float16") -> None:
    """Write a store of a teacher's embeddings, with vit_nano's head."""
    images = [load_image(file.read_bytes(), 64) for file in sorted(photos.iterdir())]
    canvas_BHWC = torch.zeros(len(images), 64, 64, 3, dtype=torch.uint8)
    for image, canvas_HWC in zip(images, canvas_BHWC, strict=True):
        place_on_canvas(image, canvas_HWC.numpy())
    sizes_B2 = torch.tensor([image.resized_size for image in images])
    embeddings = teacher.embed(normalize_and_pad(canvas_BHWC, sizes_B2)).numpy()
    head = {key: value.numpy() for key, value in load_head("vit_nano", None).items()}
    make_photo_store(path, photos, head=head, embeddings=embeddings, dtype=dtype)


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a link to the store, which is the working directory."""
    (tmp_path / "store.zarr").symlink_to(made / "store.zarr")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mobilesam(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def distill(*args: object) -> Result:
    return mobilesam(
        *("distill", "--student", "small", "--epochs", 1, "--batch-size", 4, "--device", "cpu"), *args
    )


def trained(*args: object) -> dict[str, Any]:
    done = distill(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def told(result: Result, code: int) -> str:
    """Return a command's message; it exited with `code`, in one or two lines and with no word of a bug."""
    assert result.exit_code == code, result.output
    errors = result.stderr.split("error: ")[-1].strip()
    assert 1 <= len(errors.splitlines()) <= 2, errors
    assert "bug" not in errors
    return result.stderr


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int, *args: object) -> None:
    """Begin a run that is stopped after a step, as by Ctrl-C."""
    whole = Trainer.after_step

    def stopping(self: Trainer, *, last: bool) -> None:
        if self.state.step == step:
            self.stop.set(signal.SIGINT)
        whole(self, last=last)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "after_step", stopping)
        stopped = distill(*args)
        assert stopped.exit_code == 130, stopped.output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}


def test_a_checkpoint_with_any_number_of_steps_since_the_last_logged_line_resumes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X1: 45,000 pairs of an older last.pt are read, and a new one holds their sums, in few bytes."""
    monkeypatch.setattr("mobilesam.distill.trainer.LINES_PER_EPOCH", 1)
    interrupted(monkeypatch, 2, "--batch-size", 1, "--out", "run")
    saved = torch.load("run/last.pt", weights_only=True)
    assert saved["state"]["window"]["steps"] == 2
    saved["format"], saved["state"]["window"] = 3, [(0.1 * i, 0.2 * i) for i in range(45_000)]
    torch.save(saved, "run/last.pt")
    interrupted(monkeypatch, 3, "--batch-size", 1, "--out", "run")
    window = torch.load("run/last.pt", weights_only=True)["state"]["window"]
    assert window["steps"] == 45_001
    assert len(window["loss"]) + len(window["grad_norm"]) < 20
    result = trained("--batch-size", 1, "--out", "run")
    assert result["steps"] == 7
    line = Run.open("run").last("train")
    assert line is not None
    assert 2000 < line["loss"] < 0.1 * 45_000 / 2, "the mean of 45,005 steps"


def test_the_weights_of_another_program_are_no_run(place: Path) -> None:
    """R4: a config.json and a student.safetensors in `runs` were taken for the newest run."""
    trained("--out", "runs/base")
    Path("runs/latest").unlink()
    other = Path("runs/sam-vit-base")
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "sam"}')
    shutil.copy("runs/base/student.safetensors", other)
    os.utime(other / "student.safetensors", (2e9, 2e9))
    result = json.loads(mobilesam("verify", "--points", 0, "--json").stdout)
    assert result["subject"]["run"] == "base"


def test_latest_names_the_last_run_that_has_a_student(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: it stays at a finished run while another one has none yet, and moves at that one's first epoch."""
    trained("--out", "runs/base")
    interrupted(monkeypatch, 1, "--epochs", 2, "--out", "runs/cut")
    assert os.readlink("runs/latest") == "base"
    assert json.loads(mobilesam("verify", "--points", 0, "--json").stdout)["subject"]["run"] == "base"
    interrupted(monkeypatch, 3, "--epochs", 2, "--out", "runs/cut")
    assert os.readlink("runs/latest") == "cut"
    trained("--epochs", 2, "--out", "runs/cut")
    trained("--out", "runs/base")
    assert os.readlink("runs/latest") == "base", "asked for again"


def test_a_run_without_a_student_is_not_finished_and_says_how_to_go_on(
    place: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R4: the first run of all, stopped in its first epoch, in every command that takes a student."""
    interrupted(monkeypatch, 1, "--out", "runs/cut")
    photo = made / "photos" / "p0.png"
    for args in (
        ("verify",),
        ("verify", "--student", "runs/cut"),
        ("segment", photo, "--point", 9, 9),
        ("segment", photo, "--student", "runs/cut", "--point", 9, 9),
        ("export", "--out", "exported"),
        ("evaluate", "--store", "store.zarr", "--model", "a=runs/cut"),
        ("evaluate", "--store", "store.zarr", "--model", "a=runs/latest"),
        ("distill", "--student", "small", "--init", "runs/cut"),
    ):
        assert "cut is not finished: no student yet; run the same distill command again to go on" in told(
            mobilesam(*args), 3
        ), args
    assert trained("--out", "runs/cut")["steps"] == 2
    assert mobilesam("verify", "--points", 0).exit_code == 0


def test_an_older_versions_link_to_a_run_without_a_student_is_passed_over_with_a_word(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R4: links of 4c4873a name whatever began last; a link to a folder that is gone is no dead end, either."""
    trained("--out", "runs/base")
    interrupted(monkeypatch, 1, "--out", "runs/cut", "--seed", 1)
    for target, why in (("cut", "is not finished: no student yet"), ("gone", "is gone")):
        Path("runs/latest").unlink()
        Path("runs/latest").symlink_to(target)
        done = mobilesam("verify", "--points", 0, "--json")
        assert json.loads(done.stdout)["subject"]["run"] == "base"
        assert f"{target}, which {why}; taken instead: runs/base" in done.stderr.replace("\n", " ")
    interrupted(monkeypatch, 1, "--out", "runs/other", "--seed", 2)
    assert os.readlink("runs/latest") == "base", "the next distill mends it"
    shutil.rmtree("runs/base")
    assert "no student yet" in told(mobilesam("verify", "--student", "runs/other"), 3)


@pytest.mark.parametrize(
    ("student", "batch"),
    [
        ("skresnet18", (2,)),
        ("resnest14d", (1,)),
        *(
            pytest.param(student, batch, marks=pytest.mark.long)
            for student in ("skresnet18", "rexnet_100", "resnest14d")
            for batch in ((2,), (1,), (4, 1))
        ),
    ],
)
def test_a_student_with_batch_norms_over_one_pooled_value_trains_on_batches_of_one_image(
    place: Path, student: str, batch: tuple[int, ...]
) -> None:
    """T1: seven images: the last batch of two is odd; batches of one; micro-batches of one."""
    result = trained(
        *("--student", f"timm:{student}", "--batch-size", batch[0], "--out", "run"),
        *(("--micro-batch", batch[1]) if len(batch) > 1 else ()),
    )
    assert result["steps"] == -(-7 // batch[0])
    assert np.isfinite(result["val"]["mse"])
    assert mobilesam("verify", "--student", "run", "--points", 0).exit_code == 0


def test_norms_that_never_see_two_values_are_told_with_the_mend(place: Path) -> None:
    """T1: a line, since they keep their first statistics for the whole run."""
    done = distill("--student", "timm:skresnet18", "--batch-size", 1, "--out", "run")
    assert done.exit_code == 0
    assert "timm:skresnet18 has 8 batch norms over one value per image" in done.stderr
    assert "--batch-size 2" in done.stderr


def test_more_epochs_than_a_finished_run_are_refused_and_init_is_named(place: Path) -> None:
    """T2: with --out; the run is unchanged, and the way on that is named works."""
    trained("--out", "runs/t2")
    before = contents(Path("runs/t2"))
    message = told(distill("--epochs", 3, "--out", "runs/t2"), 3)
    assert "epochs: 1 then, 3 now" in message
    assert "--init runs/t2 --out OTHER" in message
    assert contents(Path("runs/t2")) == before
    done = distill("--epochs", 3, "--init", "runs/t2", "--out", "runs/t2b", "--json")
    assert json.loads(done.stdout)["epochs"] == 3
    assert "starting from" in done.stderr
    assert "runs/t2/student.safetensors" in done.stderr
    config = json.loads(Path("runs/t2b/config.json").read_text())
    assert config["init"]["taken"]["parameters"] == config["init"]["taken"]["of_parameters"]


def test_the_same_run_in_a_folder_that_was_named_is_told_when_another_begins(place: Path) -> None:
    """T2: nothing differs but the folder."""
    trained("--out", "runs/t2")
    words = " ".join(distill().stderr.split())
    assert re.search(
        r"a new run begins in runs/small-\w+, from new weights: the one in runs/t2 is the same", words
    )


def test_more_epochs_in_a_folder_of_their_own_begin_anew_with_a_word_on_the_earlier_run(place: Path) -> None:
    """T2: without --out; the nearest earlier run, what differs, and --init are named."""
    assert "a new run begins" not in distill().stderr
    (first,) = [path for path in Path("runs").iterdir() if not path.is_symlink()]
    again = distill()
    assert "a new run begins" not in again.stderr
    assert "was finished on" in again.stdout
    more = distill("--epochs", 3)
    assert more.exit_code == 0
    words = " ".join(more.stderr.split())
    assert "a new run begins in runs/small-" in words
    assert f"the earlier one in {first} was begun differently (epochs: 1 then, 3 now)" in words
    assert f"add --init {first}" in words
    assert "a new run begins" not in distill("--epochs", 2, "--init", first).stderr


def test_a_finished_run_asked_for_again_says_that_it_was_finished_and_when(place: Path) -> None:
    """T2: no old numbers that look like a training of now; also for a run of an older version."""
    first = trained("--out", "run")
    assert not first["already_finished"]
    before = contents(Path("run"))
    again = trained("--out", "run")
    assert again == {**first, "already_finished": True}
    shown = distill("--out", "run").stdout.splitlines()
    year = first["finished"][:4]
    assert shown[0].startswith(f"{Path('run').resolve()} was finished on {year}-")
    assert "nothing was trained now" in shown[0]
    assert shown[1].startswith("it took 1 epoch, 2 steps, ")
    assert contents(Path("run")) == before
    lines = before["metrics.jsonl"].splitlines(keepends=True)
    result = {
        name: value for name, value in json.loads(lines[-1]).items() if name not in ("finished", "crc32")
    }
    Path("run/metrics.jsonl").write_bytes(b"".join(lines[:-1]) + encode_line(result))
    os.utime("run/metrics.jsonl", (0, 86400.0 * 366))
    assert "was finished on 1971-01-0" in distill("--out", "run").stdout


def test_a_student_that_is_its_teacher_has_a_skill_and_a_miou_of_one_on_any_processor(
    place: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T2: `verify` computes in float32 unless told otherwise, also where `auto` is bfloat16."""
    monkeypatch.setattr("mobilesam.sam.device.cpu_accelerates_bfloat16", lambda: True)
    encoder, head = build_student("tiny_vit", 1024, seed=0).state_dict(), load_head("vit_nano", None)
    torch.save({f"image_encoder.{key}": value for key, value in encoder.items()} | head, "own.pt")
    teacher = load_teacher("mobile_sam", Path("own.pt"), image_size=64)
    write_store(Path("own.zarr"), made / "photos", teacher, dtype="float32")
    asked = (
        "verify",
        "--student",
        "own.pt",
        "--store",
        "own.zarr",
        "--split",
        "all",
        "--device",
        "cpu",
        "--json",
    )
    result = json.loads(mobilesam(*asked).stdout)
    assert result["subject"]["precision"] == "float32"
    assert result["skill"] == pytest.approx(1, abs=1e-5)
    assert result["skill_valid"] == pytest.approx(1, abs=1e-5)
    assert result["miou"] == 1
    hidden = json.loads(mobilesam(*asked, "--precision", "auto").stdout)
    assert hidden["subject"]["precision"] == "bfloat16"
    assert hidden["skill"] < 1 - 1e-5


def test_wrong_images_are_named_with_their_option(place: Path, made: Path) -> None:
    """T2: a folder that isn't there, and one with other photos."""
    Path("others").mkdir()
    for command in ("distill", "verify"):
        extra = ("--student", "small") if command == "distill" else ("--student", "run")
        if command == "verify":
            trained("--out", "run")
        for given in ("wrong", "others"):
            assert f"--images {given}" in told(mobilesam(command, *extra, "--images", given), 3)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("distill --store missing.zarr", "missing.zarr is no mobilesam store"),
        ("distill --store wrong.pt", "wrong.pt is a file, not a mobilesam store"),
        ("distill --init wrong.pt", "wrong.pt (2 bytes) is not a checkpoint of PyTorch or safetensors"),
        ("sweep --store missing.zarr", "missing.zarr is no mobilesam store"),
        ("sweep --init wrong.pt", "wrong.pt (2 bytes) is not a checkpoint"),
        ("verify", "no run at runs/latest"),
        ("verify --student wrong.pt --split all", "wrong.pt (2 bytes) is not a checkpoint"),
        ("verify --student wrong.pt --store missing.zarr", "missing.zarr is no mobilesam store"),
        ("export --out exported", "no run at runs/latest"),
        ("export --student wrong.pt --out exported", "it is a text that begins with"),
        ("segment photo.jpg --student wrong.pt --point 1 1", "wrong.pt (2 bytes) is not a checkpoint"),
        ("evaluate --store store.zarr --model a=wrong.pt", "wrong.pt (2 bytes) is not a checkpoint"),
    ],
)
def test_a_missing_store_and_a_wrong_file_are_told_before_torch_loads(
    place: Path, command: str, words: str
) -> None:
    """T2: in a second, not after the ten that torch takes on a busy machine."""
    Path("wrong.pt").write_text("x\n")
    Image.new("RGB", (64, 48)).save("photo.jpg")
    code = (
        "import sys; from mobilesam.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_every_evaluation_shows_its_images_and_counts_in_the_time_left(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R7: the last phases of distill used to stand at `0:00:00 left`."""
    monkeypatch.setattr("mobilesam.common.terminal.Reporter.LINE_SECONDS", 0.0)
    monkeypatch.setattr("mobilesam.distill.metrics.evaluate.embed", _slow_embed())
    done = distill("--val-fraction", 0.6, "--micro-batch", 1, "--out", "run")
    lines = done.stderr.splitlines()
    validations = [line for line in lines if "validate " in line]
    assert len(validations) >= 4
    assert "validate 0/" in validations[0]
    for line in validations[1:]:
        assert "0:00:0" in line
        assert "0:00:00 left" not in line, "the evaluation of training images is still to come"
    assert any("evaluate " in line for line in lines)


def _slow_embed() -> Any:
    import time

    embed = sys.modules["mobilesam.distill.metrics.evaluate"].embed

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return embed(*args)

    return slow


def test_a_sweep_shows_its_verification_and_says_which_runs_were_finished_already(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R7, T2: the same for a sweep's runs; `runs/latest` is left alone."""
    monkeypatch.setattr("mobilesam.common.terminal.Reporter.LINE_SECONDS", 0.0)
    asked = (
        "sweep",
        "--student",
        "small",
        "--epochs",
        "1,2",
        "--batch-size",
        4,
        "--device",
        "cpu",
        "--out",
        "sw",
    )
    first = mobilesam(*asked, "--points", 1)
    assert first.exit_code == 0, first.output
    assert first.stderr.count("verify 1/1 images") == 2
    assert "finished on" not in first.stderr
    again = mobilesam(*asked, "--points", 2)
    assert again.exit_code == 0
    assert again.stderr.count(", trained already, finished on 20") == 2
    assert not Path("runs").exists()
