"""Facts of the machine: limits of cgroups, environment variables, disks."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from mobilesam.doctor import machine
from mobilesam.doctor.machine import Limits, cgroup_limits

GIB = 2**30


def _process(tmp_path: Path, text: str) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cgroup").write_text(text)
    return tmp_path / "proc"


def _group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_tightest_limit_of_all_groups_above_a_process_holds(tmp_path: Path) -> None:
    process, root = _process(tmp_path, "0::/job.slice/step\n"), tmp_path / "cgroup"
    _group(root, cpu__max="max 100000\n")
    _group(
        root / "job.slice",
        cpu__max="150000 100000\n",
        memory__max=f"{4 * GIB}\n",
        memory__current=f"{3 * GIB}\n",
        memory__stat=f"anon 7\ninactive_file {GIB}\n",
    )
    _group(
        root / "job.slice" / "step", cpu__max="800000 100000\n", memory__max="max\n", memory__current="1\n"
    )
    assert cgroup_limits(process, root) == Limits(cores=1.5, memory=4 * GIB, memory_left=2 * GIB)


def test_limits_of_version_1_are_read_where_a_container_mounts_its_own_group(tmp_path: Path) -> None:
    process = _process(tmp_path, "5:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n")
    root = tmp_path / "cgroup"
    _group(root / "cpu,cpuacct", cpu__cfs_quota_us="300000\n", cpu__cfs_period_us="100000\n")
    _group(root / "memory", memory__limit_in_bytes=f"{GIB}\n", memory__usage_in_bytes=f"{GIB // 4}\n")
    assert cgroup_limits(process, root) == Limits(cores=3.0, memory=GIB, memory_left=GIB - GIB // 4)


@pytest.mark.parametrize("text", ["", "0::/\n", "2:cpu:/../../elsewhere\n"])
def test_without_a_limit_there_is_none(tmp_path: Path, text: str) -> None:
    _group(tmp_path / "cgroup" / "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert cgroup_limits(_process(tmp_path, text), tmp_path / "cgroup") == Limits()


def test_usable_cores_heed_affinity_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5})
    for cores, usable in ((None, 4), (8.0, 4), (2.5, 2), (0.5, 1)):
        monkeypatch.setattr(machine, "cgroup_limits", lambda cores=cores: Limits(cores=cores))
        found = machine.processor()
        assert (found["affinity"], found["limit"], found["usable"]) == (4, cores, usable)


def test_memory_is_that_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    total = psutil.virtual_memory().total
    limits = Limits(memory=GIB, memory_left=GIB // 8)
    monkeypatch.setattr(machine, "cgroup_limits", lambda: limits)
    found = machine.memory()
    assert (found["total"], found["limit"]) == (GIB, GIB)
    assert found["available"] <= GIB // 8
    # Version 1 gives a number larger than any memory where there is no limit.
    monkeypatch.setattr(machine, "cgroup_limits", lambda: Limits(memory=2**63 - 4096, memory_left=2**62))
    assert (machine.memory()["total"], machine.memory()["limit"]) == (total, None)


def test_the_environment_is_shown_without_secrets_and_without_what_changes_nothing() -> None:
    found = machine.environment(
        {
            "OMP_NUM_THREADS": "4",
            "https_proxy": "http://me:hunter2@proxy:3128",
            "DASK_GATEWAY__AUTH__TOKEN": "abcdef",
            "CUDA_VISIBLE_DEVICES": "",
            "HOME": "/home/me",
            "AWS_SECRET_ACCESS_KEY": "abcdef",
        }
    )
    assert found == {
        "CUDA_VISIBLE_DEVICES": "",
        "DASK_GATEWAY__AUTH__TOKEN": "(not shown)",
        "OMP_NUM_THREADS": "4",
        "https_proxy": "http://(not shown)@proxy:3128",
    }


def test_a_folder_that_isnt_there_has_the_disk_that_it_would_be_made_on(tmp_path: Path) -> None:
    found = machine.disk(tmp_path / "not" / "there")
    assert found["folder"] == str(tmp_path / "not" / "there")
    assert 0 < found["free"] <= found["total"]
    assert found["writable"]


def test_a_cached_checkpoint_of_the_wrong_length_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOBILESAM_CACHE", str(tmp_path / "cache"))
    assert machine.checkpoints() == {"folder": str(tmp_path / "cache"), "files": []}
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "sam_vit_b_01ec64.pth").write_bytes(b"short")
    (tmp_path / "cache" / "sam_vit_l_0b3195.pth.part").write_bytes(b"begun")
    (tmp_path / "cache" / "sam_vit_l_0b3195.pth.part.json").write_bytes(b"{}")
    (tmp_path / "cache" / "mine.pth").write_bytes(b"whole")
    found = {(file["name"], file["teacher"], file["complete"]) for file in machine.checkpoints()["files"]}
    assert found == {
        ("sam_vit_b_01ec64.pth", "vit_b", False),
        ("sam_vit_l_0b3195.pth.part", "vit_l", False),
        ("mine.pth", None, True),
    }
