"""Where a teacher's checkpoint is: given, in the cache, or downloaded into it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import platformdirs

from .catalog import EMBEDDED_TEACHER, TEACHERS, TeacherInfo
from .download import Progress, Request, download_file
from .errors import CheckpointError, DownloadError, SamError

CACHE_VARIABLE = "MOBILESAM_CACHE"


def cache_directory() -> Path:
    """``$MOBILESAM_CACHE``, else the user's cache directory for mobilesam; it need not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("mobilesam"))


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a whole file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def find_checkpoint(
    teacher: str,
    checkpoint: Path | None = None,
    *,
    progress: Progress | None = None,
    download: bool = True,
    url: str | None = None,
) -> Path | None:
    """The teacher's checkpoint file: ``checkpoint``, else the cache's, else downloaded into the cache.

    A file of the user's own is not compared with the official digest: a finetuned one is as good.

    Args:
        teacher: a key of ``TEACHERS``.
        checkpoint: a file of the user's own.
        progress: called with (bytes so far, bytes in all) while downloading.
        download: False looks only; what is absent is an error.
        url: another place to download the official file from (a mirror).

    Returns:
        The file; None for the embedded teacher, which has none.

    Raises:
        CheckpointError: ``checkpoint`` does not exist, is no file, or was given for the embedded teacher;
            or nothing was found with ``download=False``.
        DownloadError: the download failed; the message names the file and where to put it.
        SamError: an unknown teacher.
    """
    if teacher not in TEACHERS:
        raise SamError(f"unknown teacher {teacher!r}: use {', '.join(TEACHERS)}")
    info = TEACHERS[teacher]
    if info.file is None:
        if checkpoint is not None:
            raise CheckpointError(f"{teacher} is embedded and takes no checkpoint; leave out {checkpoint}")
        return None
    if checkpoint is not None:
        return _existing(checkpoint)
    cached = cache_directory() / info.file
    if cached.is_file():
        return cached
    if not download:
        raise CheckpointError(f"{info.file} ({teacher}) is not in the cache.\n{_mend(cached)}")
    return _download(info, cached, progress, url)


def _existing(checkpoint: Path) -> Path:
    checkpoint = Path(checkpoint)
    if checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is a directory; --checkpoint takes the .pth or .pt file in it")
    if not checkpoint.exists():
        raise CheckpointError(f"{checkpoint} does not exist; --checkpoint takes a .pth or .pt file")
    return checkpoint


def _download(info: TeacherInfo, target: Path, progress: Progress | None, url: str | None) -> Path:
    assert info.url is not None
    assert info.bytes is not None
    assert info.sha256 is not None
    request = Request(url=url or info.url, target=target, size=info.bytes, sha256=info.sha256)
    try:
        download_file(request, progress)
    except DownloadError as error:
        what = f"{info.file} ({info.name}, {info.bytes / 1e6:,.0f} MB)"
        raise DownloadError(f"{what} could not be downloaded: {error}.\n{_mend(target)}") from None
    return target


def _mend(target: Path) -> str:
    return f"Put it at {target}, or give --checkpoint FILE; to try without it: --teacher {EMBEDDED_TEACHER}."
