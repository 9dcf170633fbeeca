"""The command that goes on with a store, for a shell."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from .records import Selection
from .spec import StoreSpec


def precompute_command(store: Path, spec: StoreSpec, selection: Selection) -> str:
    """What computes the pending rows: the settings that can't be taken from the store, as they were last given."""
    words = ["mobilesam", "precompute", "--images", *(selection.sources or (spec.image_root,))]
    words += ["--out", str(store), "--teacher", spec.teacher]
    if selection.checkpoint is not None:
        words += ["--checkpoint", selection.checkpoint]
    if selection.fraction < 1:
        words += ["--fraction", repr(selection.fraction), "--seed", str(selection.seed)]
    if selection.limit is not None:
        words += ["--limit", str(selection.limit)]
    return quoted(words)


def quoted(words: Sequence[str]) -> str:
    """Words as one line that a shell takes apart again, whatever bytes they are made of."""
    return " ".join(shlex.quote(word) if word.isprintable() else _ansi_quoted(word) for word in words)


def _ansi_quoted(word: str) -> str:
    """$'...', for newlines and bytes that are not UTF-8: those can't be printed as they are."""
    escaped = re.sub(
        rb"[^ -&(-\[\]-~]",  # all but printable ASCII without ' and \
        lambda match: b"\\%03o" % match[0][0],
        os.fsencode(word),
    )
    return f"$'{escaped.decode('ascii')}'"
