"""Gallery of the worst and the best images of a verification: panels of pictures for the report.

Shape suffixes: B images, C channels, H and W rows and columns, h and w those of low-resolution masks, g side of the
embedding's grid, P prompts of one point each, p some of them, Y and X rows and columns of the grid of points, 1 one
image, 2 (x, y).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..distill import Batch, ImageMetrics, Loader, embed
from ..distill.metrics.evaluate import teacher_embeddings
from ..distill.metrics.masks import Floats, MaskComparison, grid_points
from ..sam.modeling.head import SamHead
from ..sam.modeling.masks import MASK_THRESHOLD, PROMPTS_AT_ONCE, mask_cover, point_logits
from ..store import ImageRecord
from .evaluate.images import StoreImages
from .inputs import Inputs
from .rendering.images import (
    LARGE_SIDE,
    POINT_COLOURS,
    EmbeddingColours,
    MaskPanel,
    PointMasks,
    at_side,
    choose_points,
    common_scale,
    cosine_distance,
    mask_panel,
    paint_error,
    png_uri,
    thumbnail_uri,
    usable,
)
from .summary import example_positions, ranked, scores_of

KEPT_BYTES = 2**28
"""Most memory for embeddings of the student that are kept for the gallery: 64 images at 1024 pixels."""

CANDIDATES_PER_SIDE = 8
"""Largest number of points in each direction that are tried for masks to show."""


def worst_and_best(scores: Sequence[float | None], count: int = 6) -> tuple[list[int], list[int]]:
    """Return the indices of the lowest and of the highest scores, the most extreme first; no index is in both lists.

    Args:
        scores: scores of images; an undefined score (None or NaN) is in neither list.
        count: largest length of each list. If there are fewer than 2 * `count` scores, the lower half (rounded up)
            and the upper half are returned.
    """
    order = ranked(scores)
    worst = order[: min(count, (len(order) + 1) // 2)]
    best = order[len(order) - min(count, len(order) // 2) :][::-1]
    return worst, best


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its embeddings by teacher and student."""

    key: str
    """The image's key in the store."""
    photo_HWC: npt.NDArray[np.uint8]
    """uint8 RGB (H, W, 3), the photo at the size at which its masks are drawn."""
    valid_gg: npt.NDArray[np.bool_]
    """bool (g, g), True for cells whose centre lies in the image."""
    teacher_CHW: npt.NDArray[np.floating]
    """float32 (256, g, g)."""
    student_CHW: npt.NDArray[np.floating]
    """float32 (256, g, g)."""
    metrics: Mapping[str, Any]
    """`cosine`, `cosine_valid`, `mse`, `mse_valid` of this image."""
    masks: PointMasks | None = None
    """Masks of some points; None if masks weren't compared."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One sample as data URIs and numbers."""

    name: str
    size: tuple[int, int]
    """Height and width of the photo's picture in pixels."""
    pictures: Mapping[str, str]
    """Data URIs of `photo`, `teacher`, `student` (embeddings as colours) and `error`."""
    metrics: Mapping[str, float]
    error_max: float
    """Largest 1 - cosine over the valid cells."""
    masks: MaskPanel | None


@dataclass(frozen=True, kw_only=True)
class Example:
    """One of the photos at the top of the page: photo, teacher and student side by side."""

    place: str
    """"best", "median" or "worst"; "" for the only photo."""
    panel: Panel
    pictures: Mapping[str, str]
    """Data URIs of `photo`, `teacher` and `student`: the models' masks over the photo, without masks embeddings."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images that the page shows."""

    worst: Sequence[Sample]
    """The worst images, the worst first."""
    best: Sequence[Sample]
    """The best images, the best first."""
    examples: Mapping[str, Sample]
    """Images at the top of the page, by their place among all images: "best", "median", "worst"."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Panels that share one set of colours and one error scale."""

    worst: list[Panel]
    best: list[Panel]
    examples: list[Example]
    explained: float
    """Share of the teacher's variance that the colours show, 0 to 1."""
    error_top: float
    """Upper end of the error scale, as 1 - cosine."""
    error_bar: str
    """Colour bar of the error scale from 0 to `error_top`: data URI of a picture one pixel high."""


def build_gallery(samples: Samples) -> Gallery | None:
    """Fit the colours and the error scale to all samples, and paint their panels.

    Args:
        samples: images to show.

    Returns:
        The gallery; None without samples.
    """
    every = list({id(s): s for s in [*samples.worst, *samples.best, *samples.examples.values()]}.values())
    if not every:
        return None
    colours = EmbeddingColours.fit((s.teacher_CHW, s.valid_gg) for s in every)
    errors = [cosine_distance(s.student_CHW, s.teacher_CHW, s.valid_gg) for s in every]
    top = common_scale(errors)
    panels = {id(s): _panel(s, error_HW, colours, top) for s, error_HW in zip(every, errors, strict=True)}
    return Gallery(
        worst=[panels[id(s)] for s in samples.worst],
        best=[panels[id(s)] for s in samples.best],
        examples=_examples(samples.examples, panels),
        explained=colours.explained,
        error_top=top,
        error_bar=png_uri(paint_error(np.linspace(0, 1, 128)[None] ** 2, 1.0)),
    )


def _examples(samples: Mapping[str, Sample], panels: Mapping[int, Panel]) -> list[Example]:
    """Return one example of each different photo: of two photos there is no median, and one has no place."""
    different = {id(s): (place, s) for place, s in samples.items() if place != "median"}
    for place, s in samples.items():
        different.setdefault(id(s), (place, s))
    order = [pair for pair in samples.items() if different[id(pair[1])] == pair]
    return [_example("" if len(order) == 1 else place, s, panels[id(s)]) for place, s in order]


def _example(place: str, s: Sample, panel: Panel) -> Example:
    if s.masks is None:
        pictures = {name: panel.pictures[name] for name in ("teacher", "student")}
    else:
        masks = mask_panel(s.photo_HWC, s.masks, LARGE_SIDE)
        pictures = {"teacher": masks.teacher, "student": masks.student}
    return Example(
        place=place,
        panel=panel,
        pictures={"photo": thumbnail_uri(s.photo_HWC, LARGE_SIDE), **pictures},
    )


def _panel(s: Sample, error_HW: npt.NDArray[np.floating], colours: EmbeddingColours, top: float) -> Panel:
    height, width = s.photo_HWC.shape[:2]
    return Panel(
        name=s.key,
        size=(height, width),
        pictures={
            "photo": thumbnail_uri(s.photo_HWC),
            "teacher": png_uri(colours.paint(s.teacher_CHW, s.valid_gg)),
            "student": png_uri(colours.paint(s.student_CHW, s.valid_gg)),
            "error": png_uri(paint_error(error_HW, top)),
        },
        metrics=s.metrics,
        error_max=float(error_HW.max()),
        masks=None if s.masks is None else mask_panel(s.photo_HWC, s.masks),
    )


class KeptEmbeddings:
    """Embeddings of the student that needn't be computed again for the gallery, by row; none if they are too many.

    Args:
        inputs: inputs of the verification.
    """

    def __init__(self, inputs: Inputs) -> None:
        grid = inputs.store.spec.grid
        self._keeps = len(inputs.rows) * 256 * grid * grid * 4 <= KEPT_BYTES
        self._by_row: dict[int, Tensor] = {}

    def add(self, rows: Sequence[int], student_BCHW: Tensor) -> None:
        """Keep the embeddings of a batch, if there is room for all.

        Args:
            rows: rows of the B images.
            student_BCHW: float32 (B, 256, g, g).
        """
        if self._keeps:
            self._by_row |= zip(rows, student_BCHW.cpu().split(1), strict=True)

    def get(self, row: int) -> Tensor | None:
        """Return a row's embedding, float32 (1, 256, g, g) on the CPU; None if it wasn't kept."""
        return self._by_row.get(row)


def load_samples(
    inputs: Inputs,
    per_image: Sequence[ImageMetrics],
    masks: MaskComparison | None,
    kept: KeptEmbeddings,
    drawn: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Return the worst, the best and the median image, by their masks' mean IoU, with embeddings and a few masks.

    Without masks they are ranked by their cosine over valid cells. Masks are decoded again, and so are embeddings
    computed that weren't kept: those of all images may take too much memory.

    Args:
        inputs: inputs of the verification, still open.
        per_image: metrics of each image, in the order of the inputs' rows.
        masks: comparison of the masks of all rows, in the same order; None leaves masks out.
        kept: embeddings of the student that are known.
        drawn: called with the number of photos done and the total.
    """
    scores = scores_of(per_image, None if masks is None else masks.per_image)
    worst, best = worst_and_best(scores)
    examples = example_positions(scores)
    chosen = list(dict.fromkeys([*worst, *best, *examples.values()]))
    rows = [inputs.rows[position] for position in chosen]
    records = [inputs.records[row] for row in rows]
    photos = StoreImages(inputs.store, records, inputs.image_root)
    samples: dict[int, Sample] = {}
    drawn(0, len(chosen))
    with (
        Loader(
            inputs.store,
            inputs.records,
            inputs.image_root,
            workers=1,
            student_size=inputs.student.info["student_size"],
        ) as loader,
        closing(loader.batches([row] for row in rows)) as batches,
    ):
        for index, (position, batch) in enumerate(zip(chosen, batches, strict=True)):
            photo_HWC = at_side(photos.read(index).pixels(), LARGE_SIDE)
            student_1CHW, teacher_1CHW = _embeddings(inputs, batch, kept.get(batch.rows[0]))
            samples[position] = Sample(
                key=records[index].key,
                photo_HWC=photo_HWC,
                valid_gg=batch.valid_BHW[0].numpy(),
                teacher_CHW=teacher_1CHW[0].cpu().numpy(),
                student_CHW=student_1CHW[0].cpu().numpy(),
                metrics=asdict(per_image[position]),
                masks=None
                if masks is None
                else _Drawing(masks, records[index], (photo_HWC.shape[0], photo_HWC.shape[1])).masks(
                    masks.ious[position], teacher_1CHW, student_1CHW
                ),
            )
            drawn(len(samples), len(chosen))
    return Samples(
        worst=[samples[position] for position in worst],
        best=[samples[position] for position in best],
        examples={place: samples[position] for place, position in examples.items()},
    )


@torch.no_grad()
def _embeddings(inputs: Inputs, batch: Batch, known_1CHW: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's embedding of a batch of one image, on the device."""
    if known_1CHW is None:
        return embed(inputs.student.encoder, batch, inputs.compute)
    device = inputs.compute.device
    return known_1CHW.to(device), teacher_embeddings(batch, device)


class _Drawing:
    """Masks of one photo, for a picture of it.

    Args:
        comparison: comparison of the masks, which has both heads and the points.
        record: the photo's record.
        size: height and width of the picture in pixels.
    """

    def __init__(self, comparison: MaskComparison, record: ImageRecord, size: tuple[int, int]) -> None:
        assert record.original_size is not None, "only committed rows are compared"
        assert record.resized_size is not None, "only committed rows are compared"
        self.comparison, self.size = comparison, size
        self.original_size, self.resized_size = record.original_size, record.resized_size
        self.points_P2 = grid_points(comparison.points_per_side, record.original_size)

    def masks(self, ious_P: Floats, teacher_1CHW: Tensor, student_1CHW: Tensor) -> PointMasks:
        """Decode the masks of a few points whose teacher's masks differ.

        Args:
            ious_P: float64 (P,), IoU of both models' masks at each point.
            teacher_1CHW: float32 (1, 256, g, g), on the heads' device.
            student_1CHW: float32 (1, 256, g, g), on the heads' device.
        """
        chosen, teacher_p1hw = self._choose(teacher_1CHW)
        student_p1hw = self._logits(self.comparison.student_head, student_1CHW, chosen)
        height, width = self.original_size
        return PointMasks(
            points_p2=self.points_P2[chosen] / (width, height),
            teacher_pHW=self._cover(teacher_p1hw),
            student_pHW=self._cover(student_p1hw),
            ious_p=ious_P[chosen],
            image_iou=float(ious_P.mean()),
            compared=len(ious_P),
        )

    def _choose(self, teacher_1CHW: Tensor) -> tuple[list[int], Tensor]:
        """Return points whose masks differ, those near the photo's centre first, and the teacher's logits there.

        Decoding ends as soon as there are enough.
        """
        candidates = self._candidates()
        step = PROMPTS_AT_ONCE[teacher_1CHW.device.type]
        logits: list[Tensor] = []
        chosen: list[int] = []
        for start in range(0, len(candidates), step):
            logits.append(self._logits(self.comparison.head, teacher_1CHW, candidates[start : start + step]))
            masks_phw = self._inside(torch.cat(logits))
            chosen = choose_points(masks_phw)
            if len(chosen) == len(POINT_COLOURS) and usable(masks_phw[chosen]).all():
                break
        return [candidates[i] for i in chosen], torch.cat(logits)[chosen]

    def _candidates(self) -> list[int]:
        """Return points of the grid, at most CANDIDATES_PER_SIDE a direction, those near its centre first."""
        side = self.comparison.points_per_side
        step = -(-side // CANDIDATES_PER_SIDE)
        points_YX = np.arange(side * side).reshape(side, side)[step // 2 :: step, step // 2 :: step]
        y, x = np.divmod(points_YX.ravel(), side)
        distances = np.maximum(np.abs(2 * y + 1 - side), np.abs(2 * x + 1 - side))
        return points_YX.ravel()[np.argsort(distances, kind="stable")].tolist()

    def _logits(self, head: SamHead, emb_1CHW: Tensor, points: Sequence[int]) -> Tensor:
        chosen_p2 = self.points_P2[list(points)]
        return point_logits(head, emb_1CHW, chosen_p2, self.original_size, self.resized_size)

    def _inside(self, logits_p1hw: Tensor) -> npt.NDArray[np.bool_]:
        """Return low-resolution masks without padding, bool (p, h, w)."""
        share = logits_p1hw.shape[-1] / self.comparison.head.image_size
        rows, columns = (max(1, round(side * share)) for side in self.resized_size)
        return (logits_p1hw[:, 0, :rows, :columns] > MASK_THRESHOLD).cpu().numpy()

    def _cover(self, logits_p1hw: Tensor) -> Floats:
        side = self.comparison.head.image_size
        return mask_cover(logits_p1hw, side, self.size, self.resized_size).cpu().numpy()
