from __future__ import annotations

import pytest
from faults.fixtures import many, pictures, run, scheduler  # noqa: F401
from faults.ledger import Ledger, place


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kill-points", choices=["few", "full"], default="few", help="how many kill points")


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Ledger:
    """Writes one JSON line a fault, under the test's name."""
    return Ledger(place(), request.node.name)
