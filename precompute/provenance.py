"""Which software wrote a store."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from .. import __version__

_PACKAGES = ("torch", "torchvision", "segment-anything", "zarr", "numpy", "pillow", "dask", "distributed")


def versions() -> dict[str, str]:
    """Versions of this package, Python, and what decides an embedding's bits."""
    found = {"mobilesam": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
