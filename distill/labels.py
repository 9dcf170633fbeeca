"""Objects of annotations, drawn for a training step and brought to the size at which masks are compared."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..sam.annotations import AnnotationFiles, Annotations
from ..sam.errors import AnnotationError
from ..store import ImageRecord
from .mask_training import mask_side

logger = logging.getLogger(__name__)

Masks = npt.NDArray[np.bool_]


class Labels:
    """SA-1B's JSON files beside the images of `root`, read when an image's turn comes. Threads may share it.

    `objects` are drawn of each image, others in every epoch. An image whose annotations can't be used is named once,
    in a warning, and has no objects from then on; `broken` are their keys.
    """

    def __init__(self, root: Path, image_size: int, objects: int, seed: int) -> None:
        self.objects = objects
        self.side = mask_side(image_size)
        self.broken: set[str] = set()
        self._files = AnnotationFiles(root)
        self._seed = seed
        self._lock = threading.Lock()

    def draw(self, record: ImageRecord, epoch: int) -> Masks | None:
        """Up to `objects` masks (n, M, M) of the encoder's square; None where the image has no annotations."""
        with self._lock:
            if record.key in self.broken:
                return np.zeros((0, self.side, self.side), np.bool_)
        try:
            annotations = self._files.read(record.key, size=record.original_size)
        except AnnotationError as error:
            self._note(record.key, error)
            return np.zeros((0, self.side, self.side), np.bool_)
        return None if annotations is None else self._drawn(annotations, record.row, epoch)

    def _drawn(self, annotations: Annotations, row: int, epoch: int) -> Masks:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch, row])))
        order = rng.permutation(len(annotations))
        found = np.zeros((self.objects, self.side, self.side), np.bool_)
        place = 0
        for index in order:
            if place == self.objects:
                break
            found[place] = to_square_mask(annotations.mask(int(index)), self.side)
            # One that is smaller than a pixel here is no object to be asked for.
            place += bool(found[place].any())
        return found[:place]

    def _note(self, key: str, error: AnnotationError) -> None:
        with self._lock:
            if key in self.broken:
                return
            self.broken.add(key)
        logger.warning("%s; the image is trained without masks", error)


def to_square_mask(mask_HW: Masks, side: int) -> Masks:
    """A mask over its image, brought to (side, side) over the encoder's square: set where at least half of it is."""
    height, width = mask_HW.shape
    longest = max(height, width)
    square = Image.new("L", (longest, longest))
    square.paste(Image.fromarray(mask_HW.astype(np.uint8) * np.uint8(255)), (0, 0))
    return np.asarray(square.resize((side, side), Image.Resampling.BOX)) >= 128
