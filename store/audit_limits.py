"""Audit limits: how far a stored embedding may lie from a fresh float32 run of the teacher on the same photo."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from .records import Audit


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limits of the audit of one row."""

    cosine: float
    """Least cosine over the 256 channels of a cell, mean over cells."""
    relative_mse: float
    """Largest squared error relative to the fresh embedding's variance about its mean per channel."""

    def missed_by(self, audit: Audit) -> bool:
        """Return True if the audit lies outside the limits; NaN does."""
        return not (audit.cosine >= self.cosine and audit.relative_mse <= self.relative_mse)


TOLERANCES: Mapping[tuple[str, str], Tolerance] = MappingProxyType(
    {
        ("float32", "float32"): Tolerance(cosine=0.99999, relative_mse=3e-5),
        ("float16", "float32"): Tolerance(cosine=0.99999, relative_mse=3e-5),
        ("int8", "float32"): Tolerance(cosine=0.9998, relative_mse=5e-3),
        ("float32", "bfloat16"): Tolerance(cosine=0.9995, relative_mse=2e-2),
        ("float16", "bfloat16"): Tolerance(cosine=0.9995, relative_mse=2e-2),
        ("int8", "bfloat16"): Tolerance(cosine=0.9995, relative_mse=2e-2),
    }
)
"""Limits by (dtype stored, precision of the arithmetic).

Largest differences measured with vit_nano on a CPU, between batches of 3 in two threads and single images in one
thread: 9 example photos at 256 pixels, 4 at 1024 (bfloat16 at 256 only). The last column is a plain white image, the
worst case of relative_mse, since its embedding varies little from cell to cell:

| stored, computed in | 1 - cosine | relative_mse | relative_mse of the white image |
|---|---|---|---|
| float32, float32 | 0 | 0 | 0 |
| float16, float32 | 2.2e-8 | 2.4e-7 | 2.7e-6 |
| int8, float32 | 1.9e-5 | 1.0e-4 | 5.2e-4 |
| float16, bfloat16 | 2.5e-5 | 2.9e-4 | 2.3e-3 |
| int8, bfloat16 | 3.4e-5 | 3.9e-4 | 2.8e-3 |

The limits are about ten times the worst value, to leave room for deeper teachers (ViT-B in bfloat16: 1 - cosine
6e-5), other processors, other orders of addition. Errors that they detect, by the same measurements (in brackets the
cosine of the photo whose embedding changes least): in every store a wrong photo (0.29), red and blue swapped (0.987),
a mean off by 0.1 in the normalisation (0.997), two channels of 256 swapped (0.9992); in float32 and float16 stores
computed in float32 also weights off by 2% (0.9998) and noise of 1% (0.99995).
"""


def tolerance(dtype: str, precision: str) -> Tolerance:
    """Return the audit limits of a store.

    Args:
        dtype: type of the stored embeddings, one of `DTYPES`.
        precision: precision that the teacher computed in, one of `PRECISIONS`; never "auto".

    Raises:
        KeyError: another dtype or precision.
    """
    return TOLERANCES[dtype, precision]


def audit_summary(audits: Sequence[Audit], limits: Tolerance) -> dict[str, Any] | None:
    """Summarise audits as plain JSON values.

    Args:
        audits: audits of one store.
        limits: tolerance of that store.

    Returns:
        `rows` audited, `cosine_min`, `relative_mse_max`, and the limits as `tolerance`; None without audits. The
        minimum or maximum is None if an audit is not finite, since JSON has no NaN.
    """
    if not audits:
        return None
    cosines = [audit.cosine for audit in audits]
    errors = [audit.relative_mse for audit in audits]
    return {
        "rows": len(audits),
        "cosine_min": min(cosines) if all(map(math.isfinite, cosines)) else None,
        "relative_mse_max": max(errors) if all(map(math.isfinite, errors)) else None,
        "tolerance": asdict(limits),
    }
