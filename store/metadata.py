"""The Zarr v3 documents of a store: made by zarr-python, written durably by us."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .durable import write_atomic
from .errors import StoreDamaged, StoreNotFound
from .layout import ArrayLayout
from .spec import StoreSpec

DOCUMENT = "zarr.json"
ATTRIBUTE = "mobilesam"

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
    """The spec of the store at a path; StoreNotFound when it is none."""
    path = store / DOCUMENT
    try:
        document = json.loads(path.read_bytes())
        attributes = dict(document["attributes"][ATTRIBUTE])
    except FileNotFoundError as error:
        raise StoreNotFound(
            f"{store} is no mobilesam store (it has no {DOCUMENT}): make one with mobilesam precompute"
        ) from error
    except NotADirectoryError as error:
        raise StoreNotFound(f"{store} is a file, not a mobilesam store") from error
    except OSError as error:
        raise StoreNotFound(f"can't read {path}: {error.strerror}") from error
    except (KeyError, TypeError, IndexError) as error:
        raise StoreNotFound(f"{store} is a Zarr group, but no mobilesam store") from error
    except ValueError as error:
        raise StoreDamaged(f"{path} is damaged (no JSON): make the store anew") from error
    return StoreSpec.from_json(attributes)
