"""The exceptions of this room."""

from __future__ import annotations

from typing import Any


class VerifyError(Exception):
    """A comparison cannot be made; the message is ready for the user: the fact, the numbers, the mend."""


class ReportError(VerifyError):
    """A comparison was made, but not the page that shows it. `result` is what would have been returned, without a
    report; `__cause__` says why."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result
