"""Zarr v3 metadata documents (zarr.json) of a store: made by zarr-python, written atomically, read for the spec."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.durable import explain_os_errors, write_atomic
from ..common.errors import REPAIR_METADATA, StoreDamaged, StoreError, StoreNotFound
from .layout import MANIFEST, ArrayLayout, local_path
from .spec import StoreSpec

DOCUMENT = "zarr.json"
ATTRIBUTE = "mobilesam"

_DIMENSIONS = ("row", "channel", "y", "x")


def exists(path: Path | str) -> bool:
    """Return True if there is a mobilesam store at the path, intact or damaged."""
    try:
        read_spec(local_path(path))
    except StoreNotFound:
        return False
    return True


def read_spec(store: Path) -> StoreSpec:
    """Read the spec from the attributes of the group's zarr.json.

    Raises:
        StoreNotFound: there is no store at the path.
        StoreDamaged: there is one, but its document is missing or damaged.
        StoreError: the document can't be read, or another version wrote it.
    """
    path = store / DOCUMENT
    try:
        document = json.loads(path.read_bytes())
        attributes = dict(document["attributes"][ATTRIBUTE])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_store(store, f"it has no {DOCUMENT}") from error
    except OSError as error:
        with explain_os_errors(path):
            raise error
    except (ValueError, RecursionError) as error:
        raise StoreDamaged(f"{path} is damaged (not JSON): {REPAIR_METADATA}") from error
    except (KeyError, TypeError, IndexError) as error:
        raise _no_store(store, f"its {DOCUMENT} has no attribute {ATTRIBUTE}") from error
    return StoreSpec.from_json(attributes)


def _no_store(store: Path, reason: str) -> StoreError:
    if (store / MANIFEST).exists():
        return StoreDamaged(f"{store} is a store with a manifest, but {reason}: {REPAIR_METADATA}")
    if store.is_file():
        return StoreNotFound(f"{store} is a file, not a mobilesam store")
    return StoreNotFound(f"{store} is no mobilesam store ({reason}): make one with mobilesam precompute")


def document_names(spec: StoreSpec) -> set[str]:
    """Return the paths of a store's zarr.json files, relative to the store."""
    return {DOCUMENT, *(f"{layout.name}/{DOCUMENT}" for layout in spec.layouts)}


def documents_of(spec: StoreSpec, rows: int) -> dict[str, bytes]:
    """Make every zarr.json of a store.

    Args:
        spec: description of the store.
        rows: rows of the store.

    Returns:
        Content by path in the store, such as "embeddings/zarr.json"; the group's last.
    """
    arrays = {layout.name: _array_document(layout, rows) for layout in spec.layouts}
    documents = {f"{name}/{DOCUMENT}": document for name, document in arrays.items()}
    return documents | {DOCUMENT: _group_document(spec, arrays)}


def _group_document(spec: StoreSpec, arrays: Mapping[str, bytes]) -> bytes:
    """Make the root group's zarr.json, with the spec among its attributes and the arrays' documents as consolidated
    metadata, without which xarray warns on opening."""
    import zarr

    documents: dict[str, Any] = {}
    zarr.create_group(documents, zarr_format=3, attributes={ATTRIBUTE: spec.to_json()})
    document = json.loads(documents[DOCUMENT].to_bytes())
    document["consolidated_metadata"] = {
        "kind": "inline",
        "must_understand": False,
        "metadata": {name: json.loads(text) for name, text in sorted(arrays.items())},
    }
    return json.dumps(document, indent=2).encode()


def _array_document(layout: ArrayLayout, rows: int) -> bytes:
    """Make an array's zarr.json for `rows` rows: shards of whole rows, a crc32c behind every row. Missing rows read
    as NaN; in int8 as 0, with scales that read as NaN."""
    import zarr
    from zarr.codecs import Crc32cCodec

    documents: dict[str, Any] = {}
    zarr.create_array(
        documents,
        shape=(rows, *layout.item_shape),
        dtype=layout.dtype,
        chunks=(1, *layout.item_shape),
        shards=(layout.shard_size, *layout.item_shape),
        filters=None,
        compressors=Crc32cCodec(),
        fill_value=float("nan") if layout.dtype.kind == "f" else 0,
        dimension_names=_DIMENSIONS[: 1 + len(layout.item_shape)],
        chunk_key_encoding={"name": "default", "separator": "."},
        zarr_format=3,
    )
    return bytes(documents[DOCUMENT].to_bytes())


def changed_documents(store: Path, documents: Mapping[str, bytes]) -> list[str]:
    """Return the names of the documents that are missing on disk or have another content.

    Args:
        store: path of the store.
        documents: expected content by path in the store.

    Raises:
        OSError: a document can't be read.
    """
    return [name for name, content in documents.items() if not _holds(store / name, content)]


def write_documents(store: Path, documents: Mapping[str, bytes]) -> None:
    """Write the documents that are missing or have another content, each atomically, in the order given.

    Args:
        store: path of the store.
        documents: content by path in the store.

    Raises:
        OSError: a document can't be written.
    """
    for name in changed_documents(store, documents):
        path = store / name
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, documents[name])


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return False
