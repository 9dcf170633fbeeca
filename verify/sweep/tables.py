"""Tables of a sweep in the form of the MobileSAM paper's Tables 4 (batch size, epochs) and 2 (ways to distil)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.errors import counted, shown
from ...common.table import Table
from .aggregate import Group, Spread, grouped, varying, verified_split
from .trial import FAILED

_LENGTH = ("batch_size", "epochs")
_ABSENT = "-"


def sweep_tables(outcomes: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the table of batch size and epochs and, if there are several objectives, that of ways to distil.

    Args:
        outcomes: outcomes of `run_trial`; without a finished one there are no tables.
    """
    groups = grouped(outcomes)
    if not groups:
        return []
    tables = [_length_table(groups)]
    if len({group.options["objective"] for group in groups}) > 1:
        tables.append(_objective_table(groups))
    return tables


def caption(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Describe the measurement of the tables' numbers: masks, points, images."""
    done = [outcome for outcome in outcomes if "val" in outcome]
    if not done:
        return "nothing was measured"
    split = verified_split(done)
    numbers = done[0][split]
    image = "image" if numbers["images"] == 1 else "images"
    where = (
        f"held-out {image}" if split == "val" else f"{image} of {Path(done[0]['judged']['test_store']).name}"
    )
    points = counted(numbers["prompts"], "point")
    return (
        f"mIoU with the teacher's masks, {points} an image, {numbers['images']:,} {where}{_constants(done)}"
    )


def _constants(done: Sequence[Mapping[str, Any]]) -> str:
    """Return words on the students that are no better than a constant, with the mend if they had too few steps."""
    constant = [outcome for outcome in done if outcome.get("no_better_than_constant")]
    if not constant:
        return ""
    few = sum(outcome["too_few_steps"] for outcome in constant)
    mend = f"; {few:,} of them had too few steps, and --epochs auto takes enough" if few else ""
    share = f"{len(constant):,} of {counted(len(done), 'student')}"
    return f"; {share} no better than a constant on their training rows{mend}"


def failure_lines(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each run that failed, including those that keep the numbers of an earlier sweep."""
    return [
        shown(f"FAILED  {outcome['name']}: {' '.join(str(outcome['error']).split())}{_earlier(outcome)}")
        for outcome in outcomes
        if "error" in outcome
    ]


def _earlier(outcome: Mapping[str, Any]) -> str:
    return "" if outcome["status"] == FAILED else "; its earlier numbers are kept"


def other_options(groups: Sequence[Group]) -> list[str]:
    """Return the options other than batch size, epochs and objective in which groups differ."""
    return [name for name in varying(groups) if name not in (*_LENGTH, "objective")]


def _length_table(groups: Sequence[Group]) -> Table:
    named = [name for name in varying(groups) if name not in _LENGTH]
    ordered = sorted(groups, key=lambda group: (_placed(groups, group, named), _length(group)))
    columns = [
        *named,
        "batch",
        "epochs",
        "iterations",
        "seeds",
        "mIoU",
        "lowest",
        "highest",
        "skill",
        "cosine",
    ]
    rows = [[*_values(groups, group, named), *_length_cells(group)] for group in ordered]
    numeric = [False] * len(named) + [True] * (len(columns) - len(named))
    return Table(title="Batch, epochs and iterations", columns=_headings(columns), numeric=numeric, rows=rows)


def _length_cells(group: Group) -> list[str]:
    miou = group.verified("miou")
    return [
        *(str(value) for value in _length(group)),
        _text(group.spread("steps"), ",.0f"),
        _seeds(group),
        _text(miou, ".4f"),
        _ABSENT if miou is None else f"{miou.lowest:.4f}",
        _ABSENT if miou is None else f"{miou.highest:.4f}",
        _text(group.verified("skill_valid"), ".4f"),
        _text(group.verified("cosine_valid", "mean"), ".4f"),
    ]


def _objective_table(groups: Sequence[Group]) -> Table:
    named = ["objective", *other_options(groups)]
    ordered = sorted(groups, key=lambda group: (_length(group), _placed(groups, group, named)))
    columns = [*named, "mIoU", "batch", "iterations", "images", "epochs", "seeds", "seconds"]
    rows = []
    for group in ordered:
        batch, epochs = _length(group)
        cells = [
            _text(group.verified("miou"), ".4f"),
            str(batch),
            _text(group.spread("steps"), ",.0f"),
            _text(group.spread("images", "train"), ",.0f"),
            str(epochs),
            _seeds(group),
            _text(group.spread("seconds"), ",.0f"),
        ]
        rows.append([*_values(groups, group, named), *cells])
    numeric = [False] * len(named) + [True] * (len(columns) - len(named))
    return Table(title="Ways to distil", columns=_headings(columns), numeric=numeric, rows=rows)


def _length(group: Group) -> tuple[int, int]:
    return group.options["batch_size"], group.options["epochs"]


def _seeds(group: Group) -> str:
    """Return the number of runs as text, and the number of runs whose mIoU is undefined, if there are any."""
    miou, runs = group.verified("miou"), len(group.outcomes)
    defined = 0 if miou is None else miou.count
    return str(runs) if defined == runs else f"{runs}, {runs - defined} undefined"


def _placed(groups: Sequence[Group], group: Group, named: Sequence[str]) -> list[int]:
    """Return for each option the index of the group's value among all groups' values, for sorting."""
    return [
        list(dict.fromkeys(repr(each.options.get(name)) for each in groups)).index(
            repr(group.options.get(name))
        )
        for name in named
    ]


def _values(groups: Sequence[Group], group: Group, named: Sequence[str]) -> list[str]:
    return [
        shown(distinct_value(groups, group, name)) if name in group.options else _ABSENT for name in named
    ]


def distinct_value(groups: Sequence[Group], group: Group, name: str) -> str:
    """Format a group's value of an option so that it differs from other groups' values.

    Args:
        groups: all groups of the table.
        group: one of them.
        name: option that the group has.
    """
    return value_text(group.options[name], [each.options.get(name) for each in groups])


def value_text(value: Any, values: Sequence[Any] = ()) -> str:
    """Format an option's value: of a path the file's name, with as many parent folders as make it unique.

    Args:
        value: the value; None is shown as "none".
        values: all values of the option, among which paths have to differ.
    """
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or "/" not in str(value):
        return "none" if value is None else str(value)
    path, others = Path(value), {Path(other) for other in values if other is not None} - {Path(value)}
    for count in range(1, len(path.parts)):
        if all(other.parts[-count:] != path.parts[-count:] for other in others):
            return str(Path(*path.parts[-count:]))
    return str(path)


def _headings(columns: Sequence[str]) -> list[str]:
    return [column.replace("_", " ") for column in columns]


def _text(spread: Spread | None, digits: str) -> str:
    """Format a spread: the mean alone if all seeds have the same number, as for iterations."""
    if spread is None:
        return _ABSENT
    return format(spread.mean, digits) if spread.lowest == spread.highest else spread.text(digits)
