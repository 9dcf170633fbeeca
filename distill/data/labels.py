"""Objects of annotations, drawn for a training step and brought to the size at which masks are compared."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from math import ceil
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...common.errors import AnnotationError
from ...sam.annotations import AnnotationFiles, Annotations
from ...store import ImageRecord
from ..loss.masks import mask_side

logger = logging.getLogger(__name__)

Masks = npt.NDArray[np.bool_]


def count_annotated(root: Path, records: Iterable[ImageRecord]) -> int:
    """How many of the images have a JSON file beside them, whether or not it can be used."""
    files = AnnotationFiles(root)
    return sum(files.beside(record.key) for record in records)


class Labels:
    """SA-1B's JSON files beside the images of `root`, read when an image's turn comes. Threads may share it.

    `objects` are drawn of each image, others in every epoch. An image whose annotations can't be used is named once,
    in a warning, and has no objects; in another epoch they are read again, as they may be there then. `broken` has
    their keys and what is wrong, `empty` the keys of those whose annotations have no object.
    """

    def __init__(self, root: Path, image_size: int, objects: int, seed: int) -> None:
        self.objects = objects
        self.side = mask_side(image_size)
        self.broken: dict[str, str] = {}
        self.empty: set[str] = set()
        self._files = AnnotationFiles(root)
        self._seed = seed
        self._lock = threading.Lock()

    def draw(self, record: ImageRecord, epoch: int) -> Masks | None:
        """Up to `objects` masks (n, M, M) of the encoder's square; None where the image has no annotations."""
        try:
            annotations = self._files.read(record.key, size=record.original_size)
        except AnnotationError as error:
            self.note(record.key, str(error))
            return np.zeros((0, self.side, self.side), np.bool_)
        if annotations is None:
            return None
        if not len(annotations):
            with self._lock:
                self.empty.add(record.key)
        return self._drawn(annotations, record.row, epoch)

    def note(self, key: str, reason: str) -> None:
        """Names an image whose annotations can't be used, unless that was done."""
        with self._lock:
            if key in self.broken:
                return
            self.broken[key] = reason
        logger.warning("%s; the image is trained without masks", reason)

    def _drawn(self, annotations: Annotations, row: int, epoch: int) -> Masks:
        # As in epoch_order: the same whatever numpy's version.
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch, row]))
        order = np.argsort(bits.random_raw(len(annotations)), kind="stable")
        found = np.zeros((self.objects, self.side, self.side), np.bool_)
        place = 0
        for index in order:
            if place == self.objects:
                break
            found[place] = to_square_mask(annotations.mask(int(index)), self.side)
            # One that is smaller than a pixel here is no object to be asked for.
            place += bool(found[place].any())
        return found[:place]


def to_square_mask(mask_HW: Masks, side: int) -> Masks:
    """A mask over its image, brought to (side, side) over the encoder's square: set where at least half of it is."""
    height, width = mask_HW.shape
    longest = max(height, width)
    # Only the part of the square that the image reaches is made: panoramas are thousands of times as long as high.
    rows, columns = ceil(height * side / longest), ceil(width * side / longest)
    reach = (columns * longest / side, rows * longest / side)
    canvas = Image.new("L", (min(longest, ceil(reach[0])), min(longest, ceil(reach[1]))))
    canvas.paste(Image.fromarray(mask_HW.astype(np.uint8) * np.uint8(255)), (0, 0))
    reach = (min(reach[0], canvas.width), min(reach[1], canvas.height))
    small = canvas.resize((columns, rows), Image.Resampling.BOX, box=(0, 0, *reach))
    square_MM = np.zeros((side, side), np.bool_)
    square_MM[:rows, :columns] = np.asarray(small) >= 128
    return square_MM
