"""dask's settings for a cluster of one's own.

A site's settings (`/etc/dask`, `~/.config/dask`, `DASK_...` variables) are made for the site's clusters: a dashboard
behind a proxy, TLS, preloaded modules, limits of memory. They hold for `--scheduler ADDRESS`, whose cluster is the
site's, and not for the workers that a run starts on its own machine and ends again.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import MobileSamError

try:
    import dask
except ValueError as error:
    raise MobileSamError(f"dask's settings can't be read: {' '.join(str(error).split())}") from error

_PREFIX = "DASK_"
_INHERITED = "DASK_INTERNAL_INHERIT_CONFIG"
"""Variable from which a new process takes dask's settings, before those of any file."""

_LINK = "distributed.dashboard.link"
"""Setting with the template of a dashboard's address; the site's may lead through its proxy, and is kept."""
WORKER_PRELOAD = "distributed.worker.preload"
"""Setting with modules and scripts that workers run first; those that are there are kept."""


@contextmanager
def own_dask_settings(settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Let dask, and processes started in the context, use dask's defaults and `settings`, not the site's settings.

    Of these only two are kept, where they can be used: modules that workers run first, and the dashboard's address.

    Args:
        settings: settings by dotted name, such as "distributed.worker.daemon".
    """
    variables = {name: value for name, value in os.environ.items() if name.startswith(_PREFIX)}
    config = dask.config.config
    before = dict(config)
    link, preloads = dask.config.get(_LINK, None), dask.config.get(WORKER_PRELOAD, None)
    for name in variables:
        del os.environ[name]
    try:
        config.clear()
        # `distributed`, if it isn't imported yet, adds its own defaults at its import.
        config.update(dask.config.merge(*dask.config.defaults))
        if _can_be_filled_in(link):
            dask.config.set({_LINK: link})
        dask.config.set({WORKER_PRELOAD: [name for name in _listed(preloads) if _can_be_loaded(name)]})
        os.environ[_INHERITED] = dask.config.serialize(config)
        with dask.config.set(dict(settings or {})):
            yield
    finally:
        config.clear()
        # What was imported in the context has added its defaults, also below names that were there before.
        config.update(dask.config.merge(*dask.config.defaults, before))
        del os.environ[_INHERITED]
        os.environ.update(variables)


def _can_be_filled_in(template: Any) -> bool:
    """Return True for a template that dask can make a dashboard's address of, with this process's variables."""
    try:
        return bool(template.format(**{**os.environ, "scheme": "http", "host": "localhost", "port": 8787}))
    except (AttributeError, KeyError, IndexError, ValueError, TypeError):
        return False


def _listed(preloads: Any) -> list[Any]:
    return (
        [preloads]
        if isinstance(preloads, str)
        else list(preloads)
        if isinstance(preloads, list | tuple)
        else []
    )


def _can_be_loaded(preload: Any) -> bool:
    """Return True for a script or a module that is there."""
    if not isinstance(preload, str):
        return False
    if preload.endswith(".py"):
        return os.path.isfile(preload)
    try:
        return importlib.util.find_spec(preload) is not None
    except (ImportError, ValueError):
        return False
