from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mobilesam.cli import main
from mobilesam.distill import load_student
from mobilesam.distill.checksummed_json import encode_line
from mobilesam.sam import ImageError, normalize_and_pad
from mobilesam.store import Audit, EmbeddingStore
from mobilesam.verify import VerifyConfig, VerifyError, table_lines, verify

PIXELS = 128


def asked(**options: object) -> VerifyConfig:
    """With masks at one point an image, since hardly anything here is about them."""
    return VerifyConfig(**{"points": 1} | options)


def metrics(result: dict) -> dict:
    wanted = ("mse", "relative_mse", "cosine", "skill")
    return {name: value for name, value in result.items() if name.removesuffix("_valid") in wanted}


def assert_same(result: dict, logged: dict) -> None:
    assert set(metrics(result)) == set(metrics(logged))
    assert len(metrics(result)) == 8
    for name, value in metrics(result).items():
        assert value == pytest.approx(logged[name], rel=1e-5, abs=1e-7), name


def test_the_latest_run_and_its_store_are_the_default(world):
    result = verify(VerifyConfig())
    assert result["images"] == len(world.run.split.val)
    assert (result["passed"], result["failed_checks"]) == (True, [])
    assert result["subject"]["run"] == world.run.path.name
    assert result["subject"]["store"] == str(world.store)
    masks = {"miou", "miou_min", "miou_constant", "prompts", "empty_masks"}
    about = {"images", "no_better_than_constant", "train_skill_valid", "passed", "failed_checks", "subject"}
    words = {"summary", "follows", "examples", "held_out", "trained_on"}
    assert {*about, *words, *metrics(result), *masks} == set(result)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(("split", "kind"), [("val", "val"), ("train", "train_eval")])
def test_the_numbers_are_those_that_the_trainer_logged(world, split, kind):
    logged = world.run.last(kind)
    result = verify(asked(split=split, batch_size=3))
    assert result["images"] == logged["rows"]
    assert_same(result, logged)


def test_the_numbers_agree_with_a_computation_by_hand(world):
    result = verify(asked(split="all"))
    student, _ = load_student(world.run.path)
    with EmbeddingStore.open(world.store) as store:
        records = store.manifest.records()
        teacher_NCHW = store.read([record.row for record in records]).to_float32().astype(np.float64)
    outputs, valid = [], []
    for record in records:
        height, width = record.resized_size
        image = Image.open(world.photos / record.key).resize((width, height), Image.Resampling.BILINEAR)
        canvas_BHWC = torch.zeros(1, PIXELS, PIXELS, 3, dtype=torch.uint8)
        canvas_BHWC[0, :height, :width] = torch.from_numpy(np.array(image))
        with torch.no_grad():
            outputs.append(
                student(normalize_and_pad(canvas_BHWC, torch.tensor([[height, width]])))[0].double().numpy()
            )
        centres = np.arange(PIXELS // 16) * 16 + 8
        valid.append((centres < height)[:, None] & (centres < width)[None, :])
    student_NCHW, valid_N1HW = np.stack(outputs), np.stack(valid)[:, None]
    squared = (student_NCHW - teacher_NCHW) ** 2
    mean_CHW = teacher_NCHW[list(world.run.split.train)].mean(axis=0)
    constant = (mean_CHW - teacher_NCHW) ** 2
    where = np.broadcast_to(valid_N1HW, squared.shape)
    assert result["images"] == 6
    assert result["mse"] == pytest.approx(squared.mean(), rel=1e-5)
    assert result["mse_valid"] == pytest.approx(squared[where].mean(), rel=1e-5)
    assert result["skill_valid"] == pytest.approx(1 - squared[where].sum() / constant[where].sum(), abs=1e-5)
    norms = np.linalg.norm(student_NCHW, axis=1) * np.linalg.norm(teacher_NCHW, axis=1)
    cosine_NHW = (student_NCHW * teacher_NCHW).sum(axis=1) / norms
    cosines = [cosine[mask].mean() for cosine, mask in zip(cosine_NHW, valid, strict=True)]
    assert result["cosine_valid"]["mean"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert result["cosine_valid"]["p5"] == pytest.approx(np.percentile(cosines, 5), abs=1e-6)
    assert result["cosine_valid"]["min"] == pytest.approx(np.min(cosines), abs=1e-6)


def test_a_missed_threshold_fails_with_both_numbers(world):
    result = verify(asked(min_skill=1.0, min_cosine=-1.0))
    assert result["passed"] is False
    assert result["failed_checks"] == [
        {"check": "min_skill", "metric": "skill_valid", "value": result["skill_valid"], "threshold": 1.0}
    ]
    lines = table_lines(result)
    assert any(line.startswith("FAILED  skill") for line in lines)
    assert any(line.startswith("passed  cosine") for line in lines)


def test_progress_counts_every_image(world):
    seen = []
    verify(asked(split="all", batch_size=4), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]


def test_a_student_file_in_its_run_knows_its_split(world):
    assert verify(asked(student=world.run.student_path)) == verify(asked(student=world.run.path))


def test_a_student_file_alone_has_no_split_and_says_what_its_skill_means(world, tmp_path):
    alone = shutil.copy(world.run.student_path, tmp_path / "mine.safetensors")
    with pytest.raises(VerifyError, match="val rows aren't known: give --split all"):
        verify(asked(student=alone))
    result = verify(asked(student=alone, split="all", precision="float32"))
    assert result["subject"]["run"] is None
    assert result["subject"]["mean_embedding"] == "all committed rows of the store"
    assert any("mean of all rows of the store" in line for line in table_lines(result))
    # Against the mean of the very rows it is judged on, a student looks worse than against the training rows'.
    assert result["skill"] < verify(asked(split="all"))["skill"]
    assert result["mse"] == pytest.approx(verify(asked(split="all"))["mse"], rel=1e-6)


def test_a_store_that_moved_is_the_same_store(world, tmp_path):
    expected = verify(asked())
    moved = shutil.move(world.store, tmp_path / "moved.zarr")
    result = verify(asked(store=moved))
    assert_same(result, expected)
    assert result["subject"]["notes"] == expected["subject"]["notes"]


def measured_on_training_rows(world, skill):
    """Let the trainer have measured this skill, or nothing for "nothing"."""
    file = world.run.path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    measured = world.run.last("train_eval") | {"skill_valid": skill}
    new = b"" if skill == "nothing" else encode_line(measured)
    file.write_bytes(b"".join(new if b"train_eval" in line else line for line in lines))


def test_a_student_no_better_than_a_constant_is_called_so_in_numbers_table_and_report(world, tmp_path):
    measured_on_training_rows(world, -1.414)
    report = tmp_path / "report.html"
    result = verify(asked(report=report))
    note = (
        "this student is no better than a constant (skill -1.41 on its own training rows): 4 steps were too few; "
        "distill again with --epochs auto"
    )
    assert result["no_better_than_constant"] is True
    assert result["subject"]["notes"][0] == note
    assert f"note: {note}" in table_lines(result)
    assert f'<div class="callout warn"><p>{note}</p></div>' in report.read_text()


def test_a_student_better_than_a_constant_needs_no_note_and_one_of_a_single_image_has_no_verdict(world):
    for skill, verdict in ((0.001, False), (None, None)):
        measured_on_training_rows(world, skill)
        result = verify(asked())
        assert result["no_better_than_constant"] is verdict
        assert result["subject"]["notes"] == []


def test_without_its_run_a_student_is_judged_by_the_rows_compared(world, tmp_path):
    file = tmp_path / "alone.safetensors"
    shutil.copy(world.run.student_path, file)
    result = verify(asked(student=file, store=world.store, split="all"))
    assert result["no_better_than_constant"] is (result["skill_valid"] <= 0)
    told = (
        f"(skill {result['skill_valid']:.3g} on the 6 images compared): see if these are images of the kind"
    )
    assert any(told in note for note in result["subject"]["notes"]) is (result["skill_valid"] <= 0)


def test_a_run_whose_training_rows_were_never_measured_is_not_judged(world):
    measured_on_training_rows(world, "nothing")
    result = verify(asked())
    assert result["no_better_than_constant"] is None
    assert result["subject"]["notes"] == []


def test_another_store_can_only_be_compared_as_a_whole(world, other_store):
    other = other_store(store_id="0" * 32)
    with pytest.raises(VerifyError, match=r"other\.zarr is not the store .* --split all"):
        verify(asked(store=other))
    result = verify(asked(store=other, split="all"))
    assert result["images"] == 6
    assert result["subject"]["mean_embedding"] == "the run's training rows"
    assert any("not the store that the student was trained on" in note for note in result["subject"]["notes"])
    assert not any("another teacher" in note for note in result["subject"]["notes"])


def test_another_teacher_is_noted(world, other_store):
    result = verify(asked(store=other_store(checkpoint_sha256="cd" * 32), split="all"))
    assert any("another teacher" in note and "cdcdcdcd" in note for note in result["subject"]["notes"])


def test_a_store_of_another_image_size_is_refused_with_both(world, other_store):
    other = other_store(image_size=64)
    with pytest.raises(VerifyError, match=r"128 pixels.*embeddings of 64"):
        verify(asked(store=other, split="all"))


def test_a_store_of_another_preprocessing_is_refused(world, other_store):
    other = other_store(preprocessing={"filter": "nearest"})
    with pytest.raises(VerifyError, match="another preprocessing"):
        verify(asked(store=other, split="all"))


def test_rows_that_are_no_longer_committed_are_counted(world):
    with EmbeddingStore.open(world.store, writable=True) as store:
        store.withdraw(range(2))
    with pytest.raises(VerifyError, match=r"0 done, 6 pending.*run precompute"):
        verify(asked(split="all"))
    with pytest.raises(VerifyError, match=rf"lacks {len(world.run.split.train)} of the rows"):
        verify(asked(split="train"))


def test_an_image_that_changed_stops_by_name(world):
    with EmbeddingStore.open(world.store) as store:
        key = store.manifest.records()[world.run.split.val[0]].key
    content = bytearray((world.photos / key).read_bytes())
    content[-20] ^= 1
    (world.photos / key).write_bytes(content)
    with pytest.raises(ImageError, match=f"{key} changed since precompute"):
        verify(asked())


def test_images_that_moved_are_asked_for(world, tmp_path):
    expected = verify(asked())
    moved = shutil.move(world.photos, tmp_path / "elsewhere")
    with pytest.raises(VerifyError, match="photos-0; say where they are with --images"):
        verify(asked())
    assert_same(verify(asked(images=moved)), expected)


def test_an_explicit_precision_overrides_the_runs(world):
    result = verify(asked(precision="bfloat16"))
    assert result["subject"]["precision"] == "bfloat16"
    assert verify(asked())["subject"]["precision"] == "float32"
    assert result["mse"] != verify(asked())["mse"]
    assert result["mse"] == pytest.approx(verify(asked())["mse"], rel=0.05)


def test_drawing_tells_how_far_it_is_and_computes_no_embedding_twice(world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mobilesam.verify.gallery.embed", lambda *_: pytest.fail("the student's embeddings are known")
    )
    told: list[tuple[int, int]] = []
    phases: list[str] = []
    kept = tmp_path / "kept.html"
    verify(
        asked(split="all", report=kept),
        drawn=lambda done, total: told.append((done, total)),
        phase=phases.append,
    )
    assert told == [(done, 6) for done in range(7)]
    assert phases[-2:] == ["drawing photos", "writing the report"]
    monkeypatch.undo()
    monkeypatch.chdir(world.path)
    # Of more images than can be kept, embeddings are computed again.
    monkeypatch.setattr("mobilesam.verify.gallery.KEPT_BYTES", 0)
    verify(asked(split="all", report=tmp_path / "again.html", batch_size=1))
    assert (tmp_path / "again.html").stat().st_size == pytest.approx(kept.stat().st_size, rel=0.02)


def test_a_report_that_cannot_be_written_is_refused_before_any_work(world, tmp_path, monkeypatch):
    monkeypatch.setattr("mobilesam.verify.run.open_inputs", lambda _: pytest.fail("work was begun"))
    with pytest.raises(VerifyError, match="does not exist"):
        verify(asked(report=tmp_path / "absent" / "report.html"))


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (
            OSError(28, "No space left on device"),
            "error: no report: cannot write the report r.html: No space left",
        ),
        (KeyError("odd"), "error: no report: unexpected KeyError: 'odd'\nThis is a bug"),
    ],
)
def test_figures_are_printed_where_their_report_cannot_be_made(world, monkeypatch, raised, text):
    def fail(_):
        raise raised

    command = ["verify", "--points", "1", "--report", "r.html"]
    monkeypatch.setattr("mobilesam.common.durable.os.fsync", fail)
    printed = CliRunner().invoke(main, command)
    assert printed.exit_code == 3
    assert text in printed.stderr
    assert "cosine" in printed.stdout
    assert "r.html" not in printed.stdout
    printed = CliRunner().invoke(main, [*command, "--json"])
    assert printed.exit_code == 3
    assert_same(json.loads(printed.stdout), world.run.last("val"))
    assert not (world.path / "r.html").exists()


def test_the_report_shows_every_image_of_a_small_set_once(world, tmp_path):
    report = tmp_path / "report.html"
    result = verify(asked(split="all", report=report, min_cosine=0.9))
    pictures: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: pictures.append(dict(attrs)["alt"]) if tag == "img" else None
    page = report.read_text(encoding="utf-8")
    parser.feed(page)
    photos = [alt for alt in pictures if alt.startswith("photo of ")]
    assert sorted(photos) == [f"photo of photo{i}.bmp" for i in range(6)]
    assert len(pictures) == 3 * 3 + 6 * 6 + 1
    assert sum("s masks for" in alt for alt in pictures) == 6 * 2
    for stated in (
        world.run.path.name,
        "ab" * 32,
        "5,743,892",
        "6 done, 0 failed, 0 pending",
        f"{result['skill_valid']:.4f}",
        "Failed.",
    ):
        assert stated in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split must be val, train, all; it is 'test'"),
        ({"precision": "float16"}, "precision must be"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"min_cosine": 1.5}, "min cosine must be between -1 and 1"),
        ({"min_cosine": float("nan")}, "min cosine"),
        ({"min_skill": 1.01}, "min skill must be at most 1"),
        ({"min_skill": float("nan")}, "min skill"),
        ({"min_miou": -0.1}, "min miou must be between 0 and 1"),
        ({"min_miou": 1.1}, "min miou must be between 0 and 1"),
        ({"min_miou": float("nan")}, "min miou"),
        ({"min_miou": 0.5, "points": 0}, "min miou 0.5 asks for masks, but points is 0"),
        ({"points": -1}, "points must be between 0 and 64"),
        ({"points": 65}, "points must be between 0 and 64"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(VerifyError, match=message):
        VerifyConfig(**options)


def test_a_store_that_fails_its_audit_fails_the_verification_and_the_report_says_so(world):
    whole = verify(asked(split="all"))
    assert (whole["passed"], whole["subject"]["audit"]) == (True, None)
    with EmbeddingStore.open(world.store, writable=True) as store:
        store.record_audits([Audit(row=1, cosine=0.4, relative_mse=1.2)])
    report = world.path / "report.html"
    result = verify(asked(split="all", report=report))
    assert not result["passed"]
    assert [check["check"] for check in result["failed_checks"]] == ["audit", "audit"]
    assert any(line.startswith("FAILED  the store's audit: cosine 0.4") for line in table_lines(result))
    page = report.read_text()
    assert "The store does not hold the embeddings that its teacher computes." in page
    assert "threshold" not in page.partition("Failed.")[2].partition("</ul>")[0]
    assert "1 row embedded again" in page


def test_an_audit_that_gave_no_number_fails_too_and_stays_plain_json(world):
    with EmbeddingStore.open(world.store, writable=True) as store:
        store.record_audits(
            [Audit(row=row, cosine=value, relative_mse=0.0) for row, value in ((0, 1.0), (1, np.nan))]
        )
    result = verify(asked(split="all", report=world.path / "report.html"))
    assert [(check["metric"], check["value"]) for check in result["failed_checks"]] == [("cosine_min", None)]
    assert any("cosine undefined" in line for line in table_lines(result))
    assert "cosine at least undefined" in (world.path / "report.html").read_text()
    json.dumps(result, allow_nan=False)
