"""Tables of an evaluation, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...common.errors import counted, shown
from ...common.table import Table
from ...sam.labels.annotations import CROWD
from ..table import number
from . import iou

ABSENT = "-"
"""Cell without a number."""

MOST_NAMED = 10
"""Largest number of failed images named in the terminal; `--json` and the report name all of them."""

LABEL_HEADINGS = {
    iou.BOX: "box",
    iou.CENTRE: "center",
    iou.TOP_SCORED: "center, picked of 3",
    iou.ORACLE: "center, best of 3",
}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of cost, of mIoU with the teacher's masks and of mIoU with labels, as far as measured.

    Args:
        result: result of `evaluate_masks`.
    """
    models: Sequence[Mapping[str, Any]] = result["models"]
    if not result["evaluated"]:
        return []
    found = [_cost_table(models)]
    if any(model["teacher"] for model in models):
        found.append(_teacher_table(result, models))
    if any(model["labels"] for model in models):
        found.append(_label_table(result, models))
    return found


def evaluation_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the lines that `mobilesam evaluate` prints.

    Args:
        result: result of `evaluate_masks`.
    """
    evaluated = result["evaluated"]
    counts = f"{evaluated:,} of {counted(result['images'], 'image')}"
    if result["reference"] is not None and result["reference"]["store"] is not None:
        counts += f", split {result['split']}"
    lines = [counts]
    lines += [f"note: {note}" for note in result["notes"]]
    for model in result["models"]:
        if model["licence"] is not None:
            lines.append(f"licence of {model['name']}: {model['licence']}")
        lines += [f"note on {model['name']}: {note}" for note in model["notes"]]
    for table in tables(result):
        lines += ["", *table.lines()]
    failed = result["failed"]
    if failed:
        lines += ["", f"{counted(len(failed), 'image')} failed:"]
        lines += [
            f"  {one['key']}: {one['reason'].removeprefix(one['key'] + ': ')}" for one in failed[:MOST_NAMED]
        ]
        lines += [f"  and {len(failed) - MOST_NAMED:,} more"] if len(failed) > MOST_NAMED else []
    if not evaluated:
        lines += ["", no_numbers(result)]
    if result["report"]:
        lines += ["", f"report  {result['report']}"]
    return [shown(line) for line in lines]


def no_numbers(result: Mapping[str, Any]) -> str:
    """Explain why no image could be evaluated."""
    if result["failed"]:
        return "nothing could be evaluated: every image failed, or has nothing to be compared with"
    teacher = " (--points 0 leaves out the teacher's masks)" if result["reference"] is not None else ""
    labels = result["labels"]
    if labels is None:
        return (
            "nothing to compare with: give --store, --teacher, or labels of these images (--coco, --label-masks, or "
            f"SA-1B's JSON beside each image){teacher}"
        )
    if labels["left_out"]:
        return f"nothing to judge: {_all_left_out(labels['left_out'])}{teacher}"
    if not labels["images"]:
        return f"nothing to judge: the labels are of other images{teacher}"
    images = labels["images"]
    return f"nothing to judge: the labels name {counted(images, 'image')} and no object in {_them(images)}{teacher}"


def _all_left_out(left_out: Mapping[str, int]) -> str:
    """Return the number of objects of which none can be used, and why."""
    count = sum(left_out.values())
    objects = counted(count, "labelled object")
    if list(left_out) == [CROWD]:
        return f"{objects}, a crowd" if count == 1 else f"{objects}, all crowds"
    return f"{objects}, left out ({_reasons(left_out)})"


def _reasons(left_out: Mapping[str, int]) -> str:
    return "; ".join(f"{reason}: {count:,}" for reason, count in left_out.items())


def _them(count: int) -> str:
    return "it" if count == 1 else "them"


def _cost_table(models: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for model in models:
        macs = model["encoder_macs"]
        rows.append(
            [
                model["name"],
                model["kind"],
                ABSENT if model["student_size"] is None else str(model["student_size"]),
                ABSENT if model["parameters"] is None else f"{model['parameters']:,}",
                ABSENT if macs is None else f"{macs / 1e9:.3g} G",
                ABSENT if model["encoder_ms"] is None else f"{model['encoder_ms']:,.1f}",
                ABSENT if model["decoder_ms"] is None else f"{model['decoder_ms']:,.1f}",
            ]
        )
    return Table(
        title="Cost on this machine",
        note="Side of the encoder's input in pixels; parameters of encoder and decoder; multiply-accumulates of the "
        "encoder; milliseconds for an image and for one prompt, medians. For FastSAM: segmenting everything, from "
        "pixels to masks.",
        columns=["model", "kind", "pixels", "parameters", "MACs", "encoder ms", "decoder ms"],
        numeric=[False, False, True, True, True, True, True],
        rows=rows,
    )


def _teacher_table(result: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> Table:
    protocols = list(models[0]["teacher"])
    side, images = result["points"], result["evaluated"]
    left_out = sum(result["left_out"].values())
    asked = side * side * images * len(result["left_out"])
    fit = f" {left_out:,} of {asked:,} pairs don't fit into their image and are left out." if left_out else ""
    return Table(
        title=f"mIoU with {shown(str(result['reference']['teacher']))}'s masks, {side} x {side} points in "
        f"{counted(images, 'image')}",
        note="One foreground point; then one foreground and one background point, at a distance in pixels. Mean over "
        f"an image's prompts, then over images.{fit}",
        columns=[
            "model",
            *(name.replace("pair_", "+- ") + (" px" if "pair" in name else "") for name in protocols),
        ],
        numeric=[False, *(True for _ in protocols)],
        rows=[[model["name"], *_ious(model["teacher"], protocols)] for model in models],
    )


def _label_table(result: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> Table:
    images = counted(result["labelled"], "image")
    headings = [LABEL_HEADINGS[name] for name in iou.LABEL_PROTOCOLS]
    objects = max((one["prompts"] for model in models for one in model["labels"].values() if one), default=0)
    left_out = result["labels"]["left_out"]
    fewer = f" {sum(left_out.values()):,} left out ({_reasons(left_out)})." if left_out else ""
    return Table(
        title=f"mIoU with labels, {counted(objects, 'object')} in {images}",
        note="Single masks for the object's box and for its innermost point; of three masks for that point, the one "
        f"with the highest predicted IoU, and the best one. Mean over objects.{fewer}",
        columns=["model", *headings],
        numeric=[False, *(True for _ in headings)],
        rows=[[model["name"], *_ious(model["labels"], iou.LABEL_PROTOCOLS)] for model in models],
    )


def _ious(found: Mapping[str, Mapping[str, Any] | None], protocols: Sequence[str]) -> list[str]:
    values = [found.get(name) for name in protocols]
    return [ABSENT if value is None else number(value["miou"], ".4f") for value in values]
