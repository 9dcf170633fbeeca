"""What README tells people to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mobilesam.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (mobilesam .*?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_the_readme_opens_with_the_two_commands_for_a_fresh_machine() -> None:
    first_block = re.search(r"^    make (\w+).*\n    make (\w+)", README, re.MULTILINE)
    assert first_block is not None
    assert first_block.groups() == ("demo", "test")
    assert README[: first_block.start()].count("\n") < 15


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_in_the_readme_is_accepted(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    context = main.commands[name].make_context(name, arguments)
    assert context.params


def test_every_command_is_documented() -> None:
    for name in main.commands:
        assert f"| `mobilesam {name}` |" in README


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([\w-]+)", README)) - {"it"} <= targets


def test_every_file_that_the_readme_shows_exists() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
