"""The one exception of this room."""

from __future__ import annotations


class VerifyError(Exception):
    """A comparison cannot be made; the message is ready for the user: the fact, the numbers, the mend."""
