"""Connection to a dask cluster: an address without a scheduler, a scheduler without workers."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import dask
import pytest
from distributed import LocalCluster

from mobilesam.common import dask_client
from mobilesam.common.dask_client import DASK_CLIENT_LOG, connected, dashboard_link
from mobilesam.common.errors import PrecomputeError


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers and workers are waited for a second only."""
    monkeypatch.setattr(dask_client, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(dask_client, "REACH_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
def test_an_address_without_a_scheduler_is_refused_by_name() -> None:
    with (
        pytest.raises(PrecomputeError, match="no dask scheduler at tcp://127"),
        connected("tcp://127.0.0.1:9", PrecomputeError),
    ):
        pass


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "scheduler.json can't be read: No such file"),
        ("text", "scheduler.json holds no scheduler's address"),
        ('{"id": "a"}', "scheduler.json holds no scheduler's address"),
        ('{"address": 7}', "scheduler.json holds no scheduler's address"),
        ('{"address": "tcp://127.0.0.1:9"}', "no dask scheduler at tcp://127.0.0.1:9"),
    ],
)
def test_a_scheduler_file_that_leads_nowhere_is_refused(
    tmp_path: Path, content: str | None, told: str
) -> None:
    if content is not None:
        (tmp_path / "scheduler.json").write_text(content)
    with (
        pytest.raises(PrecomputeError, match=told),
        connected(str(tmp_path / "scheduler.json"), PrecomputeError),
    ):
        pass


def test_a_scheduler_file_leads_to_its_scheduler_and_a_dashboards_address_never_ends_the_work(
    tmp_path: Path,
) -> None:
    with LocalCluster(
        n_workers=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        file = tmp_path / "scheduler.json"
        file.write_text(json.dumps({"address": cluster.scheduler_address}))
        with connected(str(file), PrecomputeError) as client:
            for template in ("{NOWHERE}/{port}", "{}", None):
                with dask.config.set({"distributed.dashboard.link": template}):
                    link = dashboard_link(client)
                    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/status", link)


@pytest.mark.usefixtures("impatient")
def test_a_scheduler_without_workers_is_refused_with_the_command_that_starts_one() -> None:
    with LocalCluster(
        n_workers=0, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        address = cluster.scheduler_address
        with (
            pytest.raises(PrecomputeError, match=f"has no workers after 1 s.*`dask worker {address}`"),
            connected(address, PrecomputeError),
        ):
            pass


def test_dasks_client_log_has_its_level_again_after_the_connection() -> None:
    before = DASK_CLIENT_LOG.level
    with (
        LocalCluster(
            n_workers=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        connected(cluster.scheduler_address, PrecomputeError),
    ):
        DASK_CLIENT_LOG.setLevel(logging.CRITICAL)
    assert before == DASK_CLIENT_LOG.level
