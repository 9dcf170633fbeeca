"""A run of a sweep as a task of dask: what a worker does, and how it is told to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from typing import Any

from distributed import Status, get_worker

from .. import __version__
from ..distill import DistillInterrupted, Progress, StopFlag
from .trial import INTERRUPTED, Judging, run_trial
from .trials import Trial

WORKING = (Status.running, Status.paused)
"""Of a worker that isn't about to close."""

_running: dict[str, StopFlag] = {}
_lock = threading.Lock()


def trial_task(sweep: str, trial: Trial, judging: Judging, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """As `run_trial`; the outcome of one that was told to stop has the status "interrupted".

    A sweep that has gone away, as one that was killed, lets go of its tasks: the run then saves and stops too, so
    that nobody is in the way of the next sweep. The same when the worker is told to close: the run goes on elsewhere.
    """
    worker = get_worker()
    key, stop = worker.get_current_task(), StopFlag()

    def watch(_: Progress) -> None:
        task = worker.state.tasks.get(key)
        if task is None or task.state == "cancelled" or worker.status not in WORKING:
            stop.set(signal.SIGTERM)

    with _lock:
        _running[f"{sweep} {trial.name}"] = stop
    try:
        return run_trial(trial, judging, known, stop=stop, progress=watch)
    except DistillInterrupted as error:
        return {"name": trial.name, "status": INTERRUPTED, "error": str(error)}
    finally:
        with _lock:
            del _running[f"{sweep} {trial.name}"]


def stop_tasks(sweep: str, signum: int) -> int:
    """Asks this process's runs of the sweep to save and stop; how many there are."""
    with _lock:
        flags = [flag for name, flag in _running.items() if name.startswith(f"{sweep} ")]
    for flag in flags:
        flag.set(signum)
    return len(flags)


def worker_version() -> str:
    """The version of this package that a worker has."""
    return __version__
