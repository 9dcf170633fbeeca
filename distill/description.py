"""What config.json says of a run, and what its student's file says of it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..sam.precision import resolve_device, resolve_precision
from ..store import EmbeddingStore, ImageRecord
from .config import DistillConfig
from .digests import rows_digest
from .errors import DistillError
from .initial import InitialWeights
from .labels import count_annotated
from .memory import default_micro_batch
from .objectives import mask_options
from .replicas import Replicas
from .run import FORMAT, Run
from .store_images import image_root
from .students import student_info


def describe(
    config: DistillConfig,
    store: EmbeddingStore,
    records: Sequence[ImageRecord],
    initial: InitialWeights | None,
    replicas: Replicas,
) -> dict[str, Any]:
    """The content of config.json for a run begun now."""
    info = student_info(config.student)
    device = resolve_device(replicas.device(config.device))
    precision = resolve_precision(config.precision, device)
    micro_batch = config.micro_batch or default_micro_batch(
        info,
        -(-config.batch_size // replicas.count),
        store.spec.image_size,
        precision,
        device,
        masks=None if config.objective == "decoupled" else mask_options(config),
    )
    counts = store.counts()
    root = _image_root(config, store)
    return {
        "format": FORMAT,
        "student": config.student,
        "image_size": store.spec.image_size,
        "config": config.to_json(),
        "identity": config.identity() | ({"init_sha256": initial.sha256} if initial else {}),
        **({"init": initial.report()} if initial else {}),
        "data": {
            "store_id": store.spec.store_id,
            "rows": len(records),
            "rows_digest": rows_digest(records),
            **({"annotated": _annotated(root, records)} if config.labels == "annotations" else {}),
        },
        "resolved": {
            "device": str(device),
            "precision": precision,
            "micro_batch": micro_batch,
            "processes": replicas.count,
        },
        "store": {"path": str(Path(config.store).resolve()), "spec": store.spec.to_json()},
        "image_root": root,
        "counts": {"done": counts.done, "failed": counts.failed, "pending": counts.pending},
        "versions": {
            "mobilesam": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "pillow")},
        },
    }


def _image_root(config: DistillConfig, store: EmbeddingStore) -> str | None:
    """The folder of the images that are learned from; None for those that the store keeps."""
    root = image_root(store, config.images)
    if root is None and config.labels == "annotations":
        raise DistillError(
            f"{store.path} keeps images but no annotations: say where both are with --images DIR"
        )
    return None if root is None else str(root)


def _annotated(root: str | None, records: Sequence[ImageRecord]) -> int:
    """How many of the images have annotations beside them; DistillError where none has."""
    assert root is not None, "_image_root has seen to it"
    count = count_annotated(Path(root), records)
    if not count:
        raise DistillError(
            f"none of the {len(records):,} images in {root} has annotations beside it, as 1.json is beside 1.jpg: "
            "say with --images where there are some, or learn from the teacher's masks with --labels teacher"
        )
    return count


def student_metadata(run: Run) -> dict[str, Any]:
    spec = run.config["store"]["spec"]
    kept = ("teacher", "checkpoint_sha256", "preprocessing", "store_id")
    return {
        **{name: spec[name] for name in kept},
        **({"init": run.config["init"]} if "init" in run.config else {}),
        "run": run.path.name,
        "run_id": run.id,
        "versions": run.config["versions"],
    }
