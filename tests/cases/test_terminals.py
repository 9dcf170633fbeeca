"""Terminals and processes: readers that go away, signals, narrow terminals, boxes over the edge, dask's settings.

Commands run in processes of their own where streams, signals or terminals matter, else through click's CliRunner.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from gradient_photo import gradient_photo
from photo_store import make_photo_store
from PIL import Image
from precompute_command import command_of

from mobilesam.cli import main
from mobilesam.distill import Run
from mobilesam.sam.teacher import load_head
from mobilesam.store import EmbeddingStore

# The command with a student that is built at once; {pause} s for each image.
PROGRAM = """
import time
from torch import nn
from mobilesam.cli import main
from mobilesam.distill.students.registry import STUDENTS, StudentInfo

class Slow(nn.Conv2d):
    def forward(self, pixels):
        time.sleep({pause} * len(pixels))
        return super().forward(pixels)

build = lambda *sizes: nn.Sequential(Slow(3, 4, 16, 16), nn.Conv2d(4, 256, 1))
STUDENTS["tiny_vit"] = StudentInfo(name="tiny_vit", summary="", build=build, training_bytes={{"float32": 1}})
main()
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six photos, and their store of random embeddings."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos").mkdir()
    for i in range(6):
        gradient_photo(i, steepness=4).save(folder / "photos" / f"p{i}.png")
    head = {key: value.numpy() for key, value in load_head("vit_nano", None).items()}
    embeddings = np.random.default_rng(0).normal(size=(6, 256, 4, 4)).astype(np.float32)
    make_photo_store(folder / "store.zarr", folder / "photos", head=head, embeddings=embeddings)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, of which the parent's `made` lies elsewhere."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return made


def training(made: Path, *options: str, pause: float = 0.0) -> list[str]:
    """Return the command that trains on the store, `pause` s for each image."""
    command = [
        "distill",
        "--store",
        str(made / "store.zarr"),
        "--batch-size",
        "2",
        "--out",
        "run",
        "--seed",
        "1",
    ]
    given = [*command, "--device", "cpu", "--precision", "float32", *options]
    return [sys.executable, "-c", PROGRAM.format(pause=pause), *given]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def closed_pipe() -> int:
    """Return the writing end of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk() -> int:
    """Return a descriptor that takes no byte."""
    return os.open("/dev/full", os.O_WRONLY)


LONG = pytest.mark.long


@pytest.mark.parametrize("lost", [closed_pipe, pytest.param(full_disk, marks=LONG)])
def test_messages_that_cannot_be_written_end_no_training(folder: Path, lost: Callable[[], int]) -> None:
    """R1: `2>&1 | head -1` and a full disk ended distill with exit code 1 and nothing saved."""
    stderr = lost()
    done = subprocess.run(
        training(folder, "--epochs", "2", "--json"),
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=ENVIRONMENT,
        check=False,
    )
    os.close(stderr)
    assert done.returncode == 0
    assert json.loads(done.stdout)["epochs"] == 2
    assert Run.open(Path("run")).result() is not None


@pytest.mark.long
@pytest.mark.parametrize("lost", [closed_pipe, full_disk])
def test_messages_that_cannot_be_written_end_no_precompute(folder: Path, lost: Callable[[], int]) -> None:
    """R1: precompute ended with exit code 1, and its store was empty."""
    stderr = lost()
    command = command_of(folder / "photos", Path("other.zarr"))
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, env=ENVIRONMENT, check=False)
    os.close(stderr)
    assert done.returncode == 0
    assert json.loads(done.stdout)["done"] == 6


@pytest.mark.parametrize(("lost", "code"), [(closed_pipe, 141), (full_disk, 3)])
def test_a_result_that_cannot_be_written_has_an_exit_code(
    folder: Path, lost: Callable[[], int], code: int
) -> None:
    """R1: whoever reads the result goes away, too (`| head`)."""
    stdout = lost()
    done = subprocess.run(
        [sys.executable, "-m", "mobilesam", "inspect", str(folder / "store.zarr")],
        stdout=stdout, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    os.close(stdout)
    assert done.returncode == code
    assert ("the work is done, but its result can't be printed: No space left" in done.stderr) == (code == 3)
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize(("lost", "code"), [(closed_pipe, 141), (full_disk, 3)])
def test_a_training_is_saved_even_if_its_result_cannot_be_written(
    folder: Path, lost: Callable[[], int], code: int
) -> None:
    """R1: whoever reads the result goes away, too (`| head`)."""
    stdout = lost()
    done = subprocess.run(
        training(folder, "--epochs", "1"),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    os.close(stdout)
    assert done.returncode == code
    assert Run.open(Path("run")).result() is not None


def started(command: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **options
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def logged(path: Path = Path("run/metrics.jsonl")) -> bool:
    """Return True once a step of the run is logged."""
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize("signum", [signal.SIGHUP, pytest.param(signal.SIGTERM, marks=LONG)])
def test_a_closed_terminal_saves_a_training_as_sigterm_does(folder: Path, signum: signal.Signals) -> None:
    """R3: SIGHUP ended distill with no message and no last.pt."""
    process = started(training(folder, "--epochs", "500", pause=0.05))
    wait_until(logged, process)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert re.search(r"stopped after step \d+ of 1500, saved in ", said)
    assert (Path("run") / "last.pt").exists()


@pytest.mark.long
def test_under_nohup_a_training_goes_on_after_its_terminal_is_closed(folder: Path) -> None:
    """R3: an ignored SIGHUP, as `nohup` leaves it, stays ignored."""
    command = ["nohup", *training(folder, "--epochs", "4", pause=0.05)]
    process = started(command, stdin=subprocess.DEVNULL)
    wait_until(logged, process)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert Run.open(Path("run")).result() is not None


@pytest.mark.long
def test_a_closed_terminal_keeps_the_finished_shards_of_precompute(folder: Path) -> None:
    """R3: SIGHUP reaches the whole process group; the workers leave it to their coordinator."""
    photos = Path("many")
    photos.mkdir()
    for i in range(600):
        Image.new("RGB", (64, 48), (i % 256, i // 3, 7)).save(photos / f"{i}.png")
    command = command_of(photos, Path("other.zarr"), "--shard-size", "2", "--batch-size", "1")
    process = started(command, start_new_session=True)

    def committed() -> bool:
        try:
            with EmbeddingStore.open(Path("other.zarr")) as store:
                return store.manifest.counts().done >= 4
        except Exception:  # noqa: BLE001 - the store is being created
            return False

    wait_until(committed, process)
    os.killpg(process.pid, signal.SIGHUP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 129, said
    assert re.search(r"interrupted: \d+ of 600 images are committed", said)


class Terminal:
    """A command in a pseudo-terminal of its own, and all that it has written so far."""

    def __init__(self, command: list[str], columns: int) -> None:
        self.data = b""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {name: value for name, value in ENVIRONMENT.items() if name != "COLUMNS"}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
        )
        os.close(theirs)

    def read_until(self, wanted: str) -> None:
        """Read until the text was written."""
        end = time.monotonic() + 120
        while not re.search(wanted, self.text()):
            assert time.monotonic() < end, self.text()[-2000:]
            if select.select([self._ours], [], [], 0.1)[0]:
                self.data += os.read(self._ours, 4096)

    def press(self, key: bytes) -> None:
        os.write(self._ours, key)

    def end(self) -> int:
        """Read to the end, and return the exit code as a shell shows it."""
        try:
            while piece := os.read(self._ours, 4096):
                self.data += piece
        except OSError:  # Linux's way to say that the other end is closed
            pass
        os.close(self._ours)
        return self.process.wait(60)

    def text(self) -> str:
        """Return what was written, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m|\x1b\[2K", "", self.data.decode(errors="replace"))


def test_a_second_ctrl_c_leaves_the_cursor_and_one_last_line_on_a_narrow_terminal(folder: Path) -> None:
    """R10, R11: the cursor stayed hidden, no line was printed, and 60 columns cut the time left away."""
    terminal = Terminal(training(folder, "--epochs", "500", pause=1.5), columns=60)
    terminal.read_until(r"1/1,500 steps, [0-9:]+ left, epoch 1 of 500")
    terminal.press(b"\x03")
    terminal.read_until("stopping after this step and saving; interrupt again to stop at once")
    terminal.press(b"\x03")
    code = terminal.end()
    assert code in (-signal.SIGINT, 128 + signal.SIGINT), "both are 130 in a shell"
    lines = [line for line in re.split(r"[\r\n]+", terminal.text()) if line]
    assert lines[-1] == "killed by a second Ctrl-C without saving; there is no checkpoint yet"
    assert any(line.startswith("stopping after this step") for line in lines), "glued to the progress"
    assert terminal.text().rfind("\x1b[?25h") > terminal.text().rfind("\x1b[?25l")
    progress = [line for line in lines if "steps, " in line]
    assert max(len(line.removesuffix("^C")) for line in progress) < 60


@pytest.mark.long
def test_a_dumb_terminal_gets_lines_while_a_training_runs(folder: Path) -> None:
    """R11: with TERM=dumb nothing at all was shown until the end."""
    terminal = Terminal(["env", "TERM=dumb", *training(folder, "--epochs", "9", pause=0.5)], columns=80)
    terminal.read_until(r"\d+/27 steps, [0-9:]+ left, epoch \d of 9, \w+")
    terminal.press(b"\x03")
    assert terminal.end() == 130
    assert "\x1b" not in terminal.text()
    assert "saved in" in terminal.text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["precompute", "--images", "missing"], "missing: no such folder, tar or image"),
        (["distill", "--store", "missing"], "missing is no mobilesam store"),
        (["verify", "--store", "missing"], "missing is no mobilesam store"),
        (["sweep", "--store", "missing"], "missing is no mobilesam store"),
        (["evaluate", "--store", "missing", "--model", "a=b.pt"], "missing is no mobilesam store"),
        (["evaluate", "--images", "missing", "--model", "a=b.pt", "--teacher", "vit_nano"], "no such folder"),
        (["inspect", "missing"], "missing is no mobilesam store"),
        (["segment", "missing.jpg", "--point", "1", "1"], "missing.jpg: the file is missing"),
        (["export", "--student", "missing", "--out", "new"], "no student at missing"),
        (["verify", "--student", "missing.pt"], "no student at missing.pt"),
        (["sweep", "--store", "{made}/store.zarr", "--init", "missing.pt"], "missing.pt does not exist"),
    ],
)
def test_a_path_with_nothing_there_is_told_before_torch_is_loaded(
    folder: Path, arguments: list[str], told: str
) -> None:
    """Seconds of loading came before the answer."""
    program = (
        "import sys; from mobilesam.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *(text.format(made=folder) for text in arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    assert done.stdout == "3 False\n"
    assert told in done.stderr


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:9", "tcp://nowhere.invalid:1", "127.0.0.1:9", "missing.json"]
)
def test_a_scheduler_that_cannot_be_reached_is_told_in_seconds_and_no_store_is_made(
    folder: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dask itself tried for half a minute."""
    monkeypatch.setattr("mobilesam.common.dask_client.REACH_SECONDS", 0.5)
    began = time.monotonic()
    result = run("precompute", "--images", folder / "photos", "--teacher", "vit_nano", "--scheduler", address)
    assert time.monotonic() - began < 15
    assert result.exit_code == 3
    assert address in result.stderr
    assert re.search("no dask scheduler at|can't be read: No such file", result.stderr)
    assert not list(Path().iterdir())


SITE = """
temporary-directory: /nowhere/at/all
scheduler-address: tcp://10.255.0.1:8786
distributed:
  scheduler: {preload: [nowhere], idle-timeout: 1s, worker-ttl: 1s, contact-address: "tcp://10.255.0.1:1"}
  worker: {preload: [nowhere], daemon: false, multiprocessing-method: fork, lifetime: {duration: 1s},
    resources: {G: 1}, memory: {target: false, spill: false, pause: 0.000001, terminate: 0.000001}}
  nanny: {preload: [nowhere], pre-spawn-environ: {PATH: /nowhere}}
  client: {preload: [nowhere], security-loader: nowhere.at.all, heartbeat: never}
  comm: {default-scheme: tls, require-encryption: true, tls: {ca-file: /nowhere/ca.pem}, timeouts: {connect: 1ms}}
  dashboard: {link: "{JUPYTERHUB_SERVICE_PREFIX}proxy/{port}/status"}
  admin: {tick: {interval: often}, pdb-on-err: true}
"""


@pytest.mark.long
@pytest.mark.parametrize("how", ["variables", "files", "a module that fails"])
def test_the_sites_dask_settings_never_end_a_run_with_workers_of_its_own(folder: Path, how: str) -> None:
    """T3: a dashboard's link, a preload and TLS of a JupyterHub ended precompute as "a bug"."""
    Path("site").mkdir()
    (Path("site") / "dask.yaml").write_text(SITE)
    Path("fails.py").write_text("raise RuntimeError('no GPU here')")
    variables = {
        "variables": {
            "DASK_DISTRIBUTED__DASHBOARD__LINK": "{JUPYTERHUB_SERVICE_PREFIX}proxy/{port}/status",
            "DASK_DISTRIBUTED__WORKER__DAEMON": "false",
            "DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME": "tls",
            "DASK_DISTRIBUTED__NANNY__PRELOAD": '["nowhere"]',
        },
        "files": {"DASK_CONFIG": str(Path("site").absolute())},
        "a module that fails": {"DASK_DISTRIBUTED__WORKER__PRELOAD": str(Path("fails.py").absolute())},
    }
    done = subprocess.run(
        command_of(folder / "photos", Path("other.zarr"), "--audit", "1"),
        capture_output=True, text=True, check=False, env={**ENVIRONMENT, **variables[how]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["done"] == 6
    assert re.search(r"dashboard: http://127\.0\.0\.1:\d+/status", done.stderr)


def segment(photo: Path, *options: object) -> Result:
    return run(
        "segment", photo, "--teacher", "vit_nano", "--image-size", 64, "--json", "--masks", "masks", *options
    )


def test_a_box_two_pixels_over_the_edge_is_clipped_to_the_image(folder: Path) -> None:
    """R5: it was refused as outside the image, which it isn't."""
    photo = folder / "photos" / "p0.png"
    over, inside = (segment(photo, "--box", x0, 10, 30, 40) for x0 in (-2, 0))
    assert over.exit_code == inside.exit_code == 0, over.output + inside.output
    results = [json.loads(result.stdout) for result in (over, inside)]
    assert results[0]["masks"] == results[1]["masks"]
    assert results[1]["notes"] == []
    (note,) = results[0]["notes"]
    assert "--box -2 10 30 40 reaches over the edge" in note
    assert note.endswith("clipped to 0 10 30 40")


@pytest.mark.parametrize(
    ("prompt", "code", "told"),
    [
        (["--box", 64, 0, 70, 9], 3, "--box 64 0 70 9 is outside the image, which is 64 x 48 pixels"),
        (["--point", 64, 0], 3, "--point 64 0 is outside the image"),
        (["--box", 30, 10, 5, 40], 2, "--box 30 10 5 40 is empty"),
    ],
)
def test_a_prompt_that_lies_outside_or_runs_backwards_is_refused(
    folder: Path, prompt: list[object], code: int, told: str
) -> None:
    """R5: what can't be meant stays an error."""
    result = segment(folder / "photos" / "p0.png", *prompt)
    assert result.exit_code == code
    assert told in result.stderr
    assert not list(Path().iterdir())


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_that_saves_nothing_in_one_line(folder: Path, signum: signal.Signals) -> None:
    """R3, R10: in the other commands, too."""
    Image.new("RGB", (2000, 1500)).save("large.png")
    options = ["--teacher", "vit_nano", "--image-size", "64", "--everything", "--masks", "masks"]
    terminal = Terminal([sys.executable, "-m", "mobilesam", "segment", "large.png", *options], columns=60)
    terminal.read_until(r"\d+/1,024 points")
    if signum == signal.SIGINT:
        terminal.press(b"\x03")
    else:
        terminal.process.send_signal(signum)
    assert terminal.end() == 128 + signum
    lines = [line for line in re.split(r"[\r\n]+", terminal.text()) if line]
    assert lines[-1].removeprefix("\x1b[?25h") == "error: interrupted"
    assert {path.name for path in Path().iterdir()} == {"large.png"}


def test_everything_shows_its_points_and_says_why_nothing_was_found(folder: Path) -> None:
    """R6: it was silent for minutes, and then found 0 masks without a reason."""
    result = segment(folder / "photos" / "p0.png", "--everything")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["masks"] == []
    (note,) = found["notes"]
    assert re.search(
        r"nothing found: of 3,072 masks for a grid of 1,024 points (none reaches a predicted IoU of 0\.88 \(the best "
        r"0\.\d+\)|[\d,]+ reach a predicted IoU of 0\.88, and none of these a stability score of 0\.95)",
        note,
    )
    assert "1,024/1,024 points" in result.stderr
