"""Typed description of a run, stored as config.json: options, data, resolved settings, store, initial weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..common.errors import DistillError, StoreError
from ..sam.weights.weight_files import FOLDER_FILES, absent, describe_folder
from ..store.spec import StoreSpec

CONFIG_FILE = "config.json"
STUDENT_FILE = "student.safetensors"
MODEL_FILE = "model.safetensors"
"""File of student and head together in an export's folder."""
NO_STUDENT = "no student yet; run the same distill command again to go on"
"""End of the message about a run that has written no student."""
FORMAT = 2
"""Version of config.json."""
CONFIG_MEND = "put back a whole copy, or start over with distill --restart"
"""Remedy for a damaged config.json."""


def is_run(folder: Path) -> bool:
    """Return True if a folder is a run's: it has a config.json, even a damaged one, that isn't Hugging Face's."""
    try:
        text = (folder / CONFIG_FILE).read_bytes()
    except OSError:
        return False
    return b'"sha256"' in text or b'"model_type"' not in text


def student_path(path: Path | str) -> Path:
    """Return the student's file in the folder of a run or an export, or the file itself.

    In a folder of another program it is one of FOLDER_FILES: a file of weights, or the index of several.

    Raises:
        DistillError: there is none.
    """
    path = Path(path)
    files = [path / name for name in (STUDENT_FILE, MODEL_FILE, *FOLDER_FILES)] if path.is_dir() else [path]
    if path.name in ("last.pt", "previous.pt") and is_run(path.parent):
        raise DistillError(f"{path} is a checkpoint that training resumes from; give the run, {path.parent}")
    for file in files:
        if file.is_file():
            return file
    if is_run(path):
        raise DistillError(f"{path} is not finished: {NO_STUDENT}")
    wanted = f"run distill first, or give a run or a {STUDENT_FILE}"
    if not path.exists():
        raise DistillError(f"no student at {path}, which {absent(path, wanted)}")
    kind = describe_folder(path) if path.is_dir() else None
    if kind is not None:
        raise DistillError(f"no student at {path}, which is {kind}")
    raise DistillError(f"no student at {files[0]}; {wanted}")


@dataclass(frozen=True, kw_only=True)
class DataDescription:
    """Rows of a store that a run trains and validates on; a run resumes only on the same rows."""

    store_id: str
    """Identifier in the store's spec."""
    rows: int
    """Number of committed rows, training and validation together."""
    rows_digest: str
    """`CommittedRows.digest` of these rows."""
    annotated: int | None = None
    """Number of images with an annotation file; None if labels are the teacher's."""

    def to_json(self) -> dict[str, Any]:
        """Return the values as in config.json, without `annotated` if it is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings:
    """Settings as resolved on the machine that began the run; a resumed run keeps precision and micro-batch."""

    device: str
    precision: str
    """"float32" or "bfloat16"."""
    micro_batch: int
    """Images of one forward pass."""
    processes: int = 1
    """Number of processes that torchrun started."""


@dataclass(frozen=True, kw_only=True)
class StoreDescription:
    """Store at the last start of the run."""

    path: Path
    """Absolute path."""
    spec: StoreSpec


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """Content of config.json."""

    student: str
    """Name in the registry of students."""
    image_size: int
    """Side of SAM's square, in pixels."""
    student_size: int
    """Side of the student's input, in pixels."""
    options: Mapping[str, Any]
    """All options given when the run began (`DistillConfig.to_json`); the key in JSON is `config`."""
    identity: Mapping[str, Any]
    """Options that decide what the student learns (`DistillConfig.identity`), with the SHA-256 of the file of initial
    weights as `init_sha256`, and of labels as `coco_sha256` or `label_masks_sha256`, if there is one; a run resumes
    only if they are the same."""
    init: Mapping[str, Any] | None = None
    """Report on the initial weights (`InitialWeights.report`); None if all were random."""
    labels: Mapping[str, Any] | None = None
    """Report on the labels (`OpenLabels.report`); None if they are the teacher's masks."""
    data: DataDescription
    resolved: ResolvedSettings
    store: StoreDescription
    image_root: Path | None
    """Folder of the images at the last start of the run; None: the images that the store keeps."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Number of rows of the store by status: `done`, `failed`, `pending`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of mobilesam, Python and the libraries that began the run."""
    split_sha256: str
    """SHA-256 of split.json's value."""

    def to_json(self) -> dict[str, Any]:
        """Return config.json's value, without its checksum."""
        return {
            "format": FORMAT,
            "student": self.student,
            "image_size": self.image_size,
            "student_size": self.student_size,
            "config": self.options,
            "identity": self.identity,
            **({} if self.init is None else {"init": self.init}),
            **({} if self.labels is None else {"labels": self.labels}),
            "data": self.data.to_json(),
            "resolved": asdict(self.resolved),
            "store": {"path": str(self.store.path), "spec": self.store.spec.to_json()},
            "image_root": None if self.image_root is None else str(self.image_root),
            "counts": self.counts,
            "versions": self.versions,
            "split_sha256": self.split_sha256,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunDescription:
        """Parse the value of a config.json; keys that this version doesn't know are ignored.

        Args:
            value: content of config.json, of format FORMAT.

        Raises:
            DistillError: a key is missing, or the store's spec can't be used.
        """
        try:
            store, root = value["store"], value["image_root"]
            known: dict[str, Any] = {
                "student_size": value["image_size"],  # of runs from before there were others
                **{"options" if name == "config" else name: each for name, each in value.items()},
                "data": DataDescription(**_known(DataDescription, value["data"])),
                "resolved": ResolvedSettings(**_known(ResolvedSettings, value["resolved"])),
                "store": StoreDescription(path=Path(store["path"]), spec=StoreSpec.from_json(store["spec"])),
                "image_root": None if root is None else Path(root),
            }
            return cls(**_known(cls, known))
        except KeyError as error:
            raise DistillError(f"config.json lacks {error}; {CONFIG_MEND}") from error
        except StoreError as error:
            raise DistillError(
                f"config.json has a spec of a store that can't be used: {error}; {CONFIG_MEND}"
            ) from error


def _known(cls: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries whose keys are fields of a dataclass; KeyError if a field without default is missing."""
    optional = {one.name for one in fields(cls) if not (one.default is one.default_factory is MISSING)}
    return {one.name: value[one.name] for one in fields(cls) if one.name in value or one.name not in optional}
