"""Where the numbers come from: what the report says of student, teacher, store and comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import __version__
from .audit import store_audit
from .subject import Subject
from .table import number

Pairs = list[tuple[str, str]]


def provenance(subject: Subject, split: str) -> dict[str, Pairs]:
    """Heading -> (name, value) pairs, for the report."""
    return {
        "Student": _student(subject),
        "Teacher": _teacher(subject),
        "Store": _store(subject),
        "This comparison": _comparison(subject, split),
    }


def _student(subject: Subject) -> Pairs:
    info, run = subject.info, subject.run
    parameters = sum(parameter.numel() for parameter in subject.student.parameters())
    pairs = [
        ("encoder", str(info["student"])),
        ("parameters", f"{parameters:,}"),
        ("file", str(subject.file)),
    ]
    if "epoch" in info:
        pairs.append(("trained for", f"{info['epoch']} epochs, {info['step']:,} steps"))
    if run is not None:
        options, resolved = run.config["config"], run.config["resolved"]
        pairs += [
            ("run", run.path.name),
            ("learning rate", f"{options['lr']:g}, weight decay {options['weight_decay']:g}"),
            ("batch size", f"{options['batch_size']}, loss over {options['loss_region']} cells"),
            ("seed", str(options["seed"])),
            ("rows", f"{len(run.split.train):,} training, {len(run.split.val):,} validation"),
            ("trained in", f"{resolved['precision']} on {resolved['device']}"),
        ]
    return [*pairs, ("written by", _versions(info.get("versions", {})))]


def _teacher(subject: Subject) -> Pairs:
    spec = subject.store.spec
    return [
        ("encoder", spec.teacher),
        ("checkpoint", spec.checkpoint or "in the package"),
        ("SHA-256", spec.checkpoint_sha256),
        ("computed in", spec.precision),
    ]


def _store(subject: Subject) -> Pairs:
    spec, counts = subject.store.spec, subject.store.counts()
    return [
        ("path", str(subject.store.path.absolute())),
        ("id", spec.store_id),
        ("embeddings", f"256 x {spec.grid} x {spec.grid} {spec.dtype}, images of {spec.image_size} pixels"),
        ("rows", f"{counts.done:,} done, {counts.failed:,} failed, {counts.pending:,} pending"),
        ("audit", _audit(store_audit(subject.store))),
        ("subset", f"fraction {spec.subset['fraction']:g}, seed {spec.subset['seed']}"),
        ("images", str(subject.image_root or f"kept in the store as {spec.kept_images}")),
        ("written by", _versions(spec.versions)),
    ]


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return "no row was embedded again"
    return (
        f"{audit['rows']:,} row(s) embedded again in float32: cosine at least {number(audit['cosine_min'], '.6f')}, "
        f"relative mse at most {number(audit['relative_mse_max'], '.2g')}"
    )


def _comparison(subject: Subject, split: str) -> Pairs:
    return [
        ("split", f"{split}: {len(subject.rows):,} images"),
        ("computed in", f"{subject.precision} on {subject.device}; metrics in float64"),
        ("skill against", f"the mean embedding of {subject.mean_source}"),
        ("computed by", _versions({"mobilesam": __version__, "torch": torch.__version__})),
    ]


def _versions(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in dict(versions).items()) or "unknown"
