"""SAM's head for a student: the order in which places are searched, and reading a head from each kind of file.

A head is SAM's prompt encoder and mask decoder, the tensors `prompt_encoder.*` and `mask_decoder.*`. It can be in

- a store, which has the head that precompute saved beside the embeddings;
- a safetensors file: sam_head.safetensors, an export's model.safetensors, or another program's;
- a file in torch's format: a checkpoint of SAM or of MobileSAM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..common.errors import CheckpointError, DistillError, HeadNotFound, shown
from ..distill.run_folder import HEAD_FILE, Run
from ..distill.students.student_file import load_own_head, read_any_tensors, trained_head
from ..sam.checkpoint import read_state
from ..sam.modeling.head import SamHead, build_head
from ..sam.modeling.head_shapes import HEAD_PREFIXES
from ..sam.torch_file import in_torch_format
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
    raise HeadNotFound(f"{file} holds no mask decoder, and there is no {HEAD_FILE} beside it: {_MEND}")


def read_head_file(path: Path) -> LoadedHead:
    """Read the head from a store, a safetensors file or a checkpoint in torch's format; other tensors are ignored.

    Raises:
        DistillError, CheckpointError, StoreError: there is no head, or the file is missing or damaged.
    """
    if path.is_dir():
        with EmbeddingStore.open(path) as store:
            return LoadedHead(
                state=_decode(store.read_head(), store.head_path),
                source=str(path),
                teacher=store.spec.teacher,
                checkpoint_sha256=store.spec.checkpoint_sha256,
            )
    if not path.is_file():
        raise DistillError(f"there is no file or store {shown(str(path))}; {_MEND}")
    state = _head_of_safetensors(path) if _is_safetensors(path) else _only_head(read_state(path), path)
    return LoadedHead(state=state, source=str(path))


def _is_safetensors(path: Path) -> bool:
    """Return True if the content is safetensors: a JSON object after 8 bytes of length.

    If the content is neither that nor torch's format, the file's name decides.
    """
    with _readable(path), path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" or (path.suffix == ".safetensors" and not in_torch_format(start))


def _head_of_safetensors(path: Path) -> dict[str, Tensor]:
    """Read only the head's tensors, by mmap."""
    with _readable(path):
        try:
            state = read_any_tensors(path, HEAD_PREFIXES)
        except DistillError as error:
            raise DistillError(f"{error}; {_MEND}") from error
    return _only_head(state, path)


def _decode(data: bytes, path: Path) -> dict[str, Tensor]:
    """Decode safetensors in memory, the content of `path`, whose SHA-256 has been checked."""
    try:
        return _only_head(load(data), path)
    except SafetensorError as error:
        raise DistillError(f"{path} is damaged ({str(error)[:100]}); {_MEND}") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into DistillError."""
    try:
        yield
    except OSError as error:
        raise DistillError(f"{path} can't be read: {error.strerror or error}") from error


def _only_head(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the head's part of `state` as float32; refuse integers and values that aren't finite."""
    head = {key: value for key, value in state.items() if key.startswith(HEAD_PREFIXES)}
    if not head:
        raise DistillError(f"{path} holds no mask decoder; {_MEND}")
    for key, value in head.items():
        if not value.is_floating_point():
            raise DistillError(f"{path} is no SAM head: {key[:80]} holds {value.dtype} numbers; {_MEND}")
        if not bool(torch.isfinite(value.float()).all()):
            raise DistillError(f"{path} holds values that aren't finite, in {key[:80]}; {_MEND}")
    return {key: value.float() for key, value in head.items()}
