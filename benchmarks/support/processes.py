"""Calls in fresh processes, which start without the memory and settings that other calls left behind."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Found = TypeVar("Found")


def in_a_new_process(call: Callable[P, Found], *args: P.args, **kwargs: P.kwargs) -> Found:
    """Return the result of a call made in a spawned process, which ends with the call."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args, **kwargs).result()
