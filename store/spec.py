"""What a store is made of: written once, never changed, compared before anything is added."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..common.config import DTYPES, PRECISIONS
from ..common.errors import REPAIR_METADATA, StoreDamaged, StoreError, StoreMismatch
from .layout import PIXELS_PER_CELL, ArrayLayout, array_layouts

FORMAT_VERSION = 1

_COMPARED = (
    "teacher",
    "checkpoint_sha256",
    "image_size",
    "preprocessing",
    "dtype",
    "precision",
    "shard_size",
    "kept_images",
)


def spec_digest(value: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a spec's JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """The immutable description of a store, kept in the Zarr group's attributes under `mobilesam`.

    `image_size` is the side in pixels of the teacher's square input, `positions_interpolated` whether its position
    tables had to be resampled for it; `precision` the arithmetic as resolved, never `auto`; `kept_images` the kind of
    file (as "webp") that resized images are kept as beside their embeddings, None where they aren't; `subset` the
    fraction and seed that chose the first set of images; `image_root` the absolute folder that keys are relative to.
    """

    store_id: str
    teacher: str
    checkpoint: str | None
    checkpoint_sha256: str
    head_sha256: str
    image_size: int
    positions_interpolated: bool
    preprocessing: Mapping[str, Any]
    dtype: str
    precision: str
    shard_size: int
    kept_images: str | None = None
    subset: Mapping[str, Any]
    image_root: str
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise StoreError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.precision not in PRECISIONS:
            raise StoreError(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.image_size < PIXELS_PER_CELL or self.image_size % PIXELS_PER_CELL:
            raise StoreError(f"image size {self.image_size} is not a positive multiple of {PIXELS_PER_CELL}")
        if self.shard_size < 1:
            raise StoreError(f"shard size {self.shard_size} is less than 1")

    @property
    def grid(self) -> int:
        """Cells along a side of the embedding."""
        return self.image_size // PIXELS_PER_CELL

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        """The arrays' layouts, `embeddings` first."""
        return array_layouts(self.dtype, self.image_size, self.shard_size)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the format's version."""
        return {"format": FORMAT_VERSION, **asdict(self)}

    def digest(self) -> str:
        """SHA-256 (hex) of every field: the manifest keeps it, so that a changed zarr.json is told."""
        return spec_digest(self.to_json())

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StoreSpec:
        """The inverse of `to_json`; StoreError for another format version or a missing field."""
        version = value.get("format")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"the store has format {version!r}, this program reads format {FORMAT_VERSION}: "
                "use the version that wrote it"
            )
        # Stores of versions before images could be kept say nothing of them; their manifests say the rest.
        value = {"kept_images": None, **value}
        names = {field.name for field in fields(cls)}
        missing = sorted(names - value.keys())
        if missing:
            raise StoreDamaged(
                f"the store's attributes lack {', '.join(missing)}: zarr.json is damaged; {REPAIR_METADATA}"
            )
        try:
            return cls(**{name: value[name] for name in names})
        except TypeError as error:
            raise StoreDamaged(
                f"the store's attributes make no sense ({error}): zarr.json is damaged; {REPAIR_METADATA}"
            ) from error

    def refuse_differences(self, path: Path, wanted: Mapping[str, Any]) -> None:
        """StoreMismatch, naming each difference, when a setting in `wanted` that isn't None is not the store's."""
        lines = self.differences(wanted)
        if lines:
            raise StoreMismatch(
                f"{path} was made otherwise ({'; '.join(lines)}): ask for the store's settings, or give another --out"
            )

    def differences(self, wanted: Mapping[str, Any]) -> list[str]:
        """One line for every setting in `wanted` that is not None and differs from the store's."""
        lines = []
        for name in _COMPARED:
            mine, asked = getattr(self, name), wanted.get(name)
            if asked is None or asked == mine:
                continue
            if isinstance(mine, Mapping):
                lines += [
                    f"{name}.{key}: store {mine.get(key)!r}, asked {asked.get(key)!r}"
                    for key in sorted({*mine, *asked})
                    if mine.get(key) != asked.get(key)
                ]
            else:
                lines.append(f"{name}: store {mine!r}, asked {asked!r}")
        return lines
