"""Files that weights come in, recognised by content: of torch.save, of safetensors, sharded, in a folder.

A file of another kind is called what it is: an unfinished download, a Git LFS pointer, a web page, a photo.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...common.errors import ArchiveError, CheckpointError, ForeignObjects, counted, shown

# torch, which takes seconds to load, is imported by the functions that read tensors: a wrong file is told before.

_TORCH_STARTS = (b"PK\x03\x04", b"\x80")
"""Beginnings of files of `torch.save`: a zip archive, or in the older format a pickle."""

INDEX_SUFFIX = ".index.json"
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors" + INDEX_SUFFIX,
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX_SUFFIX,
)
"""Files of weights in Hugging Face's folders, the one to read first; an index names the files of a sharded model."""

PLAIN = "torch.save(model.state_dict(), FILE)"
"""Way to save weights that every program can read."""

MAX_HEADER = 4 << 20
"""Largest header of a safetensors file that is read, in bytes: a hundred times that of ViT-H's. Parsed it takes about
100 MB."""

MAX_INDEX = 4 << 20
"""Largest index of a sharded model that is read, in bytes."""

MAX_SHARDS = 1000
"""Most files of a sharded model."""

_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".ckpt")
_CHUNK = 1 << 20
_START = 512
_AGAIN = "download or copy it again"

# Beginnings of files that people take for weights.
_MAGIC = (
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG\r\n", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "gzip-compressed: unpack it first"),
    (b"BZh", "bzip2-compressed: unpack it first"),
    (b"\xfd7zXZ\0", "xz-compressed: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras and TensorFlow write: save the weights with PyTorch"),
    (b"SQLite format 3", "an SQLite database"),
    (b"GGUF", "a GGUF file of llama.cpp: save the weights with PyTorch"),
)
# The same, at a later place.
_LATER = (
    (4, b"TFL3", "a TensorFlow Lite model: save the weights with PyTorch"),
    (8, b"WEBP", "a WebP image"),
    (4, b"ftyp", "a HEIC or AVIF image, or a video"),
    (257, b"ustar", "a tar archive: unpack it first"),
)


def load_weights(path: Path) -> object:
    """Load the content of a file or folder of weights.

    In files of torch's zip format every checksum is verified first (2.4 GB take about a second once they are in the
    page cache); then the file is mapped, as safetensors files are, so that memory holds only the tensors that are
    used. Files in torch's older format are read whole.

    Args:
        path: a file of `torch.save` or of safetensors, the index of a sharded model, or a folder with one of
            FOLDER_FILES.

    Returns:
        The saved object: tensors on the CPU in plain containers, a `Foreign` in place of any other object.

    Raises:
        CheckpointError: the path is absent, the file is empty, damaged or of another kind, or the folder has none.
    """
    files = weight_files(path)
    if len(files) == 1:
        return _load_file(files[0])
    state: dict[Any, object] = {}
    for file in files:
        part = _load_file(file)
        if not isinstance(part, dict):
            raise CheckpointError(f"{file} holds a {type(part).__name__}, not a part of a state dict")
        state |= part
    return state


def weights_sha256(path: Path) -> str:
    """Return the hex SHA-256 that identifies weights: of the file, or of the one file in the folder.

    For a sharded model it is the digest of its files' names and digests, in the order of the names.

    Args:
        path: as for `load_weights`.

    Raises:
        CheckpointError: a file is absent or can't be read.
    """
    files = weight_files(path)
    digests = []
    for file in files:
        with _readable(file), file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    if len(files) == 1:
        return digests[0]
    lines = [f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold the weights: the path itself, or those of its folder or index, by name.

    Args:
        path: as for `load_weights`.

    Raises:
        CheckpointError: the path is absent, a folder without weights, or an index that can't be used.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    if not path.exists():
        raise CheckpointError(f"{path} {absent(path)}")
    return _shards(path) if path.name.endswith(INDEX_SUFFIX) else [path]


def absent(path: Path, wanted: str = "give a file of weights (.pth, .pt, .safetensors)") -> str:
    """Return the end of the message about a path that doesn't exist: how to download it, if it looks like an address
    or a model of Hugging Face, else what is wanted.

    Args:
        path: path as the user named it.
        wanted: the mend, for any other path.
    """
    text = str(path)
    address = re.match(r"(https?|ftp|hf|s3|gs):/+(.+)", text)  # a Path has one slash of two
    if address and address[1] != "hf":
        return f"is an address, not a file here: download it first (curl -LO {address[1]}://{address[2]})"
    name = address[2] if address else text
    # huggingface.co's names of models: an owner and a name, neither of them a path's.
    if address or (re.fullmatch(r"[\w-]+/[\w.-]+", name) and not path.suffix and not path.parent.exists()):
        download = f"hf download {name} --local-dir FOLDER"
        return f"does not exist; {wanted}.\nIf it is a model of Hugging Face, download it first: {download}"
    return f"does not exist; {wanted}"


def _file_in(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).exists():
            return folder / name
    kind = describe_folder(folder)
    if kind is not None:
        raise CheckpointError(f"{folder} is {kind}")
    wanted = f"{FOLDER_FILES[0]} or {FOLDER_FILES[2]}"
    candidates = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
    if not candidates:
        raise CheckpointError(f"{folder} is a directory without {wanted}: not a checkpoint")
    raise CheckpointError(
        f"{folder} is a directory without {wanted}: name the file of weights in it ({', '.join(candidates[:3])})"
    )


def describe_folder(folder: Path) -> str | None:
    """Return the kind of a folder that has weights, but not as one file, and how to make or name one; None for any
    other folder.

    Args:
        folder: path of a folder.
    """
    names = {file.name for file in folder.iterdir()}
    if any(name.endswith(".distcp") for name in names):
        return (
            "a distributed checkpoint of PyTorch; make one file of it:\n"
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pt"
        )
    if "data.pkl" in names:
        return (
            "an unpacked file of torch.save; pack it again, uncompressed:\n"
            f"(cd {folder.absolute().parent} && zip -0 -r {folder.name}.pt {folder.name})"
        )
    if "zero_to_fp32.py" in names or any(name.startswith("zero_pp_rank_") for name in names):
        return (
            "a checkpoint of DeepSpeed, in parts; make one file of it:\n"
            "python zero_to_fp32.py FOLDER FILE, the script that DeepSpeed saved with it"
        )
    if names & {"tf_model.h5", "saved_model.pb", "flax_model.msgpack"}:
        return "a model of TensorFlow or JAX: save its weights with PyTorch"
    inner = _folders_in(folder)
    return f"a folder of checkpoints: name one of them ({', '.join(inner[:3])})" if inner else None


def _folders_in(folder: Path) -> list[str]:
    """Return the folders with weights in a folder, as of Hugging Face's Trainer and cache, the newest first."""
    wanted = (*FOLDER_FILES, ".metadata")  # the last one of PyTorch's distributed checkpoints
    found = [
        file.parent
        for pattern in ("*", "snapshots/*")
        for name in wanted
        for file in folder.glob(f"{pattern}/{name}")
    ]
    newest = sorted(set(found), key=lambda each: (-each.stat().st_mtime_ns, each.name))
    return [shown(str(each)) for each in newest]


def _shards(index: Path) -> list[Path]:
    """Return the files that an index of a sharded model names."""
    with _readable(index), index.open("rb") as opened:
        text = opened.read(MAX_INDEX + 1)
    try:
        names = set(json.loads(text)["weight_map"].values()) if len(text) <= MAX_INDEX else set()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = set()
    if (
        not names
        or len(names) > MAX_SHARDS
        or not all(isinstance(n, str) and n == Path(n).name for n in names)
    ):
        raise CheckpointError(
            f"{index} is no index of a sharded model: it has no weight_map of files beside it"
        )
    files = [index.parent / name for name in sorted(names)]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(
            f"{index} names {len(files)} files, of which {len(absent)} are not beside it, the first "
            f"{shown(absent[0])}; {_AGAIN}"
        )
    return files


def _load_file(path: Path) -> object:
    """Load one file, of torch's or safetensors' format."""
    from .torch_file import read_torch_file

    refuse_other_kind(path)
    with _readable(path):
        with path.open("rb") as file:
            start = file.read(_START)
        try:
            if is_safetensors(start):
                return _read_safetensors(path)
            kind = _kind_of_zip(path)
            if kind:
                raise CheckpointError(f"{path} is {kind}")
            return read_torch_file(path, foreign=True)
        except ArchiveError as error:
            raise CheckpointError(_damage(path, str(error))) from None
        except ForeignObjects as error:
            raise CheckpointError(f"{path} is {error}: save the weights with {PLAIN}") from None


def refuse_other_kind(path: Path) -> None:
    """Refuse a file that begins neither as one of `torch.save` nor as one of safetensors, without loading torch.

    Args:
        path: path of a file.

    Raises:
        CheckpointError: it is empty, can't be read, or of another kind, which the message names.
    """
    with _readable(path):
        with path.open("rb") as file:
            start = file.read(_START)
        if not start:
            raise CheckpointError(f"{path} is empty (0 bytes); {_AGAIN}")
        if not is_safetensors(start) and not _in_torch_format(start):
            raise CheckpointError(
                f"{path} ({path.stat().st_size:,} bytes) is not a checkpoint of PyTorch or safetensors: it is "
                f"{_kind(start, path)}"
            )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise CheckpointError(_damage(path, "the disk can't read it")) from None
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _damage(path: Path, reason: str) -> str:
    """Return the message about a damaged file, with the expected length if it is named like an official one."""
    size = path.stat().st_size
    from ..registry import TEACHERS

    official = [info.checkpoint for info in TEACHERS.values() if info.checkpoint]
    wanted = [file.bytes for file in official if file.name == path.name and file.bytes not in (size, None)]
    lengths = f", {wanted[0]:,} expected" if wanted else ""
    return f"{path} ({size:,} bytes{lengths}) is truncated or damaged; {_AGAIN}.\n({reason})"


def is_safetensors(start: bytes) -> bool:
    """Return True if a file that begins with these nine bytes or more is of safetensors: eight bytes of a length, the
    first of which may equal a pickle's, and a JSON object."""
    return start[8:9] == b"{" and b"\0" in start[:8]


def _in_torch_format(start: bytes) -> bool:
    """Return True if a file that begins with these bytes was written by `torch.save`.

    A safetensors file begins with a length in eight bytes, the first of which may equal a pickle's, followed by a
    JSON object. So nine bytes are needed, or all of a shorter file.
    """
    return start.startswith(_TORCH_STARTS) and start[8:9] != b"{"


def _read_safetensors(path: Path) -> dict[str, object]:
    """Map the tensors of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ArchiveError(f"its header alone has {length:,} bytes")
        if length > MAX_HEADER:
            raise ArchiveError(f"its header has {length:,} bytes; at most {MAX_HEADER:,} are read")
        try:
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise ArchiveError("its header isn't that of safetensors") from None
    wanted = 8 + length + max(ends, default=0)
    if wanted > size:
        raise ArchiveError(f"by its header it has {wanted:,} bytes: an unfinished download or copy")
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ArchiveError((str(error).splitlines() or [""])[0][:100]) from None


def _kind_of_zip(path: Path) -> str | None:
    """Return the kind of a zip archive that `torch.save` didn't write; None for one that it did, or a damaged one."""
    from .torch_file import archive_names

    with path.open("rb") as file:
        names = archive_names(file) if file.read(2) == b"PK" else None
    if names is None:
        return None
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return f"a TorchScript archive: save the network's weights with {PLAIN}"
    exported = {"archive_format", "serialized_exported_program.json", "models/model.json"}
    if exported & inner or "serialized_exported_program.json" in names:
        return f"a program of torch.export: save the network's weights with {PLAIN}"
    if names and all(name.endswith(".npy") for name in names):
        return f"a NumPy archive: save the weights with {PLAIN}"
    if any(name == "data.pkl" or name.startswith("data/") for name in inner):
        return None  # torch.save's, perhaps damaged
    first = f", the first {shown(names[0][:80])}" if names else ""
    count = counted(len(names), "file")
    return f"a zip archive of {count}{first}, not a checkpoint of PyTorch: unpack it first"


def _kind(start: bytes, path: Path) -> str:
    """Return what a file is that is in no format of weights, by its first bytes."""
    if start.startswith(b"version https://git-lfs"):
        size = next(
            (line[5:] for line in start.decode("ascii", "replace").splitlines() if line[:5] == "size "), "?"
        )
        return f"a Git LFS pointer to a file of {size[:20]} bytes; fetch it with: git lfs pull"
    for magic, kind in _MAGIC:
        if start.startswith(magic):
            return kind
    for place, magic, kind in _LATER:
        if start[place:].startswith(magic):
            return kind
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")) or b"<html" in text:
        return f"an HTML page, as a server sends in place of a file; {_AGAIN}"
    if text.startswith(b"<?xml"):
        return f"an XML page, as a server sends in place of a file; {_AGAIN}"
    if start[:1] == b"\x08" and (path.suffix == ".onnx" or b"pytorch" in start or b"onnx" in start):
        return "an ONNX model: give the weights that it was exported from"
    if path.suffix in (".pb", ".index", ".h5", ".tflite") or ".data-" in path.name:
        return "TensorFlow's: save the weights with PyTorch"
    decoded = start.decode("utf-8", "ignore")  # the last letter may be cut
    if len(decoded.encode()) > len(start) - 4 and all(c.isprintable() or c.isspace() for c in decoded):
        return f"{'JSON' if text[:1] in (b'{', b'[') else 'a'} text that begins with {decoded[:40]!r}"
    return f"of an unknown kind: it starts with {start[:16]!r}"
