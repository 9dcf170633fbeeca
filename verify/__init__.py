"""How near a student comes to its teacher: metrics against the store, thresholds, the report.

In the order of a run: config, subject (what is compared), compare, gates (thresholds), table (the terminal),
report with its gallery, pictures and charts. `verify` is loaded on first use, since it needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import VerifyConfig
from .errors import VerifyError
from .table import table_lines

if TYPE_CHECKING:
    from .compare import verify

__all__ = ["VerifyConfig", "VerifyError", "table_lines", "verify"]


def __getattr__(name: str) -> Any:
    if name != "verify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .compare import verify

    return verify
