"""What can stop a precompute job; every message states the fact, the numbers and the mend."""

from __future__ import annotations


class PrecomputeError(Exception):
    """Base of every error that this room raises for its input or its surroundings."""


class PrecomputeInterrupted(PrecomputeError):
    """A signal ended the job; what was committed stays. `signum` is the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
