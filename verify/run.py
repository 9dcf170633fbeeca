"""One verification: open what is compared, measure it, check the thresholds, write the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ..distill import ImageMetrics, evaluate
from ..distill.metrics.masks import MaskComparison
from .config import VerifyConfig
from .gallery import build_gallery, take_specimens
from .inputs import Subject, open_head, open_subject, own_head
from .report import ReportData, check_report, keeping, provenance, read_curves, write_report
from .thresholds import audit_checks, failed_checks, run_checks, store_audit


def verify(config: VerifyConfig, *, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Compares a student with its teacher's stored embeddings and returns what `--json` prints.

    The keys are `images`, the metrics (see METRICS) over all cells and as `_valid` over valid ones, `passed`,
    `failed_checks` (name, metric, value and threshold of each), and `subject`: what was compared, by name. A store
    whose audit found embeddings that are not the teacher's fails too: nothing compared with them means anything.
    `progress(done, total)` counts images.

    Unless `config.points` is 0 there are also, over the student's and the teacher's masks for the same points:
    `miou` (intersection over union, mean over an image's points, then over images), `miou_min` (the worst image's
    mean), both None where an embedding isn't finite; `prompts` (points an image); and `empty_masks`, how many of all
    masks of `teacher` and `student` are empty. Two empty masks count 1, one empty mask 0.

    Raises ReportError, which has the result, when only the report can't be made; VerifyError, also when the store's
    head can't give masks, and the other rooms' errors for a damaged store, a student's file or a changed image.
    """
    if config.report is not None:
        check_report(config.report)
    subject = open_subject(config)
    with subject.store:
        masks = open_masks(subject, config.points) if config.points else None
        numbers, per_image = evaluate(
            subject.student,
            subject.store,
            subject.rows,
            subject.image_root,
            subject.compute,
            mean_embedding=subject.mean_CHW,
            on_embeddings=None if masks is None else masks.add,
            on_image=progress,
        )
        result = _result(config, subject, numbers | (masks.result() if masks else {}))
        if config.report is not None:
            with keeping(result, result["subject"]):
                write_report(config.report, _report_data(subject, result, per_image, masks))
    return result


def open_masks(subject: Subject, side: int) -> MaskComparison:
    """A comparison of the subject's masks for side x side points an image. Raises as `open_head`."""
    records = {record.row: record for record in subject.store.manifest.records("done")}
    own = own_head(subject.file, subject.store.spec.image_size, subject.compute.device)
    return MaskComparison(open_head(subject.store, subject.compute.device), records, side, own)


def _result(config: VerifyConfig, subject: Subject, numbers: Mapping[str, Any]) -> dict[str, Any]:
    audit = store_audit(subject.store)
    failed = failed_checks([*run_checks(numbers, config.thresholds), *audit_checks(audit)])
    return {
        "images": len(subject.rows),
        **numbers,
        "passed": not failed,
        "failed_checks": failed,
        "subject": {
            **subject.names(),
            "split": config.split,
            "audit": audit,
            "thresholds": config.thresholds,
            "report": None if config.report is None else str(config.report),
        },
    }


def _report_data(
    subject: Subject,
    result: dict[str, Any],
    per_image: Sequence[ImageMetrics],
    masks: MaskComparison | None,
) -> ReportData:
    run = subject.run
    return ReportData(
        result=result,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        provenance=provenance(subject, result["subject"]["split"]),
        cosines=[image.cosine_valid for image in per_image if image.cosine_valid is not None],
        curves=None if run is None else read_curves(run.history(), run.config["config"]["loss_region"]),
        gallery=build_gallery(*take_specimens(subject, per_image, masks)),
    )
