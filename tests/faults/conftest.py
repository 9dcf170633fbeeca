from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.fault_log import FaultLog, log_path

# Fixtures that most files here use.
from faults.fixtures import many, pictures, run, scheduler  # noqa: F401
from faults.kills.cluster import FaultCluster
from faults.kills.fork_server import ForkServer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kill-points", choices=["few", "full"], default="few", help="how many kill points to try"
    )


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """True if every kill point is requested, as by `make faults`."""
    return request.config.getoption("--kill-points", "few") == "full"


@pytest.fixture
def fault_log(request: pytest.FixtureRequest) -> FaultLog:
    """Log of faults under the test's name."""
    return FaultLog(log_path(), request.node.name)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultCluster]:
    """Cluster of forked processes and a few pictures."""
    with ForkServer(tmp_path_factory.mktemp("fork_server")) as fork_server:
        made = FaultCluster(fork_server, tmp_path_factory.mktemp("cluster"))
        yield made
        made.close()


@pytest.fixture(scope="session")
def store(cluster: FaultCluster) -> Path:
    """Complete store, which must not be changed."""
    path = cluster.new_folder() / "store.zarr"
    cluster.precompute(path)
    return path
