"""Output files of commands: marked as the tool's own, so that a command never replaces anything else.

A mark names the output's kind and the SHA-256 of the file without the mark. It lies where the format has room for
it: a text field of a PNG, a comment of a JPEG, HTML's generator, the first key of a JSON object, metadata of an ONNX
file, the comment of a zip archive (`.pt`), a comment at the end of a Markdown page.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .durable import write_atomic
from .errors import MobileSamError, shown

_MARK = re.compile(rb"mobilesam ([a-z ]{1,40}), SHA-256 without this mark: ([0-9a-f]{64})")

_SEARCHED = 1 << 16
"""Bytes at the start and at the end of a file that are searched for a mark."""


@dataclass(frozen=True, kw_only=True)
class _Format:
    """Place of the mark in files that begin with `magic`."""

    magic: bytes
    after: Callable[[bytes], int]
    """Position of the mark in the unmarked content."""
    wrap: Callable[[bytes], bytes]
    """Bytes that carry the mark."""
    replaced: bytes = b""
    """Bytes at the position that the wrapped mark takes the place of."""


def _png_text(mark: bytes) -> bytes:
    text = b"tEXtComment\0" + mark
    return struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))


def _onnx_property(mark: bytes) -> bytes:
    # One more entry of ModelProto.metadata_props (field 14): a protobuf message's repeated fields may come in parts.
    pair = b"\x0a\x09mobilesam\x12" + bytes([len(mark)]) + mark
    return b"\x72" + bytes([len(pair) % 128 + 128, len(pair) // 128]) + pair


_FORMATS = (
    _Format(magic=b"\x89PNG\r\n\x1a\n", after=lambda _: 33, wrap=_png_text),  # behind the first chunk, IHDR
    _Format(
        magic=b"\xff\xd8\xff\xe0",
        after=lambda data: (
            4 + int.from_bytes(data[4:6], "big")
        ),  # behind JFIF's header, which has to be first
        wrap=lambda mark: b"\xff\xfe" + struct.pack(">H", len(mark) + 2) + mark,
    ),
    # An archive's end has the length of its comment, 0, then the comment.
    _Format(
        magic=b"PK\x03\x04",
        after=lambda data: len(data) - 2,
        wrap=lambda mark: struct.pack("<H", len(mark)) + mark,
        replaced=b"\0\0",
    ),
    _Format(magic=b"\x08", after=len, wrap=_onnx_property),  # a ModelProto's first field, ir_version
    _Format(magic=b"{", after=lambda _: 1, wrap=lambda mark: b'"software": "' + mark + b'", '),
    _Format(
        magic=b"<",
        after=lambda data: data.index(b"<head>") + 6,
        wrap=lambda mark: b'\n<meta name="generator" content="' + mark + b'">',
    ),
    _Format(magic=b"#", after=len, wrap=lambda mark: b"\n<!-- " + mark + b" -->\n"),
)


def marked(data: bytes, kind: str) -> bytes:
    """Return a file's content with a mark, by which `refuse_foreign` recognises it.

    Args:
        data: content of a PNG, JPEG, `torch.save`, ONNX, HTML or Markdown file, or a JSON object that isn't empty.
        kind: kind of output, such as "verify report": lower-case words.
    """
    form = _format_of(data)
    assert form is not None, f"no place for a mark in a file that begins with {data[:8]!r}"
    at = form.after(data)
    assert data[at : at + len(form.replaced)] == form.replaced, "the file's end has a comment already"
    mark = b"mobilesam %s, SHA-256 without this mark: %s" % (
        kind.encode(),
        hashlib.sha256(data).hexdigest().encode(),
    )
    assert _MARK.fullmatch(mark), f"{kind!r} is no kind of output"
    return data[:at] + form.wrap(mark) + data[at + len(form.replaced) :]


def _format_of(start: bytes) -> _Format | None:
    return next((form for form in _FORMATS if start.startswith(form.magic)), None)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Mark that was found in a file."""

    kind: str
    intact: bool
    """True if the file is as it was written."""


def read_mark(path: Path) -> Mark | None:
    """Return a file's mark, None if it has none.

    Raises:
        OSError: the file can't be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            parts = content[:_SEARCHED], content[max(size - _SEARCHED, 0) :]
            found = next((found for found in map(_MARK.search, parts) if found), None)
            form = _format_of(parts[0])
            if found is None or form is None:
                return None
            wrapped = form.wrap(found[0])
            at = content.find(wrapped, 0, _SEARCHED)
            at = at if at >= 0 else content.rfind(wrapped)
            kind, digest = found[1].decode(), found[2].decode()
            return Mark(kind=kind, intact=at >= 0 and _digest(content, at, wrapped, form.replaced) == digest)


def _digest(content: mmap.mmap, at: int, wrapped: bytes, replaced: bytes) -> str:
    sha256 = hashlib.sha256()
    with memoryview(content) as view, view[:at] as before, view[at + len(wrapped) :] as behind:
        for part in (before, replaced, behind):
            sha256.update(part)
    return sha256.hexdigest()


def refuse_foreign(
    path: Path,
    kind: str,
    option: str,
    error: type[MobileSamError],
    is_older: Callable[[Path], bool] = lambda _: False,
) -> None:
    """Refuse to replace a file that isn't an unchanged output of the same kind.

    Args:
        path: file to be written; may not exist.
        kind: kind of output, as given to `marked`.
        option: option of the command line that names the file, for messages.
        error: type of the error.
        is_older: returns True for a file of this kind that a version without marks wrote.

    Raises:
        MobileSamError: of the type `error`, if another file is there.
        OSError: the file can't be read.
    """
    if not path.exists():
        return
    mark = read_mark(path)
    if mark is None:
        if is_older(path):
            return
        what = f"exists and is no {kind} of mobilesam"
    elif mark.kind != kind:
        what = f"exists and is no {kind}, but mobilesam's {mark.kind}"
    elif not mark.intact:
        what = "was changed since mobilesam wrote it, or is damaged"
    else:
        return
    raise error(f"{option} {shown(str(path))} {what}: give another name, or delete it first")


def place_output(partial: Path, path: Path, refuse: Callable[[], None]) -> None:
    """Rename a finished temporary file to its final path; never over a file that `refuse` doesn't let pass.

    Args:
        partial: temporary file in the folder of `path`, synced to disk.
        path: final path.
        refuse: called again if there is a file at `path`; raises if it may not be replaced.

    Raises:
        OSError: the file can't be renamed.
    """
    try:
        os.link(partial, path)  # unlike a rename, it fails if something was put there meanwhile
    except FileExistsError:
        refuse()
        os.replace(partial, path)
    except OSError as cause:
        if cause.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():  # a file system without hard links
            refuse()
        os.replace(partial, path)
    else:
        partial.unlink()


def write_output(path: Path, data: bytes, kind: str, refuse: Callable[[], None]) -> None:
    """Write an output file with its mark, atomically and durably; of a symbolic link, the target is replaced.

    Args:
        path: file to create or replace.
        data: content without a mark.
        kind: kind of output, as given to `marked`.
        refuse: called if there is a file at `path`; raises if it may not be replaced.

    Raises:
        OSError: it names the file; the old content is unchanged, and no temporary file is left.
    """
    write_atomic(
        path.resolve(), marked(data, kind), lambda partial, final: place_output(partial, final, refuse)
    )
