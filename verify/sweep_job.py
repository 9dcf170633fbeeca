"""A sweep: a grid of runs, each trained and verified, and what they came to, side by side.

It lives here and not among the trainers because what it makes is a comparison: each run is judged by what `verify`
says of it, and that room is above theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from ..distill import Progress, StopFlag
from ..distill.run import run_lock
from ..distill.split import split_rows
from ..distill.stop import stopped_by_signals
from ..store import EmbeddingStore
from ..store.durable import explained, write_atomic
from .errors import VerifyError
from .report import check_report
from .sweep_config import SweepConfig
from .sweep_page import page
from .sweep_results import Results, check_folder
from .sweep_tables import failure_lines, judged_on, sweep_tables
from .trial import FAILED, Judging
from .trial_loop import Outcome, one_after_another
from .trials import Trial, plan_trials

PAGE_FILE, MARKDOWN_FILE = "report.html", "tables.md"


def sweep(
    config: SweepConfig,
    *,
    message: Callable[[str], None] = lambda _: None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Trains and verifies what is still to do of the grid, and returns what `--json` prints.

    The keys: `out`, `runs` (the outcomes, as `run_trial` tells them, in the order of the grid), `failed` (how many of
    them), `seconds` (of this call), `files` (of the tables and the page). Left in `out`: results.json, tables.md,
    report.html, and runs/NAME of each. `message` gets a line for each run that begins or fails, `progress` the
    trainer's, where runs are trained here.

    A run that fails doesn't stop the others. Raises DistillInterrupted when a signal came, after saving; VerifyError,
    DistillError, StoreError when nothing can be begun.
    """
    begun, stop = time.monotonic(), StopFlag()
    with stopped_by_signals(stop), ExitStack() as stack:
        trials = plan_trials(config, _training_rows(config))
        check_folder(config.out)
        stack.enter_context(explained(config.out))
        stack.enter_context(run_lock(config.out))
        check_report(config.out / PAGE_FILE)
        results = Results.open(config.out)
        for outcome in _outcomes(config, trials, results, stop, message, progress):
            results.add(outcome)
            for line in failure_lines([outcome]):
                message(line)
        outcomes = results.of([trial.name for trial in trials])
        files = _write(config, outcomes)
    return {
        "out": str(config.out),
        "runs": outcomes,
        "failed": sum(outcome["status"] == FAILED for outcome in outcomes),
        "seconds": time.monotonic() - begun,
        "files": files,
    }


def summary_lines(result: dict[str, Any]) -> list[str]:
    """What `mobilesam sweep` prints: the tables, what they are of, and what failed."""
    outcomes = result["runs"]
    lines: list[str] = []
    for table in sweep_tables(outcomes):
        lines += [*table.lines(), ""]
    lines.append(judged_on(outcomes))
    lines += failure_lines(outcomes)
    counts = f"{len(outcomes)} runs, {result['failed']} failed, {result['seconds']:.0f} s"
    return [*lines, f"{counts}; {result['files']['page']}"]


def _training_rows(config: SweepConfig) -> int:
    with EmbeddingStore.open(config.base.store) as store:
        records = store.records("done")
    if not records:
        raise VerifyError(f"{config.base.store} has no finished rows: run precompute to the end first")
    split = split_rows({record.row: str(record.sha256) for record in records}, config.base.val_fraction)
    if config.test_store is not None:
        EmbeddingStore.open(config.test_store).close()
    return len(split.train)


def _outcomes(
    config: SweepConfig,
    trials: Sequence[Trial],
    results: Results,
    stop: StopFlag,
    message: Callable[[str], None],
    progress: Callable[[Progress], None] | None,
) -> Iterator[Outcome]:
    judging, known = Judging.of(config), dict(results.outcomes)
    if config.scheduler is None:
        yield from one_after_another(trials, judging, known, message=message, progress=progress)
        return
    from .trial_cluster import ClusterRuns, connected

    with connected(config.scheduler) as client:
        runs = ClusterRuns(client, trials, judging, known, message)
        yield from runs.outcomes_as_they_come(stop)


def _write(config: SweepConfig, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Tables and page; their paths."""
    lines: list[str] = []
    for table in sweep_tables(outcomes):
        lines += [*table.markdown(), ""]
    lines += [judged_on(outcomes), ""]
    lines += [f"- {line}" for line in failure_lines(outcomes)]
    write_atomic(config.out / MARKDOWN_FILE, ("\n".join(lines).rstrip() + "\n").encode())
    write_atomic(config.out / PAGE_FILE, page(config, outcomes).encode())
    return {"tables": str(config.out / MARKDOWN_FILE), "page": str(config.out / PAGE_FILE)}
