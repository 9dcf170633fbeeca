"""Description of a store: written once, never changed, compared with the settings asked for before rows are added."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..common.config import DTYPES, PRECISIONS, require
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


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of mobilesam, Python and those of the packages that are installed, by name."""
    found = {"mobilesam": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def spec_digest(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a spec's JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Immutable description of a store, kept in the Zarr group's attributes under `mobilesam`.

    Raises:
        StoreError: a value is out of range.
    """

    store_id: str
    """Random identifier, the same in zarr.json and manifest."""
    teacher: str
    """Name of the teacher, as in the registry."""
    teacher_package: Mapping[str, str] | None = None
    """Package that the teacher came from, by `distribution`, `version` and `entry_point`; None for those of
    mobilesam."""
    checkpoint: str | None
    """Name of the teacher's checkpoint, a file or folder; None for a teacher whose weights are in its package."""
    checkpoint_sha256: str
    """SHA-256 of the checkpoint; of the package's weights for an embedded teacher; for another package's teacher
    without a file, of its name and version."""
    head_sha256: str | None
    """SHA-256 of the safetensors file with SAM's prompt encoder and mask decoder; None if the teacher has none."""
    image_size: int
    """Side of the teacher's square input, in pixels."""
    positions_interpolated: bool
    """True if the teacher's position tables were resampled for `image_size`."""
    preprocessing: Mapping[str, Any]
    """Preprocessing from an image file to the teacher's input: parameters by step."""
    dtype: str
    """Type of the stored embeddings, one of `DTYPES`."""
    precision: str
    """Precision that the teacher computed in, one of `PRECISIONS`, never "auto"."""
    shard_size: int
    """Rows of a full shard."""
    kept_images: str | None = None
    """File type (such as "webp") of the resized images kept beside their embeddings; None if none are kept."""
    subset: Mapping[str, Any]
    """Fraction and seed that chose the first set of images."""
    image_root: str
    """Absolute path of the folder that keys are relative to."""
    versions: Mapping[str, str]
    """Versions of mobilesam, Python and the packages that made the store, by name."""

    def __post_init__(self) -> None:
        for good, message in (
            (self.dtype in DTYPES, f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}"),
            (
                self.precision in PRECISIONS,
                f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}",
            ),
            (
                self.image_size >= PIXELS_PER_CELL and self.image_size % PIXELS_PER_CELL == 0,
                f"image size {self.image_size} is not a positive multiple of {PIXELS_PER_CELL}",
            ),
            (self.shard_size >= 1, f"shard size {self.shard_size} is less than 1"),
        ):
            require(good, message, StoreError)

    @property
    def grid(self) -> int:
        """Cells along a side of the embedding."""
        return self.image_size // PIXELS_PER_CELL

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        """Layouts of the arrays, `embeddings` first."""
        return array_layouts(self.dtype, self.image_size, self.shard_size)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, with the format's version; `teacher_package` only if there is one."""
        value = {"format": FORMAT_VERSION, **asdict(self)}
        if self.teacher_package is None:
            del value["teacher_package"]
        return value

    def digest(self) -> str:
        """Return the SHA-256 (hex) of all fields. The manifest keeps it, so that a changed zarr.json is detected."""
        return spec_digest(self.to_json())

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StoreSpec:
        """Make a spec from the values of `to_json`.

        Raises:
            StoreError: another format version, or a value out of range.
            StoreDamaged: a field is missing or of another type.
        """
        version = value.get("format")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"the store has format {version!r}, this program reads format {FORMAT_VERSION}: "
                "use the version that wrote it"
            )
        # Stores from before images could be kept lack this field.
        value = {"kept_images": None, "teacher_package": None, **value}
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
                f"the store's attributes are invalid ({error}): zarr.json is damaged; {REPAIR_METADATA}"
            ) from error

    def refuse_differences(self, path: Path, wanted: Mapping[str, Any]) -> None:
        """Refuse settings that differ from the store's.

        Args:
            path: path of the store, for the message.
            wanted: settings asked for, by field name; None for any value.

        Raises:
            StoreMismatch: settings differ; the message names each of them.
        """
        lines = self.differences(wanted)
        if lines:
            raise StoreMismatch(
                f"{path} was made with other settings ({'; '.join(lines)}): give the same settings, or "
                "another --out"
            )

    def differences(self, wanted: Mapping[str, Any]) -> list[str]:
        """Return one line for every setting in `wanted` that is not None and differs from the store's."""
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
