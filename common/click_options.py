"""Click options made from the fields of config dataclasses, as `common/config.py` describes them."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click

from .config import Listing, Option, expand_home
from .errors import MobileSamError


class _PathType(click.Path):
    """Path whose `~` is the home folder, which shells leave in `--option=~/file` and in quotes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(expand_home(value) if isinstance(value, str) else value, param, ctx)


# click must not check that a path is readable: that would be wrong input (exit code 3), not wrong usage (2).
PATH_TYPE = _PathType(path_type=Path, readable=False)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn errors about option values into usage errors."""
    try:
        yield
    except MobileSamError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.UsageError(f"{error.filename}: {error.strerror}") from error


def config_options(config_class: type, name: str = "config", only: Sequence[str] = ()) -> Callable:
    """Give a command one option per field of a config, and pass it the config made of them.

    Args:
        config_class: dataclass; its fields that were made by `option` become options, in their order.
        name: argument of the command that takes the config. If an outer decorator passes a config under the same
            name, the options replace values of that config.
        only: names of the fields that become options; empty for all.

    Returns:
        A decorator. Values that the config refuses are usage errors.
    """
    fields = [field for field in dataclasses.fields(config_class) if "option" in field.metadata]
    fields = [field for field in fields if not only or field.name in only]
    hints = get_type_hints(config_class)

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def configured(**values: Any) -> Any:
            given = {field.name: values.pop(field.name) for field in fields}
            given = {key: value for key, value in given.items() if value is not None}
            with usage_errors():
                config = (
                    dataclasses.replace(values[name], **given) if name in values else config_class(**given)
                )
            return command(**{**values, name: config})

        for field in reversed(fields):
            configured = _click_option(
                field.name, field.metadata["option"], field.default, hints[field.name]
            )(configured)
        return configured

    return decorate


def mapping_options(options: Mapping[str, Option], name: str) -> Callable:
    """Give a command options without defaults, and pass it a dict of those that the user gave.

    Args:
        options: description of each option, by key of the dict.
        name: argument of the command that takes the dict.

    Returns:
        A decorator.
    """

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def configured(**values: Any) -> Any:
            given = {key: values.pop(key) for key in options}
            return command(**values, **{name: {key: v for key, v in given.items() if v is not None}})

        for key in reversed(list(options)):
            configured = _click_option(key, options[key], None, str)(configured)
        return configured

    return decorate


def _click_option(name: str, described: Option, default: Any, hint: Any) -> Callable:
    """Return click's decorator for an option with this default and values of the type `hint`."""
    flag = described.flag or f"--{name.replace('_', '-')}"
    if not flag.startswith("-"):
        return click.argument(flag, type=PATH_TYPE)
    settings: dict[str, Any] = {"help": described.help, "metavar": described.metavar}
    if default is MISSING:
        settings["required"] = True
    elif default != () or described.text is not None:
        value = default if described.text is None else described.text
        settings |= {"default": value, "show_default": value is not None and value is not False}
    if get_origin(hint) not in (None, types.UnionType) and "default" not in settings:
        settings["multiple"] = True
    if described.parse is not None:
        settings["callback"] = _callback(described.parse, flag)
    return click.option(flag, name, **settings, **_value_type(described, hint))


def _value_type(described: Option, hint: Any) -> dict[str, Any]:
    """Return click's settings for the type of an option's values."""
    value = (
        get_args(hint)[0] if get_origin(hint) else hint
    )  # of an optional field, or of a sequence's elements
    if described.choices:
        return {"type": click.Choice(described.choices)}
    if value is bool:
        return {"is_flag": True}
    if described.parse is not None:
        return {"type": str}
    if get_origin(value) is tuple:
        return {"type": get_args(value)[0], "nargs": len(get_args(value))}
    return {"type": PATH_TYPE if value is Path else value}


def _callback(parse: Callable[[Any], Any], flag: str) -> Callable:
    """Return a click callback that converts the command line's value to the field's by `parse`."""

    def callback(context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
        try:
            with usage_errors():
                return None if value is None else parse(value)
        except Listing as listing:
            click.echo(str(listing))
            context.exit(0)
        except ValueError as error:
            raise click.UsageError(f"{flag} {value!r}: {error}") from None

    return callback
