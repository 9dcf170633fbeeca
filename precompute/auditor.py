"""The audit in the coordinator: which rows, what it found, and what that means."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distributed import KilledWorker

from ..sam import SamError, shown
from ..store import Audit, EmbeddingStore, RowResult, StoreError
from ..store.tolerance import tolerance
from . import sizing
from .audit import audit_rows
from .cluster import Cluster
from .errors import PrecomputeError
from .progress import Observer
from .tasks import AuditAnswer, AuditTask
from .watch import StopAsked, Watch


class Sample:
    """At most `size` of the done rows that it is shown, each with the same chance (reservoir sampling: Vitter 1985,
    algorithm R)."""

    def __init__(self, size: int) -> None:
        self.rows: list[int] = []
        self._size = size
        self._seen = 0
        self._random = random.Random()

    def show(self, results: Sequence[RowResult]) -> None:
        """Results of rows that were committed just now."""
        for result in results:
            if result.reason is not None:
                continue
            self._seen += 1
            if len(self.rows) < self._size:
                self.rows.append(result.row)
            elif (place := self._random.randrange(self._seen)) < self._size:
                self.rows[place] = result.row


def audit(
    store: EmbeddingStore,
    rows: Sequence[int],
    image_root: Path,
    image_timeout: float,
    cluster: Cluster,
    plugin_name: str,
    watch: Watch,
    observer: Observer,
) -> dict[str, Any] | None:
    """Have a worker embed the rows' images again in float32; record in the store, and tell, how near the stored rows
    are. Returns `rows, cosine_min, relative_mse_max, seconds`; None without rows, or when a signal came.

    Raises PrecomputeError when it can't be done, StoreDamaged when what is stored is not what was written.
    """
    if not rows:
        return None
    began = time.monotonic()
    observer.message(f"audit: embedding {len(rows)} of this run's images again, in float32")
    task = AuditTask(
        store=store.path.absolute(),
        image_root=image_root,
        rows=tuple(sorted(rows)),
        image_timeout=image_timeout,
        batch_timeout=sizing.batch_timeout(1, None),
    )
    try:
        answers = watch.result(cluster.client.submit(audit_rows, task, plugin_name, pure=False))
    except StopAsked:
        return None
    except (SamError, StoreError, PrecomputeError):
        raise
    except Exception as error:
        what = "its workers died" if isinstance(error, KilledWorker) else f"{type(error).__name__}: {error}"
        raise PrecomputeError(
            f"the audit could not be done ({what}); every image is committed, and --audit 0 leaves it out"
        ) from error
    return _report(store, answers, time.monotonic() - began, observer)


def _report(
    store: EmbeddingStore, answers: Sequence[AuditAnswer], seconds: float, observer: Observer
) -> dict[str, Any] | None:
    for answer in answers:
        if answer.audit is None:
            observer.message(f"not audited: {answer.reason}")
    audits = [answer.audit for answer in answers if answer.audit is not None]
    if not audits:
        return None
    store.record_audits(audits)
    cosine, relative_mse = min(a.cosine for a in audits), max(a.relative_mse for a in audits)
    observer.message(
        f"audit: {len(audits)} rows, cosine at least {_floor(cosine)}, relative mse at most {relative_mse:.1e}"
    )
    return {
        "rows": len(audits),
        "cosine_min": cosine,
        "relative_mse_max": relative_mse,
        "seconds": round(seconds, 3),
    }


def warn_of_audits(store: EmbeddingStore, observer: Observer) -> bool:
    """Tell of audited rows, of this run or an earlier one, that are out of tolerance; whether there are any."""
    missed = store.audits_out_of_tolerance()
    if not missed:
        return False
    worst: Audit = max(missed, key=lambda audit: audit.relative_mse)
    allowed = tolerance(store.spec.dtype, store.spec.precision)
    (record,) = store.records(None, range(worst.row, worst.row + 1))
    observer.message(
        f"WARNING: {len(missed)} audited row(s) of {store.path} are not what {store.spec.teacher} gives, the worst: "
        f"row {worst.row}, {shown(record.key)}: cosine {_floor(worst.cosine)} (at least {allowed.cosine:g} is "
        f"expected of {store.spec.dtype} from {store.spec.precision}), relative mse {worst.relative_mse:.1e} (at "
        f"most {allowed.relative_mse:g}).\nDon't distil from this store: look for other software or a faulty "
        "device on a worker, and precompute into a new one"
    )
    return True


def _floor(cosine: float) -> str:
    return f"{math.floor(cosine * 1e6) / 1e6:.6f}"
