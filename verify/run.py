"""`mobilesam verify`: open the inputs, measure embeddings and masks, check the thresholds, write the report.

Shape suffixes: B images, C channels, H and W rows and columns of the embedding's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from ..common.errors import VerifyError, counted
from ..distill import ImageMetrics, evaluate
from ..distill.expectations import constant_note, run_note, training_skill
from ..distill.metrics.masks import MaskComparison
from ..distill.students.student_file import TRAINED_HEAD
from ..sam.registry import hq_note
from .config import VerifyConfig
from .gallery import Gallery, KeptEmbeddings, build_gallery, load_samples
from .inputs import Inputs, no_masks, open_head, open_inputs, open_student_head
from .rendering.charts import read_curves
from .report import VERIFY_REPORT, ReportData, check_report, provenance, report_errors, write_report
from .summary import headline, summary_facts
from .thresholds import audit_checks, failed_checks, run_checks, store_audit


def verify(
    config: VerifyConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
    phase: Callable[[str], None] = lambda text: None,
    drawn: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compare a student's embeddings with its teacher's stored ones, and both models' masks for the same points.

    Args:
        config: all options.
        progress: called with the number of images done and the total.
        phase: called with what begins, where there are no images to count.
        drawn: for a report, called with the number of photos drawn and the total.

    Returns:
        The JSON object that `--json` prints:

        - `summary`: the answer in one sentence. With masks `follows`: {photos, of, threshold}, the number of photos
          on which the mean IoU of both models' masks reaches the threshold (see `FOLLOWS_IOU`), and of all photos.
          `examples`: the `best`, the `median` and the `worst` photo by that IoU (without masks by cosine):
          {key, cosine_valid, miou} of each; None if none is defined. `held_out` and `trained_on`: {images,
          cosine_valid, miou, follows} of the photos that the run wasn't, and was, trained on; None unless `split` is
          "all" and there are both. `train_skill_valid`: the skill that distill measured on the run's training rows;
          None without it.

        - `images`, their number; the metrics (see `METRICS`) over all cells, and with `_valid` appended to their
          names over valid cells.
        - Unless `config.points` is 0, or the store has no head and none is given: `miou` (intersection over union of
          the student's and the teacher's mask, mean over an image's points, then over images) and `miou_min` (the
          worst image's mean), both None if an embedding isn't finite; `miou_constant`, the same as `miou` for the
          embedding that skill compares with, which knows nothing of the image; `prompts`, the number of points per
          image; `empty_masks`, the number of empty masks of `teacher` and `student`. The IoU of two empty masks is
          1, that of an empty and another mask 0.
        - `no_better_than_constant`: True if the skill over valid cells is 0 or less, on the run's training rows or,
          for a student without its run, on the rows compared; a note says so. None if the run isn't finished, its
          objective compares masks alone, or the skill is undefined.
        - `passed`; `failed_checks`: {check, metric, value, threshold} of each. An audit of the store that is out of
          tolerance fails too, since its embeddings are not the teacher's.
        - `subject`: student, store, settings and notes of the comparison.

    Raises:
        ReportError: only the report failed; the error carries the result.
        VerifyError: the inputs can't be compared, or the store's head can't be used.
        StoreError, DistillError, SamError: a store or student is missing or damaged, or an image changed.
    """
    if config.report is not None:
        check_report(config.report, VERIFY_REPORT)
    phase("loading the student")
    inputs = open_inputs(config)
    with inputs.store:
        phase("comparing images")
        kept = KeptEmbeddings(inputs) if config.report is not None else None
        numbers, per_image, masks = _measure(inputs, config, progress, kept)
        facts = summary_facts(inputs, config.split, per_image, None if masks is None else masks.per_image)
        result = _result(config, inputs, numbers | facts)
        if config.report is not None and kept is not None:
            with report_errors(result, result["subject"]):
                phase("drawing photos")
                gallery = build_gallery(load_samples(inputs, per_image, masks, kept, drawn))
                phase("writing the report")
                write_report(config.report, _report_data(inputs, result, per_image, gallery))
    return result


def _measure(
    inputs: Inputs,
    config: VerifyConfig,
    progress: Callable[[int, int], None] | None,
    kept: KeptEmbeddings | None,
) -> tuple[dict[str, Any], list[ImageMetrics], MaskComparison | None]:
    """Return the metrics over all rows, the metrics of each image, and the comparison of masks, if there is one."""
    masks = _open_masks(inputs, config) if config.points else None

    def on_embeddings(rows: Sequence[int], student_BCHW: Tensor, teacher_BCHW: Tensor) -> None:
        if masks is not None:
            masks.update(rows, student_BCHW, teacher_BCHW)
        if kept is not None:
            kept.add(rows, student_BCHW)

    numbers, per_image = evaluate(
        inputs.student.encoder,
        inputs.store,
        inputs.rows,
        inputs.image_root,
        inputs.compute,
        mean_embedding=inputs.mean.mean_CHW,
        on_embeddings=on_embeddings,
        on_image=progress,
    )
    return numbers | ({} if masks is None else masks.result()), per_image, masks


def _open_masks(inputs: Inputs, config: VerifyConfig) -> MaskComparison | None:
    """Open a comparison of masks, and note its limits; return None if the store's teacher has no head.

    Raises like `open_head`, and VerifyError if masks are asked for that can't be made.
    """
    device, store = inputs.compute.device, inputs.store
    if (reason := no_masks(store, config.head)) is not None:
        if config.min_miou is not None:
            raise VerifyError(f"--min-miou {config.min_miou:g} asks for masks, but {reason}")
        inputs.notes.append(f"no masks are compared: {reason}")
        return None
    if config.head is None and (note := hq_note(store.spec.teacher)) is not None:
        inputs.notes.append(note)
    student_head = open_student_head(inputs.student, store.spec.image_size, device)
    return MaskComparison(
        open_head(store, device, config.head),
        inputs.records,
        config.points,
        student_head,
        constant_CHW=inputs.mean.mean_CHW.float().to(device),
    )


def _result(config: VerifyConfig, inputs: Inputs, numbers: Mapping[str, Any]) -> dict[str, Any]:
    audit = store_audit(inputs.store)
    failed = failed_checks([*run_checks(numbers, config.thresholds), *audit_checks(audit)])
    skill, note = _skill_of_training(inputs, numbers)
    if note is not None:
        inputs.notes.insert(0, note)
    result = {
        "images": len(inputs.rows),
        **numbers,
        "no_better_than_constant": None if skill is None else skill <= 0,
        "train_skill_valid": None if inputs.student.run is None else skill,
        "passed": not failed,
        "failed_checks": failed,
        "subject": {
            **inputs.describe(),
            "split": config.split,
            "audit": audit,
            "thresholds": config.thresholds,
            "report": None if config.report is None else str(config.report),
        },
    }
    return result | {"summary": headline(result)}


def _skill_of_training(inputs: Inputs, numbers: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """Return the skill that says if the student is better than a constant, and the note if it isn't.

    It is that of the run's training rows. Without a run, it is that of the rows compared, unless a head that was
    trained with the student suggests that embeddings weren't what it learned.
    """
    student = inputs.student
    if student.run is not None:
        return training_skill(student.run), run_note(student.run)
    if student.info.get(TRAINED_HEAD):
        return None, None
    skill: float | None = numbers["skill_valid"]
    return skill, constant_note(skill, f"the {counted(len(inputs.rows), 'image')} compared", None)


def _report_data(
    inputs: Inputs,
    result: dict[str, Any],
    per_image: Sequence[ImageMetrics],
    gallery: Gallery | None,
) -> ReportData:
    run = inputs.student.run
    return ReportData(
        result=result,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        provenance=provenance(inputs, result["subject"]["split"]),
        cosines=[image.cosine_valid for image in per_image if image.cosine_valid is not None],
        curves=None if run is None else read_curves(run.history(), run.description.options["loss_region"]),
        gallery=gallery,
    )
