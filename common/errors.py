"""All exceptions of this package, advice that several messages share, names and numbers in messages.

Every message is ready for the user: the fact, the numbers and what to do, in one or two lines. Only `command.py`
turns exceptions into exit codes.
"""

from __future__ import annotations

from typing import Any


class MobileSamError(Exception):
    """Base of all errors about the input or the environment."""


class Interrupted(MobileSamError):
    """A signal ended the work; everything finished before is saved.

    Args:
        message: message for the user.
        signum: number of the signal; the exit code is 128 + signum.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class StoreError(MobileSamError):
    """A store can't be read or written."""


class StoreNotFound(StoreError):
    """There is no mobilesam store at the path."""


class StoreMismatch(StoreError):
    """The store was made with other settings than those asked for."""


class StoreLocked(StoreError):
    """Another live process writes to the store."""


class HeadMissing(StoreError):
    """A store's teacher has no mask head, so the store has none."""


class StoreDamaged(StoreError):
    """Bytes on disk are not those that were committed."""


REPAIR_METADATA = "restore it with mobilesam inspect STORE --repair"
"""Advice after damage to a zarr.json, or to the manifest's copy of one."""
REPAIR_SHARDS = "remove damaged shards with mobilesam inspect STORE --repair, and compute them again"
"""Advice after damage to shard files, or to their rows in the manifest."""
REPLACE_MANIFEST = "restore an intact copy of it, or make the store again elsewhere"
"""Advice after damage to the manifest itself, which --repair can't mend."""


class SamError(MobileSamError):
    """An image, its annotations or a checkpoint can't be used."""


class ImageError(SamError):
    """One image can't be used: a one-line reason without the image's name, which the caller adds."""


class AnnotationError(SamError):
    """One image's masks can't be used: a one-line reason that names the image."""


class BadAnnotation(SamError):
    """An image's objects, or one of them, can't be used.

    Args:
        message: the fact alone, without the image's name, which the caller adds.
        reason: kind of the fault, the same for all objects with it, by which they are counted; None: the message.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


class ArchiveError(SamError):
    """A file is no intact archive: a one-line reason without the file's name, which the caller adds."""


class ForeignObjects(SamError):
    """A pickle holds other objects than tensors and plain values; the message names one."""


class CheckpointError(SamError):
    """A checkpoint is absent, damaged, hostile, or of another architecture."""


class DownloadError(SamError):
    """A checkpoint could not be downloaded."""


class PrecomputeError(MobileSamError):
    """A precompute job can't start or can't continue."""


class PrecomputeInterrupted(Interrupted, PrecomputeError):
    """A signal ended a precompute job; what was committed stays."""


class DistillError(MobileSamError):
    """A distillation can't start or can't continue."""


class DistillInterrupted(Interrupted, DistillError):
    """A signal stopped a run after its checkpoint was saved."""


class HeadNotFound(DistillError):
    """A student has no mask decoder in its file, its run or its folder."""


class RunLocked(DistillError):
    """Another process is training the run."""


class PredictError(MobileSamError):
    """A model can't be used or exported."""


class VerifyError(MobileSamError):
    """A comparison can't be made."""


class ReportError(VerifyError):
    """A comparison was made, but the page that shows it could not be written.

    Args:
        message: message for the user; `__cause__` has the reason.
        result: the result that would have been returned without a report.
    """

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


def shown(name: str) -> str:
    """Escape the unprintable characters of a key, path or message (newlines, bytes that are not UTF-8), so that it
    fits in one line of output."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun for a message: `1 image`, `1,200 images`.

    Args:
        number: number of things, 0 or more.
        noun: name of one of them.
        plural: name of several; by default the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
