"""`mobilesam inspect`: description of a store, its check or repair, the result as lines, the command that resumes it.

Without a check only the manifest and a few small files are read, and nothing heavy is imported: it answers within a
second for any number of rows.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..common.durable import explain_os_errors
from ..common.errors import StoreDamaged, StoreError, counted, shown
from .audit_limits import audit_summary, tolerance
from .check import InspectedStore, ProgressCallback, full_problems, quick_problems
from .kept_images import FOLDER
from .layout import MANIFEST, PRIVATE, local_path, shard_count
from .lock import WriterLock
from .manifest import Manifest, ManifestWriter
from .records import Problem, Selection
from .repair import Repair, repair_store
from .spec import StoreSpec
from .zarr_metadata import read_spec

SHOWN_PROBLEMS = 50
"""Most problems that are printed one by one; --json has them all."""
SHOWN_FAILED = 10
"""Most failed images that are printed one by one; --json has them all."""


def inspect_store(
    path: Path | str,
    *,
    check: bool = False,
    repair: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Describe the store at a path, and check or repair it.

    Args:
        path: folder of the store.
        check: read everything, in threads.
        repair: check everything, as the store's only writer, and repair what is damaged.
        progress: called with rows checked so far and rows committed in all.

    Returns:
        Plain JSON values. `problems` holds the problems that are found without reading shards; with `check`, all
        problems; with `repair`, those that remain.

    Raises:
        StoreNotFound: there is no store at the path.
        StoreDamaged: the manifest is missing, unreadable or another store's.
        StoreLocked: another process writes to the store, and a repair was asked for.
    """
    path = local_path(path)
    with _opened(path, writable=repair) as store:
        done = None
        if repair:
            done = repair_store(store, progress)
            problems = list(done.left)
        else:
            problems = full_problems(store, progress) if check else quick_problems(store)
        return _description(store) | {
            "checked": check or repair,
            "problems": [problem.to_json() for problem in problems],
            "repaired": None if done is None else _repair_json(done),
            "command": _command(store, problems),
        }


@contextmanager
def _opened(path: Path, *, writable: bool) -> Iterator[InspectedStore]:
    """Open the store at the path, even if its zarr.json is damaged; with `writable` under the writer's lock."""
    place = path / MANIFEST
    if not place.exists():
        read_spec(path)  # raises StoreNotFound if there is no store
    lock = None
    if writable:
        lock = WriterLock(path / PRIVATE)
        lock.acquire()
    try:
        manifest = (ManifestWriter if writable else Manifest)(place)
        try:
            yield InspectedStore(path=path, spec=_spec(path, manifest), manifest=manifest)
        finally:
            manifest.close()
    finally:
        if lock:
            lock.release()


def _spec(path: Path, manifest: Manifest) -> StoreSpec:
    """Return the spec that the manifest was made with, from the manifest or from zarr.json if the former is damaged.

    Raises:
        StoreDamaged: zarr.json is intact, and another store's.
    """
    try:
        spec = manifest.spec()
    except StoreDamaged:
        spec = read_spec(path)
        manifest.refuse_foreign(spec)
        return spec
    try:
        found = read_spec(path)
    except StoreError:
        return spec
    if found.store_id != spec.store_id:
        manifest.refuse_foreign(found)
    return spec


def _description(store: InspectedStore) -> dict[str, Any]:
    spec, manifest = store.spec, store.manifest
    counts, committed = manifest.counts(), manifest.committed_shards()
    selection = manifest.selections()[-1]
    return {
        "store": str(store.path),
        "rows": {"done": counts.done, "pending": counts.pending, "failed": counts.failed},
        "failed_images": failed_images(manifest) if counts.failed else [],
        "bytes": _bytes_on_disk(store),
        "teacher": spec.teacher,
        "teacher_package": None if spec.teacher_package is None else dict(spec.teacher_package),
        "head": spec.head_sha256 is not None,
        "checkpoint": spec.checkpoint,
        "checkpoint_sha256": spec.checkpoint_sha256,
        "image_size": spec.image_size,
        "preprocessing": dict(spec.preprocessing),
        "dtype": spec.dtype,
        "precision": spec.precision,
        "shard_size": spec.shard_size,
        "shards": {"committed": len(committed), "all": shard_count(counts.rows, spec.shard_size)},
        "subset": {"fraction": selection.fraction, "seed": selection.seed, "limit": selection.limit},
        "image_root": spec.image_root,
        "kept_images": spec.kept_images,
        "versions": dict(spec.versions),
        "audit": audit_summary(manifest.audits(), tolerance(spec.dtype, spec.precision)),
        "writer": store.writer(),
    }


def failed_images(manifest: Manifest, limit: int | None = None) -> list[dict[str, str]]:
    """Return key and reason of each failed image of a store, in row order; of those that the manifest lists whole.

    Args:
        manifest: the store's manifest.
        limit: most images that are returned, the first ones; None for all.
    """
    return [
        {"key": record.key, "reason": record.reason or ""}
        for record in manifest.whole_records("failed", limit=limit)
    ]


def failed_lines(failed: Sequence[Mapping[str, str]], count: int) -> Iterator[str]:
    """Yield the first failed images with their reasons, one a line, and the number of the others.

    Args:
        failed: result of `failed_images`.
        count: number of all failed images.
    """
    for image in failed[:SHOWN_FAILED]:
        yield f"failed        {shown(image['key'])}: {shown(image['reason'])}"
    if count > SHOWN_FAILED:
        yield f"failed        and {count - SHOWN_FAILED:,} more: mobilesam inspect STORE --json lists them all"


def _bytes_on_disk(store: InspectedStore) -> int:
    """Return the bytes of all files of the store together."""
    folders = [store.path, store.path / PRIVATE, *(store.path / layout.name for layout in store.spec.layouts)]
    if store.spec.kept_images is not None:
        folders.append(store.path / FOLDER)
    return sum(_file_bytes(folder) for folder in folders)


def _file_bytes(folder: Path) -> int:
    total = 0
    with explain_os_errors(folder):
        try:
            entries = os.scandir(folder)
        except FileNotFoundError:
            return 0  # reported as a problem elsewhere
        with entries:
            for entry in entries:
                # A writer may have renamed or removed the file meanwhile.
                with suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
    return total


def _command(store: InspectedStore, problems: Sequence[Problem]) -> str | None:
    pending = store.manifest.counts().pending
    if not pending and not any(problem.kind == "head" for problem in problems):
        return None
    return _precompute_command(store.path, store.spec, store.manifest.selections())


def _repair_json(done: Repair) -> dict[str, Any]:
    return {
        "withdrawn": list(done.withdrawn),
        "removed": list(done.removed),
        "rewritten": list(done.rewritten),
        "problems": [problem.to_json() for problem in done.problems],
    }


# ---- the result as lines


def inspection_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result of `inspect_store` as lines for people."""
    return [*_store_lines(result), *_repair_lines(result), *_problem_lines(result), *_command_lines(result)]


def _store_lines(result: Mapping[str, Any]) -> Iterator[str]:
    rows, shards, subset = result["rows"], result["shards"], result["subset"]
    yield f"store         {shown(result['store'])}"
    yield f"images        {rows['done']:,} done, {rows['pending']:,} pending, {rows['failed']:,} failed"
    yield from failed_lines(result["failed_images"], rows["failed"])
    size = counted(result["shard_size"], "image")
    yield f"shards        {shards['committed']:,} of {shards['all']:,} committed, {size} each"
    yield f"bytes         {result['bytes']:,} ({result['bytes'] / 1e9:.2f} GB)"
    made_by = result["teacher_package"]
    yield f"teacher       {result['teacher']}{'' if made_by is None else f' of {_package(made_by)}'}"
    if result["checkpoint"] is not None:
        yield f"checkpoint    {shown(result['checkpoint'])}, SHA-256 {result['checkpoint_sha256']}"
    yield f"embeddings    {result['dtype']}, computed in {result['precision']} at {result['image_size']} pixels"
    for step in _steps(result["preprocessing"]):
        yield f"preprocessing {shown(step)}"
    chosen = f"fraction {subset['fraction']:g}, seed {subset['seed']}"
    limit = "" if subset["limit"] is None else f", at most {subset['limit']:,}"
    yield f"subset        {chosen}{limit}"
    yield f"image root    {shown(result['image_root'])}"
    if result["kept_images"] is not None:
        yield f"kept images   {result['kept_images']}, resized: training and verifying need no others"
    yield f"written with  {', '.join(f'{name} {version}' for name, version in result['versions'].items())}"
    yield f"audit         {_audit(result['audit'])}"
    if result["writer"]:
        yield f"writer        process {result['writer']['pid']} on {result['writer']['host']}, is writing now"


def _package(made_by: Mapping[str, str]) -> str:
    return shown(f"{made_by['distribution']} {made_by['version']} ({made_by['entry_point']})")


def _steps(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Yield the preprocessing recipe, one line per step."""
    for step, how in recipe.items():
        details = (
            [f"{name} {value}" for name, value in how.items()] if isinstance(how, Mapping) else [str(how)]
        )
        yield f"{step}: {', '.join(details)}"


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return "no image has been embedded again yet"
    limits = audit["tolerance"]
    cosine, error = (
        "not a number" if audit[name] is None else format(audit[name], form)
        for name, form in (("cosine_min", ".6f"), ("relative_mse_max", ".3g"))
    )
    return (
        f"{counted(audit['rows'], 'image')} embedded again: cosine at least {cosine} (limit {limits['cosine']:g}), "
        f"relative MSE at most {error} (limit {limits['relative_mse']:g})"
    )


def _repair_lines(result: Mapping[str, Any]) -> Iterator[str]:
    repaired = result["repaired"]
    if repaired is None:
        return
    yield from _shown_problems("mended", repaired["problems"], Path(result["store"]))
    yield (
        f"repair        {counted(len(repaired['withdrawn']), 'shard')} withdrawn, "
        f"{counted(len(repaired['removed']), 'file')} removed, "
        f"{len(repaired['rewritten']):,} rewritten"
    )


def _problem_lines(result: Mapping[str, Any]) -> Iterator[str]:
    problems = result["problems"]
    yield from _shown_problems("problem", problems, Path(result["store"]))
    if result["checked"]:
        left = " left" if result["repaired"] is not None else ""
        found = f"{counted(len(problems), 'problem')}{left}" if problems else "whole"
        yield f"check         {found}"


def _shown_problems(title: str, problems: list[Mapping[str, Any]], store: Path) -> Iterator[str]:
    for problem in problems[:SHOWN_PROBLEMS]:
        place = [shown(_inside(problem["file"], store))] if problem["file"] else []
        place += [f"shard {problem['shard']}"] if problem["shard"] is not None else []
        place += [f"row {problem['row']}"] if problem["row"] is not None else []
        place += [shown(problem["key"])] if problem["key"] is not None else []
        yield f"{title:<13} {problem['kind']}: {', '.join(place)}: {shown(problem['message'])}"
    if len(problems) > SHOWN_PROBLEMS:
        yield f"{title:<13} and {len(problems) - SHOWN_PROBLEMS:,} more: --json lists them all"


def _command_lines(result: Mapping[str, Any]) -> Iterator[str]:
    if result["command"] and result["repaired"] is not None:
        yield "Compute the removed shards again with"
        yield f"  {result['command']}"
    elif result["command"]:
        yield "Resume with"
        yield f"  {result['command']}"
    if result["problems"] and result["repaired"] is None and result["checked"]:
        yield "Remove what is damaged with mobilesam inspect STORE --repair"


def _inside(file: str, store: Path) -> str:
    path = Path(file)
    return str(path.relative_to(store)) if path.is_relative_to(store) else file


# ---- the command that resumes a store


def _precompute_command(store: Path, spec: StoreSpec, selections: Sequence[Selection]) -> str:
    """Return the command that computes the pending rows. Options that the spec doesn't hold are those last given.

    It names the folders and tars of all selections, or those of them that are still there.
    """
    selection = selections[-1]
    sources = list(dict.fromkeys(source for each in selections for source in each.sources)) or [
        spec.image_root
    ]
    there = [source for source in sources if os.path.lexists(source)]
    words = ["mobilesam", "precompute", "--images", *(there or sources)]
    if there and there != sources:
        words.append("--extend")
    words += ["--out", str(store), "--teacher", spec.teacher]
    if selection.checkpoint is not None:
        words += ["--checkpoint", selection.checkpoint]
    if selection.fraction < 1:
        words += ["--fraction", repr(selection.fraction), "--seed", str(selection.seed)]
    if selection.limit is not None:
        words += ["--limit", str(selection.limit)]
    return _quoted(words)


def _quoted(words: Sequence[str]) -> str:
    """Join words into one line that a shell splits into the same words, even if they are not printable."""
    return " ".join(shlex.quote(word) if word.isprintable() else _ansi_quoted(word) for word in words)


def _ansi_quoted(word: str) -> str:
    """Return a word as $'...', for newlines and bytes that are not UTF-8, which can't be printed unescaped."""
    escaped = re.sub(
        rb"[^ -&(-\[\]-~]",  # all but printable ASCII without ' and \
        lambda match: b"\\%03o" % match[0][0],
        os.fsencode(word),
    )
    return f"$'{escaped.decode('ascii')}'"
