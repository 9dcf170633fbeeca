"""The models that this room uses, under its own name; `distill/whole.py` opens them."""

from __future__ import annotations

from ..distill.whole import Model, load_model, load_teacher_model

__all__ = ["Model", "load_model", "load_teacher_model"]
