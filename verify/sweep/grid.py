"""The runs of a sweep: every combination of its axes, made to fit its objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any

from ...common.errors import VerifyError
from ...distill.checksummed_json import digest
from ...distill.config import OF_MASKS, DistillConfig
from .config import AXES, SweepConfig

RUNS = "runs"
DECOUPLED, DECODER = "decoupled", "decoder"
MOST_TRIALS = 10_000
"""More are a mistake."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep. `options` are the values of the AXES that mean something for it, as JSON has them; `after`
    names the trial with whose student this one begins."""

    name: str
    config: DistillConfig
    options: Mapping[str, Any]
    after: str | None = None


def plan_trials(config: SweepConfig, training_rows: int) -> list[Trial]:
    """All distinct runs, one that begins with another's student after that one.

    An option that an objective doesn't take is left out of its runs. `training_rows` translates iterations to epochs.
    Raises VerifyError when decoder runs lack what they would finetune, DistillError for a value that distill refuses.
    """
    lengths: Mapping[str, tuple[Any, ...]] = {"iterations": config.iterations} if config.iterations else {}
    axes = {**config.axes, **lengths}
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MOST_TRIALS:
        raise VerifyError(f"{count:,} runs are more than {MOST_TRIALS:,}: give fewer values")
    combinations = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    for options in combinations:
        if "iterations" in options:
            steps = ceil(training_rows / options.get("batch_size", config.base.batch_size))
            options["epochs"] = max(1, round(options.pop("iterations") / steps))
    trained = [options for options in combinations if _objective(config, options) != DECODER]
    trials = {trial.name: trial for trial in (_trial(config, options) for options in trained)}
    for options in combinations:
        if _objective(config, options) == DECODER:
            trial = _decoder_trial(config, options, trials)
            trials[trial.name] = trial
    return list(trials.values())


def _objective(config: SweepConfig, options: Mapping[str, Any]) -> str:
    return str(options.get("objective", config.base.objective))


def _trial(config: SweepConfig, options: Mapping[str, Any], after: str | None = None) -> Trial:
    if _objective(config, options) == DECOUPLED:
        options = {name: value for name, value in options.items() if name not in OF_MASKS}
    unnamed = dataclasses.replace(config.base, **options)
    told = unnamed.to_json()
    meaningless = set(OF_MASKS) if unnamed.objective == DECOUPLED else set()
    if after is not None:
        meaningless.add("init")
    # Of what is asked for alone, not of the axes, so that a grid can be widened.
    label = f"{unnamed.student.replace(':', '-')}-{unnamed.objective}"
    length = f"b{unnamed.batch_size}-e{unnamed.epochs}-s{unnamed.seed}"
    name = "-".join([label, length, digest(unnamed.identity(), after or told["init"])])
    return Trial(
        name=name,
        config=dataclasses.replace(unnamed, out=config.out / RUNS / name),
        options={axis: told[axis] for axis in AXES if axis not in meaningless},
        after=after,
    )


def _decoder_trial(config: SweepConfig, options: Mapping[str, Any], trials: Mapping[str, Trial]) -> Trial:
    """Finetuning is of the file that `init` names, or else of the student that the same options gave decoupled."""
    options = {name: value for name, value in options.items() if name != "mse_weight"}
    if options.get("init", config.base.init) is not None:
        return _trial(config, options)
    before = _trial(config, {**options, "objective": DECOUPLED})
    if before.name not in trials:
        raise VerifyError(
            "the decoder objective finetunes finished students: add decoupled to the objectives, or name a run or "
            "file with --init"
        )
    start = {**options, "init": before.config.out}
    return _trial(config, start, after=before.name)
