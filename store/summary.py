"""An inspection's result as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SHOWN_PROBLEMS = 50
"""Problems that are printed one by one; --json has them all."""


def inspection_lines(result: Mapping[str, Any]) -> list[str]:
    """The result of `inspect_store`."""
    return [*_store_lines(result), *_repair_lines(result), *_problem_lines(result), *_command_lines(result)]


def _store_lines(result: Mapping[str, Any]) -> Iterator[str]:
    rows, shards, subset = result["rows"], result["shards"], result["subset"]
    yield f"store         {_shown(result['store'])}"
    yield f"images        {rows['done']:,} done, {rows['pending']:,} pending, {rows['failed']:,} failed"
    yield f"shards        {shards['committed']:,} of {shards['all']:,} committed, {result['shard_size']} images each"
    yield f"bytes         {result['bytes']:,} ({result['bytes'] / 1e9:.2f} GB)"
    yield f"teacher       {result['teacher']}"
    if result["checkpoint"] is not None:
        yield f"checkpoint    {_shown(result['checkpoint'])}, SHA-256 {result['checkpoint_sha256']}"
    yield f"embeddings    {result['dtype']}, computed in {result['precision']} at {result['image_size']} pixels"
    for step in _steps(result["preprocessing"]):
        yield f"preprocessing {_shown(step)}"
    chosen = f"fraction {subset['fraction']:g}, seed {subset['seed']}"
    limit = "" if subset["limit"] is None else f", at most {subset['limit']:,}"
    yield f"subset        {chosen}{limit}"
    yield f"image root    {_shown(result['image_root'])}"
    if result["kept_images"] is not None:
        yield f"kept images   {result['kept_images']}, resized: training and verifying need no other"
    yield f"written with  {', '.join(f'{name} {version}' for name, version in result['versions'].items())}"
    yield f"audit         {_audit(result['audit'])}"
    if result["writer"]:
        yield f"writer        process {result['writer']['pid']} on {result['writer']['host']}, at work now"


def _steps(recipe: Mapping[str, Any]) -> Iterator[str]:
    """The recipe between a file and the teacher, one line a step."""
    for step, how in recipe.items():
        details = (
            [f"{name} {value}" for name, value in how.items()] if isinstance(how, Mapping) else [str(how)]
        )
        yield f"{step}: {', '.join(details)}"


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return "no image was embedded again yet"
    limits = audit["tolerance"]
    cosine, error = (
        "not a number" if audit[name] is None else format(audit[name], form)
        for name, form in (("cosine_min", ".6f"), ("relative_mse_max", ".3g"))
    )
    return (
        f"{audit['rows']:,} images embedded again: cosine at least {cosine} (limit {limits['cosine']:g}), "
        f"relative MSE at most {error} (limit {limits['relative_mse']:g})"
    )


def _repair_lines(result: Mapping[str, Any]) -> Iterator[str]:
    repaired = result["repaired"]
    if repaired is None:
        return
    yield from _shown_problems("mended", repaired["problems"], Path(result["store"]))
    yield (
        f"repair        {len(repaired['withdrawn']):,} shards withdrawn, {len(repaired['removed']):,} files removed, "
        f"{len(repaired['rewritten']):,} rewritten"
    )


def _problem_lines(result: Mapping[str, Any]) -> Iterator[str]:
    problems = result["problems"]
    yield from _shown_problems("problem", problems, Path(result["store"]))
    if result["checked"]:
        left = " left" if result["repaired"] is not None else ""
        found = f"{len(problems):,} problem{'' if len(problems) == 1 else 's'}{left}" if problems else "whole"
        yield f"check         {found}"


def _shown_problems(title: str, problems: list[Mapping[str, Any]], store: Path) -> Iterator[str]:
    for problem in problems[:SHOWN_PROBLEMS]:
        place = [_shown(_inside(problem["file"], store))] if problem["file"] else []
        place += [f"shard {problem['shard']}"] if problem["shard"] is not None else []
        place += [f"row {problem['row']}"] if problem["row"] is not None else []
        place += [_shown(problem["key"])] if problem["key"] is not None else []
        yield f"{title:<13} {problem['kind']}: {', '.join(place)}: {_shown(problem['message'])}"
    if len(problems) > SHOWN_PROBLEMS:
        yield f"{title:<13} and {len(problems) - SHOWN_PROBLEMS:,} more: --json lists them all"


def _command_lines(result: Mapping[str, Any]) -> Iterator[str]:
    if result["command"] and result["repaired"] is not None:
        yield "Compute anew what was taken out with"
        yield f"  {result['command']}"
    elif result["command"]:
        yield "Go on with"
        yield f"  {result['command']}"
    if result["problems"] and result["repaired"] is None and result["checked"]:
        yield "Take out what is damaged with mobilesam inspect STORE --repair"


def _inside(file: str, store: Path) -> str:
    path = Path(file)
    return str(path.relative_to(store)) if path.is_relative_to(store) else file


def _shown(text: str) -> str:
    """Text fit for a line of output: what can't be printed (newlines, bytes not UTF-8) is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
