"""The Zarr v3 documents of a store: made by zarr-python, written durably by us."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .durable import write_atomic
from .errors import StoreDamaged, StoreError, StoreNotFound
from .layout import ArrayLayout
from .places import MANIFEST
from .spec import StoreSpec

DOCUMENT = "zarr.json"
ATTRIBUTE = "mobilesam"

_MEND = f"put its own {DOCUMENT} back, or make the store anew in another place"

_DIMENSIONS = ("row", "channel", "y", "x")


def group_document(spec: StoreSpec, arrays: Mapping[str, bytes]) -> bytes:
    """The root group's zarr.json: the spec among its attributes, and the arrays' documents consolidated, without
    which xarray warns on opening."""
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


def array_document(layout: ArrayLayout, rows: int) -> bytes:
    """An array's zarr.json for `rows` rows: shards of whole rows, crc32c on every row, absence reads as NaN
    (as 0 in int8, where the row's scales read as NaN)."""
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


def write_documents(store: Path, spec: StoreSpec, rows: int) -> None:
    """Make every zarr.json say `rows` rows, the group's last; one that says so already is left alone."""
    arrays = {layout.name: array_document(layout, rows) for layout in spec.layouts}
    places = {store / name / DOCUMENT: document for name, document in arrays.items()}
    places[store / DOCUMENT] = group_document(spec, arrays)
    for path, document in places.items():
        if not path.exists() or path.read_bytes() != document:
            write_atomic(path, document)


def read_spec(store: Path) -> StoreSpec:
    """The spec of the store at a path. StoreNotFound when it is none, StoreDamaged when there is one, but its
    document is not whole, StoreError when it can't be read."""
    path = store / DOCUMENT
    try:
        document = json.loads(path.read_bytes())
        attributes = dict(document["attributes"][ATTRIBUTE])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _none(store, f"it has no {DOCUMENT}") from error
    except OSError as error:
        raise StoreError(f"can't read {path}: {error.strerror}; check its permissions") from error
    except ValueError as error:
        raise StoreDamaged(f"{path} is damaged (no JSON): {_MEND}") from error
    except (KeyError, TypeError, IndexError) as error:
        raise _none(store, f"its {DOCUMENT} has no attribute {ATTRIBUTE}") from error
    return StoreSpec.from_json(attributes)


def _none(store: Path, reason: str) -> StoreError:
    if (store / MANIFEST).exists():
        return StoreDamaged(f"{store} is a store with a manifest, but {reason}: {_MEND}")
    if store.is_file():
        return StoreNotFound(f"{store} is a file, not a mobilesam store")
    return StoreNotFound(f"{store} is no mobilesam store ({reason}): make one with mobilesam precompute")
