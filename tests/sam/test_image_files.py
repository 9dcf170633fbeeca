from __future__ import annotations

import os
from pathlib import Path

import pytest

from mobilesam.common.errors import shown
from mobilesam.sam import ImageRef, SamError, list_images, read_image


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def keys(*paths: Path, root: Path | None = None) -> list[str]:
    return [file.key for file in list_images(paths, root).files]


def test_images_are_found_recursively_by_suffix_in_any_case(tmp_path: Path) -> None:
    wanted = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.BMP", "sub/f.tif", "sub/deep/er/g.TIFF", "sub/h.gif"]
    for name in [*wanted, "i.txt", "j.json", "jpg", "k.jpg.part", "sub/l.heic"]:
        put(tmp_path / name)
    found = list_images([tmp_path])
    assert [file.key for file in found.files] == sorted(wanted)
    assert found.root == tmp_path
    assert found.others == 5
    assert found.problems == ()


def test_each_file_is_listed_with_its_length(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", b"four")
    assert list_images([tmp_path]).files == (ImageRef(key="a.jpg", size=4, offset=None),)


def test_keys_are_sorted_by_their_bytes(tmp_path: Path) -> None:
    # By code points "\uffff" stands before the emoji, and a surrogate before both.
    names = [
        "z.jpg",
        "é.jpg",
        "Z.jpg",
        "\uffff.jpg",
        "\U0001f600.jpg",
        "\udcff.jpg",
        "a/b.jpg",
        "a-b.jpg",
        "a b.jpg",
    ]
    for name in names:
        put(tmp_path / name)
    assert keys(tmp_path) == sorted(names, key=os.fsencode)
    assert keys(tmp_path)[0] == "Z.jpg"
    assert keys(tmp_path)[-2:] == ["\U0001f600.jpg", "\udcff.jpg"]


@pytest.mark.parametrize(
    "name",
    [
        "two\nlines.jpg",
        "\udcff\udcfe.jpg",
        "übung ñ 写真.jpg",
        " lead.jpg",
        "tab\t.jpg",
        "a\\b.jpg",
        "-rf.jpg",
        "%s{0}.jpg",
    ],
)
def test_odd_names_are_listed_and_read_back(tmp_path: Path, name: str) -> None:
    put(tmp_path / "sub" / name, name.encode("utf-8", "surrogateescape"))
    found = list_images([tmp_path])
    assert [file.key for file in found.files] == [f"sub/{name}"]
    assert read_image(found.root, found.files[0].key) == name.encode("utf-8", "surrogateescape")


def test_equal_names_in_different_folders_and_equal_stems_stay_apart(tmp_path: Path) -> None:
    names = ["a/1.jpg", "b/1.jpg", "a/1.png", "1.jpg"]
    for name in names:
        put(tmp_path / name, name.encode())
    assert keys(tmp_path) == sorted(names)
    assert {read_image(tmp_path, key) for key in keys(tmp_path)} == {name.encode() for name in names}


def test_hidden_files_and_folders_are_passed_over_and_counted(tmp_path: Path) -> None:
    for name in ["a.jpg", "._a.jpg", ".thumbnails/b.jpg", ".thumbnails/c.jpg"]:
        put(tmp_path / name)
    found = list_images([tmp_path])
    assert [file.key for file in found.files] == ["a.jpg"]
    assert found.hidden == 2


def test_a_hidden_folder_that_is_named_is_listed(tmp_path: Path) -> None:
    put(tmp_path / ".photos" / "a.jpg")
    assert keys(tmp_path / ".photos") == ["a.jpg"]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    put(tmp_path / "sub" / "a.jpg")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "round.jpg").symlink_to("round.jpg")
    found = list_images([tmp_path])
    assert [file.key for file in found.files] == ["sub/a.jpg"]
    assert [Path(problem.path).name for problem in found.problems] == ["round.jpg", "self"]


def test_folders_that_link_to_each_other_do_not_multiply(tmp_path: Path) -> None:
    for number in range(12):
        put(tmp_path / f"d{number}" / "a.jpg")
        for other in range(12):
            (tmp_path / f"d{number}" / f"to{other}").symlink_to(tmp_path / f"d{other}")
    assert len(keys(tmp_path)) == 12


def test_a_linked_folder_and_a_linked_file_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "sub" / "a.jpg", b"A")
    put(tmp_path / "single.jpg", b"S")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    (photos / "s.jpg").symlink_to(tmp_path / "single.jpg")
    assert keys(photos) == ["link/sub/a.jpg", "s.jpg"]
    assert read_image(photos, "link/sub/a.jpg") == b"A"


def test_a_folder_has_its_own_name_before_any_links(tmp_path: Path) -> None:
    put(tmp_path / "z_real" / "a.jpg")
    (tmp_path / "a_latest").symlink_to("z_real")
    assert keys(tmp_path) == ["z_real/a.jpg"]


def test_broken_links_and_things_that_are_no_files_are_recorded(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    problems = {Path(problem.path).name: problem.reason for problem in list_images([tmp_path]).problems}
    assert problems == {"gone.jpg": "broken link", "pipe.png": "not a regular file"}


def test_a_folder_that_cannot_be_read_is_recorded_and_the_rest_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a.jpg")
    put(tmp_path / "locked" / "b.jpg")
    real = os.scandir

    def scandir(path: str) -> os._ScandirIterator[str]:  # permissions don't bind root, who may run the tests
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = list_images([tmp_path])
    assert [file.key for file in found.files] == ["a.jpg"]
    assert [str(problem) for problem in found.problems] == [
        f"{tmp_path / 'locked'}: folder can't be read: Permission denied"
    ]
    with pytest.raises(SamError, match="locked can't be read: Permission denied"):
        list_images([tmp_path / "locked"])


def test_several_folders_share_their_deepest_common_folder_as_root(tmp_path: Path) -> None:
    put(tmp_path / "x" / "a" / "1.jpg")
    put(tmp_path / "x" / "b" / "c" / "2.jpg")
    put(tmp_path / "x" / "other" / "3.jpg")
    found = list_images([tmp_path / "x" / "b" / "c", tmp_path / "x" / "a"])
    assert found.root == tmp_path / "x"
    assert [file.key for file in found.files] == ["a/1.jpg", "b/c/2.jpg"]


def test_paths_that_overlap_or_repeat_list_each_image_once(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.jpg")
    put(tmp_path / "2.jpg")
    assert keys(tmp_path / "a", tmp_path, tmp_path, tmp_path / "." / "a") == ["2.jpg", "a/1.jpg"]


def test_a_given_root_stands_before_the_keys(tmp_path: Path) -> None:
    put(tmp_path / "a" / "b" / "1.jpg")
    assert keys(tmp_path / "a" / "b", root=tmp_path) == ["a/b/1.jpg"]
    with pytest.raises(SamError, match=r"/a lies outside the image root .*/ab: name a path below it"):
        list_images([tmp_path / "a"], tmp_path / "ab")


def test_relative_paths_give_an_absolute_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "photos" / "1.jpg")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert list_images(["../photos"]).root == tmp_path / "photos"
    monkeypatch.chdir(tmp_path)
    assert list_images(["photos/"]).root == tmp_path / "photos"


def test_a_linked_root_keeps_the_name_the_user_gave_it(tmp_path: Path) -> None:
    put(tmp_path / "disk7" / "1.jpg")
    (tmp_path / "photos").symlink_to("disk7")
    assert list_images([tmp_path / "photos"]).root == tmp_path / "photos"
    # Two dots behind a link lead where the system goes, not where the spelling does.
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "near").symlink_to(tmp_path / "disk7")
    assert list_images([tmp_path / "far" / "near" / ".." / "disk7"]).root == tmp_path / "disk7"


def test_absent_wrong_and_empty_paths_each_say_what_is_the_matter(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    put(tmp_path / "empty" / "notes.txt")
    put(tmp_path / "empty" / ".b.jpg")
    (tmp_path / "bare").mkdir()
    with pytest.raises(SamError, match=r"no such folder or tar: .*/gone"):
        list_images([tmp_path / "gone"])
    with pytest.raises(
        SamError, match=r"a\.jpg is neither a folder nor a \.tar file: name the folder that holds it"
    ):
        list_images([tmp_path / "a.jpg"])
    with pytest.raises(SamError, match=r"no images in .*/empty \(jpg, .*gif\): 1 other files, 1 hidden ones"):
        list_images([tmp_path / "empty"])
    with pytest.raises(SamError, match=r"no images in .*/bare and 1 more"):
        list_images([tmp_path / "empty", tmp_path / "bare"])
    with pytest.raises(SamError, match=r"name a folder or a \.tar file"):
        list_images([])


def test_what_cannot_be_printed_is_escaped_for_one_line() -> None:
    assert shown("plain/übung 写真.jpg") == "plain/übung 写真.jpg"
    assert shown("two\nlines\udcff.jpg") == "two\\nlines\\udcff.jpg"
    shown("\udcff").encode()
