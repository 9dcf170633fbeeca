"""SAM's head for a student: the order in which places are searched, and reading a head from each kind of file.

A head is SAM's prompt encoder and mask decoder, the tensors `prompt_encoder.*` and `mask_decoder.*`. It can be in

- a store, which has the head that precompute saved beside the embeddings;
- a file of this package: sam_head.safetensors, an export's model.safetensors;
- a file or folder of another program: a checkpoint of SAM or of MobileSAM, in any form that `read_weights` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..common.errors import CheckpointError, DistillError, HeadNotFound, shown
from ..distill.run_folder import HEAD_FILE, Run
from ..distill.students.student_file import is_own_file, load_own_head, read_own_tensors, trained_head
from ..sam.modeling.head import SamHead, build_head
from ..sam.modeling.head_shapes import HEAD_PREFIXES, head_shapes
from ..sam.weights.checkpoint import read_weights
from ..sam.weights.state_dict import count_by_prefix
from ..sam.weights.weight_files import FOLDER_FILES, absent, describe_folder
from ..store import EmbeddingStore

_MEND = "give --head with the store that it learned from, or with a SAM or MobileSAM checkpoint"


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedHead:
    """Tensors of a head, and their source."""

    state: Mapping[str, Tensor]
    """float32 on the CPU, by their keys in SAM's checkpoints."""
    source: str
    """Path of the file or store."""
    teacher: str | None = None
    """The teacher's name; known for a store's head only."""
    checkpoint_sha256: str | None = None
    """SHA-256 of the teacher's checkpoint; known for a store's head only."""
    note: str | None = None
    """Sentence about what was left out of a head with more layers than SAM's."""

    def build(self, image_size: int) -> SamHead:
        """Build the module for encoders of `image_size` pixels; DistillError if the tensors don't fit."""
        try:
            return build_head(self.state, image_size)
        except CheckpointError as error:
            raise DistillError(f"{self.source} is {error}; {_MEND}") from error


def find_head(
    file: Path, run: Run | None, *, given: Path | str | None = None, fallback: Path | str | None = None
) -> LoadedHead:
    """Find the head for a student's file: the first of these that exists.

    1. `given`, by the user.
    2. The head in the student's own file, if it was trained with the student, or if the file is in mobile_sam.pt's
       format.
    3. The head of the run that the file belongs to, copied from its store.
    4. The head in the student's own file, if it is the teacher's.
    5. sam_head.safetensors in the same folder.
    6. `fallback`.

    Args:
        file: the student's file, already checked by `load_student`.
        run: run that the file belongs to, or None.
        given: file or store for `read_head_file`.
        fallback: file or store for `read_head_file`.

    Raises:
        HeadNotFound: there is no head.
        DistillError, CheckpointError, StoreError: the head is missing or damaged.
    """
    if given is not None:
        return read_head_file(Path(given))
    trained = trained_head(file)
    if trained is not None:
        return LoadedHead(state=trained, source=str(file))
    if run is not None and run.description.store.spec.head_sha256 is not None:
        return LoadedHead(state=_decode(run.read_head(), run.head_path), source=str(run.head_path))
    own = load_own_head(file)
    if own is not None:
        return LoadedHead(state=own, source=str(file))
    beside = file.parent / HEAD_FILE
    if beside.is_file():
        return read_head_file(beside)
    if fallback is not None:
        return read_head_file(Path(fallback))
    if run is not None and run.description.store.spec.head_sha256 is None:
        raise HeadNotFound(
            f"{file} holds no mask decoder: it learned from {run.description.store.spec.teacher}, which has no mask "
            "head; give --head with a file that has SAM's head for its embeddings"
        )
    raise HeadNotFound(f"{file} holds no mask decoder, and there is no {HEAD_FILE} beside it: {_MEND}")


def read_head_file(path: Path) -> LoadedHead:
    """Read the head from a store, or from a file or folder of weights; other tensors are ignored.

    Raises:
        DistillError, CheckpointError, StoreError: there is no head, or the file is missing or damaged.
    """
    weights = path
    if path.is_dir():
        weights = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
    if weights.is_dir():
        kind = describe_folder(weights)
        if kind is not None:
            raise DistillError(f"--head {path} is {kind}")
        with EmbeddingStore.open(path) as store:
            return LoadedHead(
                state=_decode(store.read_head(), store.head_path),
                source=str(path),
                teacher=store.spec.teacher,
                checkpoint_sha256=store.spec.checkpoint_sha256,
            )
    if not weights.is_file():
        raise DistillError(f"--head {shown(str(path))} {absent(path, _MEND)}")
    if not is_own_file(weights):
        try:
            found = read_weights(weights)
        except CheckpointError as error:
            raise DistillError(f"--head: {error}") from error
        head = _only_head(found.state, path)
        return LoadedHead(state=head, source=str(path), note=_other_head(found.state, path))
    return LoadedHead(state=_head_of_own_file(weights), source=str(path))


def _head_of_own_file(path: Path) -> dict[str, Tensor]:
    """Read only the head's tensors of a file that this package wrote."""
    try:
        state = read_own_tensors(path, HEAD_PREFIXES)
    except OSError as error:
        raise DistillError(f"{path} can't be read: {error.strerror or error}") from error
    except DistillError as error:
        raise DistillError(f"{error}; {_MEND}") from error
    return _only_head(state, path)


def _other_head(state: Mapping[str, Tensor], path: Path) -> str | None:
    """Return a note about a head with more layers than SAM's, such as SAM-HQ's; None for SAM's."""
    known = head_shapes()
    more = count_by_prefix((key for key in state if key.startswith(HEAD_PREFIXES) and key not in known), 2)
    if not more:
        return None
    names = ", ".join(f"{name} ({count})" for name, count in list(more.items())[:6])
    return f"of the head in {path.name} SAM's own part is used; left out: {names}"


def _decode(data: bytes, path: Path) -> dict[str, Tensor]:
    """Decode safetensors in memory, the content of `path`, whose SHA-256 has been checked."""
    try:
        return _only_head(load(data), path)
    except SafetensorError as error:
        raise DistillError(f"{path} is damaged ({str(error)[:100]}); {_MEND}") from error


def _only_head(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the head's part of `state` as float32, without layers that SAM's head doesn't have; refuse integers and
    values that aren't finite."""
    known = head_shapes()
    head = {key: value for key, value in state.items() if key in known}
    if not head:
        raise DistillError(f"{path} holds no mask decoder; {_MEND}")
    for key, value in head.items():
        if value.shape != known[key]:
            raise DistillError(
                f"{path} is no SAM head: {key} has shape {tuple(value.shape)}, not {tuple(known[key])}; {_MEND}"
            )
        if not value.is_floating_point():
            raise DistillError(f"{path} is no SAM head: {key[:80]} holds {value.dtype} numbers; {_MEND}")
        if not bool(torch.isfinite(value.float()).all()):
            raise DistillError(f"{path} holds values that aren't finite, in {key[:80]}; {_MEND}")
    return {key: value.float() for key, value in head.items()}
