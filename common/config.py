"""Fields of config dataclasses that are command-line options, checks of their values and of packages they need.

A field made by `option` holds everything that the command line shows of it: default, help text, metavar, choices.
`cli.py` makes click options from such fields, so that nothing about an option is written twice. Other fields can only
be set from Python. Config modules import nothing heavy, since `mobilesam --help` reads all of them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from .errors import MobileSamError

DTYPES = ("float16", "float32", "int8")
"""Types that a store can hold embeddings in."""
PRECISIONS = ("float32", "bfloat16")
"""Floating-point types that encoders can compute in."""
AUTO_PRECISIONS = ("auto", *PRECISIONS)
"""Precisions that a user can ask for; auto depends on the hardware."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """Command-line option of one config field; its fields are the arguments of `option`."""

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
    """Return a dataclass field that is also a command-line option.

    Args:
        default: default of the field; a field without one is required.
        help: help text, one line. If the default is None, it says in brackets what applies instead.
        flag: option such as "--point" or "--resume/--restart", if it is not the field's name; a name without dashes
            is a positional argument.
        metavar: placeholder of the value; by default that of the field's type.
        choices: allowed values.
        parse: function that converts the command line's text to the field's value; it raises ValueError with a
            correction for a wrong text.
        text: the default as a text for the command line, if `parse` is given.
    """
    shown = Option(help=help, flag=flag, metavar=metavar, choices=tuple(choices), parse=parse, text=text)
    return dataclasses.field(default=default, metadata={"option": shown})


class Listing(ValueError):
    """Text that a value asks for, such as the list of possible values; it is printed instead of running the command.

    Raised by an option's `parse`.
    """


def device_option() -> Any:
    """Return the field `device`, which all commands that compute share."""
    return option(
        "auto", metavar="auto|cpu|cuda[:i]", help="Device to compute on; auto takes a GPU where there is one."
    )


def precision_option(help: str, default: str = "auto") -> Any:
    """Return the field `precision`, which all commands that compute share.

    Args:
        help: help text of the command's option.
        default: one of `AUTO_PRECISIONS`.
    """
    return option(default, choices=AUTO_PRECISIONS, help=help)


def checkpoint_option() -> Any:
    """Return the field `checkpoint` of commands that run a teacher."""
    return option(
        None,
        metavar="FILE",
        help="Teacher's weights [default: found in MOBILESAM_CACHE, else downloaded into it]",
    )


def head_option() -> Any:
    """Return the field `head` of commands that compare masks with a teacher's."""
    return option(
        None,
        metavar="STORE_OR_FILE",
        help="Store or file with SAM's prompt encoder and mask decoder, for a teacher that has none.",
    )


def label_masks_option() -> Any:
    """Return the field `label_masks` of commands that read labels."""
    return option(
        None,
        metavar="DIR",
        help="Folder of PNG masks named like the images, as labels: one integer an object, 0 is background.",
    )


def moved_images_option() -> Any:
    """Return the field `images` of commands that read a store's images."""
    return option(
        None,
        metavar="DIR",
        help="Folder that holds the store's images now [default: where precompute read them]",
    )


def require(good: bool, message: str, error: type[MobileSamError]) -> None:
    """Raise an error unless a condition holds.

    Args:
        good: condition.
        message: message of the error.
        error: type of the error.

    Raises:
        MobileSamError: of the type `error`, if `good` is False.
    """
    if not good:
        raise error(message)


def must_be(name: str, value: object, wanted: str) -> str:
    """Return the message about an option whose value is out of range.

    Args:
        name: name of the config field.
        value: its value.
        wanted: the allowed values, as the message's predicate ("must be ...").
    """
    return f"{name.replace('_', ' ')} must be {wanted}; it is {value!r}"


def require_image_size(size: int | None, error: type[MobileSamError], largest: int | None = None) -> None:
    """Raise an error unless an image size is None or a multiple of 16 pixels from 64 up.

    Args:
        size: side of the encoder's square, in pixels; None is accepted.
        error: type of the error.
        largest: largest side, in pixels; None for no limit.

    Raises:
        MobileSamError: of the type `error`.
    """
    good = size is None or (64 <= size <= (largest or size) and size % 16 == 0)
    upto = "up" if largest is None else f"to {largest}"
    require(good, f"--image-size {size} is not a multiple of 16 from 64 {upto}", error)


def missing_packages(names: Iterable[str]) -> list[str]:
    """Return those of some packages, which an option needs, that aren't installed; none of them is imported."""
    return [name for name in names if not _importable(name)]


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # sys.modules holds None for it: blocked
        return False


def expand_home(path: str) -> str:
    """Replace a leading `~` by the home folder, unless a file has this very name."""
    return path if os.path.lexists(path) else os.path.expanduser(path)


def paths_from_text(config: Any, *names: str) -> None:
    """Convert strings in these fields of a frozen config to paths, in place; None stays."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            object.__setattr__(config, name, Path(value))
