"""Annotations: object masks of an image, from SA-1B's JSON files beside the images or from a COCO instances file.

Shape suffixes: P objects of one image, 4 (x0, y0, x1, y1).
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import AnnotationError as AnnotationError
from ..common.errors import BadAnnotation, shown
from .image_decode import MAX_PIXELS
from .image_files import TarMember, scan_tar, split_tar_key
from .rle import checked_runs, write_runs

SUFFIX = ".json"
"""Suffix of SA-1B's annotation files."""

MAX_JSON = 16 * 2**20
"""Largest SA-1B file that is read, in bytes; those of SA-1B have some hundred KB. Parsed JSON takes up to thirty
times the file's length in memory."""

MAX_COCO = 2 * 2**30
"""Largest COCO file that is read, in bytes. COCO's training set has 470 MB, which take 2 GB of memory."""

MOST_OBJECTS = 10_000
"""Most objects of one image; SA-1B has 100 on average."""

BOX_MARGIN = 1.0
"""Pixels that a box may reach beyond its image: some writers count edges, others pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Annotations:
    """Object masks of one image, each kept compressed until it is decoded.

    Objects without a pixel are left out. Every mask was checked when it was read, so `mask` can't fail.
    """

    source: str
    """File that they come from, for messages."""
    size: tuple[int, int]
    """(height, width) of the image and of each mask, in pixels."""
    counts: tuple[str, ...]
    """COCO's compressed RLE of each object's mask."""
    boxes_P4: npt.NDArray[np.float64]
    """float64 (P, 4): x0, y0, x1, y1 in pixels, from the file."""
    areas_P: npt.NDArray[np.int64]
    """int64 (P,): pixels of each mask, counted in the mask."""

    def __len__(self) -> int:
        return len(self.counts)

    def rle(self, index: int) -> dict[str, Any]:
        """Return one mask in pycocotools' form: `size` [height, width] and compressed `counts`."""
        return {"size": list(self.size), "counts": self.counts[index]}

    def mask(self, index: int) -> npt.NDArray[np.bool_]:
        """Decode one mask to bool (H, W)."""
        from pycocotools import mask as coco

        return coco.decode(self.rle(index)).view(np.bool_)


class AnnotationFiles:
    """SA-1B's JSON files below one root, each beside its image with the same stem, in a folder or in the same tar.

    Threads may share it. A tar's headers are read once, when its first member is needed; an unpickled copy reads
    them again.

    Args:
        root: image root that keys are relative to.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._lock = threading.Lock()
        self._tars: dict[str, _TarIndex] = {}

    def __reduce__(self) -> tuple[type[AnnotationFiles], tuple[Path]]:
        return AnnotationFiles, (self.root,)

    def has_file(self, key: str) -> bool:
        """Return True if there is an annotation file beside the image `key`, readable or not."""
        found = split_tar_key(self.root, key)
        if found is None:
            return os.path.lexists(self.root / _annotation_name(key))
        try:
            return self._index(found[0]).member(_annotation_name(found[1])) is not None
        except (BadAnnotation, OSError):
            return True

    def read(self, key: str, *, size: tuple[int, int] | None = None) -> Annotations | None:
        """Read the masks of an image.

        Args:
            key: key of the image, as `list_images` returns it.
            size: (height, width) of the image in pixels, if the caller knows it.

        Returns:
            Its annotations; None if there is no file beside it, or JSON of another kind with neither `image` nor
            `annotations`, as other programs write beside images.

        Raises:
            AnnotationError: the file is unreadable, too large, not in SA-1B's layout, or of an image of another size,
                or it has a mask that doesn't decode to that size or a box outside it. The message is one line, and
                names the image.
        """
        try:
            data = self._data(key)
            if data is None:
                return None
            content = _parse_json(data)
            if isinstance(content, dict) and not content.keys() & {"image", "annotations"}:
                return None
            return _checked(content, shown(_annotation_name(key)), size)
        except BadAnnotation as error:
            raise AnnotationError(f"{shown(key)}: its annotations can't be used: {error}") from error

    def _data(self, key: str) -> bytes | None:
        found = split_tar_key(self.root, key)
        try:
            if found is None:
                with open(self.root / _annotation_name(key), "rb") as file:
                    return _read(file.fileno(), os.fstat(file.fileno()).st_size, 0)
            member = self._index(found[0]).member(_annotation_name(found[1]))
            if member is None:
                return None
            with open(found[0], "rb") as file:
                return _read(file.fileno(), member.size, member.offset)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadAnnotation(f"they can't be read: {error.strerror or error}") from error

    def _index(self, tar: str) -> _TarIndex:
        with self._lock:
            if tar not in self._tars:
                self._tars[tar] = _TarIndex(tar)
            return self._tars[tar]


class CocoInstances:
    """Objects of a COCO instances file, by image. Threads may share it.

    Polygons, compressed and uncompressed RLE are read; `iscrowd` annotations, which mark regions rather than
    objects, are left out. A defect of one image's annotations is reported when that image is read.

    Args:
        path: path of the JSON file.

    Raises:
        AnnotationError: the file can't be read or does not have COCO's layout.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            content = _parse_json(self._read())
            self._images, self._objects = _by_image(content)
        except BadAnnotation as error:
            raise AnnotationError(f"{shown(str(self.path))} is not a COCO instances file: {error}") from error
        self._names: defaultdict[str, list[int]] = defaultdict(list)
        self._base_names: defaultdict[str, list[int]] = defaultdict(list)
        self._expected: Counter[str] = Counter()
        for position, image in enumerate(self._images):
            self._names[image["file_name"]].append(position)
            self._base_names[_base(image["file_name"])].append(position)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, file_name: str, *, size: tuple[int, int] | None = None) -> Annotations | None:
        """Read the masks of an image.

        Args:
            file_name: name of the image; if the file doesn't list it, the only image with its base name is taken.
            size: (height, width) of the image in pixels, if the caller knows it.

        Returns:
            Its annotations; None if the file lists no such image.

        Raises:
            AnnotationError: the file lists the image twice, lists only a base name that several images have (see
                `expect_names`), or states another size; or a mask or box is damaged. The message is one line, and
                names the image.
        """
        position = self._find(file_name)
        if position is None:
            return None
        image = self._images[position]
        try:
            return _build_annotations(shown(str(self.path)), image, self._objects.get(image["id"], ()), size)
        except BadAnnotation as error:
            raise AnnotationError(
                f"{shown(file_name)}: its annotations in {self.path.name}: {error}"
            ) from error

    def expect_names(self, file_names: Iterable[str]) -> None:
        """Set the names of all images that will be read; a base name shared by several of them then matches none."""
        self._expected = Counter(map(_base, file_names))

    def example(self) -> str | None:
        """Return the first image's `file_name`; None if the file lists no images."""
        return self._images[0]["file_name"] if self._images else None

    def _find(self, file_name: str) -> int | None:
        found = self._names.get(file_name, [])
        if len(found) > 1:
            raise AnnotationError(f"{shown(file_name)}: {self.path.name} lists it {len(found)} times")
        if found:
            return found[0]
        base = _base(file_name)
        found = self._base_names.get(base, [])
        if len(found) == 1 and self._expected[base] > 1:
            raise AnnotationError(
                f"{shown(file_name)}: {self.path.name} lists one {shown(base)}, and "
                f"{self._expected[base]} images here have that name: give file_name relative to the image folder"
            )
        return found[0] if len(found) == 1 else None

    def _read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_COCO:
                    raise BadAnnotation(f"it has {size:,} bytes, at most {MAX_COCO:,} are read")
                return file.read()
        except OSError as error:
            raise AnnotationError(
                f"{shown(str(self.path))} can't be read: {error.strerror or error}"
            ) from error


class _TarIndex:
    """Index of a tar's JSON members; OSError if the tar can't be read."""

    def __init__(self, tar: str) -> None:
        contents = scan_tar(tar)
        self._members = {name: member for name, member in contents.members.items() if name.endswith(SUFFIX)}
        self._unusable = frozenset(contents.unusable)
        self._problem = contents.problem

    def member(self, name: str) -> TarMember | None:
        """Return a member's place; None if the tar has none of that name. BadAnnotation if it is lost by damage."""
        if name in self._unusable:
            raise BadAnnotation("a link or sparse file in a tar can't be read in place")
        member = self._members.get(name)
        if member is None and self._problem is not None:
            raise BadAnnotation(f"its tar is {self._problem}")
        return member


def _annotation_name(key: str) -> str:
    """Return the name of an image's annotation file: the image's name with the suffix .json."""
    return key.rpartition(".")[0] + SUFFIX


def _read(descriptor: int, size: int, offset: int) -> bytes:
    if size > MAX_JSON:
        raise BadAnnotation(f"they have {size:,} bytes, at most {MAX_JSON:,} are read")
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise BadAnnotation(f"only {len(data):,} of their {size:,} bytes could be read")
    return data


def _checked(content: Any, source: str, size: tuple[int, int] | None) -> Annotations:
    if not isinstance(content, dict):
        raise BadAnnotation("not a JSON object")
    image, objects = content.get("image"), content.get("annotations")
    if not isinstance(image, dict) or not isinstance(objects, list):
        raise BadAnnotation("it has no image and annotations, as SA-1B's files do")
    return _build_annotations(source, image, objects, size)


def _parse_json(data: bytes) -> Any:
    """Parse JSON; BadAnnotation if the bytes are not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadAnnotation(f"not JSON ({str(error)[:80]})") from error


def _build_annotations(
    source: str, image: Mapping[str, Any], objects: Sequence[Any], size: tuple[int, int] | None
) -> Annotations:
    """Check one image's objects, and compress their masks.

    Args:
        source: file that they come from, for messages.
        image: COCO's or SA-1B's `image`.
        objects: COCO's or SA-1B's annotations of that image.
        size: (height, width) of the image in pixels, if the caller knows it.

    Raises:
        BadAnnotation: the image, a mask or a box is invalid.
    """
    own = _own_size(image)
    if size is not None and own != tuple(size):
        raise BadAnnotation(
            f"they are for an image of {own[1]} x {own[0]}, this one is {size[1]} x {size[0]}"
        )
    if len(objects) > MOST_OBJECTS:
        raise BadAnnotation(f"{len(objects):,} objects, at most {MOST_OBJECTS:,} are read")
    counts, boxes, areas = [], [], []
    for index, one in enumerate(objects):
        try:
            if not isinstance(one, dict) or not {"segmentation", "bbox"} <= one.keys():
                raise BadAnnotation("it has no segmentation or no bbox")
            runs = checked_runs(one["segmentation"], own)
            box = _corners(one["bbox"], own)
        except BadAnnotation as error:
            raise BadAnnotation(f"annotation {index}: {error}") from error
        if area := int(runs[1::2].sum()):
            counts.append(write_runs(runs))
            boxes.append(box)
            areas.append(area)
    return Annotations(
        source=source,
        size=own,
        counts=tuple(counts),
        boxes_P4=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        areas_P=np.array(areas, dtype=np.int64),
    )


def _own_size(image: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width that a file states for its image."""
    height, width = image.get("height"), image.get("width")
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise BadAnnotation("its image has no height and width in pixels")
    if height > MAX_PIXELS or width > MAX_PIXELS or height * width > MAX_PIXELS:
        raise BadAnnotation(
            f"its image is {str(width)[:20]} x {str(height)[:20]}, the limit is {MAX_PIXELS:,} pixels"
        )
    return height, width


def _corners(bbox: object, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Convert COCO's x, y, width, height to x0, y0, x1, y1."""
    if not isinstance(bbox, list) or len(bbox) != 4 or any(type(v) not in (int, float) for v in bbox):
        raise BadAnnotation("a bbox is not four numbers")
    # Checked before the conversion to float, since JSON's integers have any length. NaN fails the comparison.
    if not all(-BOX_MARGIN <= value <= max(size) + BOX_MARGIN for value in bbox):
        raise BadAnnotation(f"bbox {str(bbox)[:80]} is not in the image")
    x, y, width, height = map(float, bbox)
    if min(width, height) < 0 or x + width > size[1] + BOX_MARGIN or y + height > size[0] + BOX_MARGIN:
        raise BadAnnotation(f"bbox {str(bbox)[:80]} is not in the image")
    return x, y, x + width, y + height


def _by_image(content: Any) -> tuple[list[dict[str, Any]], dict[int, list[Any]]]:
    """Return the images and their annotations by image id, reduced to the fields that are needed."""
    images, objects = (
        (content.get(key) for key in ("images", "annotations")) if isinstance(content, dict) else (0, 0)
    )
    if not isinstance(images, list) or not isinstance(objects, list):
        raise BadAnnotation("it has no images or no annotations")
    kept: list[dict[str, Any]] = []
    for index, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            raise BadAnnotation(f"image {index} has no file_name")
        if type(image.get("id")) is not int:
            raise BadAnnotation(f"image {index} has no id")
        kept.append({key: image.get(key) for key in ("id", "file_name", "height", "width")})
    if len({image["id"] for image in kept}) != len(kept):
        raise BadAnnotation("two images have the same id")
    by_image: defaultdict[int, list[Any]] = defaultdict(list)
    for index, one in enumerate(objects):
        if not isinstance(one, dict) or type(one.get("image_id")) is not int:
            raise BadAnnotation(f"annotation {index} has no image_id")
        if one.get("iscrowd", 0) in (0, False, None):
            by_image[one["image_id"]].append(
                {key: one[key] for key in ("segmentation", "bbox") if key in one}
            )
    return kept, dict(by_image)


def _base(file_name: str) -> str:
    return file_name.rpartition("/")[2]
