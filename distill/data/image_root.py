"""Images of a store: the folder that they lie in, and the check that this version preprocesses them alike."""

from __future__ import annotations

from pathlib import Path

from ...common.errors import DistillError, MobileSamError
from ...sam import preprocessing_recipe
from ...store import EmbeddingStore


def check_preprocessing(store: EmbeddingStore, *, refusal: type[MobileSamError] = DistillError) -> None:
    """Refuse a store whose embeddings belong to other pixels than this version makes of an image.

    Raises:
        refusal: the store's preprocessing recipe is not this version's.
    """
    if dict(store.spec.preprocessing) != preprocessing_recipe(store.spec.image_size):
        raise refusal(
            f"{store.path} was made with another preprocessing than this version's: precompute it again"
        )


def image_root(
    store: EmbeddingStore,
    asked: Path | None,
    last: Path | None = None,
    *,
    refusal: type[MobileSamError] = DistillError,
) -> Path | None:
    """Return the folder of the store's images, absolute; None if the images kept in the store are to be used.

    Args:
        store: names the folder that it was made from.
        asked: folder that the user gives; it goes before all others, kept images included.
        last: folder in which the images were last used, if one is known; it goes before the store's.
        refusal: exception class for a folder that doesn't exist.

    Raises:
        refusal: there is no such folder.
    """
    if asked is None and store.spec.kept_images is not None:
        return None
    root = asked or last or Path(store.spec.image_root)
    if not root.is_dir():
        raise refusal(f"the images of {store.path} are not at {root}; say where they are with --images DIR")
    return root.resolve()
