"""Labels from annotations: their source, and objects drawn from each image for a training step, resized to the masks
compared.

Shape suffixes: H and W rows and columns of an image's mask, Q objects drawn of one image (q of them exist),
M side of the masks compared, over the encoder's square.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...common.errors import AnnotationError, DistillError, ImageError, counted
from ...sam import (
    AnnotationFiles,
    Annotations,
    CocoInstances,
    LabelCounts,
    LabelMasks,
    LabelSource,
    NameMatch,
    exif_orientation,
    read_image,
)
from ...store import EmbeddingStore, ImageRecord
from ..config import DistillConfig

logger = logging.getLogger(__name__)

LARGEST_MASK_SIDE = 256

Masks = npt.NDArray[np.bool_]


def mask_side(image_size: int) -> int:
    """Return the side in pixels of the masks compared in training, M, for an encoder's square of `image_size` pixels.

    It is half the square's side, at most 256, the side of the masks that SAM's head predicts at 1024.
    """
    return min(image_size // 2, LARGEST_MASK_SIDE)


@dataclass(frozen=True, kw_only=True)
class OpenLabels:
    """Source of the labels of one run, checked against the store's images."""

    source: LabelSource
    name: str
    """Name of the file or folder for messages."""
    annotated: int
    """Number of the store's images that it has labels of."""
    identity: Mapping[str, str]
    """Digest of the labels' content, for `RunDescription.identity`; empty for files beside the images."""
    match: NameMatch | None = None
    """Listed names against the store's images; None for files beside the images."""

    def report(self) -> dict[str, Any]:
        """Return the labels' origin as JSON values, for config.json."""
        return {
            "source": self.name,
            "annotated": self.annotated,
            **self.identity,
            **({} if self.match is None else {"names": self.match.to_json()}),
        }


def open_labels(
    config: DistillConfig, root: Path | None, store: EmbeddingStore, train: Sequence[int]
) -> OpenLabels | None:
    """Open the source of labels, and check that training images have some; None if labels are the teacher's masks.

    Args:
        config: all options.
        root: folder of the images; None for the images that the store keeps.
        store: the run's store.
        train: rows of the training images.

    Raises:
        DistillError: no training image has a labelled object.
        AnnotationError: the file or folder can't be used.
    """
    if not config.learns_from_labels:
        return None
    records, listed_in = store.manifest.records("done"), Path(store.spec.image_root)
    keys = [record.key for record in records]
    training = set(train)
    train_keys = [record.key for record in records if record.row in training]
    source: CocoInstances | LabelMasks
    if config.coco is not None:
        source = CocoInstances(config.coco)
        match = source.match(keys, listed_in)
        labelled = sum(source.object_count(key) > 0 for key in train_keys)
        identity = {"coco_sha256": source.sha256}
    elif config.label_masks is not None:
        source = LabelMasks(config.label_masks)
        match = source.match(keys, listed_in)
        labelled = sum(map(source.has_labels, train_keys))
        identity = {"label_masks_sha256": source.digest(keys)}
    else:
        return _labels_beside(root, keys)
    lines = match.lines(source.path.name)
    if not labelled:
        facts = "; ".join(lines) or f"{source.path.name} lists no object of them"
        raise DistillError(
            f"none of the {len(train_keys):,} training images has a labelled object: {facts}\n"
            "give labels of the store's images, or learn from the teacher's masks without them"
        )
    for line in lines:
        logger.warning("%s", line)
    return OpenLabels(
        source=source,
        name=str(source.path.resolve()),
        annotated=len(match.found),
        identity=identity,
        match=match,
    )


def _labels_beside(root: Path | None, keys: Sequence[str]) -> OpenLabels:
    """Return SA-1B's files beside the images; DistillError if there is none."""
    assert root is not None, "the folder was found before"
    files = AnnotationFiles(root)
    count = sum(map(files.has_labels, keys))
    if not count:
        raise DistillError(
            f"none of the {counted(len(keys), 'image')} in {root} has annotations beside it, as "
            "1.json is beside 1.jpg: "
            "give a COCO file with --coco or PNG masks with --label-masks, or learn from the teacher's masks with "
            "--labels teacher"
        )
    return OpenLabels(source=files, name=str(root), annotated=count, identity={})


class AnnotationLabels:
    """Labels of the images from one source, which draws other objects of an image in every epoch.

    Annotations are read again in each epoch. If they can't be used, the image has no objects in that epoch; a
    warning, once per image, names it. Threads may share an instance.

    Args:
        source: source of the objects.
        image_size: side of the encoder's square in pixels.
        objects: largest number of objects drawn per image, Q.
        seed: seed of the drawing, together with epoch and row.
        image_root: folder of the images, where messages look for a photo's EXIF orientation; None: there is none.

    Attributes:
        side: side of the masks in pixels, M.
        broken: reason by key, for images whose annotations can't be used.
        empty: keys of images whose annotations contain no object.
        read: number of objects that can be used, and the objects left out (see `Annotations`), by key.
    """

    def __init__(
        self, source: LabelSource, image_size: int, objects: int, seed: int, image_root: Path | None = None
    ) -> None:
        self.objects = objects
        self.side = mask_side(image_size)
        self.broken: dict[str, str] = {}
        self.empty: set[str] = set()
        self.read: dict[str, tuple[int, tuple[tuple[str, str], ...]]] = {}
        self._source = source
        self._image_root = image_root
        self._seed = seed
        self._lock = threading.Lock()

    def draw(self, record: ImageRecord, epoch: int) -> Masks | None:
        """Draw up to `objects` objects of an image.

        Args:
            record: the image.
            epoch: number of the epoch, from 0.

        Returns:
            bool (q, M, M), masks over the encoder's square, none of them empty; None if the image has no annotations.
        """
        try:
            turn = None if self._image_root is None else partial(self._orientation, record)
            annotations = self._source.read(record.key, size=record.original_size, turn=turn)
        except AnnotationError as error:
            self.mark_broken(record.key, str(error))
            return np.zeros((0, self.side, self.side), np.bool_)
        if annotations is None:
            return None
        with self._lock:
            self.read[record.key] = len(annotations), annotations.left_out
            if not len(annotations):
                self.empty.add(record.key)
        return self._choose(annotations, record.row, epoch)

    def counts(self) -> LabelCounts:
        """Return the number of objects of the images read so far, and of those left out by reason."""
        counts = LabelCounts()
        for key, (used, left_out) in sorted(self.read.items()):
            counts.add(key, used, left_out)
        return counts

    def to_json(self) -> dict[str, Any]:
        """Return the numbers of images without labels that can be used, and of objects, as JSON values."""
        counts = self.counts()
        return {
            "empty": len(self.empty),
            "broken": len(self.broken),
            "objects": counts.used,
            "left_out": counts.by_reason(),
        }

    def _orientation(self, record: ImageRecord) -> int:
        """Return the EXIF orientation of an image's file; 1 if it can't be read, which the loader reports."""
        assert self._image_root is not None, "asked for with a folder only"
        try:
            data = read_image(self._image_root, record.key, offset=record.offset, size=record.bytes)
            return exif_orientation(data)
        except ImageError:
            return 1

    def mark_broken(self, key: str, reason: str) -> None:
        """Add an image to `broken`, with a warning the first time.

        Args:
            key: the image's key in the store.
            reason: sentence that names the image and says what is wrong, for the warning.
        """
        with self._lock:
            if key in self.broken:
                return
            self.broken[key] = reason
        logger.warning("%s; the image is trained without masks", reason)

    def _choose(self, annotations: Annotations, row: int, epoch: int) -> Masks:
        # Raw integers of the bit generator, as in epoch_order: the same with every version of numpy.
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch, row]))
        order = np.argsort(bits.random_raw(len(annotations)), kind="stable")
        masks_QMM = np.zeros((self.objects, self.side, self.side), np.bool_)
        place = 0
        for index in order:
            if place == self.objects:
                break
            masks_QMM[place] = to_square_mask(annotations.mask(int(index)), self.side)
            # An object too small to cover a pixel of this mask can't be prompted for: its place is reused.
            place += bool(masks_QMM[place].any())
        return masks_QMM[:place]


def to_square_mask(mask_HW: Masks, side: int) -> Masks:
    """Resize an image's mask to (side, side) over the encoder's square.

    Args:
        mask_HW: bool (H, W), over the image.
        side: side of the result in pixels, M.

    Returns:
        bool (M, M), True where the mask covers at least half of a pixel. The image is in the top-left corner.
    """
    height, width = mask_HW.shape
    longest = max(height, width)
    # Only the image's part of the square is resized: a panorama may be thousands of times as wide as high.
    rows, columns = ceil(height * side / longest), ceil(width * side / longest)
    reach = (columns * longest / side, rows * longest / side)
    canvas = Image.new("L", (min(longest, ceil(reach[0])), min(longest, ceil(reach[1]))))
    canvas.paste(Image.fromarray(mask_HW.astype(np.uint8) * np.uint8(255)), (0, 0))
    reach = (min(reach[0], canvas.width), min(reach[1], canvas.height))
    small = canvas.resize((columns, rows), Image.Resampling.BOX, box=(0, 0, *reach))
    square_MM = np.zeros((side, side), np.bool_)
    square_MM[:rows, :columns] = np.asarray(small) >= 128
    return square_MM
