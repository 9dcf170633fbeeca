"""Jobs to disturb: what is there before, what is asked for, and what an undisturbed run leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.events import Trace, read_trace
from faults.recovery import Snapshot
from faults.scene import Scene, copy_tree, draw_pictures
from faults.tracing import RENAMES, Injection, Tracer
from faults.zygote import Process

from mobilesam.store import EmbeddingStore


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A precompute command on `photos` with `options`, begun on a copy of `template` (None: on nothing). With a
    `mutant` the coordinator lacks one of its safeguards; the rerun has it. With `repair`, the command is
    `mobilesam inspect --repair`."""

    name: str
    mutant: str | None = None
    repair: bool = False
    scene: Scene
    photos: Path
    options: tuple[str, ...]
    template: Path | None
    undisturbed: Snapshot

    @property
    def role(self) -> str:
        """Whose command it is."""
        return "inspector" if self.repair else "coordinator"

    def prepared(self) -> Path:
        """The store's path in a new folder, with what is there before."""
        return _prepared(self.scene, self.template)

    def start(self, store: Path, tracer: Callable[[int], object] | None = None) -> Process:
        """The command."""
        if self.repair:
            return self.scene.start_repair(store, store.with_name("stages"), tracer=tracer)
        return self.scene.start_precompute(
            store,
            store.with_name("stages"),
            *self.options,
            photos=self.photos,
            tracer=tracer,
            mutant=self.mutant,
        )

    def rerun(self, store: Path) -> None:
        """The same command to its end; AssertionError unless it goes well. What was repaired is computed again."""
        if self.repair:
            _repair(self.scene, store)
        self.scene.precompute(store, *self.options, photos=self.photos)


def scenarios(scene: Scene) -> dict[str, Callable[[], Scenario]]:
    """By name; each is made when it is asked for."""
    return {
        "new": lambda: _scenario("new", scene, None, ()),
        "new-int8": lambda: _scenario("new-int8", scene, None, ("--dtype", "int8")),
        "extend": lambda: _extend(scene),
        "retry": lambda: _retry(scene),
        "resume": lambda: _resume(scene),
        "repair": lambda: _damaged(scene),
    }


def _scenario(
    name: str, scene: Scene, template: Path | None, options: tuple[str, ...], photos: Path | None = None
) -> Scenario:
    photos = photos or scene.photos
    store = _prepared(scene, template)
    scene.precompute(store, *options, photos=photos)
    return Scenario(
        name=name,
        scene=scene,
        photos=photos,
        options=options,
        template=template,
        undisturbed=Snapshot.of(store),
    )


def _prepared(scene: Scene, template: Path | None) -> Path:
    store = scene.place() / "store.zarr"
    if template is not None:
        copy_tree(template, store)
    return store


def _extend(scene: Scene) -> Scenario:
    """Five images, the last shard short, become eight; two arrays, for int8, and the images kept."""
    store = _prepared(scene, None)
    options = ("--dtype", "int8", "--keep-images")
    scene.precompute(store, "--limit", "5", *options)
    return _scenario("extend", scene, store, ("--limit", "8", "--extend", *options))


def _retry(scene: Scene) -> Scenario:
    """Two broken files in different shards are there whole again."""
    photos = draw_pictures(scene.place() / "photos")
    whole = {name: (photos / name).read_bytes() for name in ("1.png", "6.png")}
    for name, data in whole.items():
        (photos / name).write_bytes(data[: len(data) // 2])
    store = _prepared(scene, None)
    scene.precompute(store, photos=photos)
    for name, data in whole.items():
        (photos / name).write_bytes(data)
    return _scenario("retry", scene, store, ("--retry-failed",), photos)


def _resume(scene: Scene) -> Scenario:
    """A coordinator died before its third shard was in place, with partial files of several attempts about."""
    store = _prepared(scene, None)
    scene.ensure_worker()
    trace = traced(scene, store, None)
    third = next(
        event for event in trace.events if event.call in RENAMES and event.path.endswith("c.2.0.0.0")
    )
    shutil.rmtree(store)
    traced(scene, store, Injection(third.call, third.ordinal))
    with EmbeddingStore.open(store) as opened:
        assert 0 < len(opened.manifest.committed_shards()) < 4
    (store / "embeddings" / "c.3.0.0.0.0123456789ab.partial").write_bytes(b"abandoned")
    (store / "zarr.json.01234567.partial").write_bytes(b"abandoned")
    return _scenario("resume", scene, store, ())


def _damaged(scene: Scene) -> Scenario:
    """One shard has a flipped bit, one is missing, an array's document is damaged, partial files lie about."""
    store = _prepared(scene, None)
    scene.precompute(store)
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
        scene=scene,
        photos=scene.photos,
        options=(),
        template=store,
        undisturbed=undisturbed,
    )


def _repair(scene: Scene, store: Path) -> None:
    process = scene.start_repair(store, scene.place() / "stages")
    code = scene.zygote.wait(process)
    assert code == 0, f"inspect --repair ended with {code}:\n{process.said()}"


def traced(scene: Scene, store: Path, injection: Injection | None) -> Trace:
    """A plain precompute under strace to its end, whatever that is."""
    stages, tracer = store.with_name("stages"), Tracer(store.with_name("log"), injection)
    scene.zygote.wait(scene.start_precompute(store, stages, tracer=tracer))
    tracer.end()
    return read_trace(tracer.log, stages)
