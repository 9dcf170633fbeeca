"""Finding the image that kills workers: halves of a shard are tried until single images are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distributed import Client, KilledWorker

from ..sam import shown
from .progress import Observer
from .shard import probe
from .tasks import ShardTask, TaskImage
from .watch import Watch

REASON = "a worker process died each time it processed this image"


class SuspectHunt:
    """Bisects shards under which workers keep dying."""

    def __init__(self, client: Client, plugin_name: str, watch: Watch, observer: Observer) -> None:
        self._client = client
        self._plugin_name = plugin_name
        self._watch = watch
        self._observer = observer

    def exclude_killers(self, task: ShardTask) -> ShardTask:
        """The same shard with every image excluded that kills workers on its own.

        When none does, the shard is returned as it is: its workers died of something else. StopAsked when a signal
        came.
        """
        images = [image for image in task.images if image.excluded is None]
        self._observer.message(
            f"workers died under shard {task.shard}: looking for the image among {len(images)}"
        )
        killers = set(self._search_halves(task, images))
        for image in killers:
            self._observer.message(f"excluded: {shown(image.key)}: {REASON}")
        return replace(
            task,
            images=tuple(
                replace(image, excluded=REASON) if image in killers else image for image in task.images
            ),
        )

    def _search(self, task: ShardTask, images: Sequence[TaskImage]) -> list[TaskImage]:
        """The killers among the images, by trying them together first."""
        if not images or self._survives(replace(task, images=tuple(images))):
            return []
        return list(images) if len(images) == 1 else self._search_halves(task, images)

    def _search_halves(self, task: ShardTask, images: Sequence[TaskImage]) -> list[TaskImage]:
        middle = len(images) // 2
        return self._search(task, images[:middle]) + self._search(task, images[middle:])

    def _survives(self, task: ShardTask) -> bool:
        try:
            return bool(self._watch.result(self._client.submit(probe, task, self._plugin_name, pure=False)))
        except KilledWorker:
            return False
