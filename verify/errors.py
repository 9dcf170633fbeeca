"""The exceptions of this room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class VerifyError(Exception):
    """A comparison cannot be made; the message is ready for the user: the fact, the numbers, the mend."""


class ReportError(VerifyError):
    """A comparison was made, but not the page that shows it. `result` is what would have been returned, without a
    report; `__cause__` says why."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


@contextmanager
def keeping(result: dict[str, Any], named: dict[str, Any]) -> Iterator[None]:
    """The report is made in the context; `named`, the result or a part of it, has its path. Any exception there
    becomes a ReportError: hours of comparing are not lost with a page."""
    try:
        yield
    except Exception as error:
        named["report"] = None
        raise ReportError(f"no report: {error}", result) from error
