from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from mobilesam.common.config import (
    device_option,
    must_be,
    option,
    paths_from_text,
    precision_option,
    require,
    require_image_size,
)
from mobilesam.common.errors import PredictError, StoreError


@dataclass(frozen=True, kw_only=True)
class Config:
    source: Path = option(help="Folder.")
    out: Path | None = option(None, metavar="FILE", help="File [default: none]")
    size: int = option(8, choices=("8", "16"), help="Side.")
    clip: float = 1.0
    device: str = device_option()


@dataclass(frozen=True, kw_only=True)
class Other:
    device: str = device_option()
    precision: str = precision_option("Precision.", default="float32")


def test_an_option_is_a_field_with_its_default() -> None:
    config = Config(source=Path("a"))
    assert (config.out, config.size, config.device) == (None, 8, "auto")
    with pytest.raises(TypeError, match="source"):
        Config()  # type: ignore[call-arg]


def test_a_field_carries_what_the_command_line_shows_of_it() -> None:
    described = {field.name: field.metadata.get("option") for field in fields(Config)}
    assert described["out"].metavar == "FILE"
    assert described["size"].choices == ("8", "16")
    assert described["clip"] is None


def test_options_that_commands_share_are_described_alike() -> None:
    (one,) = (field for field in fields(Config) if field.name == "device")
    (other,) = (field for field in fields(Other) if field.name == "device")
    assert one.metadata == other.metadata
    assert Other().precision == "float32"


def test_texts_become_paths_and_none_stays() -> None:
    config = Config(source="a/b")  # type: ignore[arg-type]
    paths_from_text(config, "source", "out")
    assert config.source == Path("a/b")
    assert config.out is None


def test_a_refused_value_is_named_with_its_range() -> None:
    require(True, "never shown", StoreError)
    with pytest.raises(StoreError, match=r"^batch size must be at least 1; it is 0$"):
        require(False, must_be("batch_size", 0, "at least 1"), StoreError)


@pytest.mark.parametrize("size", [None, 64, 1024, 2048])
def test_image_sizes_are_multiples_of_16(size: int | None) -> None:
    require_image_size(size, PredictError)
    require_image_size(size, PredictError, 2048)


@pytest.mark.parametrize(
    ("size", "largest", "wanted"),
    [
        (48, None, "from 64 up"),
        (1000, None, "from 64 up"),
        (-64, None, "from 64 up"),
        (0, 2048, "from 64 to 2048"),
        (2064, 2048, "from 64 to 2048"),
    ],
)
def test_other_image_sizes_are_refused(size: int, largest: int | None, wanted: str) -> None:
    with pytest.raises(PredictError, match=f"^--image-size {size} is not a multiple of 16 {wanted}$"):
        require_image_size(size, PredictError, largest)
