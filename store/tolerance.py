"""How far a stored embedding may lie from a fresh float32 run of the teacher on the same photo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .records import Audit


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limits for one row: `cosine` at least (over the 256 channels of a cell, mean over cells), `relative_mse` at
    most (against the fresh embedding's own mean per channel)."""

    cosine: float
    relative_mse: float

    def missed_by(self, audit: Audit) -> bool:
        """Whether the audit lies outside; NaN does."""
        return not (audit.cosine >= self.cosine and audit.relative_mse <= self.relative_mse)


TOLERANCES: Mapping[tuple[str, str], Tolerance] = MappingProxyType(
    {
        # The same arithmetic twice differs by the order of additions alone: other threads, batches, processors.
        ("float32", "float32"): Tolerance(cosine=0.99999, relative_mse=1e-5),
        # Rounding to 11 bits adds a relative error of about 1e-7 (2^-24 a value), less than the line above.
        ("float16", "float32"): Tolerance(cosine=0.99999, relative_mse=1e-5),
        # One scale an image and channel: 5e-5 to 8e-5 measured on SAM-like embeddings; six times that, since
        # real ones have heavier tails.
        ("int8", "float32"): Tolerance(cosine=0.9995, relative_mse=5e-4),
        # ViT-B in bfloat16 against float32: cosine 0.99994 measured; deeper teachers gather more error.
        ("float32", "bfloat16"): Tolerance(cosine=0.999, relative_mse=2e-3),
        ("float16", "bfloat16"): Tolerance(cosine=0.999, relative_mse=2e-3),
        ("int8", "bfloat16"): Tolerance(cosine=0.998, relative_mse=3e-3),
    }
)
"""By (dtype stored, precision of the arithmetic). An exchanged photo, a wrong channel order or another teacher's
weights lie far outside: cosines of unrelated photos stay below 0.9."""


def tolerance(dtype: str, precision: str) -> Tolerance:
    """The limits for a store of this dtype, computed in this precision (as resolved)."""
    return TOLERANCES[dtype, precision]
