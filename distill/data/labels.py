"""Labels from annotations: objects drawn from each image for a training step, resized to the masks compared.

Shape suffixes: H and W rows and columns of an image's mask, Q objects drawn of one image (q of them exist),
M side of the masks compared, over the encoder's square.
"""

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

logger = logging.getLogger(__name__)

LARGEST_MASK_SIDE = 256

Masks = npt.NDArray[np.bool_]


def mask_side(image_size: int) -> int:
    """Return the side in pixels of the masks compared in training, M, for an encoder's square of `image_size` pixels.

    It is half the square's side, at most 256, the side of the masks that SAM's head predicts at 1024.
    """
    return min(image_size // 2, LARGEST_MASK_SIDE)


def count_annotated(root: Path, records: Iterable[ImageRecord]) -> int:
    """Count the images that have a JSON file beside them, usable or not.

    Args:
        root: folder of the images.
        records: records of the images.
    """
    files = AnnotationFiles(root)
    return sum(files.has_file(record.key) for record in records)


class AnnotationLabels:
    """Reader of SA-1B's JSON files beside the images, which draws other objects of an image in every epoch.

    Annotations are read again in each epoch. If they can't be used, the image has no objects in that epoch; a
    warning, once per image, names it. Threads may share an instance.

    Args:
        root: folder of the images.
        image_size: side of the encoder's square in pixels.
        objects: largest number of objects drawn per image, Q.
        seed: seed of the drawing, together with epoch and row.

    Attributes:
        side: side of the masks in pixels, M.
        broken: reason by key, for images whose annotations can't be used.
        empty: keys of images whose annotations contain no object.
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
        """Draw up to `objects` objects of an image.

        Args:
            record: the image.
            epoch: number of the epoch, from 0.

        Returns:
            bool (q, M, M), masks over the encoder's square, none of them empty; None if the image has no annotations.
        """
        try:
            annotations = self._files.read(record.key, size=record.original_size)
        except AnnotationError as error:
            self.mark_broken(record.key, str(error))
            return np.zeros((0, self.side, self.side), np.bool_)
        if annotations is None:
            return None
        if not len(annotations):
            with self._lock:
                self.empty.add(record.key)
        return self._choose(annotations, record.row, epoch)

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
