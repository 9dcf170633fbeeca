"""Errors of this room. Each carries a message that is ready to be shown: the fact, the numbers, the mend."""

from __future__ import annotations


class SamError(Exception):
    """Base of everything that this room raises about its input."""


class ImageError(SamError):
    """One image can't be used: a one-line reason without the image's name, which whoever holds it adds."""


class AnnotationError(SamError):
    """One image's masks can't be used: a one-line reason that names the image."""


class CheckpointError(SamError):
    """A checkpoint is absent, damaged, hostile, or of another architecture."""


class DownloadError(SamError):
    """A checkpoint could not be downloaded whole."""
