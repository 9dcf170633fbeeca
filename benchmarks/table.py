"""Tables of the benchmarks' figures in docs/PERFORMANCE.md, from the JSON that they printed.

    python -m benchmarks.table

reads every .bench/*.json that `make bench` has written, and replaces the part between the document's markers: one
line for each figure, and the benchmark's notes below. The rest of the document stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
HEAD = "| figure | value | target | | measured |\n|---|---|---|---|---|"
WORDS = {True: "reached", False: "**missed**", None: "not measured"}


@click.command(epilog="Exit code 3: no figures, or a document without the two markers.")
@click.option(
    "--results", type=click.Path(path_type=Path), default=ROOT / ".bench", help="Folder of JSON files."
)
@click.option(
    "--document",
    type=click.Path(path_type=Path),
    default=ROOT / "docs" / "PERFORMANCE.md",
    help="Document to change.",
)
def main(results: Path, document: Path) -> None:
    """Write the figures of all benchmarks into a document."""
    try:
        found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
        if not found:
            raise ValueError(f"no .json in {results}: make bench writes them")
        text = document.read_text()
        document.write_text(filled(text, markdown(found)))
    except (OSError, ValueError, KeyError) as error:
        click.echo(f"{document}: {error}" if isinstance(error, ValueError) else str(error), err=True)
        raise SystemExit(3) from error


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return Markdown of the benchmarks' results, name -> object printed by `report`, in the order given."""
    parts = []
    for machine, names in _by_machine(results).items():
        parts.append(machine)
        parts += [_section(name, results[name]) for name in names]
    return "\n\n".join(parts)


def filled(text: str, figures: str, name: str = "figures") -> str:
    """Return the text with `figures` between its markers.

    Args:
        text: Markdown text.
        figures: Markdown to put in.
        name: name in the markers.

    Raises:
        ValueError: the text doesn't have each marker once, in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the {name} go between one line {begin} and one {end} after it; put them in")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{figures}\n\n{end}{after}"


def _by_machine(results: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Group the benchmarks' names by a line that describes their machine."""
    found: dict[str, list[str]] = {}
    for name, result in results.items():
        line = "; ".join(f"{what} {value}" for what, value in result["machine"].items()) + "."
        found.setdefault(line, []).append(name)
    return found


def _section(name: str, result: Mapping[str, Any]) -> str:
    lines = [f"`python -m benchmarks.{name}`", "", HEAD]
    lines += [_row(figure) for figure in result["figures"]]
    if any(result["notes"]):
        lines += ["", *(f"- {_cell(note.strip())}" for note in result["notes"] if note)]
    return "\n".join(lines)


def _row(figure: Mapping[str, Any]) -> str:
    value = "" if figure["value"] is None else f"{figure['value']:.3g}"
    wanted = f"{'>=' if figure['at_least'] else '<='} {figure['target']:g}"
    return f"| {_cell(figure['what'])} | {value} | {wanted} | {WORDS[figure['reached']]} | {_cell(figure['sides'])} |"


def _cell(text: str) -> str:
    """Escape bars and Markdown's markup, for a table's cell or a list."""
    return "".join("\\" + letter if letter in "|*_<`[" else letter for letter in text)


if __name__ == "__main__":
    main()
