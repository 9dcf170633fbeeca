"""`EmbeddingStore`: a store on disk, open for reading by anyone or for writing by one process at a time."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType

from ..common.durable import explain_os_errors, fsync_directory, make_folder, write_atomic
from ..common.errors import REPAIR_SHARDS, HeadMissing, StoreDamaged, StoreError, StoreLocked
from ..common.image_ref import ImageRef
from .audit_limits import tolerance
from .kept_images import FOLDER, partial_tar_path, read_kept, tar_bytes, tar_path
from .layout import HEAD, MANIFEST, PRIVATE, local_path, rows_of, shard_count, shard_of
from .lock import WriterLock
from .manifest import Manifest, ManifestWriter
from .reader import DirectReader, StoredBatch
from .records import Audit, RowResult, Selection
from .sam_head import read_head, write_head
from .spec import StoreSpec
from .writer import carry, forget_carried, partial_files, partial_path
from .zarr_metadata import documents_of, read_spec, write_documents

RELISTED_BY_KEY = 100_000
"""Most pending rows whose keys are held in memory; with more, each listed image is looked up in the manifest."""

_DRAFT_NAME = re.compile(r"\.[0-9a-f]{8}\.partial")


class EmbeddingStore:
    """Teacher embeddings of a set of images, one image a row; see `open` and `create`.

    A shard is either committed (its files are in place and listed in the manifest), or pending and computed again as
    a whole. Use as a context manager, or call `close`. `manifest` lists the rows: `store.manifest.counts()`,
    `.records()`, `.selections()`. `reader` reads rows, and makes the batches that `read` fills.
    """

    def __init__(
        self,
        path: Path,
        spec: StoreSpec,
        manifest: Manifest,
        lock: WriterLock | None,
        direct_io: bool | None = None,
    ) -> None:
        self.path = path
        self.spec = spec
        self.manifest = manifest
        self.reader = DirectReader(path, spec, manifest, direct=direct_io)
        self._lock = lock

    # ---- opening

    @classmethod
    def open(
        cls, path: Path | str, *, writable: bool = False, direct_io: bool | None = None
    ) -> EmbeddingStore:
        """Open the store at `path`.

        Args:
            path: folder of the store.
            writable: take the writer's lock, remove killed attempts' partial files, finish an interrupted extension.
            direct_io: read rows past the page cache (O_DIRECT) if the file system can; None to do so in stores larger
                than half of the machine's memory, which the cache could not keep.

        Raises:
            StoreNotFound: there is no store at the path.
            StoreDamaged: the manifest is missing, damaged or another store's, or zarr.json was changed.
            StoreLocked: another process writes to the store.
        """
        path = local_path(path)
        spec = read_spec(path)
        lock = manifest = None
        if writable:
            lock = WriterLock(path / PRIVATE)
            lock.acquire()
        try:
            manifest = (ManifestWriter if writable else Manifest)(path / MANIFEST)
            manifest.refuse_foreign(spec)
            store = cls(path, spec, manifest, lock, direct_io)
            if writable:
                store._tidy()
        except BaseException:
            if manifest:
                manifest.close()
            if lock:
                lock.release()
            raise
        return store

    @classmethod
    def create(
        cls,
        path: Path | str,
        spec: StoreSpec,
        images: Sequence[ImageRef],
        selection: Selection,
        head: bytes | None,
    ) -> EmbeddingStore:
        """Make a store with a pending row for every image, and open it for writing.

        It is made in a folder beside `path`, which is renamed once it is complete: no half-made store is ever seen.

        Args:
            path: folder to make; nothing is there, or an empty folder.
            spec: description of the store.
            images: one for each row, in order.
            selection: rule by which the images were chosen.
            head: SAM's prompt encoder and mask decoder, as `encode_head` makes them; None if the teacher has none.

        Raises:
            StoreError: something is at the path already, or it can't be written.
        """
        path = local_path(path)
        with draft_of(path) as draft:
            with closing(ManifestWriter.create(draft / MANIFEST, spec)) as manifest:
                manifest.append(images, selection, partial(documents_of, spec))
                write_documents(draft, manifest.documents(spec))
            if head is not None:
                write_atomic(draft / HEAD, head)
        return cls.open(path, writable=True)

    def close(self) -> None:
        """Close the files and release the lock; a writer removes the partial files of unfinished attempts."""
        self.reader.close()
        self.manifest.close()
        if self._lock:
            try:
                self._remove_partials()
            finally:
                self._lock.release()

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tidy(self) -> None:
        with explain_os_errors(self.path):
            self._remove_partials()
            forget_carried(self.path, self.manifest.committed_shards())
            write_documents(self.path, self.manifest.documents(self.spec))
            if self.spec.kept_images is not None:
                make_folder(self.path / FOLDER)

    def _remove_partials(self) -> None:
        for leftover in partial_files(self.path, self.spec.layouts):
            leftover.unlink(missing_ok=True)

    # ---- reading

    @property
    def head_path(self) -> Path:
        """SAM's prompt encoder and mask decoder as safetensors: keys `prompt_encoder.*`, `mask_decoder.*`."""
        return self.path / HEAD

    def read_head(self) -> bytes:
        """Return the content of `head_path`.

        Raises:
            StoreDamaged: it is missing or was changed.
            HeadMissing: the store's teacher has none.
        """
        return read_head(self.head_path, self._head_sha256())

    def _head_sha256(self) -> str:
        if self.spec.head_sha256 is None:
            raise HeadMissing(
                f"{self.path} has no mask head: its teacher {self.spec.teacher} gave none; give --head with a file "
                "or store that has SAM's head"
            )
        return self.spec.head_sha256

    def read(self, rows: Sequence[int], out: StoredBatch | None = None) -> StoredBatch:
        """Read the embeddings of done rows, in the order given; safe to call from several threads.

        Each row is verified: the checksum of its bytes, the one stored with it and the manifest's must agree.

        Args:
            rows: numbers of B rows; any of them may be repeated.
            out: batch to fill, as `reader.empty_batch(B)` makes it; None for a new one.

        Returns:
            The rows as stored: values (B, 256, g, g) in the store's dtype, in int8 stores with scales (B, 256).

        Raises:
            StoreDamaged: a row is not as committed; the message names its file, number and key.
            StoreError: a row isn't done, or can't be read.
            ValueError: `out` has other shapes or dtypes.
        """
        return self.reader.read(rows, out)

    def read_image(self, row: int) -> bytes:
        """Read the kept image file of a done row, verified by the manifest's checksum. Safe from several threads.

        Raises:
            StoreDamaged: the image is not the one that was committed.
            StoreError: the row isn't done, or can't be read.
            ValueError: the store keeps no images.
        """
        try:
            return self._read_image(row)
        except StoreError:
            # A writer may have committed the shard again after its record was read.
            return self._read_image(row)

    def _read_image(self, row: int) -> bytes:
        if self.spec.kept_images is None:
            raise ValueError(f"{self.path} keeps no images")
        path = tar_path(self.path, shard_of(row, self.spec.shard_size))
        record = self.manifest.records(None, range(row, row + 1))[0]
        if record.status != "done":
            raise StoreError(f"row {row} of {self.path} is not done (its image is pending or failed)")
        if record.kept is None:
            raise StoreDamaged(
                f"{path}, row {row} ({record.key!r}): the manifest lists no image; {REPAIR_SHARDS}"
            )
        with explain_os_errors(path):
            return read_kept(path, record.key, row, record.kept)

    def audits_out_of_tolerance(self) -> list[Audit]:
        """Return the audits that miss the tolerance of the store's dtype and precision, in row order."""
        limits = tolerance(self.spec.dtype, self.spec.precision)
        return [audit for audit in self.manifest.audits() if limits.missed_by(audit)]

    def shard_rows(self, shard: int) -> range:
        """Return the rows of a shard, given the store's current number of rows."""
        return rows_of(shard, self.spec.shard_size, self.manifest.row_count())

    def pending_shards(self) -> list[int]:
        """Return the shards that are not committed, ascending."""
        committed = self.manifest.committed_shards()
        return [
            shard
            for shard in range(shard_count(self.manifest.row_count(), self.spec.shard_size))
            if shard not in committed
        ]

    # ---- writing

    def commit(self, shard: int, attempt: str, results: Sequence[RowResult]) -> None:
        """Move the files of a finished attempt at a shard to their places, and list its rows.

        Args:
            shard: number of a pending shard.
            attempt: name under which `ShardWriter` wrote it.
            results: one for each of the shard's rows, in order.

        Raises:
            StoreError: the attempt's files are incomplete, or can't be moved; the shard stays pending.
        """
        manifest = self._manifest_writer()
        rows = self.shard_rows(shard)
        assert [result.row for result in results] == list(rows), (
            "results must cover the shard's rows in order"
        )
        moves = self._moves(shard, attempt, results)
        for attempted, place, expected in moves:
            with explain_os_errors(attempted):
                size = attempted.stat().st_size
            if size != expected:
                raise StoreError(f"{place} was written with {size} bytes instead of {expected}: run again")
        with explain_os_errors(self.path):
            # Embeddings last: a row exists for other Zarr readers only when all its files are there.
            for attempted, place, _ in reversed(moves):
                os.rename(attempted, place)
                fsync_directory(place.parent)
        manifest.commit_shard(shard, attempt, results)
        forget_carried(self.path, {shard})
        self.reader.forget(shard)

    def _moves(self, shard: int, attempt: str, results: Sequence[RowResult]) -> list[tuple[Path, Path, int]]:
        """Return (partial path, final path, expected bytes) of each file of an attempt."""
        moves = [
            (
                partial_path(self.path, layout, shard, attempt),
                self.path / layout.name / layout.file_name(shard),
                layout.file_bytes(len(results)),
            )
            for layout in self.spec.layouts
        ]
        if self.spec.kept_images is not None:
            kept = [result.kept for result in results if result.kept is not None]
            attempted = partial_tar_path(self.path, shard, attempt)
            moves.append((attempted, tar_path(self.path, shard), tar_bytes(kept)))
        return moves

    def withdraw(self, shards: Iterable[int]) -> None:
        """Remove shards from the list so that they are recomputed; their rows become pending.

        Their done rows are carried over if their images are gone when the shards are recomputed.
        """
        manifest = self._manifest_writer()
        for shard in shards:
            with explain_os_errors(self.path):
                carry(self.path, shard, manifest.whole_records("done", self.shard_rows(shard)))
            manifest.withdraw_shard(shard, self.shard_rows(shard))
            self.reader.forget(shard)

    def record_audits(self, audits: Sequence[Audit]) -> None:
        """Record audits of done rows; StoreError for a row that is not done.

        An audit replaces an earlier one of its row, and is deleted when its shard is withdrawn.
        """
        self._manifest_writer().record_audits(audits)

    def restore_head(self, data: bytes) -> None:
        """Write the file of SAM's head again; StoreMismatch unless it is the one that the store was made with."""
        self._manifest_writer()
        write_head(self.head_path, data, self._head_sha256())

    def extend(self, images: Sequence[ImageRef], selection: Selection) -> range:
        """Append rows for more images. A last shard that is not full is withdrawn first, since it grows.

        Args:
            images: images that the store lacks, one for each new row, in order.
            selection: rule by which they were chosen.

        Returns:
            The new rows.

        Raises:
            StoreError: a key is listed already, or the store can't be written.
        """
        manifest = self._manifest_writer()
        first = manifest.row_count()
        short = first % self.spec.shard_size
        if short and images:
            self.withdraw([first // self.spec.shard_size])
        rows = manifest.append(images, selection, partial(documents_of, self.spec))
        with explain_os_errors(self.path):
            write_documents(self.path, manifest.documents(self.spec))
        return rows

    def relist(self, images: Iterable[ImageRef]) -> None:
        """Update size and offset of pending images from a new listing.

        Files may have been replaced, and tars rewritten, since the rows were appended. Committed rows and unknown
        keys are left alone.
        """
        manifest = self._manifest_writer()
        pending = [self.shard_rows(shard) for shard in self.pending_shards()]
        if sum(map(len, pending)) <= RELISTED_BY_KEY:
            keys = {key for rows in pending for key in manifest.keys(rows)}
            images = (image for image in images if os.fsencode(image.key) in keys)
        if pending:
            manifest.relist(images)

    def _manifest_writer(self) -> ManifestWriter:
        assert isinstance(self.manifest, ManifestWriter), "the store is open for reading only"
        return self.manifest


# ---- creating: in a draft folder beside the store's path, renamed to it once it is complete


def refuse_taken(path: Path) -> None:
    """Raise StoreError unless nothing is at `path`, or an empty folder (or a link to one)."""
    if not path.name or path.name == "..":
        raise StoreError(
            f"{path} can't become a store: name a folder of its own, as in {path / 'store.zarr'}"
        )
    with explain_os_errors(path):
        if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
            return
    if (path / MANIFEST).exists():
        raise StoreError(f"{path} holds a store already: resume it, or give another --out")
    if path.is_symlink() and not path.exists():
        raise StoreError(
            f"{path} is a link to {path.readlink()}, which does not exist: make that folder first"
        )
    raise StoreError(f"{path} exists and is no mobilesam store: give another --out, or remove it")


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Make a locked folder for a new store; it is moved to `path` when the context ends normally, else removed.

    Drafts that killed processes left are removed first.

    Raises:
        StoreError: something is at the path, before the context or at its end, or the folder can't be written.
    """
    refuse_taken(path)
    # A link stays a link: the store is made on the disk that it points to.
    place = Path(os.path.realpath(path))
    with explain_os_errors(path):
        make_folder(place.parent)
        _remove_abandoned(place)
        draft = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}.partial")
        (draft / PRIVATE).mkdir(parents=True)
    lock = WriterLock(draft / PRIVATE)
    try:
        lock.acquire()
        with explain_os_errors(path):
            yield draft
            lock.forget_owner()
            _move_into_place(draft, place, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        lock.release()


def _remove_abandoned(place: Path) -> None:
    """Remove drafts that killed processes left beside the store's path. Files with other names are not ours."""
    for draft in place.parent.iterdir():
        if not draft.name.startswith(place.name) or not _DRAFT_NAME.fullmatch(draft.name[len(place.name) :]):
            continue
        if not (draft / PRIVATE).is_dir():
            _remove_empty(draft)
            continue
        lock = WriterLock(draft / PRIVATE)
        try:
            lock.acquire()
        except StoreLocked:
            continue
        except StoreError:
            pass
        shutil.rmtree(draft, ignore_errors=True)
        lock.release()


def _remove_empty(draft: Path) -> None:
    """Remove a draft whose process was killed before it had made all its folders, unless it holds anything."""
    with suppress(OSError):
        for folder in (draft / PRIVATE).parents:
            if folder == draft.parent:
                break
            if folder.exists():
                folder.rmdir()


def _move_into_place(draft: Path, place: Path, path: Path) -> None:
    try:
        os.rename(draft, place)
    except OSError:
        refuse_taken(path)  # something may have been made there meanwhile
        raise
    fsync_directory(place.parent)
