from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mobilesam.distill import DistillConfig, DistillError
from mobilesam.verify import SweepConfig, VerifyError
from mobilesam.verify.sweep.config import parse_axis
from mobilesam.verify.sweep.grid import Trial, plan_trials


def plan(rows: int = 100, iterations: tuple[int, ...] = (), **axes: tuple[Any, ...]) -> list[Trial]:
    return plan_trials(SweepConfig(out=Path("sweeps/a"), axes=axes, iterations=iterations), rows)


def test_every_combination_is_a_run_and_seeds_vary_slowest() -> None:
    trials = plan(batch_size=(4, 8), epochs=(2, 3), seed=(0, 1))
    made = [(t.config.seed, t.config.batch_size, t.config.epochs) for t in trials]
    assert made == [(s, b, e) for s in (0, 1) for b in (4, 8) for e in (2, 3)]
    assert len({trial.config.out for trial in trials}) == 8


def test_what_is_not_an_axis_is_distills_default() -> None:
    (trial,) = plan(rows=5000)
    assert trial.config.identity() == DistillConfig(batch_size=8).identity()


def test_a_runs_name_does_not_depend_on_the_other_runs() -> None:
    (alone,) = plan(batch_size=(4,), seed=(1,))
    among = plan(batch_size=(8, 4), seed=(0, 1), objective=("coupled", "decoupled"), objects=(3,))
    assert [trial.name for trial in among if trial.options == alone.options] == [alone.name]


def test_a_value_given_twice_is_one_run() -> None:
    assert len(plan(seed=(0, 0))) == 1


@pytest.mark.parametrize(("batch", "epochs"), [(4, 8), (8, 15), (100, 200), (3, 6)])
def test_iterations_become_the_nearest_number_of_epochs(batch: int, epochs: int) -> None:
    (trial,) = plan(rows=100, iterations=(200,), batch_size=(batch,))
    assert trial.config.epochs == epochs


def test_iterations_keep_the_batch_size_since_smaller_ones_would_make_no_more_of_them() -> None:
    (trial,) = plan(rows=40, iterations=(100,))
    assert (trial.config.epochs, trial.config.batch_size) == (20, 8)


def test_few_images_get_small_batches_and_auto_becomes_a_number_in_the_name_and_the_tables() -> None:
    small, auto = plan(rows=10, epochs=(8, "auto"))
    assert (small.config.length, auto.config.length) == ((8, 2), (100, 2))
    assert (auto.options["epochs"], auto.options["batch_size"]) == (100, 2)
    (number,) = plan(rows=10, epochs=(100,))
    assert auto.name == number.name
    assert "-b2-e100-s0-" in auto.name


def test_fewer_iterations_than_an_epoch_has_are_one_epoch() -> None:
    (trial,) = plan(rows=1000, iterations=(3,))
    assert trial.config.epochs == 1


def test_a_decoder_run_follows_the_decoupled_run_of_its_own_options() -> None:
    trials = plan(objective=("decoder", "decoupled"), batch_size=(4, 8), seed=(0, 1))
    places = {trial.name: place for place, trial in enumerate(trials)}
    finetuned = [trial for trial in trials if trial.config.objective == "decoder"]
    assert len(finetuned) == 4
    for trial in finetuned:
        assert trial.after is not None
        before = trials[places[trial.after]]
        assert places[trial.after] < places[trial.name]
        assert before.config.objective == "decoupled"
        assert trial.config.init == before.config.out
        assert (before.config.seed, before.config.batch_size) == (trial.config.seed, trial.config.batch_size)


def test_a_decoder_run_starts_from_init_where_that_is_given() -> None:
    (trial,) = plan(objective=("decoder",), init=(Path("a.pt"),))
    assert (trial.after, trial.config.init) == (None, Path("a.pt").absolute())


def test_a_decoder_run_without_a_student_is_refused() -> None:
    with pytest.raises(VerifyError, match="add decoupled to the objectives"):
        plan(objective=("decoder", "coupled"))


def test_an_option_of_masks_multiplies_only_the_runs_that_look_at_masks() -> None:
    trials = plan(objective=("decoupled", "semi_coupled", "decoder"), objects=(2, 4), mse_weight=(0.0, 1.0))
    objectives = [trial.config.objective for trial in trials]
    assert {name: objectives.count(name) for name in set(objectives)} == {
        "decoupled": 1,
        "semi_coupled": 4,
        "decoder": 2,
    }


def test_a_loss_of_embeddings_multiplies_only_the_runs_that_look_at_embeddings() -> None:
    trials = plan(objective=("decoupled", "coupled"), loss=("mse", "huber"), mse_weight=(0.0, 1.0))
    made = {(trial.config.objective, trial.config.mse_weight, trial.config.loss) for trial in trials}
    assert made == {
        *(("decoupled", 0.0, loss) for loss in ("mse", "huber")),
        ("coupled", 0.0, None),
        *(("coupled", 1.0, loss) for loss in ("mse", "huber")),
    }
    assert len(trials) == len(made)


def test_thousands_of_runs_are_a_mistake() -> None:
    with pytest.raises(VerifyError, match="10,100 runs are more than 10,000"):
        plan(seed=tuple(range(101)), epochs=tuple(range(1, 101)))


def test_a_value_that_distill_refuses_is_refused() -> None:
    with pytest.raises(DistillError, match="epochs must be at least 1"):
        plan(epochs=(1, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"device": ("cpu",)}}, "axes must be some of seed, student"),
        ({"axes": {"lr": ()}}, "lr must be at least one value"),
        ({"axes": {"epochs": (1,)}, "iterations": (5,)}, "epochs and iterations both"),
        ({"iterations": (0,)}, "iterations must be at least 1"),
        ({"points": 0}, "points must be between 1 and 64"),
        ({"test_images": Path("a")}, "belong to a test store"),
    ],
)
def test_a_sweep_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        SweepConfig(out=Path("a"), **changes)


def test_values_are_read_with_commas_between() -> None:
    assert parse_axis("batch_size", "4, 8") == (4, 8)
    assert parse_axis("lr", "1e-3,0.5") == (1e-3, 0.5)
    assert parse_axis("init", "a.pt") == (Path("a.pt"),)
    assert parse_axis("epochs", "8, auto") == (8, "auto")
    with pytest.raises(VerifyError, match="epochs must be int values or auto with commas between"):
        parse_axis("epochs", "8,many")
    for wrong in ("4,", "", "4,x", "1.5"):
        with pytest.raises(VerifyError, match="batch size must be int values with commas between"):
            parse_axis("batch_size", wrong)


def test_labels_of_a_file_are_for_the_runs_that_learn_from_labels() -> None:
    axes = {"objective": ("decoupled", "coupled"), "labels": ("teacher", "annotations")}
    trials = plan_trials(SweepConfig(out=Path("sweeps/a"), axes=axes, coco=Path("a.json")), 100)
    used = [(trial.config.objective, trial.options.get("labels"), trial.config.coco) for trial in trials]
    path = Path("a.json").absolute()
    assert used == [
        ("decoupled", None, None), ("coupled", "teacher", None), ("coupled", "annotations", path),
    ]  # fmt: skip
    (alone,) = plan_trials(
        SweepConfig(out=Path("sweeps/a"), axes={"objective": ("coupled",)}, label_masks=Path("masks")), 100
    )
    assert alone.config.learns_from_labels
    assert alone.config.label_masks == Path("masks").absolute()
    assert alone.name != trials[2].name
    base = DistillConfig(objective="coupled", coco=Path("a.json"))
    (given,) = plan_trials(SweepConfig(out=Path("sweeps/a"), base=base), 100)
    assert (given.name, given.config.coco) == (trials[2].name, path)


def test_labels_that_no_run_learns_from_are_refused() -> None:
    with pytest.raises(VerifyError, match="no run learns from labels: add coupled to --objective"):
        plan_trials(SweepConfig(out=Path("sweeps/a"), coco=Path("a.json")), 100)
    with pytest.raises(VerifyError, match="two sources of labels"):
        SweepConfig(
            out=Path("sweeps/a"), axes={"objective": ("coupled",)}, coco=Path("a"), label_masks=Path("b")
        )


def test_sizes_of_the_input_are_an_axis_and_runs_without_it_keep_their_names() -> None:
    trials = plan(student_size=(512, 256))
    assert [trial.config.student_size for trial in trials] == [512, 256]
    (alone,) = plan()
    assert len({alone.name, *(trial.name for trial in trials)}) == 3
    assert parse_axis("student_size", "512, 256") == (512, 256)
    assert "student_size" not in alone.config.identity()
