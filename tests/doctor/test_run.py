"""`mobilesam doctor` as its users meet it: lines, JSON, exit codes, what is broken and how it is mended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from mobilesam import __version__
from mobilesam.cli import main
from mobilesam.doctor import devices, machine, packages
from mobilesam.doctor.run import _problems

DOCS = Path(__file__).parents[2] / "docs" / "DOCTOR.md"
ask_driver = devices.nvidia_driver
KEYS = {
    "mobilesam", "python", "system", "processor", "memory", "torch", "device", "gpus", "driver", "cache", "packages",
    "extras", "environment", "folder", "problems", "works",
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOBILESAM_CACHE", str(tmp_path / "cache"))
    # No problems of the machine that runs the tests.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cgroup_limits", machine.Limits)
    monkeypatch.setattr(devices, "nvidia_driver", lambda: None)
    return tmp_path


def _doctor(code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_the_object_has_the_keys_that_the_page_lists() -> None:
    facts = _doctor()
    assert facts.keys() == KEYS
    page = DOCS.read_text().split("## The JSON object")[1]
    assert {row.split("`")[1] for row in page.splitlines() if row.startswith("| `")} == KEYS
    for name in ("python", "processor", "memory", "torch", "device"):
        (row,) = (row for row in page.splitlines() if row.startswith(f"| `{name}`"))
        assert all(f"`{key}`" in row for key in facts[name]), row
    assert facts["works"]
    assert facts["mobilesam"]["version"] == __version__


def test_facts_agree_with_those_of_the_libraries() -> None:
    import torch

    facts = _doctor()
    assert facts["torch"]["version"] == torch.__version__
    assert facts["processor"]["affinity"] == len(os.sched_getaffinity(0))
    assert facts["device"]["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert 0 < facts["memory"]["available"] <= facts["memory"]["total"]
    assert facts["packages"]["zarr"] == {
        "version": metadata.version("zarr"),
        "wanted": ">=3.1",
        "error": None,
    }
    assert facts["extras"]["test"].keys() == {"complete", "missing", "command"}
    assert facts["python"]["executable"] == sys.executable


def test_the_lines_end_with_the_next_command(here: Path) -> None:
    Image.new("RGB", (8, 8)).save(here / "photo.jpg")
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 0
    assert f"mobilesam     {__version__}" in done.stdout
    assert "photos        in this folder: 1 image\n" in done.stdout
    assert (
        "Next: there are photos in this folder, and no store\n  mobilesam precompute --images . "
        in done.stdout
    )


def test_a_package_that_cant_be_imported_is_named_with_its_mend_and_the_rest_still_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    facts = _doctor(code=3)
    (problem,) = (problem for problem in facts["problems"] if problem["breaks"])
    assert problem["fact"].startswith("torchvision can't be used: ModuleNotFoundError")
    assert "install --force-reinstall 'torch>=2.6' 'torchvision>=0.21'" in problem["mend"]
    assert facts["processor"]["model"]
    assert facts["folder"]["next"] is None
    lines = CliRunner().invoke(main, ["doctor"]).stdout.splitlines()
    assert any(line.startswith("BROKEN        torchvision can't be used") for line in lines)
    assert lines[-1] == "Next: mend what is broken"


def test_without_torch_what_needs_it_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr(packages, "version", version)
    facts = _doctor(code=3)
    assert facts["torch"] is facts["device"] is facts["gpus"] is facts["driver"] is None
    assert facts["packages"]["torch"]["error"] == "it is not installed"
    assert facts["memory"]["total"] > 0


def test_a_package_that_is_too_old_is_broken_and_an_extra_that_lacks_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older = {"click": "7.0", "jinja2": "2.0"}
    monkeypatch.setattr(packages, "version", lambda name: older.get(name) or metadata.version(name))
    facts = _doctor(code=3)
    assert facts["packages"]["click"]["error"] == "it is 7.0, not >=8.1"
    assert facts["extras"]["report"] == {
        "complete": False,
        "missing": ["jinja2>=3.1"],
        "command": packages.pip_install("mobilesam[report]"),
    }
    assert [problem["fact"].split()[0] for problem in facts["problems"] if problem["breaks"]] == ["click"]


@pytest.fixture
def nvidia_smi(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program of that name first in the PATH, with this shell script."""

    def put(script: str) -> None:
        program = here / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return put


def test_the_drivers_gpus_and_its_failure_are_read_from_nvidia_smi(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("echo '550.54.15, NVIDIA H200'; echo '550.54.15, NVIDIA L4'")
    assert ask_driver() == {
        "version": "550.54.15", "gpus": ["NVIDIA H200", "NVIDIA L4"], "error": None,
    }  # fmt: skip
    nvidia_smi("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert ask_driver() == {
        "version": None, "gpus": [], "error": "Failed to initialize NVML: Driver/library version mismatch",
    }  # fmt: skip


def test_a_driver_that_hangs_is_given_up(
    nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi("exec sleep 60")
    monkeypatch.setattr(devices, "DRIVER_SECONDS", 0.2)
    assert "no answer" in ask_driver()["error"]


CPU_BUILD = {"version": "2.9.0+cpu", "cuda": None, "hip": None, "cuda_usable": False, "cuda_warning": None}
CUDA_BUILD = CPU_BUILD | {"version": "2.9.0", "cuda": "13.0", "cuda_warning": "The NVIDIA driver is too old"}
DRIVER = {"version": "470.1", "gpus": ["NVIDIA L4"], "error": None}


@pytest.mark.parametrize(
    ("build", "hidden", "fact", "mend"),
    [
        (CPU_BUILD, None, "is built without CUDA", "get-started/locally"),
        (CUDA_BUILD, None, "can't use CUDA with driver 470.1: The NVIDIA driver is too old", "update NVIDIA"),
        (CUDA_BUILD, "", "CUDA_VISIBLE_DEVICES='' leaves none", "unset CUDA_VISIBLE_DEVICES"),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_cant_use_is_a_problem_that_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, build: dict[str, Any], hidden: str | None, fact: str, mend: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(devices, "torch_build", lambda: CPU_BUILD | build | {"mps": False, "threads": 1})
    monkeypatch.setattr(devices, "gpus", list)
    monkeypatch.setattr(devices, "nvidia_driver", lambda: DRIVER)
    facts = _doctor()
    (problem,) = facts["problems"]
    assert fact in problem["fact"]
    assert mend in problem["mend"]
    assert facts["works"]


def test_a_limit_of_cores_is_mended_by_taskset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(machine, "cgroup_limits", lambda: machine.Limits(cores=2.0))
    (problem,) = _doctor()["problems"]
    assert problem["fact"].startswith("4 cores are visible, but")
    assert "taskset -c 0,1 mobilesam distill" in problem["mend"]


@pytest.mark.parametrize(("given", "threads", "told"), [("1", 1, True), ("4", 4, False), (None, 1, False)])
def test_a_variable_that_leaves_most_cores_idle_is_told(given: str | None, threads: int, told: bool) -> None:
    facts = _doctor()
    facts["environment"] = {} if given is None else {"OMP_NUM_THREADS": given}
    facts["torch"]["threads"], facts["device"]["device"] = threads, "cpu"
    facts["processor"] |= {"usable": 8, "affinity": 8}
    found = [problem["fact"] for problem in _problems(facts)]
    assert found == (["OMP_NUM_THREADS=1 lets distill use 1 thread on 8 cores"] if told else [])


def test_little_disk_is_told_with_the_images_that_fit_and_what_makes_them_smaller() -> None:
    facts = _doctor()
    facts["folder"]["disk"]["free"] = 22_000_000
    (problem,) = _problems(facts)
    assert "only 22.0 MB are free" in problem["fact"]
    assert "room for 10 images at 1024 pixels, 2.1 MB each" in problem["fact"]
    assert "--dtype int8" in problem["mend"]


def test_little_memory_is_told_with_what_a_training_takes() -> None:
    facts = _doctor()
    facts["memory"]["available"] = 10**9
    (problem,) = _problems(facts)
    assert "only 1.0 GB of memory are available; distill takes 2.6 GB" in problem["fact"]


NOTHING_STARTS = {"click", "lazy-loader", "packaging"}
BASE = {
    re.split("[<>=!~; ]", need)[0] for need in metadata.requires("mobilesam") or [] if "extra ==" not in need
}


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(BASE - NOTHING_STARTS))
def test_whichever_package_is_broken_doctor_tells_it(name: str) -> None:
    module = {"pillow": "PIL"}.get(name, name.replace("-", "_"))
    script = f"import sys; sys.modules[{module!r}] = None; from mobilesam.cli import main; main(['doctor', '--json'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    facts = json.loads(done.stdout)
    assert facts["packages"][name]["error"].startswith("ModuleNotFoundError")
    assert facts["folder"]["next"] is None


def test_the_version_is_printed_without_loading_torch() -> None:
    script = (
        "import sys\n"
        "from mobilesam.cli import main\n"
        "main(['--version'], standalone_mode=False)\n"
        "print(sorted({'torch', 'zarr', 'dask', 'numpy', 'PIL'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"mobilesam, version {__version__}\n", "[]\n")
