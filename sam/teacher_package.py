"""Teachers of other packages: any image encoder in torch, registered as an entry point.

A package's pyproject.toml names a function:

    [project.entry-points."mobilesam.teachers"]
    NAME = "package.module:function"

`function(checkpoint, device)` is called in each worker process, and before that once by the command that makes a
store, with the path given as `--checkpoint` (a pathlib.Path to a file or folder, or None) and the device as text
("cpu", "cuda:0"). If it has a parameter `image_size`, that is passed by keyword: S, the side of the padded square in
pixels. It returns a torch.nn.Module from pixels normalised as SAM's, float32 (B, 3, S, S), to embeddings
(B, 256, S/16, S/16) in any floating-point type. Weights are frozen, and evaluation mode is set, by the caller.
`--precision bfloat16` computes under torch.autocast. An image's embedding must not depend on the batch it is in.

If the module has a method `head_state()`, it returns SAM's prompt encoder and mask decoder for these embeddings:
tensors under the names of SAM's checkpoints. Without it the teacher has no mask head: students learn its embeddings,
and masks need `--head`.

A complete package is in examples/teacher_package.

Shape suffixes: B images, C channels, H and W rows and columns.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import CheckpointError, SamError, shown
from .modeling.head_shapes import HEAD_PREFIXES, head_shapes
from .modeling.neck import EMBEDDING_CHANNELS
from .photos.preprocess import PATCH
from .registry import TEACHER_GROUP, TeacherPackage
from .weights.download import file_sha256

MAX_CHANGE = 1e-3
"""Largest relative MSE between two embeddings of one image that is rounding, in any precision and batch."""


class PackageEncoder(nn.Module):
    """Encoder of another package, whose errors and results are checked.

    Args:
        inner: the package's module.
        name: the teacher's name.
        package: the package.
    """

    def __init__(self, inner: nn.Module, name: str, package: TeacherPackage) -> None:
        super().__init__()
        self.inner = inner
        self.name = name
        self.package = package

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Compute embeddings (B, 256, S/16, S/16); SamError if the module fails or gives something else."""
        with blamed(self.name, self.package, f"for pixels {tuple(pixels_BCHW.shape)}"):
            embeddings = self.inner(pixels_BCHW)
        self._check(embeddings, pixels_BCHW)
        emb_BCHW: Tensor = embeddings
        return emb_BCHW

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the package's module; the checks stay outside."""
        self.inner.compile(*args, **kwargs)

    @torch.no_grad()
    def probe(self, image_size: int, device: torch.device) -> None:
        """Embed noise, alone and beside a grey image, so that a wrong teacher is refused before any image is decoded.

        Args:
            image_size: side of the square in pixels.
            device: device of the weights.

        Raises:
            SamError: the module fails, its result has another shape or type or isn't finite, or an image's embedding
                isn't the same with and without another image beside it.
        """
        noise = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(
            device
        )
        alone_BCHW = self(noise.clone()).float()
        wrong = int((~torch.isfinite(alone_BCHW)).sum())
        if wrong:
            raise SamError(
                f"{self._who} gives NaN or infinite values: {wrong:,} of {alone_BCHW.numel():,} for an image of noise"
            )
        beside_BCHW = self(torch.cat((noise, torch.zeros_like(noise))))[:1].float()
        change = float(
            (beside_BCHW - alone_BCHW).square().mean() / alone_BCHW.square().mean().clamp_min(1e-12)
        )
        if not change <= MAX_CHANGE:
            raise SamError(
                f"{self._who} gives one image two embeddings, alone and in a batch: their relative MSE "
                f"is {change:.2g}, more than rounding.\n(Dropout that eval() leaves on, or a norm over the batch)"
            )

    def head_state(self) -> dict[str, Tensor] | None:
        """Return SAM's head from the package's module, float32 on the CPU; None if it has none.

        Raises:
            SamError: `head_state` fails, or its result isn't SAM's head.
        """
        method = getattr(self.inner, "head_state", None)
        if method is None:
            return None
        with blamed(self.name, self.package, "in head_state()"):
            state = method()
        if state is None:
            return None
        return self._checked_head(state)

    @property
    def _who(self) -> str:
        return _who(self.name, self.package)

    def _check(self, result: object, pixels_BCHW: Tensor) -> None:
        side = pixels_BCHW.shape[-1] // PATCH
        wanted = (len(pixels_BCHW), EMBEDDING_CHANNELS, side, side)
        if not isinstance(result, Tensor):
            raise SamError(f"{self._who} gives a {type(result).__name__}, not a tensor {wanted}")
        if tuple(result.shape) != wanted:
            raise SamError(
                f"{self._who} gives {tuple(result.shape)} for pixels {tuple(pixels_BCHW.shape)}, not {wanted}"
            )
        if not result.is_floating_point():
            raise SamError(f"{self._who} gives {_dtype(result)} numbers, not floating-point ones")

    def _checked_head(self, state: object) -> dict[str, Tensor]:
        wanted = head_shapes()
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise SamError(
                f"{self._who}: head_state() gives a {type(state).__name__}, not a dictionary of tensors"
            )
        head = {key: value for key, value in state.items() if str(key).startswith(HEAD_PREFIXES)}
        wrong = [key for key in wanted if key not in head or head[key].shape != wanted[key]]
        unknown = [key for key in head if key not in wanted]
        if wrong or unknown:
            raise SamError(
                f"{self._who}: head_state() isn't SAM's head: of {len(wanted)} weights {len(wrong)} are missing or "
                f"of another shape, {len(unknown)} are unknown; the first: {shown(str([*wrong, *unknown][0]))}"
            )
        for key, value in head.items():
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                raise SamError(f"{self._who}: head_state() has integers, NaN or infinite values in {key}")
        return {key: value.detach().to("cpu", torch.float32).clone() for key, value in head.items()}


def build_from_package(
    name: str,
    found: tuple[TeacherPackage, EntryPoint],
    checkpoint: Path | None,
    device: torch.device,
    image_size: int,
) -> PackageEncoder:
    """Call a package's function, and return its encoder on the device, frozen, in evaluation mode.

    Args:
        name: the teacher's name.
        found: package and entry point, from `find_teacher_package`.
        checkpoint: path of a file or folder that exists, or None.
        device: device to compute on.
        image_size: side of the padded square, in pixels.

    Raises:
        SamError: the function can't be imported, fails, or returns no module.
    """
    package, point = found
    with _settings_kept(), blamed(name, package, f"to import {point.value}"):
        function = point.load()
    if not callable(function):
        raise SamError(f"{_who(name, package)}: {point.value} is a {type(function).__name__}, not a function")
    extra = {"image_size": image_size} if _takes_image_size(function) else {}
    with _settings_kept(), blamed(name, package, f"in {point.value}(checkpoint, device)"):
        module = function(checkpoint, str(device), **extra)
    if not isinstance(module, nn.Module):
        raise SamError(
            f"{_who(name, package)}: {point.value} returns a {type(module).__name__}, not a torch.nn.Module"
        )
    with blamed(name, package, f"to move to {device}"):
        module.eval()
        module.to(device)
        for weight in module.parameters():  # requires_grad_ of a TorchScript module isn't supported
            weight.requires_grad_(False)
    return PackageEncoder(module, name, package).eval()


def package_sha256(name: str, package: TeacherPackage, checkpoint: Path | None) -> str:
    """Return what identifies a teacher's weights: the SHA-256 of its checkpoint, a file or a folder.

    Without a checkpoint the weights are the package's own: then it is that of the lines teacher, package, version and
    entry point, which changes with the package's version.

    Args:
        name: the teacher's name.
        package: the package.
        checkpoint: path given as `--checkpoint`.

    Returns:
        Hex digest.

    Raises:
        CheckpointError: the checkpoint doesn't exist or can't be read.
    """
    if checkpoint is None:
        lines = (name, package.distribution, package.version, package.entry_point)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if not checkpoint.exists():
        raise CheckpointError(f"--checkpoint {checkpoint} does not exist; {name} ({package}) would read it")
    return _folder_sha256(checkpoint) if checkpoint.is_dir() else file_sha256(checkpoint)


def _folder_sha256(folder: Path) -> str:
    """Return the SHA-256 of lines `SHA256  NAME`, one for each file below a folder, in the order of the names' bytes:
    of the output of `sha256sum` for them."""
    try:
        names = sorted(os.fsencode(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None
    if not names:
        raise CheckpointError(f"--checkpoint {folder} is an empty folder")
    digest = hashlib.sha256()
    for name in names:
        digest.update(file_sha256(folder / os.fsdecode(name)).encode() + b"  " + name + b"\n")
    return digest.hexdigest()


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Undo changes that a package's code makes to settings of torch that hold for the whole process."""
    dtype, device, threads = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            if torch.get_default_device() != device:
                torch.set_default_device(device)


@contextmanager
def blamed(name: str, package: TeacherPackage, doing: str) -> Iterator[None]:
    """Turn any exception of a package's code into a SamError that names the package; lack of memory stays.

    What the code prints goes to standard error, since standard output is for results.

    Args:
        name: the teacher's name.
        package: the package.
        doing: what failed, after "failed": "to import X".

    Raises:
        SamError: the code in the context raised an exception, or ended the process.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:300]
        raise SamError(
            f"{_who(name, package)} failed {doing} with {type(error).__name__}: {shown(reason)}"
        ) from error


def _who(name: str, package: TeacherPackage) -> str:
    return f"the teacher {name} of {package} (entry point in {TEACHER_GROUP})"


def _takes_image_size(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a class or function without a signature
        return False
    return "image_size" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
