"""The names of `distill/whole.py` that this room offers: its list of public names is of its own modules alone."""

from __future__ import annotations

from ..distill.whole import Model, load_model, load_teacher_model

__all__ = ["Model", "load_model", "load_teacher_model"]
