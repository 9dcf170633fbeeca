# ruff: noqa: RUF009 - fields made by option
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import not_
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from mobilesam.common.click_options import config_options, mapping_options
from mobilesam.common.config import option, require
from mobilesam.common.errors import StoreError


def _number(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit():
        raise ValueError("give auto or a number")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Config:
    source: Path = option(flag="source", help="Source.")
    out: Path = option(Path("out"), help="Output.")
    name: str | None = option(None, choices=("a", "b"), help="Name [default: none]")
    shares: tuple[float, ...] = option((), flag="--share", help="Share; may be repeated.")
    points: Sequence[tuple[float, float]] = option((), flag="--point", metavar="X Y", help="Point.")
    size: int | None = option(None, parse=_number, text="auto", help="Size.")
    fast: bool = option(False, help="Faster.")
    restart: bool = option(
        False, flag="--resume/--restart", parse=not_, text=True, help="Resume, or restart."
    )
    clip: float = 1.0

    def __post_init__(self) -> None:
        require(self.size != 0, "size must be at least 1; it is 0", StoreError)


def _command(*decorators: Any) -> tuple[click.Command, list[dict[str, Any]]]:
    """A command with these decorators, and what it has been called with."""
    calls: list[dict[str, Any]] = []

    def command(**values: Any) -> None:
        calls.append(values)

    for decorator in reversed(decorators):
        command = decorator(command)
    return click.command()(command), calls


def _run(command: click.Command, *arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_a_command_gets_the_config_made_of_its_options() -> None:
    command, calls = _command(config_options(Config))
    arguments = "x --out y --name b --share 0.5 --share 1 --point 3 4 --size 12 --fast --restart"
    assert _run(command, *arguments.split()).exit_code == 0
    (call,) = calls
    assert call["config"] == Config(
        source=Path("x"), out=Path("y"), name="b", shares=(0.5, 1.0), points=((3.0, 4.0),), size=12, fast=True,
        restart=True,
    )  # fmt: skip


def test_options_that_are_not_given_take_the_fields_defaults() -> None:
    command, calls = _command(config_options(Config))
    assert _run(command, "x").exit_code == 0
    assert calls == [{"config": Config(source=Path("x"))}]


def test_help_shows_defaults_but_those_of_flags_and_none() -> None:
    page = " ".join(_run(_command(config_options(Config))[0], "--help").output.split())
    for shown in ("Output. [default: out]", "Size. [default: auto]", "Resume, or restart. [default: resume]"):
        assert shown in page
    assert "Faster. --resume / --restart" in page
    assert "clip" not in page
    assert "Usage: command [OPTIONS] SOURCE" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--size", "0"], "size must be at least 1; it is 0"),
        (["x", "--size", "big"], "--size 'big': give auto or a number"),
        (["x", "--name", "c"], "'c' is not one of 'a', 'b'"),
        ([], "Missing argument 'SOURCE'"),
    ],
)
def test_values_that_the_config_refuses_are_wrong_usage(arguments: list[str], message: str) -> None:
    command, calls = _command(config_options(Config))
    result = _run(command, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert calls == []


def test_fields_of_one_config_can_stand_around_other_options() -> None:
    options = {"axis": option(8, parse=_number, help="Axis.").metadata["option"]}
    command, calls = _command(
        config_options(Config, "base", only=["source", "out"]),
        mapping_options(options, "given"),
        config_options(Config, "base", only=["fast"]),
    )
    assert [parameter.name for parameter in command.params] == ["source", "out", "axis", "fast"]
    _run(command, "x", "--fast")
    _run(command, "x", "--axis", "3")
    assert calls == [
        {"base": Config(source=Path("x"), fast=True), "given": {}},
        {"base": Config(source=Path("x")), "given": {"axis": 3}},
    ]
