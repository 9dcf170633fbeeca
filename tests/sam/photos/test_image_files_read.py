from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mobilesam.sam import ImageError, read_checked, read_image


def modules_after(names: str) -> set[str]:
    """What a fresh interpreter has imported once it has used these names of the room."""
    code = f"import sys, mobilesam.sam as s; {names}; print(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def tar(tmp_path: Path) -> tuple[str, int]:
    """A tar with the member 1.jpg, b"member"; its key and offset."""
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        info = tarfile.TarInfo("1.jpg")
        info.size = 6
        archive.addfile(info, io.BytesIO(b"member"))
    return "t.tar/1.jpg", 512


def test_a_file_whose_length_differs_names_both_lengths(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    assert read_image(tmp_path, "a.jpg", size=5) == b"12345"
    with pytest.raises(ImageError, match=r"^the file was listed with 1,234 bytes and has 5$"):
        read_image(tmp_path, "a.jpg", size=1234)


def test_a_missing_or_unreadable_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(ImageError, match=r"^the file is missing$"):
        read_image(tmp_path, "gone.jpg")
    with pytest.raises(ImageError, match=r"^the file can't be read: Is a directory$"):
        read_image(tmp_path, "folder.jpg")


def test_a_file_or_member_too_large_to_be_an_image_is_not_read(tmp_path: Path, tar: tuple[str, int]) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(ImageError, match=r"^too large: 4,398,046,511,104 bytes, the limit is 2,000,000,000$"):
        read_image(tmp_path, "huge.jpg")
    with pytest.raises(ImageError, match=r"^too large: 4,398,046,511,104 bytes"):
        read_image(tmp_path, tar[0], offset=tar[1], size=1 << 42)


def test_a_member_cannot_be_read_without_its_size(tmp_path: Path, tar: tuple[str, int]) -> None:
    key, offset = tar
    assert read_image(tmp_path, key, offset=offset, size=6) == b"member"
    with pytest.raises(ValueError, match="offset and size"):
        read_image(tmp_path, key, offset=offset)


def test_an_unchanged_image_passes_with_and_without_its_digest(tmp_path: Path, tar: tuple[str, int]) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    assert read_checked(tmp_path, "a.jpg", None, 5) == b"12345"
    assert read_checked(tmp_path, "a.jpg", None, 5, digest(b"12345")) == b"12345"
    assert read_checked(tmp_path, *tar, 6, digest(b"member")) == b"member"


def test_another_length_stops_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    with pytest.raises(
        ImageError, match=r"^a\.jpg changed since precompute: 1,000 bytes then, 5 now\nput the original"
    ):
        read_checked(tmp_path, "a.jpg", None, 1000)


def test_another_content_of_the_same_length_stops_by_name(tmp_path: Path, tar: tuple[str, int]) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12346")
    was, now = digest(b"12345")[:12], digest(b"12346")[:12]
    with pytest.raises(
        ImageError, match=rf"^a\.jpg changed since precompute: SHA-256 {was}\.\.\. then, {now}\.\.\. now"
    ):
        read_checked(tmp_path, "a.jpg", None, 5, digest(b"12345"))
    with pytest.raises(ImageError, match=r"^t\.tar/1\.jpg changed since precompute: SHA-256"):
        read_checked(tmp_path, *tar, 6, digest(b"MEMBER"))


def test_a_missing_image_stops_by_name_in_one_printable_line_and_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        read_checked(tmp_path, "two\nlines.jpg", None, 5)
    assert str(caught.value).splitlines() == [
        "two\\nlines.jpg: the file is missing",
        "put the original back, or precompute into a new store",
    ]


def test_importing_sam_loads_neither_torch_nor_numpy_nor_pillow() -> None:
    assert modules_after("s.ImageError, s.in_fraction").isdisjoint({"torch", "numpy", "PIL"})


def test_reading_and_decoding_images_needs_no_torch() -> None:
    modules = modules_after("s.load_image, s.list_images, s.read_checked")
    assert "PIL.Image" in modules
    assert "torch" not in modules


@pytest.mark.parametrize("name", ["photos.image_files", "weights.download"])
def test_listing_and_downloading_need_no_torch(name: str) -> None:
    assert "torch" not in modules_after(f"import mobilesam.sam.{name}")


def test_every_public_name_can_be_imported_from_sam() -> None:
    import mobilesam.sam as room

    for name in room.__all__:
        assert getattr(room, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = room.nonsense
