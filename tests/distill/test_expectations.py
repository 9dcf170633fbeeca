"""Steps that are enough, the length that follows from few images, the time told, and the verdict on a student."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mobilesam.cli import main
from mobilesam.distill import (
    DistillConfig,
    DistillError,
    DistillInterrupted,
    Progress,
    Run,
    StopFlag,
    distill,
    expectations,
)
from mobilesam.distill.config import BATCH_SIZE
from mobilesam.distill.distributed import ProcessGroup
from mobilesam.distill.expectations import (
    ENOUGH_STEPS,
    LEAST_AUTO_EPOCHS,
    Length,
    Outlook,
    about,
    batch_size_for,
    constant_note,
    enough_epochs,
    learns_embeddings,
    resolve_length,
    tell_length,
)

Options = Callable[..., DistillConfig]


def length(**changes: Any) -> Length:
    return Length(**{"images": 7, "held_out": 1, "batch_size": 1, "epochs": 8, **changes})


@pytest.fixture
def options(options: Options) -> Options:
    """options(store, ...) of the directory, with a recipe that any student can learn by."""
    return partial(options, recipe="mobilesam-2023")


@pytest.fixture
def twelve_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expectations, "ENOUGH_STEPS", 12)
    monkeypatch.setattr(expectations, "LEAST_AUTO_EPOCHS", 2)


@pytest.mark.parametrize(
    ("images", "epochs", "batch_size"),
    [
        (1, 8, 2),
        (7, 8, 2),
        (7, 125, 2),
        (7, 250, 4),
        (7, 500, 8),
        (130, 8, 2),
        (260, 8, 4),
        (500, 8, 8),
        (4000, 1, 8),
    ],
)
def test_few_steps_are_made_of_small_batches(images: int, epochs: int, batch_size: int) -> None:
    assert batch_size_for(images, epochs) == batch_size


def test_a_batch_is_never_smaller_than_the_micro_batch_that_was_given() -> None:
    for micro_batch in range(1, BATCH_SIZE + 1):
        resolved = resolve_length(DistillConfig(micro_batch=micro_batch), 7)
        assert resolved.batch_size is not None
        assert micro_batch <= resolved.batch_size <= BATCH_SIZE
    assert resolve_length(DistillConfig(micro_batch=3), 7).batch_size == 4


def test_what_was_given_stays_as_it_is() -> None:
    assert resolve_length(DistillConfig(batch_size=8, epochs=1), 2).length == (1, 8)
    assert resolve_length(DistillConfig(batch_size=64), 10_000).length == (8, 64)
    assert resolve_length(DistillConfig(), 10_000).identity() == DistillConfig(batch_size=8).identity()


@pytest.mark.parametrize("given", [{}, {"batch_size": 8}, {"batch_size": 3}, {"micro_batch": 2}])
def test_auto_is_the_run_of_the_number_that_it_becomes_and_that_is_the_least_that_is_enough(
    given: dict[str, int],
) -> None:
    for images in (*range(1, 80), 128, 499, 500, 501, 1000, 4001, 300_000):
        auto = resolve_length(DistillConfig(epochs="auto", **given), images)
        epochs, batch_size = auto.length
        assert auto == resolve_length(DistillConfig(epochs=epochs, **given), images)
        steps = epochs * -(-images // batch_size)
        assert steps >= ENOUGH_STEPS
        assert epochs >= LEAST_AUTO_EPOCHS
        assert epochs == LEAST_AUTO_EPOCHS or (epochs - 1) * -(-images // batch_size) < ENOUGH_STEPS


@pytest.mark.parametrize("wrong", ["many", "Auto", 0, -1, 1.5])
def test_other_words_for_epochs_are_refused(wrong: Any) -> None:
    with pytest.raises(DistillError, match="epochs must be at least 1, or auto"):
        DistillConfig(epochs=wrong)


def test_many_images_are_seen_as_often_as_by_default_and_few_as_often_as_it_takes() -> None:
    assert [enough_epochs(images, 8) for images in (1, 8, 9, 100, 4000, 10**6)] == [500, 500, 250, 39, 8, 8]


def test_steps_that_are_too_few_come_with_the_epochs_that_are_enough() -> None:
    short, long = length(), length(epochs=72)
    assert (short.steps, short.too_few, short.advised) == (56, True, long)
    assert (long.steps, long.too_few, long.advised) == (504, False, None)
    finetuned = length(needs_enough=False)
    assert (finetuned.too_few, finetuned.advised) == (False, None)


def test_large_batches_of_few_images_are_advised_against_as_far_as_the_micro_batch_allows() -> None:
    assert length(batch_size=8).advised == length(batch_size=2, epochs=125)
    assert length(batch_size=64, images=1000).advised == length(batch_size=8, images=1000)
    kept = length(batch_size=4, least_batch_size=4)
    assert kept.advised == length(batch_size=4, least_batch_size=4, epochs=250)
    for images in (1, 7, 80, 300, 5000):
        for batch_size in (1, 2, 3, 8, 64):
            advised = length(images=images, batch_size=batch_size, epochs=1).advised
            if advised is not None:
                assert advised.steps >= ENOUGH_STEPS
                assert advised.batch_size <= batch_size


def test_the_line_before_training_says_that_the_batch_was_chosen_only_if_it_was() -> None:
    assert length().line(chosen=True) == (
        "7 images to train on, 1 held out: 8 epochs in batches of 1 (chosen, as the images are few), 56 steps"
    )
    assert "chosen" not in length().line(chosen=False)
    assert "chosen" not in length(batch_size=8, images=5000).line(chosen=True)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "about 1 second"), (37.4, "about 37 seconds"), (89, "about 89 seconds"), (100, "about 2 minutes"),
        (1500, "about 25 minutes"), (5400, "about 2 hours"), (100_000, "about 28 hours"), (864_000, "about 10 days"),
    ],
)  # fmt: skip
def test_times_are_told_in_the_unit_that_people_would_choose(seconds: float, words: str) -> None:
    assert about(seconds) == words


class Rehearsal:
    """Training by a clock that the test moves: `warm_up` and `step` seconds of steps, `between` after an epoch."""

    def __init__(self, length: Length, **options: Any) -> None:
        self.length, self.now, self.lines = length, 0.0, list[str]()
        self.outlook = Outlook(length, self.lines.append, clock=lambda: self.now, **options)

    def train(self, upto: int, *, warm_up: float, step: float, between: float, begin: int = 0) -> None:
        for number in range(begin + 1, upto + 1):
            self.now += warm_up if number == begin + 1 else step
            self.progress("train", number)
            if number % self.length.steps_per_epoch == 0:
                self.progress("validate", number)
                self.now += between
                self.outlook.on_student()

    def progress(self, phase: str, step: int) -> None:
        self.outlook.on_progress(
            Progress(
                phase=phase, epoch=1, epochs=self.length.epochs, step=step, steps=self.length.steps, loss=None,
                images_per_second=1.0, eta_seconds=1e9,
            )
        )  # fmt: skip


def test_the_time_is_that_of_later_steps_and_of_the_ends_of_epochs() -> None:
    rehearsal = Rehearsal(length())
    rehearsal.train(7, warm_up=3, step=0.5, between=2)
    # 504 steps of 0.5 s, 72 ends of 2 s, and 7 images evaluated in a third of a step each.
    seconds = 504 * 0.5 + 72 * 2 + 7 * 0.5 / 3
    assert rehearsal.lines == [
        f"56 steps are too few to learn from: --epochs 72 makes 504, {about(seconds)}; --epochs auto takes them"
    ]
    rehearsal.train(56, begin=7, warm_up=1, step=0.5, between=2)
    assert len(rehearsal.lines) == 1


def test_what_is_left_is_told_after_ten_seconds_of_a_long_epoch() -> None:
    rehearsal = Rehearsal(length(images=8000, held_out=400, batch_size=8))
    rehearsal.train(5, warm_up=4, step=2, between=0)
    # At the fourth step, the tenth second; images held out cost a third of those trained on.
    seconds = 7996 * 2 + 8 * 400 / 8 * 2 / 3 + 1024 / 8 * 2 / 3
    assert rehearsal.lines == [f"7,996 steps left: {about(seconds)}"]


def test_the_first_step_alone_is_enough_where_it_takes_long_unless_it_compiles() -> None:
    slow = {"images": 8000, "held_out": 1, "batch_size": 8}
    eager, compiled = Rehearsal(length(**slow)), Rehearsal(length(**slow), slow_start=True)
    for rehearsal in (eager, compiled):
        rehearsal.train(1, warm_up=60, step=1, between=0)
    (line,) = eager.lines
    assert line.startswith("7,999 steps left: at most ")
    assert compiled.lines == []
    compiled.train(3, begin=1, warm_up=1, step=1, between=0)
    assert compiled.lines == ["7,997 steps left: about 2 hours"]


def test_epochs_of_one_step_are_measured_over_several_and_a_single_step_by_itself() -> None:
    rehearsal = Rehearsal(length(batch_size=8))
    rehearsal.train(2, warm_up=3, step=1, between=1)
    assert rehearsal.lines == []
    rehearsal.train(3, begin=2, warm_up=1, step=1, between=1)
    assert rehearsal.lines == [
        f"8 steps are too few to learn from: --epochs 125 --batch-size 2 makes 500, {about(125 + 125)}; "
        "--epochs auto without --batch-size takes them"
    ]
    single = Rehearsal(length(images=1, epochs=1))
    single.train(1, warm_up=2, step=1, between=1)
    assert single.lines == [
        "1 step is too few to learn from: --epochs 500 makes 500, at most 25 minutes; --epochs auto takes them"
    ]


def test_a_resumed_run_is_measured_by_the_steps_of_this_session() -> None:
    rehearsal = Rehearsal(length(epochs=72))
    rehearsal.outlook.on_student()  # written again from the checkpoint, before any step
    rehearsal.train(497, begin=490, warm_up=3, step=1, between=1)
    assert rehearsal.lines == [f"7 steps left: {about(7 + 1 + 7 / 3)}"]


def test_a_student_no_better_than_a_constant_is_called_so_with_the_mend_of_its_cause() -> None:
    rows = "its own training rows"
    assert constant_note(0.001, rows, length()) is None
    assert constant_note(None, rows, length()) is None
    assert constant_note(-1.414, rows, length(batch_size=8)) == (
        "this student is no better than a constant (skill -1.41 on its own training rows): 8 steps were too few; "
        "distill again with --epochs auto"
    )
    for told in (
        constant_note(0.0, rows, length(epochs=72)),
        constant_note(0.0, rows, length(needs_enough=False)),
    ):
        assert told is not None
        assert "another --lr" in told
        assert "auto" not in told
    assert "its own teacher" in str(constant_note(-0.1, "the 3 images compared", None))


def test_only_objectives_with_the_error_of_the_embeddings_are_judged_by_skill() -> None:
    masks = {"objective": "coupled"}
    judged = [DistillConfig(), DistillConfig(**masks, mse_weight=1.0), DistillConfig(**masks)]
    assert [learns_embeddings(config.identity()) for config in judged] == [True, True, False]


@pytest.mark.usefixtures("twelve_are_enough")
def test_auto_and_its_number_are_one_run_whose_description_has_the_number(
    store: Path, options: Options, small: str
) -> None:
    auto = distill(options(store, student=small, epochs="auto", batch_size=None))
    assert (auto["epochs"], auto["batch_size"], auto["steps"]) == (4, 2, 12)
    assert (auto["too_few_steps"], auto["advised_epochs"]) == (False, None)
    run = Run.open()
    assert (run.description.options["epochs"], run.description.identity["batch_size"]) == (4, 2)
    again = distill(options(store, student=small, epochs=4, batch_size=None))
    assert again == {**auto, "already_finished": True}
    explicit = distill(options(store, student=small, epochs=4, batch_size=2))
    assert explicit["run"] == auto["run"]


@pytest.mark.usefixtures("twelve_are_enough")
def test_auto_resumes_what_its_number_began(store: Path, options: Options, small: str) -> None:
    stop = StopFlag()

    def stop_soon(progress: Progress) -> None:
        if progress.step == 4:
            stop.signum = 15

    with pytest.raises(DistillInterrupted, match=r"stopped after step 4 of 12"):
        distill(options(store, student=small, epochs=4, batch_size=None), stop=stop, progress=stop_soon)
    result = distill(options(store, student=small, epochs="auto", batch_size=None))
    assert result["steps"] == 12
    assert [line["step"] for line in Run.open().history() if line["kind"] == "train"] == list(range(1, 13))


def test_what_happens_is_told_before_it_does_and_judged_at_the_end(
    store: Path, options: Options, small: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Far too high a rate, so that the student is worse than a constant.
    bad = options(store, student=small, batch_size=None, lr=10.0)
    with caplog.at_level(logging.INFO):
        result = distill(bad)
    told = [
        record.getMessage() for record in caplog.records if record.name == "mobilesam.distill.expectations"
    ]
    assert told[0] == (
        "5 images to train on, 1 held out: 2 epochs in batches of 2 (chosen, as the images are few), 6 steps"
    )
    assert told[1].startswith("6 steps are too few to learn from: --epochs 167 makes 501, about ")
    assert told[2].startswith("this student is no better than a constant (skill -")
    assert told[2].endswith("6 steps were too few; distill again with --epochs auto")
    assert result["no_better_than_constant"] is True
    assert result["train"]["skill_valid"] < 0
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert distill(bad) == {**result, "already_finished": True}
    assert [record.getMessage() for record in caplog.records] == told[2:]


@pytest.mark.usefixtures("twelve_are_enough")
def test_enough_steps_are_no_warning(
    store: Path, options: Options, small: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        distill(options(store, student=small, epochs=6, batch_size=2))
    lines = [record for record in caplog.records if record.name == "mobilesam.distill.expectations"]
    assert lines[0].getMessage() == "5 images to train on, 1 held out: 6 epochs in batches of 2, 18 steps"
    assert lines[1].getMessage().startswith("15 steps left: about ")
    assert {record.levelname for record in lines[:2]} == {"INFO"}


@pytest.mark.parametrize(("processes", "told"), [(4, True), (1, False)])
def test_processes_that_a_small_batch_leaves_idle_are_counted(
    processes: int, told: bool, store: Path, options: Options, small: str, caplog: pytest.LogCaptureFixture
) -> None:
    distill(options(store, student=small, batch_size=2, micro_batch=1))
    caplog.clear()
    tell_length(Run.open(), ProcessGroup(world_size=processes), chosen=False, slow_start=False)
    line = "a batch of 2 keeps 2 of 4 processes busy: give a larger --batch-size, or fewer processes"
    assert (line in caplog.text) is told


def test_a_single_training_image_has_no_skill_and_no_verdict(
    save_images: Callable[..., Path], make_store: Callable[..., Path], options: Options, small: str
) -> None:
    result = distill(options(make_store(save_images([(64, 64), (30, 64)])), student=small, batch_size=None))
    assert (result["images"], result["batch_size"], result["steps"]) == ({"train": 1, "val": 1}, 2, 2)
    assert result["train"]["skill_valid"] is None
    assert result["no_better_than_constant"] is None


def test_a_run_of_few_images_from_before_goes_on_with_its_batch_size(
    store: Path, options: Options, small: str, caplog: pytest.LogCaptureFixture
) -> None:
    earlier = distill(options(store, student=small, batch_size=8))
    with caplog.at_level(logging.WARNING):
        new = distill(options(store, student=small, batch_size=None))
    assert new["run"] != earlier["run"]
    assert "batch_size: 8 then, 2 now" in caplog.text
    assert distill(options(store, student=small, batch_size=8))["already_finished"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("twelve_are_enough")
def test_the_command_takes_auto_and_prints_one_object(store: Path, small: str) -> None:
    common = (
        "distill",
        "--store",
        store,
        "--student",
        small,
        "--device",
        "cpu",
        "--recipe",
        "mobilesam-2023",
    )
    done = run(*common, "--epochs", "auto", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["epochs"], result["batch_size"], result["too_few_steps"]) == (4, 2, False)
    assert "5 images to train on, 1 held out: 4 epochs in batches of 2" in done.stderr
    text = run(*common, "--epochs", "4")
    assert "trained on: skill " in text.stdout
    assert "was finished on" in text.stdout
    wrong = run(*common, "--epochs", "many")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "--epochs 'many': give a number of passes over the images, or auto" in wrong.stderr
