"""What can go wrong with a store; every message states the fact, the numbers and the mend."""

from __future__ import annotations

PUT_BACK = "put it back with mobilesam inspect STORE --repair"
TAKE_OUT = "take damaged shards out with mobilesam inspect STORE --repair, and compute them anew"
MAKE_ANEW = "put a whole copy of it back, or make the store anew in another place"
"""The mends of damage to documents, to shards, and to the manifest itself."""


class StoreError(Exception):
    """Base of every error that this room raises for its input or its surroundings."""


class StoreNotFound(StoreError):
    """There is no mobilesam store at the path."""


class StoreMismatch(StoreError):
    """The store was made with other settings than those asked for."""


class StoreLocked(StoreError):
    """Another live process writes to the store."""


class StoreDamaged(StoreError):
    """Bytes on disk are not those that were committed."""
