"""What a run writes while it trains: lines of metrics and TensorBoard's curves."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from .errors import DistillError
from .run import METRICS_FILE, decode_lines
from .sealed import encode_line


class Recorder:
    """Appends to metrics.jsonl and to TensorBoard's event file.

    `keep_bytes` of metrics.jsonl are kept, their checksums verified, and the rest cut off: what a killed session
    logged beyond the checkpoint that is gone on from will be logged again. TensorBoard hides its own such points from
    `next_step` on.
    """

    def __init__(self, folder: Path, *, keep_bytes: int, next_step: int) -> None:
        path = folder / METRICS_FILE
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        self._file.seek(0)
        kept = self._file.read(keep_bytes)
        try:
            if len(kept) < keep_bytes:
                raise DistillError(
                    f"{path} has {len(kept):,} bytes, {keep_bytes:,} at the checkpoint: put a whole copy back, "
                    "or give --restart to start over"
                )
            decode_lines(path, kept.removesuffix(b"\n").split(b"\n") if kept else [])
        except DistillError:
            self._file.close()
            raise
        self._file.truncate(keep_bytes)
        self._board = SummaryWriter(str(folder), purge_step=next_step)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.close()
        self._file.close()

    def line(self, kind: str, values: dict[str, Any]) -> None:
        """Appends one JSON object; a step's numbers also become points of curves."""
        self._file.write(encode_line({"kind": kind, **values}))
        self._file.flush()
        if "step" in values:
            self._points(kind, values, values["step"])

    def sync(self) -> int:
        """Makes the lines durable; the file's length in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def _points(self, prefix: str, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                self._points(f"{prefix}/{name}", value, step)
            elif isinstance(value, int | float) and name not in ("step", "epoch", "rows"):
                self._board.add_scalar(f"{prefix}/{name}", value, step)
