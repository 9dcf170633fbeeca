"""The images of an evaluation: a folder's or tar's, or those of a store, one after the other."""

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
from ...store import EmbeddingStore, ImageRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """One image, decoded for each size when that is first asked for."""

    key: str
    data: bytes
    """The image's file; of a store that keeps images, and is read without its photos, the kept one."""
    original_size: tuple[int, int]
    """Height and width as the picture is seen."""
    row: int | None = None
    """Of the store."""
    _decoded: dict[int, DecodedImage] = field(default_factory=dict, repr=False)

    def resized(self, image_size: int) -> DecodedImage:
        """The picture with its longest side `image_size`. Raises ImageError."""
        if image_size not in self._decoded:
            self._decoded[image_size] = load_image(self.data, image_size)
        return self._decoded[image_size]

    def pixels(self) -> npt.NDArray[np.uint8]:
        """The picture as it is in its file, uint8 RGB (H, W, 3). Raises ImageError."""
        return decode_image(self.data)


class Scenes(Protocol):
    """Images in order. `root` is the folder that the keys are relative to; None where there are no files."""

    root: Path | None

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The image's name."""

    def read(self, index: int) -> Scene:
        """The image. Raises ImageError where it can't be used."""


class FolderScenes:
    """The images of a folder or a tar, listed once. Raises SamError where there are none."""

    def __init__(self, path: Path, limit: int | None) -> None:
        listed = list_images([path])
        self.root: Path | None = listed.root
        self.problems = [str(problem) for problem in listed.problems]
        self._files: Sequence[ImageRef] = listed.files[:limit]

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        return self._files[index].key

    def read(self, index: int) -> Scene:
        assert self.root is not None, "files lie in a folder"
        file = self._files[index]
        data = read_image(self.root, file.key, offset=file.offset, size=file.size)
        height, width = decode_image(data).shape[:2]
        resized_size(height, width)
        return Scene(key=file.key, data=data, original_size=(height, width))


class StoreScenes:
    """The images behind rows of a store, each as the teacher saw it: below `root`, or with None the kept ones."""

    def __init__(self, store: EmbeddingStore, records: Sequence[ImageRecord], root: Path | None) -> None:
        self.root = root
        self._store = store
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        return self._records[index].key

    def read(self, index: int) -> Scene:
        record = self._records[index]
        assert record.original_size is not None, "only committed rows are evaluated"
        assert record.bytes is not None, "only committed rows are evaluated"
        if self.root is None:
            data = self._store.read_image(record.row)
        else:
            data = read_checked(self.root, record.key, record.offset, record.bytes, record.sha256)
        scene = Scene(key=record.key, data=data, original_size=record.original_size, row=record.row)
        found = scene.resized(self._store.spec.image_size).resized_size
        if found != record.resized_size:
            raise ImageError(
                f"it is now resized to {found}, to {record.resized_size} when it was precomputed"
            )
        return scene
