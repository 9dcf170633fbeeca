"""Calls in processes of their own: each starts without what others left in memory, or set."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Found = TypeVar("Found")


def in_a_new_process(call: Callable[P, Found], *args: P.args, **kwargs: P.kwargs) -> Found:
    """The call's result, from a process that ends with it and gives its memory back."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args, **kwargs).result()
