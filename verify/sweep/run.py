"""`mobilesam sweep`: train and verify a grid of runs, and compare their results.

Sweeps belong to verify, not to distill, since their product is a comparison by the numbers of `verify`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ...common.durable import explain_os_errors, write_atomic
from ...common.errors import DistillInterrupted, VerifyError, counted, shown
from ...common.outputs import marked, refuse_foreign
from ...common.signals import StopFlag, stopped_by_signals
from ...distill import Progress
from ...distill.data.loader import check_preprocessing, find_image_root
from ...distill.data.rows import CommittedRows
from ...distill.data.sampler import split_rows
from ...distill.run import STOPPED_EARLY
from ...distill.run_folder import LOCK_FILE, run_lock
from ...store import EmbeddingStore
from ..inputs import open_head
from ..report import SWEEP_REPORT, check_report
from ..thresholds import audit_faults
from .config import SweepConfig
from .grid import RUNS, Trial, plan_trials
from .report import render_sweep
from .tables import caption, failure_lines, sweep_tables
from .trial import DONE, FAILED, Outcome, VerifySettings, run_locally

logger = logging.getLogger(__name__)

RESULTS_FILE, PAGE_FILE, MARKDOWN_FILE = "results.json", "report.html", "tables.md"
TABLES = "sweep table"
"""Kind of output of tables.md, as its mark names it."""
FORMAT = 1
WRITE_SECONDS = 10.0
"""Shortest time between two updates of the tables and the page."""


def sweep(
    config: SweepConfig,
    *,
    message: Callable[[str], None] = lambda _: None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train and verify all runs of a grid that aren't done yet.

    A failed run doesn't stop the others. The folder `config.out` contains runs/NAME for each run, and results.json,
    tables.md and report.html, which are rewritten as runs end.

    Args:
        config: all options.
        message: called with a line for each run that begins or fails.
        progress: called with the progress of training and verification, if they run in this process.

    Returns:
        The JSON object that `--json` prints: `out`; `runs`: the outcomes (see `run_trial`) in the order of the grid;
        `failed`: the number of outcomes with an `error`, including those that keep the numbers of an earlier sweep;
        `seconds` of this call; `files`: paths of `tables` and `page`.

    Raises:
        DistillInterrupted: stopped by a signal; the training is saved.
        VerifyError, DistillError, StoreError: no run can begin.
    """
    begun, stop = time.monotonic(), StopFlag()
    with stopped_by_signals(stop, DistillInterrupted, STOPPED_EARLY), ExitStack() as stack:
        rows, test_data = _check_stores(config)
        trials = plan_trials(config, rows)
        check_folder(config.out)
        stack.enter_context(explain_os_errors(config.out))
        stack.enter_context(run_lock(config.out))
        _check_tables(config.out)
        results = Results.open(config.out)
        names = [trial.name for trial in trials]
        settings, written = VerifySettings.of(config, test_data), time.monotonic()
        for outcome in _outcomes(config, trials, settings, results, stop, message, progress):
            results.add(outcome)
            for line in failure_lines(results.of([outcome["name"]])):
                message(line)
            if time.monotonic() - written > WRITE_SECONDS:
                _write(config, results.of(names))
                written = time.monotonic()
        outcomes = results.of(names)
        files = _write(config, outcomes)
    return {
        "out": str(config.out),
        "runs": outcomes,
        "failed": sum("error" in outcome for outcome in outcomes),
        "seconds": time.monotonic() - begun,
        "files": files,
    }


def summary_lines(result: dict[str, Any]) -> list[str]:
    """Return the lines that `mobilesam sweep` prints: the tables, their caption, the failures, a summary.

    Args:
        result: result of `sweep`.
    """
    outcomes = result["runs"]
    lines: list[str] = []
    for table in sweep_tables(outcomes):
        lines += [*table.lines(), ""]
    lines.append(caption(outcomes))
    lines += failure_lines(outcomes)
    counts = f"{counted(len(outcomes), 'run')}, {result['failed']} failed, {result['seconds']:.0f} s"
    return [*lines, f"{counts}; {result['files']['page']}"]


def _check_stores(config: SweepConfig) -> tuple[int, str | None]:
    """Check store and test store before the first training.

    Returns:
        The number of rows to train on, and a digest of the test store's content (None without a test store).

    Raises:
        VerifyError: a store can't be used.
    """
    with EmbeddingStore.open(config.base.store) as store:
        spec, rows = store.spec, _usable_rows(store)
    split = split_rows(rows, config.base.val_fraction)
    if config.test_store is None:
        return len(split.train), None
    with EmbeddingStore.open(config.test_store) as test:
        rows = _usable_rows(test)
        for name, ours, theirs in (
            ("image size", spec.image_size, test.spec.image_size),
            ("teacher", spec.teacher, test.spec.teacher),
            ("checkpoint", spec.checkpoint_sha256, test.spec.checkpoint_sha256),
        ):
            if ours != theirs:
                raise VerifyError(
                    f"{config.test_store} can't test students of {config.base.store}: its {name} is {theirs}, not "
                    f"{ours}; give a test store of the same teacher and image size"
                )
        check_preprocessing(test, refusal=VerifyError)
        if config.scheduler is None:  # workers may have the images elsewhere
            find_image_root(test, config.test_images, refusal=VerifyError, option="--test-images")
        if test.spec.head_sha256 is not None:
            open_head(test, torch.device("cpu"))
        return len(split.train), f"{test.spec.store_id}-{rows.digest}"


def _usable_rows(store: EmbeddingStore) -> CommittedRows:
    """Return the committed rows. Raises VerifyError if there are none, or if an audit is out of tolerance."""
    rows = CommittedRows.of(store)
    if not len(rows):
        raise VerifyError(f"{store.path} has no finished rows: run precompute to the end first")
    faults = audit_faults(store)
    if faults:
        raise VerifyError(f"{store.path}: {faults[0]}")
    return rows


def _outcomes(
    config: SweepConfig,
    trials: Sequence[Trial],
    settings: VerifySettings,
    results: Results,
    stop: StopFlag,
    message: Callable[[str], None],
    progress: Callable[[Progress], None] | None,
) -> Iterator[Outcome]:
    known = dict(results.outcomes)
    if config.scheduler is None:
        yield from run_locally(trials, settings, known, message=message, progress=progress)
        return
    from .cluster import ClusterRunner, connected_workers

    with connected_workers(config.scheduler) as client:
        yield from ClusterRunner(client, trials, settings, known, message).run(stop)


def _write(config: SweepConfig, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Write the tables and the page, and return their paths."""
    lines = [f"# {shown(config.out.name)}, a sweep of mobilesam", ""]
    for table in sweep_tables(outcomes):
        lines += [*table.markdown(), ""]
    lines += [caption(outcomes), ""]
    lines += [f"- {line}" for line in failure_lines(outcomes)]
    tables, page = ("\n".join(lines).rstrip() + "\n").encode(), render_sweep(config, outcomes).encode()
    write_atomic(config.out / MARKDOWN_FILE, marked(tables, TABLES))
    write_atomic(config.out / PAGE_FILE, marked(page, SWEEP_REPORT))
    return {"tables": str(config.out / MARKDOWN_FILE), "page": str(config.out / PAGE_FILE)}


class Results:
    """Outcomes of `run_trial` by trial name, saved in results.json.

    Lost outcomes are recovered from the runs' folders, or measured again.

    Args:
        folder: the sweep's folder.
        known: outcomes so far, by trial name.
    """

    def __init__(self, folder: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
        self.path = folder / RESULTS_FILE
        self.outcomes: dict[str, Mapping[str, Any]] = dict(known)

    @classmethod
    def open(cls, folder: Path) -> Results:
        """Read the results in a sweep's folder; a missing or damaged file counts as empty."""
        path = folder / RESULTS_FILE
        try:
            value = json.loads(path.read_bytes())
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']}, this version's is {FORMAT}")
            return cls(folder, {outcome["name"]: outcome for outcome in value["runs"]})
        except FileNotFoundError:
            return cls(folder, {})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("%s is damaged (%s): rebuilt from the runs", path, error)
            return cls(folder, {})

    def add(self, outcome: Mapping[str, Any]) -> None:
        """Replace the trial's earlier outcome, and write the file.

        If a run was done and fails later, for instance because its photos are missing, the earlier outcome is kept,
        with the failure as `error`.
        """
        name, earlier = outcome["name"], self.outcomes.get(outcome["name"])
        if outcome["status"] == FAILED and earlier is not None and earlier["status"] == DONE:
            outcome = {**earlier, "error": outcome["error"]}
        self.outcomes[name] = outcome
        self._write()

    def of(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        """Return the outcomes of these trials, in this order; a trial without one is left out."""
        return [self.outcomes[name] for name in names if name in self.outcomes]

    def _write(self) -> None:
        value = {"format": FORMAT, "runs": list(self.outcomes.values())}
        write_atomic(self.path, json.dumps(value, indent=1).encode() + b"\n")


def check_folder(folder: Path) -> None:
    """Refuse a path that is a file, or a folder that holds something other than a sweep. Raises VerifyError."""
    if folder.exists() and not folder.is_dir():
        raise VerifyError(f"{folder} is a file; give another --out")
    if not folder.exists() or _is_sweep(folder):
        return
    others = [path.name for path in folder.iterdir() if path.name not in (RUNS, LOCK_FILE)]
    others = [name for name in others if not name.endswith(".partial")]
    if others:
        raise VerifyError(
            f"{folder} holds {counted(len(others), 'other file')} and no sweep, the first: {shown(min(others))}; "
            "give another --out"
        )


def _is_sweep(folder: Path) -> bool:
    """Return True if the folder's results, or a lock and runs, show that it is a sweep's."""
    try:
        value = json.loads((folder / RESULTS_FILE).read_bytes())
        if value["format"] == FORMAT and isinstance(value["runs"], list):
            return True
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return (folder / LOCK_FILE).is_file() and (folder / RUNS).is_dir()


def _check_tables(folder: Path) -> None:
    """Refuse to replace a page or tables that were changed since they were written; check that pages can be made."""
    check_report(folder / PAGE_FILE, SWEEP_REPORT)
    # A sweep's tables without a mark are an older version's.
    refuse_foreign(folder / MARKDOWN_FILE, TABLES, "--out", VerifyError, is_older=lambda _: True)
