"""Trials of a sweep on an existing dask cluster, at most one at a time on each worker."""

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
from .trial import INTERRUPTED, Outcome, VerifySettings, blocked_outcome, failed, run_trial

POLL_SECONDS = 1.0
"""Interval at which workers and the stop flag are checked."""

LOCK_WAIT_SECONDS = 120.0
"""Longest wait for a run's lock, while a worker that left the cluster still saves the run."""

DEATHS_ALLOWED = 2
"""Number of workers that may leave the cluster while running a trial; one more, and the trial has failed."""

WORKING = (Status.running, Status.paused)
"""States of a worker that isn't closing."""


@contextmanager
def connected_workers(address: str) -> Iterator[Client]:
    """Connect to the cluster at a scheduler's address, and check that its workers have this version of mobilesam.

    Raises:
        VerifyError: there is no scheduler or worker, or the workers have another version of this package.
    """
    with connected(address, VerifyError) as client:
        try:
            versions = set(client.run(worker_version).values())
        except ModuleNotFoundError as error:
            raise VerifyError(f"the cluster's workers lack {error.name}: install mobilesam there") from error
        if versions != {__version__}:
            raise VerifyError(
                f"the cluster's workers have mobilesam {', '.join(sorted(versions))}, this is {__version__}: install "
                "the same everywhere"
            )
        yield client


def worker_version() -> str:
    """Return this package's version; called on each worker."""
    return __version__


class ClusterRunner:
    """Scheduler of trials on free workers, which collects their outcomes.

    Workers are chosen here, since dask would run as many trials on a worker as it has threads. If a worker leaves the
    cluster, its trial resumes on another one from its checkpoint, at most DEATHS_ALLOWED times.

    Args:
        client: client connected to the cluster.
        trials: trials in order; a trial that starts from another's student comes after that one.
        settings: settings for the verification.
        known: earlier outcomes by trial name.
        message: called with a line for each trial that begins or moves.
    """

    def __init__(
        self,
        client: Client,
        trials: Sequence[Trial],
        settings: VerifySettings,
        known: Mapping[str, Outcome],
        message: Callable[[str], None],
    ) -> None:
        self.client, self.settings, self.known, self.message = client, settings, known, message
        self.sweep = uuid.uuid4().hex
        self.trials = {trial.name: trial for trial in trials}
        self.waiting = list(trials)
        self.running: dict[Future, tuple[Trial, str]] = {}
        """Trial and worker's address by task."""
        self.deaths: dict[str, int] = {}
        """Number of workers that left the cluster while running a trial, by trial name."""
        self.locked: dict[str, float] = {}
        """time.monotonic() at which a run was first found locked by a worker that left, by trial name."""
        self.stopping = False
        self.outcomes: dict[str, Outcome] = {}

    def run(self, stop: StopFlag) -> Iterator[Outcome]:
        """Run all trials, and yield their outcomes as they end.

        Args:
            stop: flag at which running trials save and stop.

        Raises:
            DistillInterrupted: after a stop.
            VerifyError: the connection to the scheduler was lost.
        """
        stop.graceful = True
        while self.waiting or self.running:
            if self.client.status != "running":
                DASK_CLIENT_LOG.setLevel(logging.CRITICAL)  # it logs the same with a traceback
                raise VerifyError(
                    "the connection to the dask scheduler was lost; the same command resumes the runs that were saved"
                )
            self._requeue_lost()
            self.stopping = stop.signum is not None
            if stop.signum is not None:
                # In each round: a worker may only now have begun a task that it received before.
                self.waiting = []
                self.client.run(stop_tasks, self.sweep, stop.signum, on_error="ignore")
            self._submit()
            yield from self._record(self._finished() + self._abandoned())
        if stop.signum is not None:
            raise DistillInterrupted(
                "stopped, and the training is saved; run the same command again to resume", stop.signum
            )

    def _workers(self, *, working: bool = False) -> set[str]:
        """Return the addresses of all workers, or, with `working`, of those that aren't closing."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"]
        return {name for name, info in workers.items() if not working or Status[info["status"]] in WORKING}

    def _requeue_lost(self) -> None:
        """Return the trials of workers that left the cluster to the queue."""
        present = self._workers()
        for future, (trial, worker) in list(self.running.items()):
            if worker not in present and not future.done():
                del self.running[future]
                future.cancel()
                self.deaths[trial.name] = self.deaths.get(trial.name, 0) + 1
                self.message(f"{worker} left the cluster: {trial.name} resumes on another worker")
                self.waiting.insert(0, trial)

    def _submit(self) -> None:
        """Submit to each free worker the first trial that can begin."""
        free = self._workers(working=True) - {worker for _, worker in self.running.values()}
        for worker in sorted(free):
            able = (trial for trial in self.waiting if trial.after is None or trial.after in self.outcomes)
            trial = next((trial for trial in able if blocked_outcome(trial, self.outcomes) is None), None)
            if trial is None:
                return
            self.waiting.remove(trial)
            known = self.known.get(trial.name)
            future = self.client.submit(
                trial_task, self.sweep, trial, self.settings, known, workers=[worker], pure=False, retries=0
            )
            self.running[future] = trial, worker
            begun = len(self.outcomes) + len(self.running)
            self.message(f"run {begun} of {len(self.trials)}: {trial.name} on {worker}")

    def _finished(self) -> list[Outcome]:
        """Wait at most POLL_SECONDS, and return the outcomes of the tasks that ended."""
        if not self.running:
            time.sleep(0 if self._workers() else POLL_SECONDS)
            return []
        try:
            with self.client.as_current():
                wait(list(self.running), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
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
                outcomes.append(failed(trial, f"its task was {future.status} by another client"))
            future.release()
        return outcomes

    def _abandoned(self) -> list[Outcome]:
        """Return failed outcomes of the waiting trials that can't begin, or that too many workers died with."""
        abandoned: list[Outcome] = []
        for trial in list(self.waiting):
            outcome = None
            if trial.after in self.outcomes:
                outcome = blocked_outcome(trial, self.outcomes)
            if self.deaths.get(trial.name, 0) > DEATHS_ALLOWED:
                deaths = self.deaths[trial.name]
                outcome = failed(
                    trial, f"{deaths} workers left the cluster while running it: do they have enough memory?"
                )
            if outcome is not None:
                self.waiting.remove(trial)
                abandoned.append(outcome)
        return abandoned

    def _record(self, outcomes: Sequence[Outcome]) -> Iterator[Outcome]:
        """Record and yield outcomes; trials that a closing worker saved, or is still saving, return to the queue."""
        for outcome in outcomes:
            name = outcome["name"]
            if outcome["status"] == INTERRUPTED or self._still_locked(outcome):
                self.waiting += [] if self.stopping else [self.trials[name]]
            else:
                self.outcomes[name] = outcome
                yield outcome

    def _still_locked(self, outcome: Outcome) -> bool:
        """Return True if a worker that left the cluster still holds the run's lock, for at most LOCK_WAIT_SECONDS."""
        name = outcome["name"]
        if not outcome.get("locked") or name not in self.deaths:
            return False
        since = self.locked.setdefault(name, time.monotonic())
        if time.monotonic() - since > LOCK_WAIT_SECONDS:
            return False
        time.sleep(POLL_SECONDS)
        return True


_running: dict[str, StopFlag] = {}
"""On a worker: stop flag of each running trial, by "SWEEP TRIAL"."""
_lock = threading.Lock()


def trial_task(
    sweep: str, trial: Trial, settings: VerifySettings, known: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Run a trial as a task on a worker.

    The trial also saves and stops when its task is released, so that a killed sweep doesn't block the next one, and
    when its worker is closing, so that it can resume elsewhere.

    Args:
        sweep: id of this call of `sweep`.
        trial: trial to run.
        settings: settings for the verification.
        known: earlier outcome of the trial.

    Returns:
        The outcome of `run_trial`; after a stop, one with the status "interrupted".
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
        return run_trial(trial, settings, known, stop=stop, progress=watch)
    except DistillInterrupted as error:
        return {"name": trial.name, "status": INTERRUPTED, "error": str(error)}
    finally:
        with _lock:
            del _running[f"{sweep} {trial.name}"]


def stop_tasks(sweep: str, signum: int) -> int:
    """Request a stop of a sweep's trials on this worker.

    Args:
        sweep: id of the call of `sweep`.
        signum: signal that requests the stop.

    Returns:
        Number of trials that were asked to stop.
    """
    with _lock:
        flags = [flag for name, flag in _running.items() if name.startswith(f"{sweep} ")]
    for flag in flags:
        flag.set(signum)
    return len(flags)
