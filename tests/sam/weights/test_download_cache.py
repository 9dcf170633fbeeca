from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from mobilesam.common.errors import CheckpointError, DownloadError, SamError
from mobilesam.sam.registry import TEACHERS
from mobilesam.sam.weights import download
from mobilesam.sam.weights.download import Request, cache_directory, file_sha256, find_checkpoint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOBILESAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What would have been downloaded."""
    made: list[Request] = []
    monkeypatch.setattr(download, "download_file", lambda request, progress: made.append(request))
    return made


def test_the_cache_is_where_the_variable_says(cache: Path) -> None:
    assert cache_directory() == cache


def test_without_the_variable_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOBILESAM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory().name == "mobilesam"
    assert cache_directory().is_relative_to(tmp_path)


def test_a_given_checkpoint_comes_before_the_cache(cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    (cache / "sam_vit_b_01ec64.pth").write_bytes(b"cached")
    mine = tmp_path / "mine.pth"
    mine.write_bytes(b"finetuned: no official digest is asked of it")
    assert find_checkpoint("vit_b", mine) == mine


@pytest.mark.parametrize("teacher", ["vit_h", "vit_l", "vit_b", "mobile_sam"])
def test_a_file_in_the_cache_is_found_by_its_official_name(
    cache: Path, teacher: str, requests: list[Request]
) -> None:
    cache.mkdir()
    file = cache / TEACHERS[teacher].checkpoint.name
    file.write_bytes(b"anything")
    assert find_checkpoint(teacher) == file
    assert requests == []


def test_a_missing_checkpoint_is_downloaded_from_the_official_place(
    cache: Path, requests: list[Request]
) -> None:
    assert find_checkpoint("vit_h") == cache / "sam_vit_h_4b8939.pth"
    (request,) = requests
    assert request.url == "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth"
    assert request.size == 2_564_550_879
    assert request.sha256 == "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"


def test_another_address_can_be_named(cache: Path, requests: list[Request]) -> None:
    find_checkpoint("mobile_sam", url="http://127.0.0.1/mirror")
    assert requests[0].url == "http://127.0.0.1/mirror"
    assert requests[0].target == cache / "mobile_sam.pt"


def test_the_embedded_teacher_has_no_file(cache: Path, requests: list[Request]) -> None:
    assert find_checkpoint("vit_nano") is None
    assert requests == []


def test_a_checkpoint_for_the_embedded_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vit_nano is embedded"):
        find_checkpoint("vit_nano", tmp_path / "file.pth")


def test_a_given_checkpoint_that_is_absent_is_never_replaced_by_a_download(
    cache: Path, tmp_path: Path, requests: list[Request]
) -> None:
    with pytest.raises(CheckpointError, match=r"typo\.pth does not exist"):
        find_checkpoint("vit_b", tmp_path / "typo.pth")
    with pytest.raises(CheckpointError, match="is a directory"):
        find_checkpoint("vit_b", tmp_path)
    assert requests == []


def test_without_a_network_the_error_names_file_place_and_trial_teacher(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real download, against a port where nobody listens.
    monkeypatch.setattr(download, "Request", lambda **values: Request(**values, attempts=1))
    with pytest.raises(DownloadError) as caught:
        find_checkpoint("vit_h", url="http://127.0.0.1:9/sam_vit_h_4b8939.pth")
    message = str(caught.value)
    assert "sam_vit_h_4b8939.pth (vit_h, 2,565 MB)" in message
    assert str(cache / "sam_vit_h_4b8939.pth") in message
    assert "--checkpoint" in message
    assert "--teacher vit_nano" in message
    assert len(message.splitlines()) == 2


def test_looking_without_downloading_gives_the_same_advice(cache: Path, requests: list[Request]) -> None:
    with pytest.raises(CheckpointError, match="--teacher vit_nano") as caught:
        find_checkpoint("vit_l", download=False)
    assert str(cache / "sam_vit_l_0b3195.pth") in str(caught.value)
    assert requests == []


def test_an_unknown_teacher_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SamError, match=r"vit_h, vit_l, vit_b, .*mobile_sam, vit_nano"):
        find_checkpoint("vit_x")


def test_progress_reaches_the_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[Any] = []
    monkeypatch.setattr(download, "download_file", lambda request, progress: passed.append(progress))

    def show(done: int, total: int) -> None: ...

    find_checkpoint("vit_b", progress=show)
    assert passed == [show]


def test_the_digest_is_of_the_whole_file(tmp_path: Path) -> None:
    content = b"0123456789" * 100_000
    file = tmp_path / "file"
    file.write_bytes(content)
    assert file_sha256(file) == hashlib.sha256(content).hexdigest()


def test_the_digest_of_an_unreadable_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        file_sha256(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="directory"):
        file_sha256(tmp_path)
