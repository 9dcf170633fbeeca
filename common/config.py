"""Fields of config dataclasses that are command-line options, and checks of their values.

A field made by `option` holds all that the command line shows of it: default, help text, metavar, choices. `cli.py`
makes click options of such fields, so that nothing about an option is written twice. A field without one is an
option of the library alone. Config modules import nothing heavy: `mobilesam --help` reads all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from .errors import MobileSamError

DTYPES = ("float16", "float32", "int8")
"""Types that a store can hold embeddings in."""
PRECISIONS = ("float32", "bfloat16")
"""Types that encoders can compute in."""
AUTO_PRECISIONS = ("auto", *PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class Option:
    """Command-line option of one config field; `option` documents the fields."""

    help: str
    flag: str
    metavar: str | None
    choices: tuple[str, ...]
    parse: Callable[[Any], Any] | None
    text: Any


def option(
    default: Any = MISSING,
    *,
    help: str,
    flag: str = "",
    metavar: str | None = None,
    choices: Sequence[str] = (),
    parse: Callable[[Any], Any] | None = None,
    text: Any = None,
) -> Any:
    """Return a dataclass field that is a command-line option, too.

    Args:
        default: of the field; a field without one is required.
        help: one line in the imperative or a noun phrase. It names the default in brackets where that is None.
        flag: such as "--point" or "--resume/--restart" where it is not the field's name; a name without dashes is
            a positional argument.
        metavar: placeholder of the value; by default that of the field's type.
        choices: the values allowed.
        parse: makes the field's value of the command line's; a ValueError says how to mend a wrong one.
        text: the default as the command line shows it, where `parse` is given.
    """
    shown = Option(help=help, flag=flag, metavar=metavar, choices=tuple(choices), parse=parse, text=text)
    return dataclasses.field(default=default, metadata={"option": shown})


def device_option() -> Any:
    """Return the field `device`, which all commands that compute share."""
    return option(
        "auto", metavar="auto|cpu|cuda[:i]", help="Device to compute on; auto takes a GPU where there is one."
    )


def precision_option(help: str, default: str = "auto") -> Any:
    """Return the field `precision`, which all commands that compute share."""
    return option(default, choices=AUTO_PRECISIONS, help=help)


def checkpoint_option() -> Any:
    """Return the field `checkpoint` of commands that run a teacher."""
    return option(
        None,
        metavar="FILE",
        help="Teacher's weights [default: found in MOBILESAM_CACHE, else downloaded into it]",
    )


def moved_images_option() -> Any:
    """Return the field `images` of commands that read a store's images."""
    return option(
        None,
        metavar="DIR",
        help="Folder that holds the store's images now [default: where precompute read them]",
    )


def require(good: bool, message: str, error: type[MobileSamError]) -> None:
    """Raise `error` with `message` unless `good`."""
    if not good:
        raise error(message)


def must_be(name: str, value: object, wanted: str) -> str:
    """Return the message about an option outside its range: its name, the range, the value."""
    return f"{name.replace('_', ' ')} must be {wanted}; it is {value!r}"


def require_image_size(size: int | None, error: type[MobileSamError], largest: int | None = None) -> None:
    """Raise `error` unless the side is None or a multiple of 16 pixels from 64 to `largest` (None: no limit)."""
    good = size is None or (64 <= size <= (largest or size) and size % 16 == 0)
    upto = "upwards" if largest is None else f"to {largest}"
    require(good, f"--image-size {size} is not a multiple of 16 from 64 {upto}", error)


def paths_from_text(config: Any, *names: str) -> None:
    """Replace texts in these fields of a frozen config by paths; None stays."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            object.__setattr__(config, name, Path(value))
