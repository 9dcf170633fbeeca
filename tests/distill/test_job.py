from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mobilesam.distill import DistillConfig, distill

SIZES = [(40, 60), (64, 64), (60, 30), (20, 64), (64, 50), (33, 64)]


def small(store: Path, **options: object) -> DistillConfig:
    values = {"epochs": 2, "batch_size": 2, "device": "cpu", "precision": "float32", **options}
    return DistillConfig(store=store, **values)  # type: ignore[arg-type]


def test_a_run_reports_exactly_the_documented_keys(save_images: Callable, make_store: Callable) -> None:
    result = distill(small(make_store(save_images(SIZES))))
    assert list(result) == [
        "run",
        "epochs",
        "steps",
        "seconds",
        "images_per_second",
        "data_wait_share",
        "val",
    ]
    print(json.dumps(result, indent=1))
    print(sorted(p.name for p in Path(result["run"]).iterdir()))
    print((Path(result["run"])/"metrics.jsonl").read_text())
