"""Packages that mobilesam needs: the base install's are imported, those of extras are looked for.

The lists are those of the installed distribution, that is of setup.cfg.
"""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement

DISTRIBUTION = "mobilesam"
_MODULES = {"pillow": "PIL"}
"""Modules that aren't named like their package, with underscores for dashes."""
_LONGEST_ERROR = 300
"""Characters that are kept of the error of a package that can't be imported."""


def installed_at() -> str | None:
    """Return the folder of an editable installation; None for any other, or without one."""
    try:
        text = distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    origin = json.loads(text) if text else {}
    editable = origin.get("dir_info", {}).get("editable", False)
    return unquote(urlsplit(origin["url"]).path) if editable else None


def base_packages() -> dict[str, dict[str, Any]]:
    """Import every package that the base install needs.

    Returns:
        By name: `version` (None if it isn't installed), `wanted` (the versions that setup.cfg allows, "" for all)
        and `error` (None if the version is right and the import succeeds). Empty if mobilesam itself isn't installed.
    """
    with _dask_settings():
        return {need.name: _package(need) for need in _requirements("")}


def _dask_settings() -> AbstractContextManager[None]:
    """Return the context in which commands import dask: its packages read the site's settings at their import."""
    try:
        from ..common.dask_settings import own_dask_settings
    except ImportError:  # dask itself is broken
        return nullcontext()
    return own_dask_settings()


def extras() -> dict[str, dict[str, Any]]:
    """Look for the packages of each extra, without importing them.

    Returns:
        By name of the extra: `complete`; `missing`, the requirements that aren't met; `command`, which installs
        them, None if it is complete.
    """
    names = _distribution_extras()
    found = {}
    for name in names:
        missing = [str(_bare(need)) for need in _requirements(name) if _unmet(need) is not None]
        command = pip_install(f"{DISTRIBUTION}[{name}]") if missing else None
        found[name] = {"complete": not missing, "missing": missing, "command": command}
    return found


def pip_install(*words: str) -> str:
    """Return the command that installs packages for the Python that runs now, whichever `pip` is found first."""
    return shlex.join([sys.executable, "-m", "pip", "install", *words])


def _distribution_extras() -> list[str]:
    try:
        return distribution(DISTRIBUTION).metadata.get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return []


def _requirements(extra: str) -> Iterator[Requirement]:
    """Yield the requirements that an extra adds; those of the base install for ""."""
    try:
        texts = distribution(DISTRIBUTION).requires or []
    except PackageNotFoundError:
        return
    for need in map(Requirement, texts):
        in_base = need.marker is None or need.marker.evaluate({"extra": ""})
        if (in_base and not extra) or (
            not in_base and need.marker and need.marker.evaluate({"extra": extra})
        ):
            yield need


def _bare(need: Requirement) -> Requirement:
    """Return a requirement without its marker, as a user would type it."""
    return Requirement(f"{need.name}{need.specifier}")


def _package(need: Requirement) -> dict[str, Any]:
    error = _unmet(need)
    if error is None:
        try:
            importlib.import_module(_MODULES.get(need.name, need.name.replace("-", "_")))
        except Exception as failure:  # noqa: BLE001 - a broken package may raise anything; it is the finding
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:_LONGEST_ERROR]
    return {"version": _version(need.name), "wanted": str(need.specifier), "error": error}


def _unmet(need: Requirement) -> str | None:
    """Return the reason why a requirement isn't met; None if it is."""
    found = _version(need.name)
    if found is None:
        return "it is not installed"
    if not need.specifier.contains(found, prereleases=True):
        return f"it is {found}, not {need.specifier}"
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
