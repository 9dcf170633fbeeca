"""End of a command: its result is printed; errors, signals and a lost result become a message and an exit code.

`cli.py` makes its commands of these classes; each returns the exit code of a result.
"""

from __future__ import annotations

import errno
import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from .durable import final_name
from .errors import Interrupted, MobileSamError, ReportError
from .signals import StopFlag, stopped_by_signals
from .terminal import guarded_streams

# Exit codes. click itself exits with 2 for wrong usage; a signal's code is 128 + its number (129, 130 and 143).
DONE, FAILED_CHECK, INPUT, READER_GONE = 0, 1, 3, 141


class MainGroup(click.Group):
    """Group of all commands. A message that can't be written is dropped; a lost result becomes an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command, and exit unless `standalone_mode` is False."""
        with guarded_streams() as output:
            try:
                return super().main(*args, **kwargs)
            except SystemExit as end:
                output.flush()
                if output.failure is None or end.code:
                    raise
                if output.failure.errno in (errno.EPIPE, errno.EIO):  # after `| head`; a terminal was closed
                    raise SystemExit(READER_GONE) from None
                reason = output.failure.strerror
                click.echo(f"error: the work is done, but its result can't be printed: {reason}", err=True)
                raise SystemExit(INPUT) from None


class RoomCommand(click.Command):
    """Command whose return value is its exit code, and whose errors become a short message and an exit code."""

    def invoke(self, context: click.Context) -> None:
        """Run the command and exit."""
        debug = context.params.pop("debug")
        try:
            with stopped_by_signals(StopFlag(), Interrupted, "interrupted"):
                code = super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            code = 130
        except Exception as error:  # noqa: BLE001 - the outermost handler
            if debug:
                traceback.print_exc()
            message, code = explain(error)
            if not process_rank():
                click.echo(f"error: {message}", err=True)
            elif code == INPUT:
                click.echo(f"error in process {process_rank()}: {message}", err=True)
        context.exit(code)


def explain(error: Exception) -> tuple[str, int]:
    """Return the message for an error and the exit code."""
    if isinstance(error, Interrupted):
        return str(error), 128 + error.signum
    if isinstance(error, ReportError) and isinstance(error.__cause__, Exception):
        message, code = explain(error.__cause__)
        return f"no report: {message}", code
    if isinstance(error, MobileSamError):
        return str(error), INPUT
    if isinstance(error, OSError):
        place = final_name(error.filename) if isinstance(error.filename, str) else "input or output"
        return f"{place}: {error.strerror or error}", INPUT
    return f"unexpected {type(error).__name__}: {error}\nThis is a bug; --debug shows where.", INPUT


def process_rank() -> int:
    """Return the rank among torchrun's processes; only rank 0 reports."""
    return int(os.environ.get("RANK", "0")) if os.environ.get("WORLD_SIZE", "1") != "1" else 0


def common_options(command: Callable) -> Callable:
    """Give a command the options that all have, --json and --debug."""
    json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
    debug_option = click.option("--debug", is_flag=True, help="Show tracebacks.")
    return json_option(debug_option(command))


def print_result(as_json: bool, result: dict[str, Any], lines: list[str]) -> None:
    """Print a result.

    Args:
        as_json: print one JSON object.
        result: JSON values.
        lines: the result as text.
    """
    click.echo(json.dumps(result) if as_json else "\n".join(lines))


@contextmanager
def printed_without_report(as_json: bool, lines: Callable[[dict[str, Any]], list[str]]) -> Iterator[None]:
    """Print the result before the error if only its report could not be written.

    Args:
        as_json: print one JSON object.
        lines: returns a result as text.
    """
    try:
        yield
    except ReportError as error:
        print_result(as_json, error.result, lines(error.result))
        raise
