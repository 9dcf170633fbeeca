from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner
from labelled_photos import label

from mobilesam.cli import main
from mobilesam.distill.students import cost


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time each model once: medians take most of the time, and the test of them needs no evaluation."""
    monkeypatch.setattr(cost, "FORWARDS", 1)


@pytest.fixture
def labelled(world: Any) -> Any:
    """The world with labels beside each of its photos."""
    for seed, photo in enumerate(sorted(world.photos.glob("*.bmp"))):
        label(photo, seed)
    return world


@pytest.fixture
def run(world: Any) -> Callable[..., Any]:
    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])

    return invoke
