"""Connection to an existing dask cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client
from distributed.comm import get_address_host_port

from .errors import MobileSamError

CONNECT_SECONDS = 30
"""Longest wait for a scheduler, and again for its first worker."""
DASK_CLIENT_LOG = logging.getLogger("distributed.client")


@contextmanager
def connected(address: str, error: type[MobileSamError]) -> Iterator[Client]:
    """Connect to a scheduler and wait for its first worker. dask's client log keeps its level after the context.

    Args:
        address: address of the scheduler, such as tcp://10.0.0.1:8786; the protocol may be left out.
        error: type of the error.

    Returns:
        Context manager of the connected client, which is closed when the context ends.

    Raises:
        MobileSamError: of the type `error`, when no scheduler answers or it has no workers.
    """
    try:
        get_address_host_port(address if "://" in address else f"tcp://{address}")
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as refused:
        raise error(
            f"no dask scheduler at {address} ({refused}): start one with `dask scheduler`, or leave out --scheduler"
        ) from refused
    level = DASK_CLIENT_LOG.level
    try:
        with client:
            try:
                client.wait_for_workers(1, timeout=CONNECT_SECONDS)
            except TimeoutError as late:
                raise error(
                    f"the scheduler at {address} has no workers after {CONNECT_SECONDS} s: start some with "
                    f"`dask worker {address}`"
                ) from late
            yield client
    finally:
        DASK_CLIENT_LOG.setLevel(level)
