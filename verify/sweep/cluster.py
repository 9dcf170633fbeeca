"""The runs of a sweep on a dask cluster that exists: at most one at a time on each worker."""

from __future__ import annotations

import logging
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distributed import Client, Future, Status, get_worker, wait

from ... import __version__
from ...common.dask_client import DASK_CLIENT_LOG, connected
from ...common.errors import VerifyError
from ...distill import DistillInterrupted, Progress, StopFlag
from .grid import Trial
from .trial import INTERRUPTED, Judging, Outcome, failed, run_trial, without_start

LOOK_SECONDS = 1.0
"""Between two looks at who is there and whether to stop."""
LOCKED_SECONDS = 120.0
"""How long a run is waited for whose worker went away and is still saving it."""
DEATHS_ALLOWED = 2
"""Deaths of a worker under one run that are taken for bad luck."""


@contextmanager
def connected_workers(address: str) -> Iterator[Client]:
    """Connect to the cluster at an address whose workers can run this version's sweep.

    Raises:
        VerifyError: when there is no scheduler or worker, or the workers have another version of this package.
    """
    with connected(address, VerifyError) as client:
        _check_versions(client)
        yield client


def _check_versions(client: Client) -> None:
    try:
        versions = set(client.run(worker_version).values())
    except ModuleNotFoundError as error:
        raise VerifyError(f"the cluster's workers lack {error.name}: install mobilesam there") from error
    if versions != {__version__}:
        raise VerifyError(
            f"the cluster's workers have mobilesam {', '.join(sorted(versions))}, this is {__version__}: install "
            "the same everywhere"
        )


class ClusterRuns:
    """Places trials on workers as these are free, and collects the outcomes.

    Which worker takes what is decided here: dask would put as many runs on a worker as it has threads. A worker
    that goes away is no failure of its run, which goes on elsewhere from its checkpoint, unless it happens again and
    again.
    """

    def __init__(
        self,
        client: Client,
        trials: Sequence[Trial],
        judging: Judging,
        known: Mapping[str, Outcome],
        message: Callable[[str], None],
    ) -> None:
        self.client, self.judging, self.known, self.message = client, judging, known, message
        self.sweep = uuid.uuid4().hex
        self.trials = {trial.name: trial for trial in trials}
        self.waiting = list(trials)
        self.running: dict[Future, tuple[Trial, str]] = {}
        self.deaths: dict[str, int] = {}
        self.locked: dict[str, float] = {}
        """When a run was first found in the hands of the worker that went away, by time.monotonic()."""
        self.stopping = False
        self.outcomes: dict[str, Outcome] = {}

    def outcomes_as_they_come(self, stop: StopFlag) -> Iterator[Outcome]:
        """Every trial's outcome. When `stop` is set, those that run save first; then DistillInterrupted."""
        stop.graceful = True
        while self.waiting or self.running:
            if self.client.status != "running":
                DASK_CLIENT_LOG.setLevel(logging.CRITICAL)  # it says the same, in a traceback
                raise VerifyError(
                    "the connection to the dask scheduler was lost; runs that were saved go on from there with the "
                    "same command"
                )
            self._take_back_lost()
            self.stopping = stop.signum is not None
            if stop.signum is not None:
                # Every time: a worker may only now have begun what it was given before.
                self.waiting = []
                self.client.run(stop_tasks, self.sweep, stop.signum, on_error="ignore")
            self._place()
            yield from self._take(self._finished() + self._hopeless())
        if stop.signum is not None:
            raise DistillInterrupted(
                "stopped, with what was trained saved; run the same command again to go on", stop.signum
            )

    def _workers(self, *, working: bool = False) -> set[str]:
        """Addresses; with `working` of those alone that aren't about to close."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"]
        return {name for name, info in workers.items() if not working or Status[info["status"]] in WORKING}

    def _place(self) -> None:
        """Gives each free worker the first trial that can begin."""
        free = self._workers(working=True) - {worker for _, worker in self.running.values()}
        for worker in sorted(free):
            able = (trial for trial in self.waiting if trial.after is None or trial.after in self.outcomes)
            trial = next((trial for trial in able if without_start(trial, self.outcomes) is None), None)
            if trial is None:
                return
            self.waiting.remove(trial)
            known = self.known.get(trial.name)
            future = self.client.submit(
                trial_task, self.sweep, trial, self.judging, known, workers=[worker], pure=False, retries=0
            )
            self.running[future] = trial, worker
            begun = len(self.outcomes) + len(self.running)
            self.message(f"run {begun} of {len(self.trials)}: {trial.name} on {worker}")

    def _take_back_lost(self) -> None:
        """Those whose worker is gone wait again."""
        there = self._workers()
        for future, (trial, worker) in list(self.running.items()):
            if worker not in there and not future.done():
                del self.running[future]
                future.cancel()
                self.deaths[trial.name] = self.deaths.get(trial.name, 0) + 1
                self.message(f"{worker} is gone: {trial.name} goes on elsewhere")
                self.waiting.insert(0, trial)

    def _hopeless(self) -> list[Outcome]:
        """Outcomes of those waiting that can't begin, or that worker after worker died of."""
        given_up: list[Outcome] = []
        for trial in list(self.waiting):
            outcome = None
            if trial.after in self.outcomes:
                outcome = without_start(trial, self.outcomes)
            if self.deaths.get(trial.name, 0) > DEATHS_ALLOWED:
                deaths = self.deaths[trial.name]
                outcome = failed(trial, f"{deaths} workers went away under it: is their memory enough?")
            if outcome is not None:
                self.waiting.remove(trial)
                given_up.append(outcome)
        return given_up

    def _finished(self) -> list[Outcome]:
        if not self.running:
            time.sleep(0 if self._workers() else LOOK_SECONDS)
            return []
        try:
            with self.client.as_current():
                wait(list(self.running), timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED")
        except TimeoutError:
            return []
        outcomes: list[Outcome] = []
        for future in [future for future in self.running if future.done()]:
            trial, _ = self.running.pop(future)
            error = future.exception() if future.status == "error" else None
            if error is not None:
                outcomes.append(failed(trial, f"{type(error).__name__}: {error}"))
            elif future.status == "finished":
                outcomes.append(future.result())
            else:
                outcomes.append(failed(trial, f"its task was {future.status} by somebody else"))
            future.release()
        return outcomes

    def _take(self, outcomes: Sequence[Outcome]) -> Iterator[Outcome]:
        for outcome in outcomes:
            name = outcome["name"]
            if outcome["status"] == INTERRUPTED or self._still_held(outcome):
                # Saved by a worker that closes, or about to be.
                self.waiting += [] if self.stopping else [self.trials[name]]
            else:
                self.outcomes[name] = outcome
                yield outcome

    def _still_held(self, outcome: Outcome) -> bool:
        """Whether the worker that went away under a run still has it, and hasn't had it for too long."""
        name = outcome["name"]
        if not outcome.get("locked") or name not in self.deaths:
            return False
        since = self.locked.setdefault(name, time.monotonic())
        if time.monotonic() - since > LOCKED_SECONDS:
            return False
        time.sleep(LOOK_SECONDS)
        return True


# --- A run of a sweep as a task of dask: what a worker does, and how it is told to stop.

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
