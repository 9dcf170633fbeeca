"""Kinds of files in photo folders: images by name or content, all else by what it is, mobilesam's own folders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Set
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ...common.outputs import read_mark

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".mpo", ".png", ".apng"),
    *(".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
)
"""Suffixes of image files, in upper or lower case; the format is recognised later, by the content."""

HEIC_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")
AVIF_SUFFIXES = (".avif", ".avifs")

TAR_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tbz",
    ".tbz2",
    ".tar.xz",
    ".txz",
    ".tar.zst",
    ".tzst",
    ".tar.lz4",
)

INSTALL_HEIF = "pip install 'mobilesam[heif]'"
"""Command that makes HEIC photos readable."""

HIDDEN = "hidden"
MAC_TWIN = "Mac's ._ twin"
UNKNOWN = "other"

HEAD_BYTES = 32
"""Bytes at the start of a file by which `content_kind` recognises it."""

_KINDS = {
    "video": "mp4 mov avi mkv m4v 3gp 3g2 webm mts m2ts mpg mpeg wmv insv lrv",
    "sound": "mp3 wav m4a aac ogg flac",
    "RAW photo": "dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef srw raw 3fr fff iiq x3f rwl gpr kdc dcr mrw",
    "JPEG 2000": "jp2 j2k j2c jpf jpx jpm jpc",
    "JPEG XL": "jxl",
    "OpenEXR": "exr",
    "Radiance HDR": "hdr",
    "JPEG XR": "jxr hdp wdp",
    "JPEG-LS": "jls",
    "Netpbm": "ppm pgm pbm pnm pam pfm",
    "TGA": "tga",
    "icon": "ico icns cur",
    "PCX": "pcx",
    "DDS": "dds",
    "SGI": "sgi",
    "FITS": "fits fit fts",
    "NIfTI": "nii",
    "Photoshop": "psd psb",
    "DICOM": "dcm",
    "SVG": "svg svgz",
    "PDF": "pdf",
    "PostScript": "ps eps ai",
    "JSON": "json jsonl geojson ndjson",
    "XMP": "xmp",
    "XML": "xml kml gpx",
    "text": "txt md csv tsv log rst tex yaml yml toml ini cfg conf",
    "HTML": "html htm css js",
    "program": "py pyc pyi ipynb sh bat c h cc cpp hpp rs go java class o a so dll exe",
    "array or weights": "npy npz h5 hdf5 mat pkl pickle pt pth ckpt bin safetensors onnx parquet tfrecord lmdb mdb",
    "database": "db sqlite sqlite3",
    "ZIP archive": "zip",
    "archive": "7z rar gz bz2 xz zst iso dmg",
    "tar inside a tar": "tar",
    "unfinished download": "part partial crdownload download tmp aria2",
    "sidecar": "aae thm pp3 lrcat lrprev on1 dop cos xmpx tfw jgw pgw prj ovr aux",
    "system file": "lnk url",
}
_BY_SUFFIX = {f".{suffix}": kind for kind, suffixes in _KINDS.items() for suffix in suffixes.split()}
_SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "picasa.ini"}
_MAC_FOLDER = "__macosx"
_SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb"),  # Synology, QNAP
    *("$recycle.bin", "system volume information", "lost+found", "lost.dir"),
}
"""Folders of thumbnails and deleted photos that servers and systems make beside the photos, in small letters.
Thumbnails among the photos would put held-out photos into training."""

_MAGIC = (
    (b"\xff\xd8\xff\xf7", "JPEG-LS"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"IIRO", "RAW photo"),
    (b"IIU\0", "RAW photo"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"\0\0\1\0", "icon"),
    (b"DDS ", "DDS"),
    (b"SIMPLE  =", "FITS"),
    (b"FUJIFILMCCD-RAW", "RAW photo"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "Photoshop"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "PostScript"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"PK\x05\x06", "ZIP archive"),
    (b"7z\xbc\xaf'\x1c", "archive"),
    (b"Rar!", "archive"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\0\x05\x16\x07", MAC_TWIN),
    (b"version https://git-lfs", "Git LFS pointer"),
    (b"<!DOCTYPE html", "HTML"),
    (b"<!doctype html", "HTML"),
    (b"<html", "HTML"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
    (b"\x1aE\xdf\xa3", "video"),
)
_HEIC_BRANDS = (
    b"heic",
    b"heix",
    b"heim",
    b"heis",
    b"hevc",
    b"hevx",
    b"hevm",
    b"hevs",
    b"mif1",
    b"msf1",
    b"mif2",
)
_AVIF_BRANDS = (b"avif", b"avis")

IMAGE_KINDS = frozenset({"JPEG", "PNG", "GIF", "TIFF", "WebP", "BMP", "HEIC", "AVIF"})
"""Results of `content_kind` that are images which can be decoded, HEIC and AVIF where `decodable` says so."""


def content_kind(head: bytes) -> str | None:
    """Return the kind of a file by its content.

    Args:
        head: its first bytes, `HEAD_BYTES` or more.

    Returns:
        Name of the kind, such as "JPEG", "HEIC" or "ZIP archive"; None if it is not known.
    """
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head.startswith(b"RIFF"):
        return {b"WEBP": "WebP", b"AVI ": "video"}.get(head[8:12], "sound")
    # Two letters alone are found at the start of texts, too: BMP's header has two fields of zeros.
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return "BMP"
    if head[4:8] == b"ftyp":
        return _boxed_kind(head)
    return None


def _boxed_kind(head: bytes) -> str:
    """Return the kind of an ISO base media file, by its major brand, then by the compatible brands in its head."""
    brand = head[8:12]
    compatible = [
        head[start : start + 4] for start in range(16, min(int.from_bytes(head[:4], "big"), len(head)), 4)
    ]
    if brand in _AVIF_BRANDS or (brand in (b"mif1", b"msf1") and set(compatible) & set(_AVIF_BRANDS)):
        return "AVIF"
    if brand in _HEIC_BRANDS:
        return "HEIC"
    return "RAW photo" if brand == b"crx " else "video"


@cache
def decodable(kind: str) -> bool:
    """Return True if images of a kind can be decoded here: HEIC needs pillow-heif, AVIF a Pillow built with it."""
    if kind == "HEIC":
        return find_spec("pillow_heif") is not None
    if kind == "AVIF":
        from PIL import features

        return bool(features.check("avif"))
    return kind in IMAGE_KINDS


def is_image(name: str, head: Callable[[], bytes]) -> tuple[bool, str]:
    """Decide if a file is listed as an image.

    Args:
        name: the file's name, without folders.
        head: returns its first `HEAD_BYTES` bytes; called only if the name doesn't tell.

    Returns:
        True if it is listed, and its kind (for an image that is recognised by its name, "image").

    Raises:
        OSError: `head` failed.
    """
    name = name.lower()
    if name.endswith(IMAGE_SUFFIXES):
        return True, "image"
    for suffixes, kind in ((HEIC_SUFFIXES, "HEIC"), (AVIF_SUFFIXES, "AVIF")):
        if name.endswith(suffixes):
            return decodable(kind), kind
    if name.endswith(COMPRESSED_SUFFIXES):
        return False, "compressed tar"
    if name in _SYSTEM_NAMES:
        return False, "system file"
    known = _BY_SUFFIX.get(os.path.splitext(name)[1])
    if known is not None:
        return False, known
    kind = content_kind(head()) or UNKNOWN
    return kind in IMAGE_KINDS and decodable(kind), kind


HINTS = {
    "HEIC": f"{INSTALL_HEIF} reads them",
    "AVIF": "a Pillow built with AVIF reads them",
    "ZIP archive": "unpack them to a folder",
    "archive": "unpack them to a folder",
    "compressed tar": "decompress them to .tar",
    "tar inside a tar": "unpack the outer one",
    "gzip": "decompress them",
    "RAW photo": "export them as JPEG or TIFF",
    "JPEG 2000": "convert them to JPEG or PNG",
    "JPEG XL": "convert them to JPEG or PNG",
    "JPEG XR": "convert them to JPEG or PNG",
    "JPEG-LS": "convert them to PNG",
    "Netpbm": "convert them to PNG",
    "TGA": "convert them to PNG",
    "PCX": "convert them to PNG",
    "DDS": "convert them to PNG",
    "SGI": "convert them to PNG",
    "OpenEXR": "convert them to PNG, with a white level of your choice",
    "Radiance HDR": "convert them to PNG, with a white level of your choice",
    "video": "save their frames as photos",
}
"""Mends for messages: ways to the photos in files of some kinds."""


def passed_over_line(counts: Mapping[str, int]) -> str:
    """Return the files that a listing passed over as words, the most frequent kind first; "" for none."""
    kinds = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{count:,} {kind}" + (f" ({HINTS[kind]})" if kind in HINTS else "") for kind, count in kinds]
    return f"passed over: {', '.join(words)}" if words else ""


def hidden_kind(name: str) -> str | None:
    """Return the kind of a file or folder that is passed over whatever it holds, by its name; None for all others."""
    if name.startswith("._"):
        return MAC_TWIN
    if name.lower() == _MAC_FOLDER:
        return "Mac's __MACOSX folder"
    if name.lower() in _SYSTEM_FOLDERS:
        return "system folder"
    return HIDDEN if name.startswith(".") else None


def own_folder(path: str, names: Set[str]) -> str | None:
    """Return what a folder is if mobilesam made it, by the marker files in it: its content is never listed as photos.

    Args:
        path: path of the folder.
        names: names of its entries.

    Returns:
        Such as "a store"; None for all other folders.
    """
    if "embeddings" in names and is_store(path):
        return "a store"
    if {"config.json", "split.json"} <= names and (
        "run.lock" in names or {"student", "identity", "split_sha256"} <= _keys(path, "config.json")
    ):
        return "a training run"
    if "results.json" in names and "runs" in names and {"format", "runs"} <= _keys(path, "results.json"):
        return "a sweep"
    if "model.json" in names and str(_json(path, "model.json").get("format")).startswith("mobilesam model"):
        return "an export"
    return None


OVERLAY_NAME = re.compile(r"overlay\.(png|jpe?g)", re.IGNORECASE)
MASK_NAME = re.compile(r"\d{3,}\.png")


def own_pictures(folder: str, names: Set[str]) -> Set[str]:
    """Return the names of overlays and masks that `mobilesam segment` wrote into a folder, recognised by their marks.

    Only files of the names that it gives by itself are looked into, and masks only if the first one is such: opening
    every photo of a large folder would take too long.

    Args:
        folder: path of the folder.
        names: names of its entries.
    """
    found = {name for name in names if OVERLAY_NAME.fullmatch(name) and _has_mark(folder, name)}
    masks = sorted(name for name in names if MASK_NAME.fullmatch(name))
    if masks and _has_mark(folder, masks[0]):
        found |= {name for name in masks if _has_mark(folder, name)}
    return found


def _has_mark(folder: str, name: str) -> bool:
    try:
        return read_mark(Path(folder, name)) is not None
    except OSError:
        return False


def is_store(path: str) -> bool:
    """Return True if a folder is a store, even a damaged or half-made one."""
    private = os.path.join(path, "embeddings", "mobilesam")
    return os.path.isdir(private) and (
        os.path.exists(os.path.join(private, "manifest.sqlite"))
        or os.path.exists(os.path.join(path, "zarr.json"))
    )


def store_around(path: str) -> str | None:
    """Return the store that a path is or lies in, if any."""
    return next((str(folder) for folder in (Path(path), *Path(path).parents) if is_store(str(folder))), None)


_MAX_MARKER = 64 * 2**20
"""Largest marker file that is read, in bytes: a sweep's results have some KB per run."""


def _json(folder: str, name: str) -> dict:
    """Return the JSON object in a file; an empty one if it holds none."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            value = json.loads(file.read(_MAX_MARKER))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _keys(folder: str, name: str) -> Set[str]:
    return _json(folder, name).keys()
