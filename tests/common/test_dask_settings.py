"""dask's settings in the context of a cluster of one's own: its defaults, and what of the site's can be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask
import distributed  # noqa: F401 - adds its defaults
import pytest

from mobilesam.common.dask_settings import WORKER_PRELOAD, own_dask_settings

SITE = {
    "distributed.comm.default-scheme": "tls",
    "distributed.comm.require-encryption": True,
    "distributed.nanny.preload": ["nowhere"],
    "distributed.worker.memory.pause": 1e-9,
    "temporary-directory": "/nowhere/at/all",
}
LINK = "distributed.dashboard.link"


def test_the_sites_settings_hold_outside_and_dasks_own_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__DAEMON", "False")
    with dask.config.set(SITE):
        before = dask.config.serialize(dask.config.config)
        with own_dask_settings({"distributed.worker.daemon": True}):
            defaults = dask.config.merge(*dask.config.defaults)
            assert {name: dask.config.get(name) for name in SITE} == {
                name: dask.config.get(name, config=defaults) for name in SITE
            }
            assert dask.config.get("distributed.worker.daemon") is True
            assert "DASK_DISTRIBUTED__WORKER__DAEMON" not in os.environ
            inherited = dask.config.collect(paths=[], env=os.environ)
            assert {name: dask.config.get(name, config=inherited) for name in SITE} == {
                name: dask.config.get(name, config=defaults) for name in SITE
            }
        assert dask.config.serialize(dask.config.config) == before
    assert os.environ["DASK_DISTRIBUTED__WORKER__DAEMON"] == "False"
    assert "DASK_INTERNAL_INHERIT_CONFIG" not in os.environ


@pytest.mark.parametrize(
    ("template", "kept"),
    [
        ("{OUR_PREFIX}proxy/{port}/status", True),
        ("http://here:{port}", True),
        ("{JUPYTERHUB_SERVICE_PREFIX}proxy/{port}/status", False),
        ("{}", False),
        ("{port", False),
        (None, False),
        (7, False),
    ],
)
def test_a_dashboards_template_is_kept_if_it_can_be_filled_in(
    template: Any, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_PREFIX", "/user/us/")
    monkeypatch.delenv("JUPYTERHUB_SERVICE_PREFIX", raising=False)
    default = dask.config.get(LINK)
    with dask.config.set({LINK: template}), own_dask_settings():
        assert dask.config.get(LINK) == (template if kept else default)


def test_workers_load_first_what_of_the_sites_modules_is_there(tmp_path: Path) -> None:
    script = tmp_path / "setup.py"
    script.touch()
    site = [str(script), "json", "nowhere", "nowhere.at.all", str(tmp_path / "missing.py"), 7]
    with dask.config.set({WORKER_PRELOAD: site}), own_dask_settings():
        assert dask.config.get(WORKER_PRELOAD) == [str(script), "json"]
    with dask.config.set({WORKER_PRELOAD: str(script)}), own_dask_settings():
        assert dask.config.get(WORKER_PRELOAD) == [str(script)]


def test_distributed_gets_its_defaults_even_if_it_is_imported_after_the_context() -> None:
    program = (
        "import dask\n"
        "from mobilesam.common.dask_settings import own_dask_settings\n"
        "for imported in (False, True):\n"
        "    dask.config.set({'distributed.worker.daemon': False})\n"
        "    with own_dask_settings():\n"
        "        if imported:\n"
        "            import distributed\n"
        "print(dask.config.get('distributed.comm.default-scheme'), dask.config.get('distributed.worker.daemon'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "tcp False\n"
