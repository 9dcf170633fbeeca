"""The current folder: its photos, stores and runs, as far as they are, and the command that comes next.

Only a few small files of each store and run are read, and only the names of photos.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from ..common.errors import MobileSamError, StoreError, counted
from ..distill.config import DistillConfig
from ..distill.latest_run import LATEST, RUNS
from ..distill.recipe import RECIPES
from ..distill.run_description import is_run
from ..distill.run_folder import Run, trainer_of
from ..distill.students.registry import STUDENTS
from ..precompute.config import DEFAULT_DTYPE, DEFAULT_IMAGE_SIZE, DEFAULT_TEACHER
from ..sam.photos.file_kinds import hidden_kind, is_image, is_store, own_folder, own_pictures
from ..sam.registry import TEACHERS
from ..sam.weights.download import cache_directory
from ..store import array_layouts
from ..store.inspection import inspect_store
from .machine import size_words

MOST_NAMES = 100_000
"""Names that are read in and below one folder; in a larger one the photos are counted so far only."""
MOST_RUNS = 10
"""Runs that are looked into, the newest ones."""


def bytes_per_image(image_size: int = DEFAULT_IMAGE_SIZE, dtype: str = DEFAULT_DTYPE) -> int:
    """Return the disk space of one image in a store, by default that of `precompute`'s defaults.

    Args:
        image_size: side of the teacher's input in pixels.
        dtype: type of the stored embeddings.
    """
    return sum(layout.file_bytes(1) - layout.file_bytes(0) for layout in array_layouts(dtype, image_size, 1))


# ---- what is there


def photos(folder: Path) -> list[dict[str, Any]]:
    """Count the photos in a folder, and in and below each folder in it, by their names, and list the tars in it.

    Args:
        folder: folder to look into.

    Returns:
        `path` (relative to the folder), `images` (None for a tar, which isn't read) and `all` (False if there are
        more than MOST_NAMES names, of which so many were read), those with the most images first.
    """
    found: list[dict[str, Any]] = []
    for path in [folder, *_folders(folder)]:
        images, all_read = _count_photos(path, deep=path != folder)
        if images:
            found.append({"path": os.path.relpath(path, folder), "images": images, "all": all_read})
    found.sort(key=lambda each: -each["images"])
    tars = sorted(entry.name for entry in _entries(folder) if entry.name.endswith(".tar"))
    return found + [{"path": name, "images": None, "all": False} for name in tars]


def _count_photos(top: Path, *, deep: bool) -> tuple[int, bool]:
    """Count the photos in a folder, and in those below if `deep`; False if there are more than MOST_NAMES names."""
    images, left, places = 0, MOST_NAMES, [top]
    while places and left:
        place = places.pop()
        entries = list(islice(_entries(place), left))
        names = {entry.name for entry in entries}
        left -= len(names)
        if own_folder(str(place), names) is None:
            images += sum(_is_photo(name) for name in names - own_pictures(str(place), names))
            places += [Path(one.path) for one in entries if deep and _is_folder(one)]
    return images, left > 0


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder that is searched: neither hidden nor a link."""
    return entry.is_dir(follow_symlinks=False) and hidden_kind(entry.name) is None


def _is_photo(name: str) -> bool:
    return hidden_kind(name) is None and is_image(name, lambda: b"")[0]


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder; nothing of one that may not be read."""
    try:
        entries = os.scandir(folder)
    except OSError:
        return
    with entries:
        yield from entries


def _folders(folder: Path) -> list[Path]:
    """Return the folders directly in a folder that aren't hidden, by name."""
    return sorted(
        Path(one.path) for one in _entries(folder) if one.is_dir() and hidden_kind(one.name) is None
    )


def stores(folder: Path) -> list[dict[str, Any]]:
    """Describe the stores directly in a folder, `store.zarr`, which the commands take by default, first.

    Args:
        folder: folder to look into.

    Returns:
        Of each: `path`, and either `error` or the keys `rows`, `bytes`, `teacher`, `image_size`, `dtype`,
        `image_root`, `kept_images`, `problems`, `writer` and `command` of `inspect_store`, without reading shards.
    """
    keys = (
        "rows",
        "bytes",
        "teacher",
        "image_size",
        "dtype",
        "image_root",
        "kept_images",
        "problems",
        "writer",
    )
    found: list[dict[str, Any]] = []
    for path in filter(
        is_store, map(str, sorted(_folders(folder), key=lambda path: path.name != "store.zarr"))
    ):
        name = os.path.relpath(path, folder)
        try:
            result = inspect_store(name if folder == Path() else path)
        except (StoreError, OSError) as error:
            found.append({"path": name, "error": str(error)})
        else:
            found.append({"path": name} | {key: result[key] for key in (*keys, "command")})
    return found


def runs() -> list[dict[str, Any]]:
    """Describe the newest runs in `runs`, the newest first.

    Returns:
        Of each: `path`, and either `error` or: `student`, `teacher`, `image_size`, `store`; `finished` (time, or
        None); `trainer` (who trains it now, or None); `epochs` (wanted) and `epoch` (of the last evaluation, 0 before
        it); `skill` and `cosine` of the held-out images' valid cells at that evaluation, or None; `command`, which
        resumes an unfinished run, or None.
    """
    folders = [path for path in _folders(RUNS) if path.name != LATEST.name and is_run(path)]
    folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [_run(path) for path in folders[:MOST_RUNS]]


def _run(path: Path) -> dict[str, Any]:
    try:
        run = Run.open(path)
        finished, val = run.result(), run.last("val")
    except (MobileSamError, OSError) as error:
        return {"path": str(path), "error": str(error)}
    figures = val or {}
    return {
        "path": str(path),
        "student": run.description.student,
        "teacher": run.description.store.spec.teacher,
        "image_size": run.description.image_size,
        "store": str(run.store_path),
        "finished": None if finished is None else finished["finished"],
        "trainer": trainer_of(path),
        "epochs": run.description.options["epochs"],
        "epoch": figures.get("epoch", 0),
        "skill": figures.get("skill_valid"),
        "cosine": figures.get("cosine_valid", {}).get("mean"),
        "command": None if finished is not None else resume_command(run, path),
    }


def resume_command(run: Run, folder: Path) -> str:
    """Return the distill command with which a run was begun, which resumes it.

    Args:
        run: the run.
        folder: its folder, as a path of the current folder.
    """
    given, words = dict(run.description.options), ["mobilesam", "distill"]
    # These are saved as they apply: left out where the recipe, or the default, says the same.
    recipe = RECIPES.get(given.get("recipe", DistillConfig().recipe))
    store = run.store_path
    given |= {"store": store.name if store.parent == Path.cwd() else str(store), "out": str(folder)}
    if given.get("labels") == "teacher":
        given["labels"] = None
    for field in fields(DistillConfig):
        value = given.get(field.name)
        if "option" not in field.metadata or field.name == "restart" or value is None or value is False:
            continue
        if str(value) != str(field.default) and value != getattr(recipe, field.name, None):
            words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


# ---- what comes next


def next_step(folder: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the next command for a folder, and say what it needs.

    Args:
        folder: `photos`, `stores` and `runs`, as the functions of those names return them.
        facts: `disk_free` and `memory` (available) in bytes, `gpu` (True with a usable one), `cached` (names of
            teachers whose checkpoints are there) and `report` (True if packages for --report are there).

    Returns:
        `state`, in words; `command`, None where one has to wait; `needs`, a text for each thing it needs; `then`,
        commands that may follow.
    """
    store = next(iter(folder["stores"]), None)
    if store is not None and not _is_whole(store):
        return _mend_store(store, facts)
    run = next(iter(folder["runs"]), None)
    if run is not None:
        return _after_run(run, facts)
    if store is not None:
        return _distill(store, facts)
    return _precompute(folder["photos"], facts)


def _step(state: str, command: str | None, needs: list[str], *then: str) -> dict[str, Any]:
    return {"state": state, "command": command, "needs": needs, "then": list(then)}


def _is_whole(store: Mapping[str, Any]) -> bool:
    return not ("error" in store or store["problems"] or store["rows"]["pending"] or store["writer"])


def _mend_store(store: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    path = store["path"]
    if "error" in store:
        return _step(f"{path} can't be read", shlex.join(["mobilesam", "inspect", path]), [])
    if store["writer"]:
        return _step(f"process {store['writer']['pid']} writes {path} now: wait for it", None, [])
    if store["problems"]:
        repair = shlex.join(["mobilesam", "inspect", path, "--repair"])
        return _step(f"{path} is damaged: {counted(len(store['problems']), 'problem')}", repair, [])
    pending = store["rows"]["pending"]
    each = bytes_per_image(store["image_size"], store["dtype"])
    needs = [_disk_words(pending, each, store["image_size"], facts["disk_free"])]
    return _step(f"{path} lacks {counted(pending, 'image')}", store["command"], needs)


def _after_run(run: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    path = run["path"]
    if "error" in run:
        return _step(f"{path} can't be read: {run['error']}", None, [])
    if run["trainer"]:
        return _step(f"{path} is being trained by {run['trainer']}: wait for it", None, [])
    if run["finished"] is None:
        return _step(f"{path} isn't finished: epoch {run['epoch']} of {run['epochs']}", run["command"], [])
    report = ["--report", "report.html"] if facts["report"] else []
    return _step(
        f"{path} is finished",
        shlex.join(["mobilesam", "verify", "--student", path, *report]),
        [] if report else ["--report report.html also needs the extra report"],
        f"mobilesam segment PHOTO --student {shlex.quote(path)} --point X Y",
        f"mobilesam export --student {shlex.quote(path)} --out exported",
    )


def _distill(store: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    words = ["mobilesam", "distill", "--epochs", "auto"]
    words += [] if store["path"] == "store.zarr" else ["--store", store["path"]]
    needs = []
    if not store["kept_images"]:
        there = Path(store["image_root"]).is_dir()
        needs.append(f"the photos, in {store['image_root']}{'' if there else ', which is not there'}")
        words += [] if there else ["--images", "DIR"]
    needs.append(_memory_words(store["image_size"], facts["memory"]))
    return _step(f"{store['path']} is complete, and no student learned from it", shlex.join(words), needs)


def _precompute(found: list[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    teacher = next(iter(facts["cached"]), DEFAULT_TEACHER if facts["gpu"] else "vit_b")
    words = ["--out", "store.zarr", "--teacher", teacher]
    needs = [_checkpoint_words(teacher, facts["cached"])]
    size = bytes_per_image()
    if not found:
        needs.insert(0, "a folder or a .tar of photos, JPEG, PNG or another format that Pillow reads")
        return _step(
            "there are neither photos nor stores nor runs in this folder",
            shlex.join(["mobilesam", "precompute", "--images", "DIR", *words]),
            [*needs, f"{size_words(size)} of disk an image"],
        )
    source = found[0]
    if source["images"] is None:
        needs.append(f"{size_words(size)} of disk an image at {DEFAULT_IMAGE_SIZE} pixels")
        state = f"there are photos in {source['path']}, and no store"
    else:
        needs.append(_disk_words(source["images"], size, DEFAULT_IMAGE_SIZE, facts["disk_free"]))
        state = f"there are photos in {_place(source['path'])}, and no store"
    command = shlex.join(["mobilesam", "precompute", "--images", source["path"], *words])
    trial = ["mobilesam", "precompute", "--images", source["path"], "--teacher", "vit_nano"]
    return _step(state, command, needs, shlex.join([*trial, "--image-size", "256", "--out", "trial.zarr"]))


def _place(path: str) -> str:
    return "this folder" if path == "." else path


def _disk_words(images: int, each: int, image_size: int, free: int) -> str:
    need = images * each
    lacking = "" if need <= free else f", {size_words(need - free)} too little"
    return (
        f"{size_words(need)} of disk for {counted(images, 'image')} at {image_size} pixels, {size_words(each)} each; "
        f"{size_words(free)} are free{lacking}"
    )


def _memory_words(image_size: int, available: int) -> str:
    return (
        f"{size_words(training_bytes(image_size))} of memory an image in a pass of tiny_vit, in float32; "
        f"{size_words(available)} are available"
    )


def training_bytes(image_size: int) -> int:
    """Return the memory in bytes that training tiny_vit in float32 takes for one image of a forward pass.

    Args:
        image_size: side of its input in pixels.
    """
    known = STUDENTS["tiny_vit"].training_bytes
    assert known is not None, "tiny_vit's memory is measured"
    return round(known["float32"] * (image_size / 1024) ** 2)


def _checkpoint_words(teacher: str, cached: list[str]) -> str:
    file = TEACHERS[teacher].checkpoint
    if file is None:
        return f"no download: {teacher} is in the package"
    if teacher in cached:
        return f"{file.name}, which is in the cache"
    size = "" if file.bytes is None else f", {size_words(file.bytes)}"
    return f"a download of {teacher}'s weights ({file.name}{size}) into {cache_directory()}, or --checkpoint FILE"
