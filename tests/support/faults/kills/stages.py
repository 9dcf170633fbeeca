"""Stages of a job, written to a file as they begin and end, so that a trace of system calls shows them.

"+commit" is written when a commit begins, "-commit" when it has returned, "!commit" when it has raised an error.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Callable
from typing import Any

STAGES = {
    "create": ("mobilesam.store.store", "EmbeddingStore.create"),
    "open": ("mobilesam.store.store", "EmbeddingStore.open"),
    "commit": ("mobilesam.store.store", "EmbeddingStore.commit"),
    "withdraw": ("mobilesam.store.store", "EmbeddingStore.withdraw"),
    "extend": ("mobilesam.store.store", "EmbeddingStore.extend"),
    "relist": ("mobilesam.store.store", "EmbeddingStore.relist"),
    "close": ("mobilesam.store.store", "EmbeddingStore.close"),
    "begin": ("mobilesam.store.writer", "ShardWriter.__enter__"),
    "row": ("mobilesam.store.writer", "ShardWriter.add"),
    "finish": ("mobilesam.store.writer", "ShardWriter.finish"),
    "latest": ("mobilesam.distill.run", "point_latest"),
    "resume": ("mobilesam.distill.checkpoint", "Checkpoints.load"),
    "checkpoint": ("mobilesam.distill.checkpoint", "Checkpoints.save"),
    "student": ("mobilesam.distill.trainer", "Trainer.save_student"),
    "mean": ("mobilesam.distill.trainer", "Trainer.gather_and_write_mean_embedding"),
    "record": ("mobilesam.distill.train_log", "Recorder.line"),
    "sync": ("mobilesam.distill.train_log", "Recorder.sync"),
    "recorder": ("mobilesam.distill.train_log", "Recorder.__init__"),
}

_file = -1
_slow = 0.0


def log_stages_to(path: str, slow: float = 0.0) -> None:
    """Write this process's stages to a file from now on; delay each row by `slow` seconds."""
    global _file, _slow
    _file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    _slow = slow


def wrap_stages() -> None:
    """Wrap the functions of STAGES.

    Raises:
        AttributeError, KeyError: A function was renamed.
    """
    for stage, (module, name) in STAGES.items():
        owner: Any = importlib.import_module(module)
        *classes, attribute = name.split(".")
        for part in classes:
            owner = getattr(owner, part)
        plain = vars(owner)[attribute]
        if isinstance(plain, classmethod):
            setattr(owner, attribute, classmethod(_logged(stage, plain.__func__)))
        else:
            setattr(owner, attribute, _logged(stage, plain))


def _logged(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        _write(f"+{stage}{_detail(stage, arguments)}")
        if stage == "row" and _slow:
            time.sleep(_slow)
        try:
            result = function(*arguments, **named)
        except BaseException:
            _write(f"!{stage}")
            raise
        _write(f"-{stage}{_detail(stage, arguments)}")
        return result

    return wrapped


def _detail(stage: str, arguments: tuple[Any, ...]) -> str:
    """Return the shard's number for a commit."""
    return f" {arguments[1]}" if stage == "commit" else ""


def _write(text: str) -> None:
    if _file >= 0:
        os.write(_file, f"{text}\n".encode())
