"""Whether the images of a store can be used here, and where they are."""

from __future__ import annotations

from pathlib import Path

from ...common.errors import DistillError
from ...sam import preprocessing_recipe
from ...store import EmbeddingStore


def check_preprocessing(store: EmbeddingStore, *, refusal: type[Exception] = DistillError) -> None:
    """Raises `refusal` where the stored embeddings are of other pixels than this version makes of an image."""
    if dict(store.spec.preprocessing) != preprocessing_recipe(store.spec.image_size):
        raise refusal(
            f"{store.path} was made with another preprocessing than this version's: precompute it again"
        )


def image_root(
    store: EmbeddingStore,
    asked: Path | None,
    last: Path | None = None,
    *,
    refusal: type[Exception] = DistillError,
) -> Path | None:
    """The folder of the images, absolute; None for those that the store keeps.

    `asked` is where a user says that they are, `last` where they were when they were last used, if that is known
    better than by the store. Raises `refusal` where there is no such folder.
    """
    if asked is None and store.spec.kept_images is not None:
        return None
    root = asked or last or Path(store.spec.image_root)
    if not root.is_dir():
        raise refusal(f"the images of {store.path} are not at {root}; say where they are with --images DIR")
    return root.resolve()
