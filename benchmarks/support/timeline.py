"""Timeline of a precompute run: when its teacher was busy, and when it waited."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from unittest.mock import patch

from mobilesam.precompute.messages import ShardResult, Span
from mobilesam.precompute.scheduler import RunTotals


@dataclass
class Spans:
    """Phases of all committed shards, and the time of each commit in seconds since the epoch."""

    by_shard: dict[int, tuple[Span, ...]] = field(default_factory=dict)
    commits: list[float] = field(default_factory=list)

    def add(self, result: ShardResult) -> None:
        """Add the phases of a committed shard."""
        self.by_shard[result.shard] = result.spans
        self.commits.append(time.time())

    def lines(self) -> list[str]:
        """Return, as text, how a run with one worker spent the time from its first batch to its last commit."""
        teacher = sorted(self._of("teacher"), key=lambda found: found[1].start)
        first, last = teacher[0][1].start, teacher[-1][1].stop
        busy = [span.stop - span.start for _, span in teacher]
        within, between = [], []
        for (shard, before), (other, after) in pairwise(teacher):
            (within if shard == other else between).append(after.start - before.stop)
        writing = sum(span.stop - span.start for _, span in self._of("write"))
        return [
            f"first batch to last commit: {max(self.commits) - first:.2f} s, of which the teacher was busy "
            f"{sum(busy):.2f} s in {len(busy)} batches (median {median(busy):.3f} s, first {busy[0]:.3f} s)",
            f"the teacher waited within shards {sum(within):.3f} s (longest {max(within, default=0):.3f} s), "
            f"between shards {sum(between):.3f} s (longest {max(between, default=0):.3f} s), and after the last "
            f"batch {max(self.commits) - last:.3f} s passed until the last commit; writing took {writing:.2f} s",
        ]

    def _of(self, phase: str) -> list[tuple[int, Span]]:
        return [
            (shard, span) for shard, spans in self.by_shard.items() for span in spans if span.phase == phase
        ]


@contextmanager
def watched_spans() -> Iterator[Spans]:
    """Record the phases of every shard that precompute commits in the context; its own result has only their sums."""
    spans, add = Spans(), RunTotals.add

    def watched(totals: RunTotals, result: ShardResult) -> None:
        add(totals, result)
        spans.add(result)

    with patch.object(RunTotals, "add", watched):
        yield spans
