"""Options of config dataclasses: each field carries its default, its help text and its check."""

from __future__ import annotations

from .errors import MobileSamError


def require(good: bool, message: str, error: type[MobileSamError]) -> None:
    """Raise `error` with `message` unless `good`."""
    if not good:
        raise error(message)


def must_be(name: str, value: object, wanted: str) -> str:
    """Message about an option outside its range: the option, the range, the value."""
    return f"{name.replace('_', ' ')} must be {wanted}; it is {value!r}"
