from __future__ import annotations

from pathlib import Path

import pytest
from random_student import ToyEncoder, save_random_student

from mobilesam.distill import STUDENTS
from mobilesam.distill.students.registry import StudentInfo
from mobilesam.predict.export import bundle
from mobilesam.predict.export import run as exporter
from mobilesam.predict.export.onnx_graph import OnnxFile


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student that upstream has no class for."""
    info = StudentInfo(name="toy", summary="one convolution", build=ToyEncoder)
    monkeypatch.setattr("mobilesam.distill.students.registry.STUDENTS", {**STUDENTS, "toy": info})
    return save_random_student(tmp_path / "toy.safetensors", "toy")


@pytest.fixture
def _quick_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX files are made and checked in tests of their own; here it matters where they go."""
    data = b"\x08\x0aonnx"  # it begins as every ONNX file does
    made = OnnxFile(data=data, max_relative_difference=1e-6, limit=1e-4)
    for name in ("export_encoder", "export_decoder"):
        monkeypatch.setattr(bundle, name, lambda *_: made)
        monkeypatch.setattr(exporter, name, lambda *_: made)
