"""Checkpoint files of teachers: given by the user, in the cache, or downloaded into it.

A download is verified, resumed after an interruption, and retried. The bytes go to `FILE.part`, and the server's ETag
or modification time goes to `FILE.part.json`, so that a later attempt continues only the same version of the file
(Range with If-Range, RFC 9110). The file gets its final name only after its SHA-256 was verified.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import json
import logging
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import platformdirs

from ...common.errors import CheckpointError as CheckpointError
from ...common.errors import DownloadError as DownloadError
from ..registry import EMBEDDED_TEACHER, find_teacher_info
from .weight_files import weight_files

CACHE_VARIABLE = "MOBILESAM_CACHE"
"""Environment variable that names the cache directory."""

CHUNK = 1 << 20
"""Most bytes that are received at a time."""

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which another attempt may succeed."""

Progress = Callable[[int, int], None]
"""Function called with the bytes received so far and the bytes in all."""

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Return `$MOBILESAM_CACHE`, else the user's cache directory for mobilesam; it need not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("mobilesam"))


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a whole checkpoint file; CheckpointError if it can't be read."""
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
    """Find a teacher's checkpoint: the user's own file, else the one in the cache, else download it into the cache.

    The user's own file is not compared with the official digest, since it may be finetuned.

    Args:
        teacher: a key of `TEACHERS`.
        checkpoint: the user's own file or folder, if there is one.
        progress: called while downloading with the bytes received so far and the bytes in all.
        download: if False, a file that is not in the cache is an error.
        url: mirror to download the official file from; None for the official URL.

    Returns:
        Path of the file or folder; None for the embedded teacher, which has none.

    Raises:
        CheckpointError: `checkpoint` does not exist, is a folder without weights, or was given for the embedded
            teacher; or the cache has no file, and `download` is False or the official file's SHA-256 isn't known.
        DownloadError: the download failed; the message names the file and where to put it.
        SamError: an unknown teacher.
    """
    info = find_teacher_info(teacher)
    if info.checkpoint is None:
        if checkpoint is not None:
            raise CheckpointError(f"{teacher} is embedded and takes no checkpoint; leave out {checkpoint}")
        return None
    if checkpoint is not None:
        return _existing(checkpoint)
    cached = cache_directory() / info.checkpoint.name
    if cached.is_file():
        return cached
    file = info.checkpoint
    if file.sha256 is None or file.bytes is None:
        raise CheckpointError(
            f"{file.name} ({teacher}) is not in the cache, and no SHA-256 is known to check a download with.\n"
            f"Download it from {file.url}. {_mend(cached)}"
        )
    if not download:
        raise CheckpointError(f"{file.name} ({teacher}) is not in the cache.\n{_mend(cached)}")
    request = Request(url=url or file.url, target=cached, size=file.bytes, sha256=file.sha256)
    try:
        download_file(request, progress)
    except DownloadError as error:
        named = f"{file.name} ({teacher}, {file.bytes / 1e6:,.0f} MB)"
        raise DownloadError(f"{named} could not be downloaded: {error}.\n{_mend(cached)}") from None
    return cached


@dataclass(frozen=True, kw_only=True)
class Request:
    """File to download, and limits of time and attempts."""

    url: str
    """http or https URL."""
    target: Path
    """Final path of the file; its directory is made."""
    size: int
    """Length in bytes."""
    sha256: str
    """Hex digest of the whole file."""
    timeout: float = 30.0
    """Seconds without a byte after which an attempt has failed."""
    attempts: int = 4
    """Number of attempts in a row that may fail without a new byte."""
    backoff: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""

    @property
    def part(self) -> Path:
        """Path of the bytes received so far."""
        return self.target.with_name(self.target.name + ".part")

    @property
    def version_file(self) -> Path:
        """Path of the JSON file that identifies the version of the file that `part` belongs to."""
        return self.target.with_name(self.target.name + ".part.json")


def download_file(request: Request, progress: Progress | None = None) -> None:
    """Download a file; return once its SHA-256 is verified and it is at its final path.

    A second process that requests the same file waits for the first one, and uses its file.

    Args:
        request: file to download.
        progress: called about every megabyte with the bytes received so far and the bytes in all.

    Raises:
        DownloadError: the download failed; the message is one line without a full stop. Received bytes are kept for
            the next attempt, except those of a whole file whose SHA-256 was wrong.
    """
    try:
        request.target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(request.target):
            if request.target.exists():
                return
            _check_room(request)
            _fetch_with_retries(request, progress or _no_progress)
            _check_digest(request)
            _put_in_place(request)
    except OSError as error:
        raise DownloadError(f"{error.filename or request.target}: {error.strerror or error}") from None


def _existing(checkpoint: Path) -> Path:
    checkpoint = Path(checkpoint)
    weight_files(checkpoint)
    return checkpoint


def _mend(target: Path) -> str:
    return f"Put it at {target}, or give --checkpoint FILE; to try without it: --teacher {EMBEDDED_TEACHER}."


class _Transient(Exception):
    """This attempt failed; another may succeed."""


def _no_progress(done: int, total: int) -> None:
    pass


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of this target. The lock file is never removed, since two processes could then hold the lock."""
    with target.with_name(target.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_room(request: Request) -> None:
    """Raise DownloadError if the disk has too little room for the rest of the file."""
    present = request.part.stat().st_size if request.part.exists() else 0
    free = shutil.disk_usage(request.target.parent).free
    needed = request.size - present
    if free < needed:
        raise DownloadError(
            f"no room in {request.target.parent}: {needed:,} bytes are needed, {free:,} are free"
        )


def _fetch_with_retries(request: Request, progress: Progress) -> None:
    """Make attempts until all bytes are received; attempts that received any don't count against the limit."""
    failures = 0
    while True:
        before = _resumable_bytes(request)
        try:
            _attempt(request, progress)
            return
        except _Transient as error:
            failures = 1 if _resumable_bytes(request) > before else failures + 1
            if failures >= request.attempts:
                raise DownloadError(f"{request.url}: {error}") from None
            wait = request.backoff * 2 ** (failures - 1)
            log.warning("%s: %s; next attempt in %.0f s", request.url, error, wait)
            time.sleep(wait)


def _resumable_bytes(request: Request) -> int:
    """Return the number of received bytes that an attempt can continue from; 0 if their version isn't known."""
    if not _version_headers(request) or not request.part.exists():
        return 0
    present = request.part.stat().st_size
    return present if present <= request.size else 0


def _version_headers(request: Request) -> dict[str, str]:
    """Return the If-Range header for the version that `part` belongs to; empty if there is none.

    A weak ETag guarantees equal meaning, not equal bytes, so RFC 9110 forbids it here.
    """
    try:
        version = json.loads(request.version_file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(version, dict) or version.get("url") != request.url:
        return {}
    etag, modified = version.get("etag"), version.get("last_modified")
    if etag and not str(etag).startswith("W/"):
        return {"If-Range": str(etag)}
    return {"If-Range": str(modified)} if modified else {}


def _attempt(request: Request, progress: Progress) -> None:
    """Receive the missing bytes in one connection."""
    start = _resumable_bytes(request)
    if start == request.size:
        return
    headers = {"Accept-Encoding": "identity", "User-Agent": "mobilesam"}
    if start:
        headers |= {"Range": f"bytes={start}-"} | _version_headers(request)
    try:
        # Every URL comes from the registry or from the caller's own code.
        with urllib.request.urlopen(
            urllib.request.Request(request.url, headers=headers), timeout=request.timeout
        ) as response:
            start = _accepted_start(request, start, response.status, response.headers)
            _receive(request, response, start, progress)
    except urllib.error.HTTPError as error:
        _refuse_status(request, error.code, error.reason)
    except urllib.error.URLError as error:
        raise _Transient(str(getattr(error.reason, "strerror", None) or error.reason)) from None
    except (TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
        raise _Transient(str(error) or type(error).__name__) from None


def _refuse_status(request: Request, status: int, reason: str) -> None:
    if status == 416:
        # The server's file is shorter than the bytes received, so it is another version. Start again.
        _discard(request)
        raise _Transient("the server's file changed; starting again")
    if status in TRANSIENT_STATUS:
        raise _Transient(f"the server answered {status} {reason}")
    raise DownloadError(f"{request.url}: the server answered {status} {reason}")


def _accepted_start(request: Request, start: int, status: int, headers: Mapping[str, str]) -> int:
    """Return the file position of the response's first byte: 0, with `part` emptied, unless the range was granted."""
    if status == 206 and start:
        unit_range, _, total = headers.get("Content-Range", "").partition("/")
        if not unit_range.startswith(f"bytes {start}-"):
            _discard(request)
            raise _Transient(f"the server sent another range than requested: {unit_range!r}")
        _check_length(request, total)
        return start
    length = headers.get("Content-Length", "")
    _check_length(request, length)
    version = {
        "url": request.url,
        "etag": headers.get("ETag"),
        "last_modified": headers.get("Last-Modified"),
    }
    # The old bytes are removed before the new version is recorded, so that the two always agree.
    request.part.write_bytes(b"")
    request.version_file.write_text(json.dumps(version))
    return 0


def _check_length(request: Request, stated: str) -> None:
    if stated.isdigit() and int(stated) != request.size:
        _discard(request)
        raise DownloadError(
            f"{request.url}: the server's file has {int(stated):,} bytes, not {request.size:,}"
        )


def _receive(request: Request, response: http.client.HTTPResponse, start: int, progress: Progress) -> None:
    done = start
    with request.part.open("r+b") as part:
        part.seek(start)
        progress(done, request.size)
        while chunk := response.read(CHUNK):
            _write(request, part, chunk)
            done += len(chunk)
            if done > request.size:
                break
            progress(done, request.size)
        part.flush()
        os.fsync(part.fileno())
    if done > request.size:
        _discard(request)
        raise DownloadError(f"{request.url}: the server sent more than {request.size:,} bytes")
    if done < request.size:
        raise _Transient(f"the connection ended after {done:,} of {request.size:,} bytes")


def _write(request: Request, part: BinaryIO, chunk: bytes) -> None:
    try:
        part.write(chunk)
        part.flush()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"no room left in {request.target.parent} for {request.size:,} bytes"
            ) from None
        raise


def _check_digest(request: Request) -> None:
    with request.part.open("rb") as part:
        found = hashlib.file_digest(part, "sha256").hexdigest()
    if found != request.sha256:
        _discard(request)
        raise DownloadError(
            f"{request.url}: the file's SHA-256 is {found}, not {request.sha256}; it was removed"
        )


def _put_in_place(request: Request) -> None:
    os.replace(request.part, request.target)
    request.version_file.unlink(missing_ok=True)
    directory = os.open(request.target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _discard(request: Request) -> None:
    """Remove the received bytes and the record of their version."""
    request.version_file.unlink(missing_ok=True)
    request.part.unlink(missing_ok=True)
