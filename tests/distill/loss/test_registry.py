from __future__ import annotations

from mobilesam.distill.config import OBJECTIVES as NAMES
from mobilesam.distill.loss.registry import OBJECTIVES


def test_the_registry_has_the_objectives_that_the_command_line_offers() -> None:
    assert tuple(OBJECTIVES) == NAMES
