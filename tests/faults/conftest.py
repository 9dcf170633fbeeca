from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

# Used by most files here: pictures, a precompute in this process, how often to do things.
from faults.fixtures import many, pictures, run, scheduler  # noqa: F401
from faults.ledger import Ledger, place
from faults.scene import Scene
from faults.zygote import Zygote


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kill-points", choices=["few", "full"], default="few", help="how many kill points to try"
    )


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether every kill point is asked for, as by `make faults`."""
    return request.config.getoption("--kill-points", "few") == "full"


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Ledger:
    """Writes one JSON line a fault, under the test's name."""
    return Ledger(place(), request.node.name)


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A cluster of forked processes and a few pictures."""
    with Zygote(tmp_path_factory.mktemp("zygote")) as zygote:
        made = Scene(zygote, tmp_path_factory.mktemp("scene"))
        yield made
        made.close()


@pytest.fixture(scope="session")
def store(scene: Scene) -> Path:
    """A whole store, for those who only read it."""
    path = scene.place() / "store.zarr"
    scene.precompute(path)
    return path
