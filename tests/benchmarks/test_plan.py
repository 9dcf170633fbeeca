"""The plan on paper: its arithmetic against figures known otherwise, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.plan import SA_1B, Costs, Size, amount, cores, hours, main, tables

PAGE = Path(__file__).parents[2] / "docs" / "SCALE.md"


@pytest.mark.parametrize("title", tables(Costs()))
def test_the_page_shows_what_the_command_prints(title: str) -> None:
    assert tables(Costs())[title] in PAGE.read_text()


def test_sizes_are_those_of_the_published_arithmetic() -> None:
    ten_tars = Size(images=111_854, dtype="float16", shard_size=64)
    assert ten_tars.bytes / 1e9 == pytest.approx(235, rel=3e-3)
    assert ten_tars.shards == 1748
    assert Size(images=SA_1B, dtype="float16", shard_size=64).bytes / 1e12 == pytest.approx(23.5, rel=3e-3)
    assert Size(images=SA_1B, dtype="int8", shard_size=64).bytes / 1e12 == pytest.approx(11.73, rel=1e-2)


def test_one_row_more_is_one_stride_more() -> None:
    sizes = [Size(images=count, dtype="float16", shard_size=64).bytes for count in (100, 101)]
    assert sizes[1] - sizes[0] == 2**21 + 4096


def test_rates_give_the_published_minutes() -> None:
    assert 60 * hours(111_854, 83, 1) == pytest.approx(22.5, abs=0.1)
    assert hours(100, 10, 2) == pytest.approx(5 / 3600)
    assert cores(200, 15) == 3


@pytest.mark.parametrize(
    ("count", "text"), [(500, "500 B"), (2e6, "2 MB"), (2.35e11, "235 GB"), (2.35e13, "23.5 TB")]
)
def test_amounts_are_in_the_unit_that_suits_them(count: float, text: str) -> None:
    assert amount(count) == text


def test_every_input_is_an_option() -> None:
    result = CliRunner().invoke(main, ["--gpus", "64", "--gpu-hour", "5", "--epochs", "2"])
    assert result.exit_code == 0
    assert "64 GPUs, hours" in result.output
    assert "2 epochs on one GPU" in result.output
