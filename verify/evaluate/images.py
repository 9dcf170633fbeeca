"""Images of an evaluation, read one by one from a folder, a tar or a store.

Shape suffixes: H and W rows and columns of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...sam import (
    DecodedImage,
    ImageError,
    ImageRef,
    decode_image,
    list_images,
    load_image,
    read_checked,
    read_image,
    resized_size,
)
from ...sam.photos.file_kinds import passed_over_line
from ...store import EmbeddingStore, ImageRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class LazyImage:
    """One image, decoded at each size on first use."""

    key: str
    """The image's name: its path in the folder, or its key in the store."""
    data: bytes
    """Content of the image's file, or of the resized image that the store keeps."""
    original_size: tuple[int, int]
    """Height and width of the photo in pixels, after its EXIF orientation is applied."""
    row: int | None = None
    """Row of the store; None for a file."""
    _decoded: dict[int, DecodedImage] = field(default_factory=dict, repr=False)

    def resized(self, image_size: int) -> DecodedImage:
        """Return the image with its longest side resized to `image_size` pixels. Raises ImageError."""
        if image_size not in self._decoded:
            self._decoded[image_size] = load_image(self.data, image_size)
        return self._decoded[image_size]

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return the image at the size of its file, uint8 RGB (H, W, 3). Raises ImageError."""
        return decode_image(self.data)


class Images(Protocol):
    """Images in a fixed order."""

    root: Path | None
    """Folder that the keys are relative to; None if the images are kept in a store."""

    @property
    def all_keys(self) -> Sequence[str]:
        """Keys of all images of the folder or store, those that are not evaluated included."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Return the image's name."""

    def read(self, index: int) -> LazyImage:
        """Read the image. Raises ImageError if it can't be used."""


class FolderImages:
    """Images of a folder or a tar, listed once.

    Args:
        path: the folder or the tar.
        limit: largest number of images; None for all.

    Raises:
        SamError: there are no images.
    """

    def __init__(self, path: Path, limit: int | None) -> None:
        listed = list_images([path])
        self.root: Path | None = listed.root
        self.problems = [str(problem) for problem in listed.problems]
        # JSON beside the images may be their labels.
        passed_over = {kind: count for kind, count in listed.passed_over.items() if kind != "JSON"}
        if passed_over:
            self.problems.append(passed_over_line(passed_over).removeprefix("passed over: "))
        self.all_keys: Sequence[str] = [file.key for file in listed.files]
        self._files: Sequence[ImageRef] = listed.files[:limit]

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        return self._files[index].key

    def read(self, index: int) -> LazyImage:
        assert self.root is not None, "files lie in a folder"
        file = self._files[index]
        data = read_image(self.root, file.key, offset=file.offset, size=file.size)
        height, width = decode_image(data).shape[:2]
        resized_size(height, width)
        return LazyImage(key=file.key, data=data, original_size=(height, width))


class StoreImages:
    """Images of a store's rows, each checked to be the one that the teacher embedded.

    Args:
        store: store open for reading.
        records: committed rows of the store, in order.
        root: folder of the photos; None: the images that the store keeps.
    """

    def __init__(self, store: EmbeddingStore, records: Sequence[ImageRecord], root: Path | None) -> None:
        self.root = root
        self.all_keys: Sequence[str] = [record.key for record in store.manifest.records()]
        self._store = store
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        return self._records[index].key

    def read(self, index: int) -> LazyImage:
        record = self._records[index]
        assert record.original_size is not None, "only committed rows are evaluated"
        assert record.bytes is not None, "only committed rows are evaluated"
        if self.root is None:
            data = self._store.read_image(record.row)
        else:
            data = read_checked(self.root, record.key, record.offset, record.bytes, record.sha256)
        image = LazyImage(key=record.key, data=data, original_size=record.original_size, row=record.row)
        found = image.resized(self._store.spec.image_size).resized_size
        if found != record.resized_size:
            raise ImageError(
                f"it is now resized to {found}, to {record.resized_size} when it was precomputed"
            )
        return image
