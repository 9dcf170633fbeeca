"""Whether the manifest agrees with itself: a shard's listing, and the tables as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .digests import KeysDigest, shard_digest
from .errors import MAKE_ANEW, StoreDamaged
from .manifest import PAGE_KEYS, Manifest
from .records import ImageRecord, Problem
from .rows import SELECT_RECORDS, record_of

SHOWN_ERRORS = 10
"""Lines of SQLite's own check that are shown at most."""


@dataclass(frozen=True, kw_only=True)
class ShardListing:
    """What the manifest says of one committed shard: `rows` as committed, the records of those that are whole,
    and what is wrong with the others."""

    shard: int
    attempt: str
    rows: range
    records: tuple[ImageRecord, ...]
    problems: tuple[Problem, ...]


def shard_listing(manifest: Manifest, shard: int, shard_size: int) -> ShardListing | None:
    """The listing of a shard, its digests compared; None when it isn't committed (any more)."""
    first = shard * shard_size
    try:
        with manifest.snapshot():
            shards = manifest.query("SELECT * FROM shards WHERE shard = ?", (shard,))
            found = manifest.query(
                f"{SELECT_RECORDS} WHERE row >= ? AND row < ? ORDER BY row", (first, first + shard_size)
            )
    except StoreDamaged as error:
        problem = Problem(kind="listing", message=str(error), shard=shard)
        return ShardListing(shard=shard, attempt="", rows=range(0), records=(), problems=(problem,))
    if not shards:
        return None
    *fields, digest = shards[0]
    rows = range(first, first + (fields[1] if isinstance(fields[1], int) else 0))
    records, problems = [], []
    for row in found:
        try:
            record = record_of(row)
        except StoreDamaged as error:
            problems.append(Problem(kind="listing", message=str(error), shard=shard, row=row[0]))
        else:
            if record.status != "pending":
                records.append(record)
    listed = [row[-1] for row in found if row[-2]]
    if not problems and (shard_digest(tuple(fields), listed) != digest or len(records) != len(rows)):
        problems.append(
            Problem(
                kind="listing",
                message=f"the manifest lists {len(records)} rows of this shard, which was committed with "
                f"{len(rows)}, or its checksum of them is wrong",
                shard=shard,
            )
        )
    return ShardListing(
        shard=shard, attempt=fields[4], rows=rows, records=tuple(records), problems=tuple(problems)
    )


def manifest_problems(manifest: Manifest, shard_size: int) -> list[Problem]:
    """What is wrong with the manifest's tables as a whole; goes through all of them. A problem without a shard
    can't be mended by computing anew."""
    try:
        found = [*_database_problems(manifest), *_image_problems(manifest)]
        return [*found, *_stray_problems(manifest, shard_size)]
    except StoreDamaged as error:
        return [_problem(manifest, str(error))]


def _problem(manifest: Manifest, message: str, shard: int | None = None) -> Problem:
    return Problem(kind="listing", message=message, file=str(manifest.path), shard=shard)


def integrity_errors(manifest: Manifest) -> list[str]:
    """What SQLite finds wrong with the database; reads all of it."""
    lines = [line for (line,) in manifest.query(f"PRAGMA integrity_check({SHOWN_ERRORS})")]
    return [] if lines == ["ok"] else lines


def _database_problems(manifest: Manifest) -> Iterator[Problem]:
    lines = integrity_errors(manifest)
    if lines:
        yield _problem(manifest, f"SQLite finds it damaged ({'; '.join(lines)}): {MAKE_ANEW}")


def _image_problems(manifest: Manifest) -> Iterator[Problem]:
    """Rows without a gap, and in every set of images the keys that were appended."""
    manifest.row_count()
    for first, rows, *chosen, digest in manifest.query(
        'SELECT first_row, rows, fraction, seed, "limit", sources, checkpoint, digest FROM extensions'
    ):
        keys = KeysDigest((first, *chosen))
        count = 0
        for start in range(first, first + rows, PAGE_KEYS):
            for key in manifest.keys(range(start, min(start + PAGE_KEYS, first + rows))):
                if isinstance(key, bytes):
                    keys.add(key)
                count += 1
        if count != rows or keys.value() != digest:
            yield _problem(
                manifest,
                f"the {rows:,} keys from row {first:,} on are not those that were listed: {MAKE_ANEW}",
            )


def _stray_problems(manifest: Manifest, shard_size: int) -> Iterator[Problem]:
    """Results of shards that aren't listed, and shards of rows that there aren't."""
    for (shard,) in manifest.query(
        "SELECT DISTINCT row / ?1 FROM results WHERE row / ?1 NOT IN (SELECT shard FROM shards)",
        (shard_size,),
    ):
        yield _problem(manifest, "rows of this shard have results, though it isn't listed", shard)
    for (shard,) in manifest.query(
        "SELECT shard FROM shards WHERE shard < 0 OR shard * ? >= (SELECT sum(rows) FROM extensions)",
        (shard_size,),
    ):
        yield _problem(manifest, "this shard is listed, though the store has no rows in it", shard)
