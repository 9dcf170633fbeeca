from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from mobilesam.sam import ImageError, SamError, list_images, read_image
from mobilesam.sam.photos.tar_files import scan_tar


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def make_tar(
    path: Path,
    members: Iterable[tuple[tarfile.TarInfo, bytes]],
    mode: str = "w",
    format: int = tarfile.GNU_FORMAT,
) -> Path:
    with tarfile.open(path, mode, format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(path: Path) -> dict[str, bytes]:
    """Everything listed in a folder or tar, read back."""
    found = list_images([path])
    return {f.key: read_image(found.root, f.key, offset=f.offset, size=f.size) for f in found.files}


SA_1B = [
    member(f"./sa_{number}.{suffix}", f"{number} {suffix}".encode() * (number + 1))
    for number in range(20)
    for suffix in ("jpg", "json")
]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_sa_1b_is_read_in_place(tmp_path: Path, format: int) -> None:
    path = make_tar(tmp_path / "sa_000000.tar", SA_1B, format=format)
    found = list_images([path])
    assert found.root == tmp_path
    assert found.passed_over == {"JSON": 20}
    assert found.problems == ()
    assert contents(path) == {f"sa_000000.tar/sa_{n}.jpg": f"{n} jpg".encode() * (n + 1) for n in range(20)}
    assert list(tmp_path.iterdir()) == [path]


def test_tars_are_found_in_folders_beside_other_images(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    make_tar(tmp_path / "sub" / "A.TAR", [member("x/1.jpg", b"in tar")])
    (tmp_path / "2.jpg").write_bytes(b"beside")
    assert contents(tmp_path) == {"2.jpg": b"beside", "sub/A.TAR/x/1.jpg": b"in tar"}


def test_several_tars_share_their_folder_and_none_is_listed_twice(tmp_path: Path) -> None:
    a, b = (make_tar(tmp_path / f"{name}.tar", [member("1.jpg", name.encode())]) for name in "ab")
    assert [file.key for file in list_images([b, a, tmp_path]).files] == ["a.tar/1.jpg", "b.tar/1.jpg"]
    assert list_images([a, b]).root == tmp_path


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["long/" * 60 + "1.jpg", "ü 写真.jpg", "\udcff\udcfe.jpg", "two\nlines.jpg"])
def test_long_and_odd_member_names_are_kept(tmp_path: Path, format: int, name: str) -> None:
    path = make_tar(tmp_path / "t.tar", [member(name, b"odd"), member("z.jpg", b"next")], format=format)
    assert contents(path) == {f"t.tar/{name}": b"odd", "t.tar/z.jpg": b"next"}


def test_names_that_leave_the_tar_are_keys_and_never_paths(tmp_path: Path) -> None:
    outside = tmp_path / "secret.jpg"
    outside.write_bytes(b"outside")
    names = ["../secret.jpg", str(outside), "a/../../secret.jpg", "other.tar/1.jpg"]
    folder = tmp_path / "in"
    folder.mkdir()
    path = make_tar(folder / "t.tar", [member(name, b"inside %d" % n) for n, name in enumerate(names)])
    make_tar(folder / "other.tar", [member("1.jpg", b"another tar")])
    expected = {f"t.tar/{name}": b"inside %d" % n for n, name in enumerate(names)}
    assert contents(path) == expected
    assert contents(folder) == {**expected, "other.tar/1.jpg": b"another tar"}


def test_a_leading_dot_and_slash_is_dropped_and_of_one_name_the_last_counts(tmp_path: Path) -> None:
    members = [
        member("a.jpg", b"first"),
        member("././/b.jpg", b"B"),
        member("./a.jpg", b"second"),
        member("c.jpg", b"C"),
    ]
    assert contents(make_tar(tmp_path / "t.tar", members)) == {
        "t.tar/a.jpg": b"second",
        "t.tar/b.jpg": b"B",
        "t.tar/c.jpg": b"C",
    }


def test_a_folder_may_be_called_tar(tmp_path: Path) -> None:
    folder = tmp_path / "photos.tar"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"file")
    make_tar(folder / "in.tar", [member("2.jpg", b"member")])
    assert contents(tmp_path) == {"photos.tar/1.jpg": b"file", "photos.tar/in.tar/2.jpg": b"member"}


def test_hidden_members_and_folders_in_tars_are_passed_over(tmp_path: Path) -> None:
    folder = member("d.jpg", b"", type=tarfile.DIRTYPE)
    members = [member("._1.jpg"), member(".git/2.jpg"), member("3.jpg"), folder, member("../4.jpg")]
    found = list_images([make_tar(tmp_path / "t.tar", members)])
    assert [file.key for file in found.files] == ["t.tar/../4.jpg", "t.tar/3.jpg"]
    assert found.passed_over == {"Mac's ._ twin": 1, "hidden": 1}


def test_links_in_a_tar_are_recorded_and_replace_what_they_overwrite(tmp_path: Path) -> None:
    members = [
        member("a.jpg", b"A"),
        member("b.jpg", b"B"),
        member("b.jpg", b"", type=tarfile.SYMTYPE, linkname="a.jpg"),
        member("c.jpg", b"", type=tarfile.LNKTYPE, linkname="a.jpg"),
    ]
    path = make_tar(tmp_path / "t.tar", members)
    assert contents(path) == {"t.tar/a.jpg": b"A"}
    assert [problem.path for problem in list_images([path]).problems] == [f"{path}/b.jpg", f"{path}/c.jpg"]


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_members_are_recorded_and_the_next_member_is_still_right(tmp_path: Path, format: str) -> None:
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(1_000_000)
        file.seek(500_000)
        file.write(b"data")
    (tmp_path / "z.jpg").write_bytes(b"after the hole")
    command = ["tar", f"--format={format}", "--sparse", "-cf", "s.tar", "hole.jpg", "z.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    path = tmp_path / "s.tar"
    assert path.stat().st_size < 500_000
    assert contents(path) == {"s.tar/z.jpg": b"after the hole"}
    assert [problem.path for problem in list_images([path]).problems] == [f"{path}/hole.jpg"]


@pytest.mark.parametrize(
    ("name", "mode"), [("t.tar.gz", "w:gz"), ("t.tgz", "w:gz"), ("t.tar.XZ", "w:xz"), ("t.tar", "w:bz2")]
)
def test_a_compressed_tar_is_refused_with_the_mend(tmp_path: Path, name: str, mode: str) -> None:
    path = make_tar(tmp_path / name, [member("1.jpg")], mode)
    with pytest.raises(SamError, match=r"decompress it to a \.tar, or extract it"):
        list_images([path])
    (tmp_path / "2.jpg").write_bytes(b"beside")
    found = list_images([tmp_path])
    assert [file.key for file in found.files] == ["2.jpg"]
    assert [problem.path for problem in found.problems] == [str(path)]


def test_a_tar_cut_anywhere_lists_only_whole_members_and_says_that_it_is_cut(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", [member(f"{n}.jpg", bytes([n]) * (300 * n + 1)) for n in range(5)])
    data = path.read_bytes()
    whole = contents(path)
    members_end = max(
        file.offset + file.size for file in list_images([path]).files if file.offset is not None
    )
    end_mark = -(-members_end // 512) * 512
    for end in range(0, end_mark + 513, 64):
        path.write_bytes(data[:end])
        complete = {f.key for f in list_images_or_none(path)}
        assert complete <= whole.keys()
        for key, value in contents(path).items() if complete else ():
            assert value == whole[key]
        problems = problems_of(path)
        if end >= end_mark + 512:
            assert problems == []
        else:
            assert len(problems) == 1, end
            assert "truncated" in problems[0]


def list_images_or_none(path: Path) -> tuple:
    try:
        return list_images([path]).files
    except SamError:
        return ()


def problems_of(path: Path) -> list[str]:
    """The problems, also where they are all that there is."""
    with_another = path.with_name("another.tar")
    make_tar(with_another, [member("x.jpg")])
    return [problem.reason for problem in list_images([path, with_another]).problems]


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", [member("1.jpg", b"a" * 512), member("2.jpg"), member("3.jpg")])
    data = bytearray(path.read_bytes())
    data[1024 + 5] ^= 0xFF  # in the name of the second header, so that its checksum fails
    path.write_bytes(data)
    found = list_images([path])
    assert [file.key for file in found.files] == ["t.tar/1.jpg"]
    assert [problem.reason for problem in found.problems] == [
        "damaged or truncated: no valid header at byte 1,024"
    ]


@pytest.mark.parametrize("between", [0, 3_000_320])
def test_joined_tars_are_read_to_the_last_one(tmp_path: Path, between: int) -> None:
    parts = [
        make_tar(tmp_path / f"{n}.tar", [member(f"{n}.jpg", b"%d" % n), member("same.jpg", b"%d" % n)])
        for n in range(3)
    ]
    joined = tmp_path / "in" / "joined.tar"
    joined.parent.mkdir()
    joined.write_bytes((bytes(between)).join(part.read_bytes() for part in parts))
    expected = {f"joined.tar/{n}.jpg": b"%d" % n for n in range(3)}
    assert contents(joined) == {**expected, "joined.tar/same.jpg": b"2"}
    assert list_images([joined]).problems == ()
    joined.write_bytes(joined.read_bytes() + b"no header of a tar" * 40)
    (problem,) = list_images([joined]).problems
    assert "damaged or truncated: no valid header at byte" in problem.reason
    assert len(contents(joined)) == 4


def test_members_without_a_suffix_are_judged_by_content(tmp_path: Path) -> None:
    members = [
        member("IMG_1", b"\xff\xd8\xff\xe0" + bytes(40)),
        member("x/notes", b"text"),
        member("empty", b""),
    ]
    members += [member("__MACOSX/a.jpg"), member("b.txt"), member("c.tar")]
    found = list_images([make_tar(tmp_path / "t.tar", members)])
    assert [file.key for file in found.files] == ["t.tar/IMG_1"]
    assert found.passed_over == {"other": 2, "Mac's __MACOSX folder": 1, "text": 1, "tar inside a tar": 1}


@pytest.mark.parametrize("data", [b"", b"text, not a tar at all" * 100, b"\xff" * 2048])
def test_what_is_no_tar_is_an_error_with_its_size(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(data)
    with pytest.raises(SamError, match=rf"t\.tar: damaged or truncated \({len(data):,} bytes\)"):
        list_images([path])


def test_an_empty_tar_holds_no_images(tmp_path: Path) -> None:
    with pytest.raises(SamError, match="no images in"):
        list_images([make_tar(tmp_path / "t.tar", [])])


def test_a_tar_that_was_cut_or_removed_after_listing_fails_the_image_with_numbers(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", [member("1.jpg", b"a" * 600)])
    file = list_images([path]).files[0]
    os.truncate(path, 1000)
    with pytest.raises(
        ImageError, match="its tar was truncated or replaced: the image ends at byte 1,112 of 1,000"
    ):
        read_image(tmp_path, file.key, offset=file.offset, size=file.size)
    path.unlink()
    with pytest.raises(ImageError, match="its tar is missing"):
        read_image(tmp_path, file.key, offset=file.offset, size=file.size)


def test_headers_do_not_pile_up_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tar(tmp_path / "t.tar", SA_1B)
    most = 0
    real = tarfile.TarFile.next

    def watched(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        nonlocal most
        most = max(most, len(tar.members))
        return real(tar)

    monkeypatch.setattr(tarfile.TarFile, "next", watched)
    list_images([path])
    assert most <= 1


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"<!DOCTYPE html>", "HTML"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer")],
)
def test_a_file_that_is_no_tar_is_called_what_it_is(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "x.tar").write_bytes(content + bytes(1000))
    contents = scan_tar(str(tmp_path / "x.tar"))
    assert (contents.members, contents.problem) == ({}, f"no tar, but {kind}")
