"""The one exception base of this room; every message is ready for the user."""

from __future__ import annotations


class DistillError(Exception):
    """Distillation can't go on: the message gives the fact, the numbers and the mend in one or two lines."""


class DistillInterrupted(DistillError):
    """A signal stopped the run after its checkpoint was saved; `signum` is the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class RunLocked(DistillError):
    """Another process is training the run."""
