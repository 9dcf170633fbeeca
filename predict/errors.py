"""The one exception of this room."""

from __future__ import annotations


class PredictError(Exception):
    """A model can't be used or exported; the message is ready for the user: the fact, the numbers, the mend."""
