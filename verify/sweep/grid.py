"""Grid of a sweep: a trial for every combination of the axes' values, without options that its objective ignores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...common.errors import VerifyError
from ...distill.checksummed_json import digest
from ...distill.config import BATCH_SIZE, EMBEDDING_LOSS_FIELDS, MASK_FIELDS, DistillConfig
from ...distill.expectations import resolve_length, steps_per_epoch
from .config import AXES, SweepConfig

RUNS = "runs"
"""Name of the folder of runs in a sweep's folder."""

DECOUPLED, DECODER = "decoupled", "decoder"
"""Objectives; a decoder run finetunes the student of a decoupled run."""

MOST_TRIALS = 10_000
"""Largest number of trials of a sweep; more are taken for a mistake."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep."""

    name: str
    config: DistillConfig
    options: Mapping[str, Any]
    """Values of the AXES that apply to the trial's objective, as JSON values."""
    after: str | None = None
    """Name of the trial whose student it starts from."""


def plan_trials(config: SweepConfig, training_rows: int) -> list[Trial]:
    """Return all distinct trials; a trial that starts from another's student comes after that one.

    Options that an objective doesn't take are left out of its trials.

    Args:
        config: options of the sweep.
        training_rows: number of rows to train on, which iterations, `epochs="auto"` and a batch size that isn't given
            become numbers by.

    Raises:
        VerifyError: there are more than MOST_TRIALS trials, decoder runs without a student to finetune, or labels
            that no trial learns from.
        DistillError: `DistillConfig` refuses a value.
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
            # Smaller batches would make no more steps here.
            batch_size = options.setdefault("batch_size", config.base.batch_size or BATCH_SIZE)
            steps = steps_per_epoch(training_rows, batch_size)
            options["epochs"] = max(1, round(options.pop("iterations") / steps))
        options |= _length(config, options, training_rows)
    trained = [options for options in combinations if _objective(config, options) != DECODER]
    trials = {trial.name: trial for trial in (_trial(config, options) for options in trained)}
    for options in combinations:
        if _objective(config, options) == DECODER:
            trial = _decoder_trial(config, options, trials)
            trials[trial.name] = trial
    labels = config.coco or config.label_masks
    if labels is not None and not any(trial.config.label_source for trial in trials.values()):
        raise VerifyError(
            f"{'coco' if config.coco else 'label masks'} is {str(labels)!r}, but no run learns from labels: add "
            "coupled to --objective, or leave it out"
        )
    return list(trials.values())


def _objective(config: SweepConfig, options: Mapping[str, Any]) -> str:
    return str(options.get("objective", config.base.objective))


def _length(config: SweepConfig, options: Mapping[str, Any], training_rows: int) -> dict[str, Any]:
    """Return epochs and batch size of a combination as numbers."""
    given = {name: options[name] for name in ("epochs", "batch_size") if name in options}
    epochs, batch_size = resolve_length(dataclasses.replace(config.base, **given), training_rows).length
    return {"epochs": epochs, "batch_size": batch_size}


def _trial(config: SweepConfig, options: Mapping[str, Any], after: str | None = None) -> Trial:
    if _objective(config, options) == DECOUPLED:
        options = {name: value for name, value in options.items() if name not in MASK_FIELDS}
    else:
        if not options.get("mse_weight", config.base.mse_weight):
            options = {**options, **dict.fromkeys(EMBEDDING_LOSS_FIELDS)}
        if (config.coco or config.label_masks) and options.get("labels") != "teacher":
            options = {
                **options,
                "labels": "annotations",
                "coco": config.coco,
                "label_masks": config.label_masks,
            }
    unnamed = dataclasses.replace(config.base, **options)
    values = unnamed.to_json()
    inapplicable = set(MASK_FIELDS) if unnamed.objective == DECOUPLED else set()
    if after is not None:
        inapplicable.add("init")
    # The name depends on the trial's own options, not on the axes, so that a grid can be widened.
    label = f"{unnamed.student.replace(':', '-')}-{unnamed.objective}"
    length = f"b{unnamed.batch_size}-e{unnamed.epochs}-s{unnamed.seed}"
    sources = [] if unnamed.label_source is None else [str(unnamed.label_source)]
    name = "-".join([label, length, digest(unnamed.identity(), after or values["init"], *sources)])
    return Trial(
        name=name,
        config=dataclasses.replace(unnamed, out=config.out / RUNS / name),
        options={axis: values[axis] for axis in AXES if axis not in inapplicable},
        after=after,
    )


def _decoder_trial(config: SweepConfig, options: Mapping[str, Any], trials: Mapping[str, Trial]) -> Trial:
    """Return a trial that finetunes the file `init` or, without one, the student of the matching decoupled trial."""
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
