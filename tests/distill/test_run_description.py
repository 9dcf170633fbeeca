"""config.json as typed objects: the same JSON back, unknown keys ignored, missing ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mobilesam.distill import DistillConfig, DistillError, Run, distill
from mobilesam.distill.checksummed_json import read_checksummed, write_checksummed
from mobilesam.distill.run_description import RunDescription

Options = Callable[..., DistillConfig]


@pytest.fixture
def value(store: Path, options: Options, small: str) -> dict[str, Any]:
    """The value of a run's config.json."""
    distill(options(store, student=small, epochs=1, out="run"))
    return read_checksummed(Path("run/config.json"))


@pytest.mark.parametrize(
    "more", [{}, {"init": {"file": "a.pth", "sha256": "ab"}}, {"image_root": None}, {"data": "annotated"}]
)
def test_a_description_gives_back_the_json_that_it_was_read_from_with_its_keys_in_order(
    value: dict[str, Any], more: dict[str, Any]
) -> None:
    if "data" in more:
        value["data"]["annotated"] = 3
    elif "init" in more:
        names = list(value)
        names.insert(names.index("data"), "init")
        value = {name: {**value, **more}[name] for name in names}
    else:
        value |= more
    assert json.dumps(RunDescription.from_json(value).to_json()) == json.dumps(value)


def test_a_run_with_unknown_and_without_optional_keys_opens_and_keeps_the_unknown_ones(
    value: dict[str, Any], store: Path, options: Options, small: str, images: Path
) -> None:
    del value["counts"], value["versions"], value["resolved"]["processes"]
    write_checksummed(Path("run/config.json"), value | {"of_the_future": 1, "image_root": "/elsewhere"})
    run = Run.open("run")
    assert run.description.resolved.processes == 1
    assert run.description.counts == {}
    assert run.image_root == Path("/elsewhere")
    distill(options(store, student=small, epochs=1, out="run"))
    assert read_checksummed(Path("run/config.json")) == value | {"of_the_future": 1}
    assert Run.open("run").image_root == images


@pytest.mark.parametrize("missing", ["student", "data", "resolved", "store"])
def test_a_description_without_a_required_key_is_refused_by_its_name(
    value: dict[str, Any], missing: str
) -> None:
    del value[missing]
    with pytest.raises(DistillError, match=f"lacks '{missing}'.*--restart"):
        RunDescription.from_json(value)


def test_another_format_is_refused_with_both_numbers(value: dict[str, Any]) -> None:
    write_checksummed(Path("run/config.json"), value | {"format": 1})
    with pytest.raises(DistillError, match=r"has format 1, this version reads 2.*--restart"):
        Run.open("run")
