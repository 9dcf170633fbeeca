"""Object masks in a COCO instances file: one JSON for many images."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .annotations import Annotations, build_annotations, parse_json
from .errors import AnnotationError
from .rle import BadAnnotation
from .sources import shown

MAX_COCO = 2 * 2**30
"""Largest file that is read, in bytes. COCO's own training set has 470 MB, and takes about 2 GB once it is read."""


class CocoInstances:
    """The instances of a COCO file, by image. Threads may share it.

    Polygons, compressed and uncompressed RLE are read; `iscrowd` annotations, which mark regions rather than objects,
    are left out. What is wrong with one image's annotations is told when that image is read.

    Raises AnnotationError where the file can't be read or isn't laid out as COCO's.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            content = parse_json(self._read())
            self._images, self._objects = _by_image(content)
        except BadAnnotation as error:
            raise AnnotationError(f"{shown(str(self.path))} is not a COCO instances file: {error}") from error
        self._names: defaultdict[str, list[int]] = defaultdict(list)
        self._base_names: defaultdict[str, list[int]] = defaultdict(list)
        self._asked: Counter[str] = Counter()
        for position, image in enumerate(self._images):
            self._names[image["file_name"]].append(position)
            self._base_names[_base(image["file_name"])].append(position)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, file_name: str, *, size: tuple[int, int] | None = None) -> Annotations | None:
        """The masks of an image: of the one with this `file_name`, else of the only one with its base name.

        None where the file lists no such image. `size` is the image's height and width. Raises AnnotationError, with
        one line that names the image, where the file lists it twice; where it lists a base name that several images
        have (see `told_of`); where it has it in another size; or where a mask or box of its isn't one.
        """
        position = self._find(file_name)
        if position is None:
            return None
        image = self._images[position]
        try:
            return build_annotations(shown(str(self.path)), image, self._objects.get(image["id"], ()), size)
        except BadAnnotation as error:
            raise AnnotationError(
                f"{shown(file_name)}: its annotations in {self.path.name}: {error}"
            ) from error

    def told_of(self, file_names: Iterable[str]) -> None:
        """Takes note of all images that may be asked for: a base name that several have means none of them."""
        self._asked = Counter(map(_base, file_names))

    def example(self) -> str | None:
        """The first image's `file_name`, None without any."""
        return self._images[0]["file_name"] if self._images else None

    def _find(self, file_name: str) -> int | None:
        found = self._names.get(file_name, [])
        if len(found) > 1:
            raise AnnotationError(f"{shown(file_name)}: {self.path.name} lists it {len(found)} times")
        if found:
            return found[0]
        base = _base(file_name)
        found = self._base_names.get(base, [])
        if len(found) == 1 and self._asked[base] > 1:
            raise AnnotationError(
                f"{shown(file_name)}: {self.path.name} lists one {shown(base)}, of which there are "
                f"{self._asked[base]} here: give file_name as paths below the images' folder"
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


def _by_image(content: Any) -> tuple[list[dict[str, Any]], dict[int, list[Any]]]:
    """The images, and each one's annotations by its id: only what is needed of either."""
    images, objects = (
        (content.get(key) for key in ("images", "annotations")) if isinstance(content, dict) else (0, 0)
    )
    if not isinstance(images, list) or not isinstance(objects, list):
        raise BadAnnotation("no images and annotations in it")
    kept: list[dict[str, Any]] = []
    for index, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            raise BadAnnotation(f"image {index} has no file_name")
        if type(image.get("id")) is not int:
            raise BadAnnotation(f"image {index} has no id")
        kept.append({key: image.get(key) for key in ("id", "file_name", "height", "width")})
    if len({image["id"] for image in kept}) != len(kept):
        raise BadAnnotation("two images have one id")
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
