"""Tables of our results next to the paper's, as lines of Markdown, from the results of examples/paper.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mobilesam.common.errors import counted
from mobilesam.verify.sweep.aggregate import Group, Spread, grouped

# Table 4 of the paper: batch, epochs, iterations, mIoU.
PAPER_LENGTHS = ((4, 2, "50k", 0.7057), (8, 4, "50k", 0.7286), (8, 8, "100k", 0.7447))
# Table 2: mIoU and cost.
PAPER_WAYS = {
    "decoupled": (0.75, "batch 4, 55k iterations, 11K images, 2 GPUs"),
    "coupled": (0.72, "batch 128, 180k iterations, 11M images, 128 GPUs"),
}
# Against FastSAM: mIoU with SAM's masks, by the distance of the two points.
PAPER_DISTANCES = (100, 200, 300, 400, 500)
PAPER_PAIRS = {
    "FastSAM, in the paper": (0.27, 0.33, 0.37, 0.41, 0.41),
    "MobileSAM, in the paper": (0.73, 0.71, 0.74, 0.73, 0.73),
}
TEACHER = "vit_nano"
LABELS = {"student": "our student", "control": "our control"}
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom."""

Results = Mapping[str, Any]


def comparison_lines(results: Results) -> list[str]:
    """Return the lines of Table 4, Table 2 and the control."""
    lengths, ways = grouped(results["lengths"]), grouped(results["ways"])
    known = [group for group in ways if group.options["objective"] in PAPER_WAYS]
    known.sort(key=lambda group: PAPER_WAYS[group.options["objective"]][0])
    names = [group.options["objective"] for group in known]
    decoupled = [group for group in ways if group.options["objective"] == "decoupled"]
    return [
        f"{_setting(results, ('lengths', 'ways', 'control'))} The figures are means over seeds, ± their standard "
        "deviation.",
        "",
        "### Table 4: batch, epochs, iterations",
        "",
        *_length_table(lengths),
        "",
        *_order(lengths, [row[3] for row in PAPER_LENGTHS], [_length(group) for group in lengths]),
        "",
        "### Table 2: ways to distil",
        "",
        *_way_table(ways),
        "",
        *_order(known, [PAPER_WAYS[name][0] for name in names], names),
        "",
        "### The control: embeddings of other pictures",
        "",
        *_control_table(grouped(results["control"]), decoupled),
    ]


def recipe_lines(results: Results) -> list[str]:
    """Return the lines of the default recipe and its control: masks, pairs of points, labels, cost."""
    return [
        _setting(results, ("student", "control")),
        "",
        "### The default recipe",
        "",
        *_control_table(grouped(results["control"]), grouped(results["student"])),
        "",
        *_evaluation(results),
    ]


PARTS: Mapping[str, Callable[[Results], list[str]]] = {
    "comparisons": comparison_lines,
    "recipe": recipe_lines,
}


def document(text: str, part: str, results: Results) -> str:
    """Return the text with a part's tables between its markers.

    Raises:
        ValueError: The text does not have both markers once, in this order.
    """
    begin, end = f"<!-- {part} -->", f"<!-- /{part} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the document needs the markers {begin} and {end}, once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n" + "\n".join(PARTS[part](results)) + f"\n\n{end}{rest.split(end)[1]}"


def _setting(results: Results, stages: Sequence[str]) -> str:
    scale, runs = results["scale"], [run for stage in stages for run in results[stage]]
    different = {run["run"]: run for run in runs}
    seconds = sum(run["seconds"] + run["judged_seconds"] for run in different.values())
    seeds, one = sorted({run["options"]["seed"] for run in runs}), runs[0]
    cores = counted(results["cores"], "core")
    return (
        f"{one['images']['train']:,} training pictures, {one['test']['images']} test pictures of another seed, "
        f"image size {scale['image_size']}, {one['test']['prompts']} points per picture, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}. {len(different)} runs took "
        f"{seconds / 3600:.2f} hours of training and evaluation on {cores}. mIoU compares with the masks of "
        "vit_nano, the teacher."
    )


def _length_table(groups: Sequence[Group]) -> list[str]:
    rows = [
        [f"{batch} / {epochs} / {iterations}", f"{miou:.4f}", *_ours(group, _length(group))]
        for (batch, epochs, iterations, miou), group in zip(PAPER_LENGTHS, groups, strict=True)
    ]
    return _table(
        ["paper: batch / epochs / iterations", "paper's mIoU", "ours", "our mIoU", "lowest", "highest"], rows
    )


def _way_table(groups: Sequence[Group]) -> list[str]:
    rows = []
    for group in groups:
        name = group.options["objective"]
        miou, took = PAPER_WAYS.get(name, (None, "not in the table"))
        paper = "" if miou is None else f"{miou:.2f}"
        seconds = group.spread("seconds")
        assert seconds is not None
        rows.append([name, paper, took, *_ours(group, _length(group)), f"{seconds.mean:,.0f} s"])
    columns = [
        "",
        "paper's mIoU",
        "paper's training",
        "ours",
        "our mIoU",
        "lowest",
        "highest",
        "our training",
    ]
    return _table(columns, rows)


def _control_table(control: Sequence[Group], own: Sequence[Group]) -> list[str]:
    labelled = [("embeddings of other pictures", group) for group in control]
    labelled += [("its own embeddings", group) for group in own]
    rows = [[text, *_ours(group, _length(group))] for text, group in labelled]
    return _table(["trained on", "batch / epochs / iterations", "mIoU", "lowest", "highest"], rows)


def _evaluation(results: Results) -> list[str]:
    """Return the lines of student, control and teacher: pairs of points, labels, cost."""
    found = results["evaluation"]
    distances, models = results["scale"]["distances"], found["models"]
    names = ["point", *(f"pair_{distance}" for distance in distances)]
    pairs = [[name, "", *(f"{miou:.2f}" for miou in mious)] for name, mious in PAPER_PAIRS.items()]
    pairs += [
        [_called(model), *(_miou_text(model["teacher"][name]) for name in names)]
        for model in models
        if model["name"] != TEACHER
    ]
    far = [
        f"{of} px" if of == here else f"{of} px, {here} here"
        for of, here in zip(PAPER_DISTANCES, distances, strict=True)
    ]
    labels = [[_called(model), *map(_miou_text, model["labels"].values())] for model in models]
    cost = [
        [
            _called(model),
            f"{model['encoder_parameters']:,}",
            f"{model['encoder_macs'] / 1e9:.3g} G",
            f"{model['encoder_ms']:,.1f}",
            f"{model['decoder_ms']:,.1f}",
        ]
        for model in models
    ]
    return [
        "### Against FastSAM: a foreground and a background point",
        "",
        *_table(["mIoU with the teacher's masks", "one point", *far], pairs),
        "",
        "### Against labels",
        "",
        f"{found['labelled']} pictures, all objects of each. Prompts are an object's box or its innermost point. Of "
        "the three masks for the point, *picked* is the one that the model rates best, *best* the one closest to the "
        "label.",
        "",
        *_table(["", "box", "point", "picked of 3", "best of 3"], labels),
        "",
        "### Table 1: parameters and speed",
        "",
        *_table(["", "encoder's parameters", "multiply-accumulates", "encoder ms", "decoder ms"], cost),
    ]


def _called(model: Results) -> str:
    return LABELS.get(model["name"], model["name"])


def _miou_text(found: Results | None) -> str:
    return "" if found is None else f"{found['miou']:.4f}"


def _ours(group: Group, length: str) -> list[str]:
    miou = _miou(group)
    return [length, miou.text(".4f"), f"{miou.lowest:.4f}", f"{miou.highest:.4f}"]


def _length(group: Group) -> str:
    steps = group.spread("steps")
    assert steps is not None, "only finished runs are grouped"
    return f"{group.options['batch_size']} / {group.options['epochs']} / {steps.mean:,.0f}"


def _miou(group: Group) -> Spread:
    miou = group.verified("miou")
    if miou is None:
        raise ValueError(
            f"no run of {dict(group.options)} has masks to compare: its embeddings are not finite"
        )
    return miou


def _order(groups: Sequence[Group], paper: Sequence[float], names: Sequence[str]) -> list[str]:
    """Return a list that compares neighbours of the paper's ranking (lower first) with ours."""
    lines = []
    neighbours = zip(pairwise(groups), pairwise(paper), pairwise(names), strict=True)
    for (low, high), (paper_low, paper_high), (one, other) in neighbours:
        difference = _miou(high).mean - _miou(low).mean
        lines.append(
            f"- {other} against {one}: {paper_high - paper_low:+.4f} in the paper, {difference:+.4f} here: "
            f"{_verdict(_miou(low), _miou(high))}"
        )
    return lines


def _verdict(low: Spread, high: Spread) -> str:
    """Judge the difference of two means by its standard error over seeds (Welch's test)."""
    if low.deviation is None or high.deviation is None:
        return "one seed, so it may be chance"
    variances = [(each.deviation or 0.0) ** 2 / each.count for each in (low, high)]
    error, difference = math.sqrt(sum(variances)), high.mean - low.mean
    # Welch's degrees of freedom.
    spread = sum(part**2 / (each.count - 1) for part, each in zip(variances, (low, high), strict=True))
    freedom = int(error**4 / spread + 1e-9) if spread else len(T_QUANTILES)
    if abs(difference) <= T_QUANTILES[min(freedom, len(T_QUANTILES)) - 1] * error:
        return f"too close to tell, the standard error being {error:.4f}"
    verdict = "the same order" if difference > 0 else "the opposite order"
    return f"{verdict}, at {abs(difference) / error:.1f} standard errors" if error else verdict


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
