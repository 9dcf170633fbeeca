"""The command line as its users meet it: help, usage, exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from mobilesam.cli import main
from mobilesam.distill.config import CostConfig, DistillConfig
from mobilesam.precompute.config import PrecomputeConfig
from mobilesam.predict.config import DemoConfig, ExportConfig, SegmentConfig
from mobilesam.verify.config import VerifyConfig
from mobilesam.verify.evaluate.config import EvaluateConfig
from mobilesam.verify.sweep.config import AXES, AXIS_OPTIONS, SweepConfig

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
COMMANDS = [
    "precompute",
    "distill",
    "verify",
    "inspect",
    "students",
    "segment",
    "export",
    "demo",
    "evaluate",
    "sweep",
    "doctor",
]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _options(command: click.Command) -> list[str]:
    return [
        name
        for option in command.params
        if isinstance(option, click.Option)
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("--")
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_an_example_in_its_commands_help(name: str) -> None:
    page = _run(name, "--help").output
    examples = page.partition("Examples:")[2].partition("Options:")[0]
    assert f"mobilesam {name}" in examples
    missing = [option for option in _options(main.commands[name]) if f"{option} " not in examples + " "
               and not re.search(rf"{option}$", examples, re.MULTILINE)]  # fmt: skip
    assert missing == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_in_the_help_is_accepted(name: str) -> None:
    page = _run(name, "--help").output
    examples = page.partition("Examples:")[2].partition("Options:")[0]
    lines = re.findall(rf"mobilesam {name}(.*)", examples)
    assert lines
    for line in lines:
        context = main.commands[name].make_context(name, line.split())
        assert context.params


def test_there_are_these_commands_and_no_others() -> None:
    assert set(main.commands) == set(COMMANDS)


CONFIGS: dict[str, Any] = {
    "precompute": PrecomputeConfig(images=(Path("photos"),)),
    "distill": DistillConfig(),
    "verify": VerifyConfig(),
    "students": CostConfig(),
    "segment": SegmentConfig(image=Path("photo.jpg"), everything=True),
    "export": ExportConfig(out=Path("exported")),
    "demo": DemoConfig(),
    "evaluate": EvaluateConfig(models=(("mine", "run"),), store=Path("store.zarr")),
}
"""Config that each command's options make, with what is required and nothing else."""
REQUIRED = {
    "precompute": ["--images", "photos"],
    "segment": ["photo.jpg", "--everything"],
    "export": ["--out", "exported"],
    "evaluate": ["--model", "mine=run", "--store", "store.zarr"],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_lines_defaults_are_those_of_the_configs(name: str) -> None:
    config = CONFIGS[name]
    given = main.commands[name].make_context(name, list(REQUIRED.get(name, []))).params
    options = [field.name for field in fields(config) if "option" in field.metadata]
    assert set(options) <= given.keys()
    for option in options:
        default = getattr(config, option)
        assert given[option] == default or (given[option] in (None, ()) and not default), option


@pytest.mark.parametrize("name", ["distill", "sweep"])
def test_help_shows_the_defaults_of_the_distill_config(name: str) -> None:
    page = _run(name, "--help").output.partition("Options:")[2]
    entries = {entry.split()[0]: " ".join(entry.split()) for entry in re.split(r"\n  (?=-)", page)[1:]}
    for field in fields(DistillConfig):
        if "option" in field.metadata and field.default is not None and not isinstance(field.default, bool):
            entry = entries[f"--{field.name.replace('_', '-')}"]
            assert entry.endswith(f"[default: {field.default}]"), entry


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described_in_a_sentence(name: str) -> None:
    page = _run(name, "--help").output
    for option in main.commands[name].params:
        if isinstance(option, click.Option):
            text = option.help or ""
            assert option.opts[-1] in page
            assert text[:1].isupper(), option.name
            assert text.endswith((".", "]")), option.name
            assert text.split()[0] not in ("Of", "What", "Whether", "Which", "How", "As", "Where"), (
                option.name
            )


@pytest.mark.parametrize("config", [*map(type, CONFIGS.values()), SweepConfig])
def test_every_option_of_a_config_has_a_help_text(config: type) -> None:
    for field in fields(config):
        if "option" in field.metadata:
            assert field.metadata["option"].help, field.name


def test_a_sweep_has_an_option_for_each_of_its_axes() -> None:
    assert AXIS_OPTIONS.keys() == {*AXES, "iterations"}
    axes = {"batch_size": (4, 8), "init": (Path("a.pt"), Path("b"))}
    arguments = ["--batch-size", "4, 8", "--init", "a.pt,b"]
    given = main.commands["sweep"].make_context("sweep", arguments).params
    assert {name: given[name] for name in AXIS_OPTIONS if given[name] is not None} == axes


def test_several_folders_and_tars_may_follow_one_images_option() -> None:
    arguments = ["--images", "a.tar", "b.tar", "--images", "c", "--limit", "3"]
    given = main.commands["precompute"].make_context("precompute", arguments).params
    assert given["images"] + given["more"] == (Path("a.tar"), Path("c"), Path("b.tar"))


def test_the_version_is_printed() -> None:
    from mobilesam import __version__

    assert _run("--version").output.strip().endswith(__version__)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["precompute"], "--images"),
        (["precompute", "--images", "x", "--fraction", "2"], "--fraction 2"),
        (["precompute", "--images", "x", "--shard-size", "many"], "--shard-size 'many'"),
        (["precompute", "--images", "x", "--teacher", "vit_x"], "vit_x"),
        (["precompute", "--images", "x", "--image-size", "1000"], "--image-size 1000"),
        (["distill", "--epochs", "0"], "epochs must be at least 1"),
        (["distill", "--student", "resnet"], "resnet"),
        (["verify", "--min-skill", "2"], "min skill must be"),
        (["verify", "--split", "test"], "test"),
        (["precompute", "--images", "x", "--audit", "-1"], "--audit -1"),
        (["precompute", "--images", "x", "--image-timeout", "0"], "--image-timeout 0"),
        (["export"], "export"),
        (["export", "--out", "mine.zip"], "give a name that ends in .pt"),
        (
            ["evaluate", "--store", "x", "--model", "m=f", "--distances", "far"],
            "--distances 'far': give pixels",
        ),
        (["evaluate", "--store", "x"], "--model NAME=FILE"),
        (["sweep", "--batch-size", "4,many"], "batch size must be int values"),
        (["sweep", "--student", "resnet"], "resnet"),
    ],
)
def test_wrong_use_exits_2_and_names_what_is_wrong(arguments: list[str], told: str) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["precompute", "--images", "missing"], "missing: no such folder, tar or image"),
        (["precompute", "--images", ".", "--teacher", "vit_nano"], "no images in"),
        (["precompute", "--images", PHOTOS, "--teacher", "vit_b", "--checkpoint", "none.pth"], "none.pth"),
        (
            ["precompute", "--images", PHOTOS, "--teacher", "vit_b", "--checkpoint", "text.pth"],
            "not a checkpoint of PyTorch",
        ),
        (["precompute", "--images", PHOTOS, "--teacher", "vit_nano", "--out", "text.pth"], "text.pth"),
        (
            ["precompute", "--images", PHOTOS, "--teacher", "vit_nano", "--out", "s3://b/x.zarr"],
            "object storage",
        ),
        (["distill"], "store.zarr is no mobilesam store"),
        (["distill", "--store", "text.pth"], "text.pth"),
        (["inspect"], "store.zarr is no mobilesam store"),
        (["inspect", "text.pth", "--check"], "text.pth"),
        (["inspect", "s3://b/x.zarr"], "object storage"),
        (["verify"], "run"),
        (["verify", "--student", "text.pth", "--split", "all"], "text.pth"),
    ],
)
def test_wrong_input_exits_3_in_one_or_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[Any], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("this is text")
    result = _run(*arguments)
    assert result.exit_code == 3, result.output
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert "unexpected" not in result.stderr
    assert 1 <= len(result.stderr.split("error: ")[-1].strip().splitlines()) <= 2
    assert result.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == {"text.pth"}


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Traceback" in _run("distill", "--debug").stderr
    assert "Traceback" not in _run("distill").stderr


def test_a_dry_run_prints_what_is_needed_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOBILESAM_CACHE", str(tmp_path / "cache"))
    arguments = ["precompute", "--images", PHOTOS, "--dry-run", "--teacher"]
    measured = json.loads(_run(*arguments, "vit_nano", "--image-size", "64", "--json").stdout)
    assert measured["images"] == measured["pending"] == len(list(PHOTOS.glob("*.[jp][pn]g")))
    assert measured["bytes_needed"] > measured["images"] * 2 * 256 * 4 * 4
    assert measured["seconds"] > 0
    blind = _run(*arguments, "vit_h")
    assert blind.exit_code == 0
    assert "time          not measured" in blind.stdout
    assert not (tmp_path / "store.zarr").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The three commands in an empty folder, on twelve photos at 128 pixels; what each printed with --json."""
    names = ["precompute", "distill", "verify", "report", "gates", "inspect", "check"]
    folder = tmp_path_factory.mktemp("empty")
    photos = folder.with_name("photos")
    shutil.copytree(PHOTOS, photos)
    (photos / "README.md").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        results = [
            _run("precompute", "--images", photos, "--teacher", "vit_nano", "--image-size", "128", "--json"),
            _run("distill", "--epochs", "2", "--batch-size", "4", "--json"),
            # In the training's precision: bfloat16 where the processor has it.
            _run("verify", "--precision", "auto", "--json"),
            _run("verify", "--split", "all", "--report", "report.html"),
            _run("verify", "--min-skill", "0.999", "--min-cosine", "0.9999"),
            _run("inspect", "--json"),
            _run("inspect", "store.zarr", "--check"),
        ]
    return {
        "folder": folder,
        "results": dict(zip(names, results, strict=True)),
    }


def _json(finished: dict[str, Any], name: str) -> dict[str, Any]:
    result = finished["results"][name]
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_three_commands_work_one_after_the_other(finished: dict[str, Any]) -> None:
    precompute, distill, verify = (_json(finished, name) for name in ("precompute", "distill", "verify"))
    assert (precompute["images"], precompute["done"], precompute["failed"]) == (12, 12, 0)
    assert (distill["epochs"], distill["steps"]) == (2, 2 * 3)
    assert verify["images"] == 1
    assert verify["passed"]


def test_json_has_the_documented_keys(finished: dict[str, Any]) -> None:
    documented = {
        "precompute": "images done done_before failed seconds images_per_second teacher_share decode_seconds "
        "audit",
        "distill": "run epochs steps seconds images_per_second data_wait_share val finished already_finished "
        "images batch_size too_few_steps advised_epochs advised_batch_size train no_better_than_constant",
        "verify": "images mse relative_mse cosine skill mse_valid relative_mse_valid cosine_valid skill_valid "
        "miou no_better_than_constant passed failed_checks summary follows examples held_out trained_on "
        "train_skill_valid",
        "inspect": "rows bytes teacher problems",
    }
    for name, keys in documented.items():
        assert set(keys.split()) <= _json(finished, name).keys()
    assert _json(finished, "verify")["cosine"].keys() == {"mean", "p5", "min"}
    assert _json(finished, "precompute")["audit"].keys() == {
        "rows",
        "cosine_min",
        "relative_mse_max",
        "seconds",
    }
    assert _json(finished, "inspect")["rows"] == {"done": 12, "pending": 0, "failed": 0}


def test_verify_reports_the_metrics_that_the_trainer_reported(finished: dict[str, Any]) -> None:
    val, verify = _json(finished, "distill")["val"], _json(finished, "verify")
    for name in ("mse", "mse_valid", "skill", "skill_valid", "relative_mse"):
        assert verify[name] == pytest.approx(val[name], rel=1e-5)


def test_the_run_was_audited_and_the_store_is_whole(finished: dict[str, Any]) -> None:
    assert _json(finished, "precompute")["audit"]["rows"] == 2
    assert _json(finished, "inspect")["audit"]["rows"] == 2
    check = finished["results"]["check"]
    assert check.exit_code == 0, check.output
    assert "check         whole" in check.stdout


def test_damage_exits_1_and_the_command_that_repair_prints_makes_it_whole(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished["folder"] / "store.zarr", tmp_path / "store.zarr")
    shard = sorted((tmp_path / "store.zarr" / "embeddings").glob("c.*"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    check = _run("inspect", "--check", "--json")
    assert check.exit_code == 1
    assert [problem["kind"] for problem in json.loads(check.stdout)["problems"]] == ["checksum"]
    repair = _run("inspect", "--repair")
    assert repair.exit_code == 0, repair.output
    (command,) = re.findall(r"^ +mobilesam (precompute .*)$", repair.stdout, re.MULTILINE)
    again = _run(*shlex.split(command))
    assert again.exit_code == 0, again.output
    assert shard.read_bytes() == whole
    assert _run("inspect", "--check").exit_code == 0


def test_a_run_whose_images_all_fail_exits_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes((PHOTOS / "coffee.jpg").read_bytes()[:100])
    result = _run("precompute", "--images", "photos", "--teacher", "vit_nano", "--image-size", "64", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["failed"] == 1
    assert "none of this run's 1 image could be embedded" in result.stderr


def test_a_missed_threshold_exits_1_and_names_both_numbers(finished: dict[str, Any]) -> None:
    result = finished["results"]["gates"]
    assert result.exit_code == 1
    assert "0.999" in result.stdout


def test_nothing_but_the_store_the_run_and_the_report_is_left(finished: dict[str, Any]) -> None:
    folder = finished["folder"]
    assert {path.name for path in folder.iterdir()} == {"store.zarr", "runs", "report.html"}
    assert (folder / "runs" / "latest").resolve().parent == folder / "runs"
    files = {path.name for path in (folder / "runs" / "latest").iterdir()}
    wanted = {"config.json", "metrics.jsonl", "last.pt", "student.safetensors", "sam_head.safetensors"}
    assert wanted <= files
    assert any(name.startswith("events.out.tfevents") for name in files)


@pytest.mark.usefixtures("finished")
def test_a_finished_run_is_reported_again_without_training(
    finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished["folder"])
    again = json.loads(_run("distill", "--epochs", "2", "--batch-size", "4", "--json").stdout)
    assert again == {**_json(finished, "distill"), "already_finished": True}


def test_the_three_commands_work_at_1024(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two photos, one epoch: the full size, with nothing but what users type."""
    (tmp_path / "photos").mkdir()
    for name in ("cat.png", "rocket.jpg"):
        shutil.copy(PHOTOS / name, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    precompute = _run(
        "precompute", "--images", "photos", "--out", "store.zarr", "--teacher", "vit_nano", "--json"
    )
    assert json.loads(precompute.stdout)["done"] == 2, precompute.stderr
    distill = _run("distill", "--epochs", "1", "--json")
    assert json.loads(distill.stdout)["steps"] == 1, distill.stderr
    verify = _run("verify", "--json")
    assert json.loads(verify.stdout)["images"] == 1, verify.stderr
