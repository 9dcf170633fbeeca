"""COCO instances files: their objects by image, and the matching of the names that they list with images' keys.

Names are compared as exporters write them: absolute paths, URLs, backslashes, percent-encoding, decomposed letters,
another case, no suffix, and the names that Roboflow and Label Studio give to copies are understood where only one
image fits.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ...common.errors import AnnotationError, BadAnnotation, shown
from ..photos.file_kinds import AVIF_SUFFIXES, HEAD_BYTES, HEIC_SUFFIXES, IMAGE_SUFFIXES, content_kind
from ..photos.tar_files import path_of
from .annotations import UPRIGHT, Annotations, Turn, build_annotations, parse_json
from .rle import whole_number

MAX_BYTES = 2 * 2**30
"""Largest COCO file that is read, in bytes. COCO's training set has 470 MB. Reading takes about four times a file's
length of memory, keeping its objects about its length."""

MOST_SHOWN = 3
"""Most names that a message shows of those that match nothing."""

NO_IMAGE = "of no listed image"
NO_IMAGE_ID = "no image_id"

_NAMES = ("file_name", "coco_url", "path")
"""Fields with the name of a listed image, the first one that is there."""

_COPY = (
    re.compile(r"(.+)_([A-Za-z]{3,4})\.rf\.[0-9A-Za-z]{16,64}\.[A-Za-z]{3,4}"),
    re.compile(r"[0-9a-f]{8}-(.+)\.([A-Za-z0-9]{3,5})"),
)
"""Names of copies of NAME.SUFFIX: Roboflow's NAME_SUFFIX.rf.HASH.jpg and Label Studio's HASH-NAME.SUFFIX."""

Parts = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class NameMatch:
    """Names of a list of labels, matched with the keys of images."""

    listed: int
    """Number of listed names."""
    found: dict[str, int]
    """Position in the list by key."""
    missing: tuple[str, ...] = ()
    """Listed names that no image has."""
    ambiguous: tuple[str, ...] = ()
    """Listed names that fit several images, or share their image with another name."""
    key: str | None = None
    """First key, as an example."""
    stems: bool = False
    """True if names were compared without suffixes, as those of masks."""

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, and the first names of each kind, as JSON values."""
        return {
            "listed": self.listed,
            "matched": len(self.found),
            "missing": len(self.missing),
            "ambiguous": len(self.ambiguous),
            "first_missing": [shown(name) for name in self.missing[:MOST_SHOWN]],
            "first_ambiguous": [shown(name) for name in self.ambiguous[:MOST_SHOWN]],
        }

    def lines(self, source: str) -> list[str]:
        """Return sentences on the listed names that match no image or more than one; none if all match.

        Args:
            source: name of the file or folder that lists them.
        """
        if not self.listed:
            return [f"{source} lists no image"]
        lines = []
        if self.missing or self.ambiguous or not self.found:
            things = (
                "masks are named like one of your images" if self.stems else "listed images are among yours"
            )
            line = f"{source}: {len(self.found):,} of {self.listed:,} {things}"
            line += f"; not among them: {_some(self.missing)}" if self.missing else ""
            if not self.found and self.key is not None:
                line += f"; yours have names such as {shown(self.key)}"
            lines.append(line)
        if self.ambiguous:
            lines.append(
                f"{source}: {len(self.ambiguous):,} listed names are left out, as each fits several images or shares "
                f"its image with another name: {_some(self.ambiguous)}; give paths relative to the image folder"
            )
        return lines


def match_names(
    names: Sequence[str], keys: Iterable[str], *, root: Path | None = None, stems: bool = False
) -> NameMatch:
    """Match listed names with images' keys, one to one.

    Equal names match first. Then paths are compared from their ends, without what exporters add (see the module): the
    pair that has the most folders in common belongs together, but if two names or keys have as many, none matches.
    Then letters' case is ignored, in the suffix and then in the whole path; last, what exporters add to the names of
    copies (see `_COPY`) or masks, and for names without a suffix that of the photo; another suffix is another photo.

    Args:
        names: listed names, each once.
        keys: keys of all images.
        root: absolute folder that the keys are relative to; its own folders count as those in common. None if it is
            not known.
        stems: compare without suffixes, as p1.png is the mask of p1.jpg.
    """
    keys = list(dict.fromkeys(keys))
    found: dict[str, int] = {}
    left_names, left_keys = dict(enumerate(names)), dict(enumerate(keys))
    ambiguous: set[int] = set()
    forms: tuple[Callable[[str], Parts], ...] = (
        (lambda name: (_stem(name),)) if stems else (lambda name: (name,)),
        (lambda name: (*_parts(name)[:-1], _stem(_parts(name)[-1]))) if stems else _parts,
        *(() if stems else (_with_lower_suffix,)),
        lambda name: tuple(part.casefold() for part in forms[1](name)),
        *((_without_mask_mark,) if stems else (_without_copy_marks, _without_suffix)),
    )
    for form in forms:
        if not left_names or not left_keys:
            break
        # Equal names are equal keys; all else is compared with the image's whole path.
        base = None if form is forms[0] else root
        name_form = _without_copy_marks if form is _without_suffix else form
        name_parts = {position: name_form(name) for position, name in left_names.items()}
        key_parts = {
            position: form(key if base is None else path_of(base, key)) for position, key in left_keys.items()
        }
        depth = max(map(len, (*name_parts.values(), ())), default=0)
        for count in range(depth, 0, -1):
            by_tail: defaultdict[Parts, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
            for position, parts in name_parts.items():
                if len(parts) >= count:
                    by_tail[parts[-count:]][0].append(position)
            for position, parts in key_parts.items():
                if len(parts) >= count and parts[-count:] in by_tail:
                    by_tail[parts[-count:]][1].append(position)
            for named, keyed in by_tail.values():
                if not keyed:
                    continue
                if len(named) == len(keyed) == 1:
                    found[keys[keyed[0]]] = named[0]
                else:
                    ambiguous.update(named)
                for position in named:
                    del name_parts[position], left_names[position]
                for position in keyed:
                    del key_parts[position], left_keys[position]
    return NameMatch(
        listed=len(names),
        found=found,
        missing=tuple(left_names.values()),
        ambiguous=tuple(names[position] for position in sorted(ambiguous)),
        key=keys[0] if keys else None,
        stems=stems,
    )


@dataclass
class _Listed:
    """Image that a COCO file lists, with its objects packed until they are read."""

    name: str
    height: Any
    width: Any
    objects: list[bytes] | bytes = field(default_factory=list)
    """Objects as `_pack_annotation` packs them; all in one when the file has been read."""
    twice: bool = False
    """True if the name is listed more than once; an object that repeats another one is then left out."""
    problem: str | None = None
    """Reason why its objects can't be told from others'."""


class CocoInstances:
    """Objects of a COCO instances file, by image. Threads may share it.

    Polygons, compressed and uncompressed RLE are read; `iscrowd` annotations, which mark regions rather than objects,
    are left out, and so is every object or listed image that can't be used. A defect of one image's annotations is
    reported when that image is read. An image that is listed twice under the same name has the objects of both.

    Args:
        path: path of the JSON file.

    Attributes:
        sha256: hexadecimal SHA-256 of the file.
        unusable: number of listed images and objects that belong to no image that can be named, by reason.

    Raises:
        AnnotationError: the file can't be read or does not have COCO's layout.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.unusable: Counter[str] = Counter()
        try:
            data = self._read()
            _refuse_other_kind(data)
            self.sha256 = hashlib.sha256(data).hexdigest()
            content = parse_json(data, _pack_annotation)
            del data
            self._listed = self._collect(content)
        except BadAnnotation as error:
            raise AnnotationError(f"{shown(str(self.path))} is not a COCO instances file: {error}") from error
        self._match: NameMatch | None = None

    def __len__(self) -> int:
        return len(self._listed)

    @property
    def names(self) -> list[str]:
        """Names of the listed images."""
        return [listed.name for listed in self._listed]

    def match(self, keys: Iterable[str], root: Path | None = None) -> NameMatch:
        """Match the listed names with the keys of all images; from then on, only these images are read.

        The objects of other images are dropped from memory.

        Args:
            keys: keys of all images, as `list_images` returns them.
            root: folder that they are relative to, as in `match_names`.
        """
        self._match = match_names(self.names, keys, root=root)
        kept = set(self._match.found.values())
        for position, listed in enumerate(self._listed):
            if position not in kept:
                listed.objects = b""
        return self._match

    def has_labels(self, key: str) -> bool:
        """Return True if the file lists the image `key`, with objects or without."""
        return self._find(key) is not None

    def object_count(self, key: str) -> int:
        """Return the number of objects of an image, usable or not, crowds included; 0 if it isn't listed."""
        listed = self._find(key)
        return 0 if listed is None else len(_unpacked(listed.objects))

    def read(
        self, key: str, *, size: tuple[int, int] | None = None, turn: Turn | None = None
    ) -> Annotations | None:
        """Read the masks of an image.

        Args:
            key: key of the image.
            size: (height, width) of the upright image in pixels, if the caller knows it.
            turn: function that returns the EXIF orientation of the image's file, if the caller has it.

        Returns:
            Its annotations, without the objects that can't be used; None if the file lists no image that fits it
            alone (see `match_names`).

        Raises:
            AnnotationError: the file states another size, or none for a photo that EXIF turns, or lists other images
                with the same id. The message is one line, and names the image.
        """
        listed = self._find(key)
        if listed is None:
            return None
        try:
            if listed.problem is not None:
                raise BadAnnotation(listed.problem)
            image = {"height": listed.height, "width": listed.width}
            unstated = listed.height is None and listed.width is None
            # Of a photo that EXIF turns, nothing says which way the labels are.
            if unstated and size is not None and (turn is None or turn() in UPRIGHT):
                image = dict(zip(("height", "width"), size, strict=True))
            return build_annotations(shown(str(self.path)), image, _unpacked(listed.objects), size, turn)
        except BadAnnotation as error:
            raise AnnotationError(f"{shown(key)}: its annotations in {self.path.name}: {error}") from error

    def _find(self, key: str) -> _Listed | None:
        match = self._match or match_names(self.names, [key])
        position = match.found.get(key)
        return None if position is None else self._listed[position]

    def _read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_BYTES:
                    raise BadAnnotation(f"it has {size:,} bytes, at most {MAX_BYTES:,} are read")
                return file.read()
        except OSError as error:
            raise AnnotationError(
                f"{shown(str(self.path))} can't be read: {error.strerror or error}"
            ) from error

    def _collect(self, content: Any) -> list[_Listed]:
        """Return the listed images with their objects, reduced to the fields that are needed."""
        images, objects = (
            (content.get(key) for key in ("images", "annotations")) if isinstance(content, dict) else (0, 0)
        )
        if not isinstance(images, list) or not isinstance(objects, list):
            raise BadAnnotation(f"it has no images or no annotations, but {_outline(content)}")
        listed, by_id = self._listed_images(images)
        images.clear()
        # Objects are taken from the end of the list, whose memory is freed on the way.
        objects.reverse()
        while objects:
            one = objects.pop()
            image_id = _id(one[0]) if isinstance(one, tuple) else None
            owner = None if image_id is None else by_id.get(image_id)
            if owner is None:
                self.unusable[NO_IMAGE_ID if image_id is None else NO_IMAGE] += 1
                continue
            assert isinstance(owner.objects, list), "packed below"
            owner.objects.append(one[1])
        for each in listed:
            assert isinstance(each.objects, list), "not packed yet"
            each.objects = _packed(_distinct(each.objects) if each.twice else each.objects)
        return listed

    def _listed_images(self, images: list[Any]) -> tuple[list[_Listed], dict[str, _Listed]]:
        """Return the images that have a name and an id, each name once, and the images by id."""
        by_name: dict[str, _Listed] = {}
        by_id: dict[str, _Listed] = {}
        first_problem = ""
        for index, image in enumerate(images):
            name = _file_name(image) if isinstance(image, dict) else None
            image_id = _id(image.get("id", image.get("image_id"))) if isinstance(image, dict) else None
            if name is None or image_id is None:
                problem = "no file_name" if name is None else "no id"
                first_problem = first_problem or f"image {index} has {problem}"
                self.unusable[f"image with {problem}"] += 1
                continue
            height, width = image.get("height"), image.get("width")
            new = _Listed(name, height, width)
            one = by_name.setdefault(name, new)
            one.twice = one.twice or one is not new
            if (whole_number(one.height), whole_number(one.width)) != (
                whole_number(height),
                whole_number(width),
            ):
                one.problem = "it is listed twice with different sizes"
            other = by_id.setdefault(image_id, one)
            if other is not one:
                for each, another in ((one, other), (other, one)):
                    each.problem = f"{shown(another.name)} is listed with the same id, {image_id[:40]}"
        if images and not by_name:
            raise BadAnnotation(first_problem)
        return list(by_name.values()), by_id


def _refuse_other_kind(data: bytes) -> None:
    """Raise BadAnnotation for a file that is empty, or of a kind that its first bytes tell."""
    kind = content_kind(data[:HEAD_BYTES])
    if kind is not None or not data.strip():
        raise BadAnnotation(f"it is a file of kind {kind}, not JSON" if kind else "it is empty")


def _outline(content: object) -> str:
    """Return what the content of another program's JSON file is, for messages."""
    if isinstance(content, dict):
        keys = ", ".join(shown(str(key)[:40]) for key in list(content)[:4])
        return f"the keys {keys}{' and others' if len(content) > 4 else ''}" if content else "is empty"
    if isinstance(content, list):
        return "is a list, as of detections or of another program's tasks: export instances in COCO's format"
    return f"is a JSON {type(content).__name__}"


def _id(value: object) -> str | None:
    """Return an id as a text, the same for 7, 7.0 and "7"; None if it is neither a number nor a text."""
    if isinstance(value, str):
        return value or None
    found = whole_number(value)
    return None if found is None else str(found)[:100]


def _file_name(image: dict[str, Any]) -> str | None:
    """Return the name of a listed image; LVIS has only its URL."""
    names = (image.get(key) for key in _NAMES)
    return next((name for name in names if isinstance(name, str) and name), None)


def _pack_annotation(one: dict[str, Any]) -> Any:
    """Return the image id of a COCO annotation, and the fields that are needed as bytes; any other object unchanged.

    Called while the file is parsed, so that its numbers never take memory as Python's objects all at once.
    """
    image = one.keys() & _NAMES and not one.keys() & {"segmentation", "bbox", "segments_info"}
    if image or "image_id" not in one:
        return one
    fields = {name: one[name] for name in ("id", "segmentation", "bbox", "iscrowd") if name in one}
    return one["image_id"], marshal.dumps(fields)


def _distinct(objects: list[bytes]) -> list[bytes]:
    """Return the objects without those that have the outline and the box of an earlier one."""
    by_content: dict[str, bytes] = {}
    for packed in objects:
        one = marshal.loads(packed)
        by_content.setdefault(json.dumps([one.get("segmentation"), one.get("bbox")]), packed)
    return list(by_content.values())


def _packed(objects: list[bytes]) -> bytes:
    """Return the objects of an image as one, compressed."""
    return zlib.compress(marshal.dumps(objects), 1) if objects else b""


def _unpacked(objects: list[bytes] | bytes) -> list[Any]:
    packed = objects if isinstance(objects, list) else _parts_of(objects)
    return [marshal.loads(one) for one in packed]


def _parts_of(objects: bytes) -> list[bytes]:
    return marshal.loads(zlib.decompress(objects)) if objects else []


def _parts(name: str) -> Parts:
    """Return the folders and the base name of a path or URL, without what exporters add to or change in a key."""
    if "://" in name or "?d=" in name:
        try:
            url = urlsplit(name)
            # Label Studio serves local files as /data/local-files/?d=PATH.
            name = (parse_qs(url.query).get("d") or [url.path])[0] or name
        except ValueError:
            pass
    if re.search("%[0-9a-fA-F]{2}", name):
        name = unquote(name)
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    return tuple(part for part in parts if part not in ("", ".")) or (name,)


def _with_lower_suffix(name: str) -> Parts:
    parts = _parts(name)
    stem, dot, suffix = parts[-1].rpartition(".")
    return (*parts[:-1], stem + dot + suffix.lower())


def _without_copy_marks(name: str) -> Parts:
    """Return the parts of a path in lower case, the base name as it was before an exporter copied the photo."""
    *folders, last = (part.casefold() for part in _parts(name))
    for copy in _COPY:
        if found := copy.fullmatch(last):
            last = f"{found[1]}.{found[2]}"
    return (*folders, last)


def _without_suffix(key: str) -> Parts:
    *folders, last = _without_copy_marks(key)
    stem, suffix = os.path.splitext(last)
    return (*folders, stem if suffix in (*IMAGE_SUFFIXES, *HEIC_SUFFIXES, *AVIF_SUFFIXES) else last)


_MASK_MARK = re.compile(r"[-_. ](masks?|labels?|seg|instances?)$")


def _without_mask_mark(name: str) -> Parts:
    """Return the parts of a path in lower case, the base name without a suffix and a word such as mask at its end."""
    *folders, last = (part.casefold() for part in _parts(name))
    return (*folders, _stem(_MASK_MARK.sub("", _stem(last))))


def _stem(name: str) -> str:
    """Return a name without its suffix, and without two if it is a photo's name with another suffix (p1.jpg.png)."""
    stem = name.rpartition(".")[0] or name
    before, dot, suffix = stem.rpartition(".")
    return before if before and dot + suffix.lower() in IMAGE_SUFFIXES else stem


def _some(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - MOST_SHOWN:,} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(shown(name) for name in names[:MOST_SHOWN]) + more
