"""Reading a checkpoint file: safely, without copying it, and with one clear error for whatever is wrong."""

from __future__ import annotations

import errno
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .catalog import TEACHERS
from .errors import CheckpointError
from .tiny_vit import CLASSIFIER_PREFIXES
from .vit import VITS

ENCODER_PREFIX = "image_encoder."
ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
# Some tools save these two with the weights; they are SAM's fixed preprocessing, not weights.
PIXEL_STATISTICS = ("pixel_mean", "pixel_std")


def read_state(path: Path) -> dict[str, Tensor]:
    """The flat state dict in a ``torch.save`` file, on the CPU.

    Nothing but tensors and plain containers is unpickled. Files in torch's zip format are mapped, so a
    tensor's bytes are read when they are first used; older files are read whole.

    Raises:
        CheckpointError: the file is absent, empty, truncated, no checkpoint, or holds other objects.
    """
    mapped = _check_start(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol, for what is refused anyway
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    # Whatever bytes do to torch's readers, it is the file that is wrong: they raise of every kind.
    except Exception as error:  # noqa: BLE001
        # A file too short to be mapped is EINVAL; other reasons of the system are its own to tell.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        raise CheckpointError(_damage(path, error)) from None
    return _tensors_only(path, loaded)


def _check_start(path: Path) -> bool:
    """Look at the first bytes; tell whether the file can be mapped (torch's zip format)."""
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
    if start.startswith(ZIP_MAGIC):
        return True
    if not start.startswith(PICKLE_MAGIC):
        raise CheckpointError(f"{path} is not a PyTorch checkpoint: it starts with {start!r}")
    return False


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"(?:GLOBAL|global) ([\w.]+)", message)
    if "truncated" in message or (found is None and "nsupported" not in message):
        return f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged; download it again"
    what = f" ({found.group(1)})" if found else ""
    return (
        f"{path} holds Python objects other than tensors{what}; it was refused, since loading them can run code.\n"
        "Save the plain state dict: torch.save(model.state_dict(), FILE)."
    )


def _damage(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    official = [info for info in TEACHERS.values() if info.file == path.name and info.bytes != size]
    lengths = f", {official[0].bytes:,} expected" if official else ""
    reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
    return f"{path} ({size:,} bytes{lengths}) is truncated or damaged; download it again.\n({reason})"


def _tensors_only(path: Path, loaded: object) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict of tensors")
    state = {str(key): value for key, value in loaded.items() if str(key) not in PIXEL_STATISTICS}
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        keys = ", ".join(map(repr, list(state)[:4])) or "nothing"
        raise CheckpointError(
            f"{path} is not a flat state dict of tensors: it holds {keys}.\n"
            "Save the plain state dict with keys image_encoder.*, prompt_encoder.*, mask_decoder.*."
        )
    return state


def looks_like(state: Mapping[str, Tensor]) -> str | None:
    """The teacher whose encoder these keys and shapes are, or None. ``state`` has ``image_encoder.*``."""
    if f"{ENCODER_PREFIX}patch_embed.seq.0.c.weight" in state:
        return "mobile_sam"
    patches = state.get(f"{ENCODER_PREFIX}patch_embed.proj.weight")
    if patches is None:
        return None
    blocks = {key.split(".")[2] for key in state if key.startswith(f"{ENCODER_PREFIX}blocks.")}
    sizes = (patches.shape[0], len(blocks))
    return next((name for name, vit in VITS.items() if (vit.width, vit.depth) == sizes), None)


def check_state(
    path: Path, name: str, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The part of ``state`` that teacher ``name`` uses, every key and shape checked.

    mobile_sam's unused classifier is left out.

    Raises:
        CheckpointError: naming the teacher that the file looks like, or the first differences.
    """
    found = looks_like(state)
    if found is not None and found != name:
        raise CheckpointError(f"{path} is a {found} checkpoint, not {name}; use --teacher {found}")
    classifier = tuple(ENCODER_PREFIX + prefix for prefix in CLASSIFIER_PREFIXES)
    if name == "mobile_sam":
        state = {key: value for key, value in state.items() if not key.startswith(classifier)}
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    if missing or unknown:
        examples = [f"{key} is missing" for key in missing[:1]] + [f"{key} is unknown" for key in unknown[:1]]
        raise CheckpointError(
            f"{path} is not a {name} checkpoint: of {len(expected)} weights {len(missing)} are missing, "
            f"{len(unknown)} are unknown.\n({'; '.join(examples)})"
        )
    for key, shape in expected.items():
        if state[key].shape != shape:
            wrong, right = tuple(state[key].shape), tuple(shape)
            raise CheckpointError(f"{path} is not a {name} checkpoint: {key} has shape {wrong}, not {right}")
    return dict(state)
