"""Scenarios of precompute and repair: start state, command, and result of an undisturbed run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.kills.cluster import FaultCluster, copy_tree, draw_pictures
from faults.kills.fork_server import Process
from faults.kills.strace import RENAMES, Injection, Tracer
from faults.kills.trace import Trace, read_trace
from faults.recovery import Snapshot

from mobilesam.store import EmbeddingStore


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Precompute of `photos` with `options` on a copy of the store `template`; None starts without a store.

    With a `mutation` the coordinator lacks a safeguard, which the rerun has. With `repair` the command is
    `mobilesam inspect --repair`.
    """

    name: str
    mutation: str | None = None
    repair: bool = False
    cluster: FaultCluster
    photos: Path
    options: tuple[str, ...]
    template: Path | None
    undisturbed: Snapshot

    @property
    def role(self) -> str:
        """Role of the command's process in the fault log."""
        return "inspector" if self.repair else "coordinator"

    def prepared(self) -> Path:
        """Set up the start state in a new folder and return the store's path."""
        return _prepared(self.cluster, self.template)

    def start(self, store: Path, tracer: Callable[[int], object] | None = None) -> Process:
        """Start the command; its stages go to the file `stages` beside the store."""
        if self.repair:
            return self.cluster.start_repair(store, store.with_name("stages"), tracer=tracer)
        return self.cluster.start_precompute(
            store,
            store.with_name("stages"),
            *self.options,
            photos=self.photos,
            tracer=tracer,
            mutation=self.mutation,
        )

    def rerun(self, store: Path) -> None:
        """Run the same command to its end and assert that it succeeds; compute again what a repair withdrew."""
        if self.repair:
            _repair(self.cluster, store)
        self.cluster.precompute(store, *self.options, photos=self.photos)


def scenarios(cluster: FaultCluster) -> dict[str, Callable[[], Scenario]]:
    """Return {name: function that makes the scenario}."""
    return {
        "new": lambda: _scenario("new", cluster, None, ()),
        "new-int8": lambda: _scenario("new-int8", cluster, None, ("--dtype", "int8")),
        "extend": lambda: _extend(cluster),
        "retry": lambda: _retry(cluster),
        "resume": lambda: _resume(cluster),
        "repair": lambda: _damaged(cluster),
    }


def _scenario(
    name: str,
    cluster: FaultCluster,
    template: Path | None,
    options: tuple[str, ...],
    photos: Path | None = None,
) -> Scenario:
    photos = photos or cluster.photos
    store = _prepared(cluster, template)
    cluster.precompute(store, *options, photos=photos)
    return Scenario(
        name=name,
        cluster=cluster,
        photos=photos,
        options=options,
        template=template,
        undisturbed=Snapshot.of(store),
    )


def _prepared(cluster: FaultCluster, template: Path | None) -> Path:
    store = cluster.new_folder() / "store.zarr"
    if template is not None:
        copy_tree(template, store)
    return store


def _extend(cluster: FaultCluster) -> Scenario:
    """Extend a store from five images (last shard short) to eight, in int8 (two arrays) with kept images."""
    store = _prepared(cluster, None)
    options = ("--dtype", "int8", "--keep-images")
    cluster.precompute(store, "--limit", "5", *options)
    return _scenario("extend", cluster, store, ("--limit", "8", "--extend", *options))


def _retry(cluster: FaultCluster) -> Scenario:
    """Retry two failed images of different shards, whose files are intact again."""
    photos = draw_pictures(cluster.new_folder() / "photos")
    intact = {name: (photos / name).read_bytes() for name in ("1.png", "6.png")}
    for name, data in intact.items():
        (photos / name).write_bytes(data[: len(data) // 2])
    store = _prepared(cluster, None)
    cluster.precompute(store, photos=photos)
    for name, data in intact.items():
        (photos / name).write_bytes(data)
    return _scenario("retry", cluster, store, ("--retry-failed",), photos)


def _resume(cluster: FaultCluster) -> Scenario:
    """Resume after a coordinator was killed before its third shard was in place, with partial files left over."""
    store = _prepared(cluster, None)
    cluster.ensure_worker()
    trace = traced(cluster, store, None)
    third = next(
        event for event in trace.events if event.call in RENAMES and event.path.endswith("c.2.0.0.0")
    )
    shutil.rmtree(store)
    traced(cluster, store, Injection(third.call, third.ordinal))
    with EmbeddingStore.open(store) as opened:
        assert 0 < len(opened.manifest.committed_shards()) < 4
    (store / "embeddings" / "c.3.0.0.0.0123456789ab.partial").write_bytes(b"abandoned")
    (store / "zarr.json.01234567.partial").write_bytes(b"abandoned")
    return _scenario("resume", cluster, store, ())


def _damaged(cluster: FaultCluster) -> Scenario:
    """Repair a flipped bit, a missing shard, a damaged zarr.json and a left-over partial file."""
    store = _prepared(cluster, None)
    cluster.precompute(store)
    undisturbed = Snapshot.of(store)
    embeddings = store / "embeddings"
    flipped = bytearray((embeddings / "c.1.0.0.0").read_bytes())
    flipped[100] ^= 1
    (embeddings / "c.1.0.0.0").write_bytes(flipped)
    (embeddings / "c.2.0.0.0").unlink()
    (embeddings / "zarr.json").write_bytes(b"{}")
    (embeddings / "c.3.0.0.0.0123456789ab.partial").write_bytes(b"abandoned")
    return Scenario(
        name="repair",
        repair=True,
        cluster=cluster,
        photos=cluster.photos,
        options=(),
        template=store,
        undisturbed=undisturbed,
    )


def _repair(cluster: FaultCluster, store: Path) -> None:
    process = cluster.start_repair(store, cluster.new_folder() / "stages")
    code = cluster.fork_server.wait(process)
    assert code == 0, f"inspect --repair ended with {code}:\n{process.printed()}"


def traced(cluster: FaultCluster, store: Path, injection: Injection | None) -> Trace:
    """Run a plain precompute under strace to its end, with an injection or none, and return the trace."""
    stages, tracer = store.with_name("stages"), Tracer(store.with_name("log"), injection)
    cluster.fork_server.wait(cluster.start_precompute(store, stages, tracer=tracer))
    tracer.end()
    return read_trace(tracer.log, stages)
