"""Observer of a precompute run that keeps all messages and snapshots."""

from __future__ import annotations

from mobilesam.precompute import Snapshot


class Listener:
    """`messages` and `snapshots` in the order in which they came."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.snapshots: list[Snapshot] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def download(self, done: int, total: int) -> None: ...

    def progress(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)
