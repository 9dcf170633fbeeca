from __future__ import annotations

import os
from pathlib import Path

import pytest

from mobilesam.common.errors import shown
from mobilesam.sam import ImageError, ImageRef, SamError, list_images, read_image
from mobilesam.sam.photos import file_kinds


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def keys(*paths: Path, root: Path | None = None) -> list[str]:
    return [file.key for file in list_images(paths, root).files]


def test_images_are_found_recursively_by_suffix_in_any_case(tmp_path: Path) -> None:
    wanted = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.BMP", "sub/f.tif", "sub/deep/er/g.TIFF", "sub/h.gif"]
    wanted += ["m.jfif", "n.JPE"]
    for name in [*wanted, "i.txt", "j.json", "jpg", "k.jpg.part", "sub/l.mov"]:
        put(tmp_path / name)
    found = list_images([tmp_path])
    assert [file.key for file in found.files] == sorted(wanted)
    assert found.root == tmp_path
    assert found.passed_over == {"text": 1, "JSON": 1, "other": 1, "unfinished download": 1, "video": 1}
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
    assert found.passed_over == {"Mac's ._ twin": 1, "hidden": 1}


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


def test_keys_outside_the_root_lead_up_from_it_and_are_read_back_even_when_it_is_gone(tmp_path: Path) -> None:
    put(tmp_path / "far" / "day2" / "1.jpg", b"day2")
    put(tmp_path / "far" / "day1" / "1.jpg", b"day1")
    root = tmp_path / "days" / "day1"
    (tmp_path / "days").symlink_to("far")
    listed = ["../day2/1.jpg", "1.jpg"]
    # The folder around the root holds the root, too: its images keep their keys.
    assert keys(tmp_path / "days", root=root) == keys(root, tmp_path / "days" / "day2", root=root) == listed
    assert keys(tmp_path / "days" / "day2", root=root) == ["../day2/1.jpg"]
    assert keys(tmp_path, root=root) == [f"../../far/{day}/1.jpg" for day in ("day1", "day2")]
    put(tmp_path / "9.jpg")
    assert keys(tmp_path / "9.jpg", root=root) == ["../../9.jpg"]
    (tmp_path / "far" / "day1").rename(tmp_path / "far" / "archive")
    assert read_image(root, "../day2/1.jpg") == b"day2"
    with pytest.raises(ImageError, match="missing"):
        read_image(root, "1.jpg")


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
    put(tmp_path / "empty" / "notes.txt")
    put(tmp_path / "empty" / ".b.jpg")
    (tmp_path / "bare").mkdir()
    with pytest.raises(SamError, match=r"--images .*/gone: no such folder, tar or image"):
        list_images([tmp_path / "gone"])
    with pytest.raises(SamError, match=r"no file matches --images .*/bare/\*\.jpg"):
        list_images([tmp_path / "bare" / "*.jpg"])
    with pytest.raises(SamError, match=r"notes\.txt: no image that can be read here, by its kind \(text\)"):
        list_images([tmp_path / "empty" / "notes.txt"])
    with pytest.raises(SamError, match=r"no images in .*/empty; passed over: 1 hidden, 1 text"):
        list_images([tmp_path / "empty"])
    with pytest.raises(SamError, match=r"no images in .*/bare and 1 more"):
        list_images([tmp_path / "empty", tmp_path / "bare"])
    with pytest.raises(SamError, match=r"name a folder, a \.tar file or an image"):
        list_images([])


def test_single_images_and_patterns_are_listed_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["p/a.jpg", "p/b.jpg", "p/c.txt", "p/q/d.jpg", "p/[x].jpg"]:
        put(tmp_path / name)
    assert keys(tmp_path / "p" / "a.jpg") == ["a.jpg"]
    assert keys(tmp_path / "p" / "a.jpg", tmp_path / "p" / "q") == ["a.jpg", "q/d.jpg"]
    assert keys(tmp_path / "p" / "*.jpg") == ["[x].jpg", "a.jpg", "b.jpg"]
    assert keys(tmp_path / "p" / "[x].jpg") == ["[x].jpg"]  # a file of that name stands before the pattern
    assert len(keys(tmp_path / "p", tmp_path / "p" / "a.jpg", tmp_path / "**" / "*.jpg")) == 4
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keys(Path("~/p/q")) == ["d.jpg"]


JPEG, HEIC = b"\xff\xd8\xff\xe0" + bytes(40), b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def test_names_that_say_nothing_are_judged_by_content_and_no_others_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ["IMG_0001", "a.jpg_large", "b.jpeg_original", "c.jpg~", "2021.05.03"]
    for name in images:
        put(tmp_path / name, JPEG)
    put(tmp_path / "notes")
    put(tmp_path / "clip", b"\0\0\0\x18ftypmp42" + bytes(40))
    put(tmp_path / "backup.old", b"PK\x03\x04" + bytes(40))
    for number in range(9):
        put(tmp_path / f"{number}.jpg")
        put(tmp_path / f"{number}.json")
    opened = []
    real = file_kinds.content_kind
    monkeypatch.setattr(file_kinds, "content_kind", lambda head: opened.append(head) or real(head))
    found = list_images([tmp_path])
    assert [file.key for file in found.files if file.size > 1] == sorted(images)
    assert found.passed_over == {"JSON": 9, "other": 1, "video": 1, "ZIP archive": 1}
    assert len(opened) == len(images) + 3


def test_thumbnails_and_deleted_photos_of_servers_and_systems_are_passed_over(tmp_path: Path) -> None:
    for folder in ("@eaDir/a.jpg", "sub/@EADIR", "#recycle", "$RECYCLE.BIN", ".@__thumb", "@__thumb", "kept"):
        put(tmp_path / folder / "SYNOPHOTO_THUMB_XL.jpg", JPEG)
    found = list_images([tmp_path])
    assert [file.key for file in found.files] == ["kept/SYNOPHOTO_THUMB_XL.jpg"]
    assert found.passed_over == {"system folder": 5, "hidden": 1}


@pytest.mark.parametrize("installed", [True, False])
def test_heic_photos_are_listed_where_they_can_be_decoded_and_else_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(file_kinds, "find_spec", lambda _: object() if installed else None)
    file_kinds.decodable.cache_clear()
    try:
        for name in ["a.HEIC", "b.hif", "c"]:
            put(tmp_path / name, HEIC)
        put(tmp_path / "d.jpg")
        found = list_images([tmp_path])
        assert found.passed_over == ({} if installed else {"HEIC": 3})
        assert len(found.files) == (4 if installed else 1)
    finally:
        file_kinds.decodable.cache_clear()


def test_what_cannot_be_printed_is_escaped_for_one_line() -> None:
    assert shown("plain/übung 写真.jpg") == "plain/übung 写真.jpg"
    assert shown("two\nlines\udcff.jpg") == "two\\nlines\\udcff.jpg"
    shown("\udcff").encode()
