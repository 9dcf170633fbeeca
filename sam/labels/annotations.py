"""Annotations: checked object masks of one image, and SA-1B's JSON files beside the images that hold them.

An object that can't be used costs itself and is counted by reason. Other sources: `coco.py`, `label_masks.py`.

Shape suffixes: P objects of one image, 4 (x0, y0, x1, y1).
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...common.errors import AnnotationError as AnnotationError
from ...common.errors import BadAnnotation, counted, shown
from ..photos.image_decode import MAX_PIXELS
from ..photos.tar_files import TarMember, path_of, scan_tar, split_tar_key
from .rle import Runs, checked_runs, number, runs_box, whole_number, write_runs

SUFFIX = ".json"
"""Suffix of SA-1B's annotation files."""

MAX_JSON = 16 * 2**20
"""Largest SA-1B file that is read, in bytes; those of SA-1B have some hundred KB. Parsed JSON takes up to thirty
times the file's length in memory."""

MOST_OBJECTS = 10_000
"""Most objects of one image; SA-1B has 100 on average."""

OVERHANG = 0.05
"""Part of the image's side that any box may reach beyond it; one that reaches farther must agree with its mask."""

AGREEMENT = 0.1
"""Part of the side of the mask's box by which the sides of a box that agrees with it may differ; 2 pixels always."""

CROWD = "crowd"
BAD_CROWD = "iscrowd is neither 0 nor 1"
NO_PIXEL = "mask without a pixel"
BOX_OUTSIDE = "bbox not in the image"
BOX_NUMBERS = "bbox is not four numbers"
BOX_CORNERS = "bbox holds two corners"

_NO_CROWD, _IS_CROWD = (0, None, "", "0", "false"), (1, "1", "true")
UPRIGHT = range(1, 5)
"""EXIF orientations that keep width and height."""

Turn = Callable[[], int]
"""Function that returns the EXIF orientation of an image's file; called where its size is not the labels' one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Annotations:
    """Object masks of one image, each kept compressed until it is decoded.

    Every mask was checked when it was read, so `mask` can't fail.
    """

    source: str
    """File that they come from, for messages."""
    size: tuple[int, int]
    """(height, width) of the image and of each mask, in pixels."""
    counts: tuple[str, ...]
    """COCO's compressed RLE of each object's mask."""
    boxes_P4: npt.NDArray[np.float64]
    """float64 (P, 4): x0, y0, x1, y1 in pixels, from the file; clipped to the image, and the mask's own box where the
    file has none."""
    areas_P: npt.NDArray[np.int64]
    """int64 (P,): pixels of each mask, counted in the mask."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Objects that can't be used: the kind of the fault, and a text that names the object and the fact."""

    def __len__(self) -> int:
        return len(self.counts)

    def rle(self, index: int) -> dict[str, Any]:
        """Return one mask in pycocotools' form: `size` [height, width] and compressed `counts`."""
        return {"size": list(self.size), "counts": self.counts[index]}

    def mask(self, index: int) -> npt.NDArray[np.bool_]:
        """Decode one mask to bool (H, W)."""
        from pycocotools import mask as coco

        return coco.decode(self.rle(index)).view(np.bool_)


class LabelSource(Protocol):
    """Source of labelled objects by image. Threads may share it."""

    def has_labels(self, key: str) -> bool:
        """Return True if there are labels of the image `key`, readable or not."""

    def read(
        self, key: str, *, size: tuple[int, int] | None = None, turn: Turn | None = None
    ) -> Annotations | None:
        """Read the objects of an image, as `AnnotationFiles.read` does."""


@dataclass(kw_only=True)
class LabelCounts:
    """Number of objects that were read, and of those left out by reason."""

    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """First object that was left out for each reason: image, object, fact."""

    @property
    def total(self) -> int:
        """Number of objects, used or not."""
        return self.used + self.left_out.total()

    def add(self, key: str, used: int, left_out: Sequence[tuple[str, str]]) -> None:
        """Count the objects of one image.

        Args:
            key: key of the image.
            used: number of objects that can be used.
            left_out: as in `Annotations`.
        """
        self.used += used
        for reason, fact in left_out:
            self.left_out[reason] += 1
            self.examples.setdefault(reason, f"{shown(key)}: {fact}")

    def by_reason(self) -> dict[str, int]:
        """Return the numbers of objects left out, the greatest first."""
        return dict(self.left_out.most_common())

    def lines(self) -> list[str]:
        """Return a line on the objects left out, and an example of each reason but crowds; empty if all are used."""
        if not self.left_out:
            return []
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in self.left_out.most_common())
        lines = [
            f"{self.left_out.total():,} of {counted(self.total, 'labelled object')} left out ({reasons})"
        ]
        return lines + [f"left out: {text}" for reason, text in self.examples.items() if reason != CROWD]


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

    def has_labels(self, key: str) -> bool:
        """Return True if there is an annotation file beside the image `key`, readable or not."""
        found = split_tar_key(self.root, key)
        if found is None:
            return os.path.lexists(path_of(self.root, _annotation_name(key)))
        try:
            return self._index(found[0]).member(_annotation_name(found[1])) is not None
        except (BadAnnotation, OSError):
            return True

    def read(
        self, key: str, *, size: tuple[int, int] | None = None, turn: Turn | None = None
    ) -> Annotations | None:
        """Read the masks of an image.

        Args:
            key: key of the image, as `list_images` returns it.
            size: (height, width) of the upright image in pixels, if the caller knows it.
            turn: function that returns the EXIF orientation of the image's file, if the caller has it.

        Returns:
            Its annotations, without the objects that can't be used; None if there is no file beside it, or JSON of
            another kind with neither `image` nor `annotations`, as other programs write beside images.

        Raises:
            AnnotationError: the file is unreadable, too large, not in SA-1B's layout, or of an image of another size.
                The message is one line, and names the image.
        """
        try:
            data = self._data(key)
            if data is None:
                return None
            content = parse_json(data)
            if isinstance(content, dict) and not content.keys() & {"image", "annotations"}:
                return None
            image, objects = _image_and_objects(content)
            return build_annotations(shown(_annotation_name(key)), image, objects, size, turn)
        except BadAnnotation as error:
            raise AnnotationError(f"{shown(key)}: its annotations can't be used: {error}") from error

    def _data(self, key: str) -> bytes | None:
        found = split_tar_key(self.root, key)
        try:
            if found is None:
                with open(path_of(self.root, _annotation_name(key)), "rb") as file:
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
    return os.path.splitext(key)[0] + SUFFIX


def _read(descriptor: int, size: int, offset: int) -> bytes:
    if size > MAX_JSON:
        raise BadAnnotation(f"they have {size:,} bytes, at most {MAX_JSON:,} are read")
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise BadAnnotation(f"only {len(data):,} of their {size:,} bytes could be read")
    return data


def _image_and_objects(content: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return `image` and `annotations` of a file beside an image: SA-1B's layout, or COCO's with that image alone."""
    if not isinstance(content, dict):
        raise BadAnnotation("not a JSON object")
    image, objects, images = (content.get(key) for key in ("image", "annotations", "images"))
    if image is None and isinstance(images, list) and len(images) == 1:
        image = images[0]
    if not isinstance(image, dict) or not isinstance(objects, list):
        raise BadAnnotation("it has no image and annotations, as SA-1B's files do")
    return image, objects


def parse_json(data: bytes, convert: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parse JSON in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Args:
        data: content of the file.
        convert: function whose result takes the place of each JSON object, the innermost first.

    Raises:
        BadAnnotation: it is no JSON.
    """
    try:
        return json.loads(data, object_hook=convert)
    except json.JSONDecodeError as error:
        lines = ": several values, as in JSON Lines; write one" if error.msg == "Extra data" else ""
        raise BadAnnotation(f"not JSON ({str(error)[:80]}){lines}") from error
    except (ValueError, RecursionError) as error:
        raise BadAnnotation(f"not JSON ({str(error)[:80]})") from error


def build_annotations(
    source: str,
    image: Mapping[str, Any],
    objects: Sequence[Any],
    size: tuple[int, int] | None,
    turn: Turn | None = None,
) -> Annotations:
    """Check one image's objects, compress their masks, and leave out those that can't be used.

    Args:
        source: file that they come from, for messages.
        image: COCO's or SA-1B's `image`.
        objects: COCO's or SA-1B's annotations of that image.
        size: (height, width) of the upright image in pixels, if the caller knows it.
        turn: function that returns the EXIF orientation of the image's file, if the caller has it.

    Raises:
        BadAnnotation: the image has no size or another one, or too many objects.
    """
    own = _own_size(image)
    check_size(own, size, turn)
    if len(objects) > MOST_OBJECTS:
        raise BadAnnotation(f"{len(objects):,} objects, at most {MOST_OBJECTS:,} are read")
    counts, boxes, areas, left_out = [], [], [], []
    for index, one in enumerate(objects):
        try:
            runs, box = _mask_and_box(one, own)
        except BadAnnotation as error:
            left_out.append((error.reason, f"{_name(one, index)}: {error}"))
            continue
        counts.append(write_runs(runs))
        boxes.append(box)
        areas.append(int(runs[1::2].sum()))
    return Annotations(
        source=source,
        size=own,
        counts=tuple(counts),
        boxes_P4=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        areas_P=np.array(areas, dtype=np.int64),
        left_out=tuple(left_out),
    )


def check_size(own: tuple[int, int], size: tuple[int, int] | None, turn: Turn | None) -> None:
    """Refuse labels of an image of another size; if EXIF turns the image, name that as the reason.

    Args:
        own: (height, width) in pixels that the labels are for.
        size: (height, width) of the upright image in pixels; None accepts any.
        turn: function that returns the EXIF orientation of the image's file; None if the caller has no file.

    Raises:
        BadAnnotation: the sizes differ.
    """
    if size is None or own == tuple(size):
        return
    fact = f"they are for an image of {own[1]} x {own[0]}, this one is {size[1]} x {size[0]}"
    if own != (size[1], size[0]):
        raise BadAnnotation(fact)
    orientation = None if turn is None else turn()
    if orientation is None:
        raise BadAnnotation(
            f"{fact}: width and height are exchanged, as for a photo that EXIF turns; label it upright"
        )
    if orientation in UPRIGHT:
        raise BadAnnotation(f"{fact}: width and height are exchanged")
    raise BadAnnotation(
        f"{fact}, since its EXIF orientation ({orientation}) turns it and the labels are of the unturned photo: "
        "label the upright photo, or save the photo without the EXIF orientation"
    )


def _name(one: Any, index: int) -> str:
    """Return the name of an annotation for messages: its id, or else its place in the list."""
    known = one.get("id") if isinstance(one, dict) else None
    return f"annotation {index}" if known is None else f"annotation with id {shown(str(known)[:40])}"


def _mask_and_box(one: Any, size: tuple[int, int]) -> tuple[Runs, tuple[float, float, float, float]]:
    """Return the mask and the box of an object; BadAnnotation with the reason if it can't be used."""
    if not isinstance(one, dict):
        raise BadAnnotation("it is no JSON object", "no JSON object")
    crowd = one.get("iscrowd")
    crowd = crowd.strip().lower() if isinstance(crowd, str) else crowd
    if isinstance(crowd, list | dict) or crowd not in (*_NO_CROWD, *_IS_CROWD):
        raise BadAnnotation(f"its iscrowd is {str(crowd)[:40]!r}, not 0 or 1", BAD_CROWD)
    if crowd in _IS_CROWD:
        raise BadAnnotation("it is a crowd, a region of many objects", CROWD)
    runs = checked_runs(one.get("segmentation"), size)
    if not runs[1::2].any():
        raise BadAnnotation("its mask has no pixel in the image", NO_PIXEL)
    return runs, _box(one.get("bbox"), size, runs_box(runs, size[0]))


def _own_size(image: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width that a file states for its image."""
    height, width = whole_number(image.get("height")), whole_number(image.get("width"))
    if height is None or width is None or min(height, width) < 1:
        raise BadAnnotation("its image has no height and width in pixels")
    if height > MAX_PIXELS or width > MAX_PIXELS or height * width > MAX_PIXELS:
        raise BadAnnotation(
            f"its image is {str(width)[:20]} x {str(height)[:20]}, the limit is {MAX_PIXELS:,} pixels"
        )
    return height, width


Box = tuple[float, float, float, float]


def _box(bbox: object, size: tuple[int, int], around: Box) -> Box:
    """Convert COCO's x, y, width, height to x0, y0, x1, y1, clipped to the image.

    Args:
        bbox: value from JSON; None, an empty list, a box without an area and one that doesn't touch the mask stand
            for the mask's own box.
        size: (height, width) of the image in pixels.
        around: box around the mask.

    Raises:
        BadAnnotation: it is no box, reaches far out of the image, or holds two corners.
    """
    if bbox is None or bbox == []:
        return around
    numbers = [number(value) for value in bbox] if isinstance(bbox, list) else []
    if len(numbers) != 4 or None in numbers:
        raise BadAnnotation("a bbox is not four numbers", BOX_NUMBERS)
    text = f"bbox {str(bbox)[:80]}"
    # Checked before the conversion to float, since JSON's integers have any length. NaN fails the comparison.
    if not all(abs(value) <= 4 * MAX_PIXELS for value in numbers if value is not None):
        raise BadAnnotation(f"{text} is not in the image", BOX_OUTSIDE)
    x, y, width, height = (float(value) for value in numbers if value is not None)
    if min(width, height) < 0:
        raise BadAnnotation(f"{text} is not in the image", BOX_OUTSIDE)
    if min(width, height) == 0:
        return around
    corners = "it looks like two corners (x0, y0, x1, y1), not x, y, width, height"
    hint = f": {corners}" if _agree((x, y, width, height), around, 0) else ""
    clipped = (max(x, 0.0), max(y, 0.0), min(x + width, float(size[1])), min(y + height, float(size[0])))
    beyond_x, beyond_y = max(-x, x + width - size[1]), max(-y, y + height - size[0])
    if _agree(clipped, around):
        return clipped
    if beyond_x > max(1.0, OVERHANG * size[1]) or beyond_y > max(1.0, OVERHANG * size[0]):
        raise BadAnnotation(f"{text} is not in the image{hint}", BOX_OUTSIDE)
    if hint:
        raise BadAnnotation(f"{text}: {corners}", BOX_CORNERS)
    apart_x = min(clipped[2], around[2]) <= max(clipped[0], around[0])
    apart_y = min(clipped[3], around[3]) <= max(clipped[1], around[1])
    return around if apart_x or apart_y else clipped


def _agree(box: Box, around: Box, part: float = AGREEMENT) -> bool:
    """Return True if each side of a box is near that of the box around a mask."""
    width, height = around[2] - around[0], around[3] - around[1]
    reach = (max(2.0, part * width), max(2.0, part * height)) * 2
    return all(abs(one - other) <= far for one, other, far in zip(box, around, reach, strict=True))
