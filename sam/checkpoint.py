"""Checkpoint files: read safely and without a copy, identified, and checked, with a clear error for any defect."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import ArchiveError, CheckpointError, ForeignObjects
from .registry import TEACHERS, TeacherInfo
from .torch_file import PICKLE_MAGIC, ZIP_MAGIC, read_torch_file

ENCODER_PREFIX = "image_encoder."
"""Prefix of the image encoder's keys in a SAM checkpoint."""

PIXEL_STATISTICS = ("pixel_mean", "pixel_std")
"""Keys that some tools save with the weights; they are SAM's fixed preprocessing, not weights."""


def read_state(path: Path, wrappers: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read the flat state dict in a `torch.save` file.

    Only tensors and plain containers are unpickled. In files of torch's zip format every checksum is verified first
    (2.4 GB take about a second once they are in the page cache); then the file is mapped, so that memory holds only
    the tensors that are used. Older files are read whole.

    Args:
        path: path of the file.
        wrappers: keys under which training scripts save the state dict in a larger dictionary; the first one that
            the file has is used. If empty, only a flat state dict is read.

    Returns:
        Tensors by key, on the CPU, without PIXEL_STATISTICS.

    Raises:
        CheckpointError: the file is absent, empty, truncated, damaged or no checkpoint, or holds other objects.
    """
    _check_start(path)
    try:
        loaded = read_torch_file(path)
    except ForeignObjects as error:
        raise CheckpointError(
            f"{path} holds Python objects other than tensors ({error}); it was refused, since loading them can run "
            "code.\nSave the plain state dict: torch.save(model.state_dict(), FILE)."
        ) from None
    except ArchiveError as error:
        raise CheckpointError(_damage(path, str(error))) from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise CheckpointError(_damage(path, "the disk can't read it")) from None
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in wrappers if isinstance(loaded.get(key), Mapping)), loaded)
    return _tensors_only(path, loaded)


def _check_start(path: Path) -> None:
    """Raise CheckpointError if the path or the file's first bytes can't be a checkpoint's."""
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a directory, not a checkpoint file; name the .pth or .pt file in it"
        )
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; --checkpoint takes a .pth or .pt file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise CheckpointError(f"{path} is empty (0 bytes); download it again")
    if not start.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
        raise CheckpointError(f"{path} is not a PyTorch checkpoint: it starts with {start!r}")


def _damage(path: Path, reason: str) -> str:
    """Return the message about a damaged file, with the expected length if it is named like an official one."""
    size = path.stat().st_size
    official = [info.checkpoint for info in TEACHERS.values() if info.checkpoint]
    wanted = [file.bytes for file in official if file.name == path.name and file.bytes != size]
    lengths = f", {wanted[0]:,} expected" if wanted else ""
    return f"{path} ({size:,} bytes{lengths}) is truncated or damaged; download it again.\n({reason})"


def _tensors_only(path: Path, loaded: object) -> dict[str, Tensor]:
    """Return a file's content as a state dict without PIXEL_STATISTICS; CheckpointError for any other content."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict of tensors")
    state = {str(key): value for key, value in loaded.items() if str(key) not in PIXEL_STATISTICS}
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        keys = ", ".join(repr(key[:80]) for key in list(state)[:4]) or "nothing"
        raise CheckpointError(
            f"{path} is not a flat state dict of tensors: it holds {keys}.\n"
            "Save the plain state dict with keys image_encoder.*, prompt_encoder.*, mask_decoder.*."
        )
    return state


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors of the image encoder, without the prefix `image_encoder.`."""
    prefix = ENCODER_PREFIX
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def identify_teacher(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the teacher whose encoder has a checkpoint's sizes; None if there is none.

    Of several teachers with the same encoder, it is the first whose trained image size fits, too.
    """
    encoder = encoder_state(state)
    found = [info for info in TEACHERS.values() if info.encoder.matches(encoder)]
    if len(found) > 1:
        found = [info for info in found if _has_trained_shapes(info, encoder)] or found
    return found[0].name if found else None


def _has_trained_shapes(info: TeacherInfo, encoder: Mapping[str, Tensor]) -> bool:
    """Return True if an encoder's tensors have the shapes of a teacher's trained image size."""
    with torch.device("meta"):
        built = info.encoder.build(info.trained_image_size).state_dict()
    return all(encoder[key].shape == value.shape for key, value in built.items() if key in encoder)


def check_state(
    path: Path, info: TeacherInfo, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Check every key, shape and dtype of a teacher's checkpoint.

    Args:
        path: path of the file, for messages.
        info: entry of the teacher that it should belong to.
        state: content of the file, as `read_state` returns it.
        expected: shapes by key, as `state_shapes` returns them.

    Returns:
        The tensors that the teacher uses; unused ones, such as mobile_sam's classifier, are left out.

    Raises:
        CheckpointError: the file doesn't fit; the message names the teacher that it belongs to, or the first
            differences.
    """
    name = info.name
    # The same encoder may belong to several teachers, whose files don't differ in their shapes.
    found = None if info.encoder.matches(encoder_state(state)) else identify_teacher(state)
    if found is not None:
        raise CheckpointError(f"{path} is a {found} checkpoint, not {name}; use --teacher {found}")
    unused = tuple(ENCODER_PREFIX + prefix for prefix in info.encoder.unused_prefixes)
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    if missing or unknown:
        examples = [f"{key} is missing" for key in missing[:1]]
        examples += [f"{key[:80]} is unknown" for key in unknown[:1]]
        raise CheckpointError(
            f"{path} is not a {name} checkpoint: of {len(expected)} weights {len(missing)} are missing, "
            f"{len(unknown)} are unknown.\n({'; '.join(examples)})"
        )
    for key, shape in expected.items():
        if state[key].shape != shape:
            wrong, right = tuple(state[key].shape), tuple(shape)
            raise CheckpointError(f"{path} is not a {name} checkpoint: {key} has shape {wrong}, not {right}")
        if not state[key].is_floating_point() and not key.endswith("num_batches_tracked"):
            raise CheckpointError(
                f"{path} is not a {name} checkpoint: {key} holds {state[key].dtype} numbers"
            )
    return dict(state)
