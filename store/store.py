"""The store as one object: opened to read by anyone, to write by one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType

from ..common.durable import explain_os_errors, fsync_directory, make_folder, write_atomic
from ..common.errors import REPAIR_SHARDS, StoreDamaged, StoreError
from ..common.image_ref import ImageRef
from .audit import tolerance
from .check import partial_files
from .create import draft_of
from .images import FOLDER, partial_tar_path, read_kept, tar_bytes, tar_path
from .layout import HEAD, MANIFEST, PRIVATE, local_path, rows_of, shard_count, shard_of
from .lock import WriterLock
from .manifest import Manifest
from .reader import DirectReader, StoredBatch
from .records import Audit, RowResult, Selection
from .sam_head import read_head, write_head
from .spec import StoreSpec
from .writer import partial_path
from .zarr_metadata import documents_of, read_spec, write_documents

RELISTED_BY_KEY = 100_000
"""Pending rows up to which their keys are kept in memory, rather than looked up for every image of a listing."""


class EmbeddingStore:
    """Teacher embeddings of a set of images, one image a row; see `open` and `create`.

    A shard is either committed, verified and listed, or it is recomputed. Use as a context manager, or `close`.
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
        self._lock = lock
        self.reader = DirectReader(path, spec, manifest, direct=direct_io)

    # ---- opening

    @classmethod
    def open(
        cls, path: Path | str, *, writable: bool = False, direct_io: bool | None = None
    ) -> EmbeddingStore:
        """Open the store at `path`; with `writable`, as its only writer.

        `direct_io`: read rows past the system's cache (O_DIRECT), where the file system can; by default in stores
        of more than half of the machine's memory, which the cache would not keep.

        Raises StoreNotFound, StoreDamaged (the manifest is missing, damaged or another store's), StoreLocked.
        """
        path = local_path(path)
        spec = read_spec(path)
        lock = manifest = None
        if writable:
            lock = WriterLock(path / PRIVATE)
            lock.acquire()
        try:
            manifest = Manifest(path / MANIFEST, writable=writable)
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
        head: bytes,
    ) -> EmbeddingStore:
        """Make a store with a pending row for every image, and open it as its only writer.

        It is made beside its place and renamed into it whole, so that no half-made store is ever seen. `head` is
        SAM's prompt encoder and mask decoder (see `encode_head`). StoreError when the place is taken.
        """
        path = local_path(path)
        with draft_of(path) as draft:
            with closing(Manifest.create(draft / MANIFEST, spec)) as manifest:
                manifest.append(images, selection, partial(documents_of, spec))
                write_documents(draft, manifest.documents())
            write_atomic(draft / HEAD, head)
        return cls.open(path, writable=True)

    def close(self) -> None:
        """Let go of the manifest and, for a writer, of the lock; attempts that came to nothing are removed."""
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

    # ---- reading

    @property
    def head_path(self) -> Path:
        """SAM's prompt encoder and mask decoder as safetensors: keys `prompt_encoder.*`, `mask_decoder.*`."""
        return self.path / HEAD

    def read_head(self) -> bytes:
        """The content of `head_path`; StoreDamaged when it isn't what was stored."""
        return read_head(self.head_path, self.spec.head_sha256)

    def read(self, rows: Sequence[int], out: StoredBatch | None = None) -> StoredBatch:
        """Embeddings of done rows, in the order given, each verified by its bytes' checksum, the one stored with
        it, and the manifest's; into `out`, where that is given (`empty_batch` makes one to be used again).

        Raises StoreDamaged or StoreError; ValueError when `out` has other shapes or dtypes. Safe to call from several
        threads."""
        return self.reader.read(rows, out)

    def read_image(self, row: int) -> bytes:
        """The image file that is kept of a done row, its bytes verified against the manifest.

        Raises StoreDamaged or StoreError; ValueError in a store that keeps no images. Safe to call from several
        threads."""
        try:
            return self._read_image(row)
        except StoreError:
            # A writer may have committed the shard anew between the listing and the file.
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
        """Those that miss the tolerance of the store's dtype and precision."""
        limits = tolerance(self.spec.dtype, self.spec.precision)
        return [audit for audit in self.manifest.audits() if limits.missed_by(audit)]

    # ---- writing

    def shard_rows(self, shard: int) -> range:
        """The rows that a shard holds, given how many the store has now."""
        return rows_of(shard, self.spec.shard_size, self.manifest.row_count())

    def pending_shards(self) -> list[int]:
        """Shards to compute, ascending: those that aren't committed."""
        committed = self.manifest.committed_shards()
        return [
            shard
            for shard in range(shard_count(self.manifest.row_count(), self.spec.shard_size))
            if shard not in committed
        ]

    def commit(self, shard: int, attempt: str, results: Sequence[RowResult]) -> None:
        """Put a finished attempt at a shard in its place and list its rows: `results` has one for each, in order.

        StoreError when the partial files aren't whole; the shard then stays pending.
        """
        self._assert_writer()
        rows = self.shard_rows(shard)
        assert [result.row for result in results] == list(rows), (
            "results must cover the shard's rows in order"
        )
        moves = self._moves(shard, attempt, results)
        for attempted, _, expected in moves:
            with explain_os_errors(attempted):
                size = attempted.stat().st_size
            if size != expected:
                raise StoreError(f"{attempted} has {size} bytes instead of {expected}: run again")
        with explain_os_errors(self.path):
            # Embeddings last: a row exists for other Zarr readers only when all its files are there.
            for attempted, place, _ in reversed(moves):
                os.rename(attempted, place)
                fsync_directory(place.parent)
        self.manifest.commit_shard(shard, attempt, results)
        self.reader.forget(shard)

    def _moves(self, shard: int, attempt: str, results: Sequence[RowResult]) -> list[tuple[Path, Path, int]]:
        """The files of an attempt: where each is, where it belongs, and the length that it has when it is whole."""
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
        """Unlist shards before they are computed anew; their rows are pending from then on."""
        self._assert_writer()
        for shard in shards:
            self.manifest.withdraw_shard(shard, self.shard_rows(shard))
            self.reader.forget(shard)

    def record_audits(self, audits: Sequence[Audit]) -> None:
        """Keep audits of done rows. One replaces an earlier one of its row, and goes when its shard is withdrawn."""
        self._assert_writer()
        self.manifest.record_audits(audits)

    def restore_head(self, data: bytes) -> None:
        """Write the head anew; StoreMismatch unless it is the one that the store was made with."""
        self._assert_writer()
        write_head(self.head_path, data, self.spec.head_sha256)

    def extend(self, images: Sequence[ImageRef], selection: Selection) -> range:
        """Append rows for more images; their range. A short last shard is withdrawn, since it grows."""
        self._assert_writer()
        first = self.manifest.row_count()
        short = first % self.spec.shard_size
        if short and images:
            self.withdraw([first // self.spec.shard_size])
        rows = self.manifest.append(images, selection, partial(documents_of, self.spec))
        with explain_os_errors(self.path):
            write_documents(self.path, self.manifest.documents())
        return rows

    def relist(self, images: Iterable[ImageRef]) -> None:
        """Take over size and offset of pending images from a new listing: files may have been replaced, and tars
        written anew, since the rows were given out. Committed rows and unknown keys are left alone."""
        self._assert_writer()
        pending = [self.shard_rows(shard) for shard in self.pending_shards()]
        if sum(map(len, pending)) <= RELISTED_BY_KEY:
            keys = {key for rows in pending for key in self.manifest.keys(rows)}
            images = (image for image in images if os.fsencode(image.key) in keys)
        if pending:
            self.manifest.relist(images)

    def _assert_writer(self) -> None:
        assert self._lock is not None, "the store is open for reading only"

    def _tidy(self) -> None:
        """Remove what killed attempts left, and finish an extension that was cut short."""
        with explain_os_errors(self.path):
            self._remove_partials()
            write_documents(self.path, self.manifest.documents())
            if self.spec.kept_images is not None:
                make_folder(self.path / FOLDER)

    def _remove_partials(self) -> None:
        for leftover in partial_files(self.path, self.spec.layouts):
            leftover.unlink(missing_ok=True)
