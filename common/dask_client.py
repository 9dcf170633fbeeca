"""Connection to an existing dask cluster."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed import Client
from distributed.comm import get_address_host, get_address_host_port

from .errors import MobileSamError, shown

CONNECT_SECONDS = 30
"""Longest wait for the answer of a scheduler that can be reached, and again for its first worker."""
REACH_SECONDS = 3.0
"""Longest wait for a connection to a scheduler's port, which one that is still starting may refuse at first."""
DASK_CLIENT_LOG = logging.getLogger("distributed.client")


@contextmanager
def connected(address: str, error: type[MobileSamError]) -> Iterator[Client]:
    """Connect to a scheduler and wait for its first worker. dask's client log keeps its level after the context.

    Args:
        address: address of the scheduler, such as tcp://10.0.0.1:8786; the protocol may be left out. Or the JSON file
            that `dask scheduler --scheduler-file` writes.
        error: type of the error.

    Returns:
        Context manager of the connected client, which is closed when the context ends.

    Raises:
        MobileSamError: of the type `error`, when no scheduler answers or it has no workers.
    """
    if address.endswith(".json"):
        address = _address_in(Path(address), error)
    try:
        _check_reachable(address if "://" in address else f"tcp://{address}")
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


def _address_in(file: Path, error: type[MobileSamError]) -> str:
    """Return the address in a scheduler file. Raises an `error` if there is none."""
    try:
        address = json.loads(file.read_bytes())["address"]
    except OSError as missing:
        raise error(f"--scheduler {shown(str(file))} can't be read: {missing.strerror}") from missing
    except (ValueError, KeyError, TypeError):
        address = None
    if not isinstance(address, str):
        raise error(
            f"--scheduler {shown(str(file))} holds no scheduler's address: give the file that `dask scheduler "
            "--scheduler-file` writes, or an address such as tcp://10.0.0.1:8786"
        )
    return address


def _check_reachable(address: str) -> None:
    """Connect once to a scheduler's port, since dask itself tries for as long as it may wait for an answer.

    Raises OSError if nothing answers, ValueError if it is no address.
    """
    host, port = get_address_host_port(address)
    if address.split("://")[0] not in ("tcp", "tls", "ws", "wss"):
        return
    end = time.monotonic() + REACH_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=REACH_SECONDS).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


def dashboard_link(client: Client) -> str:
    """Return the address of the dashboard of a client's scheduler, for people: it never ends the work.

    The site's template is used if it can be filled in; it may name variables that only a notebook has.
    """
    scheduler = client.scheduler_info(n_workers=0)
    port = scheduler.get("services", {}).get("dashboard")
    if port is None:
        return "none"
    try:
        return str(client.dashboard_link)
    except (AttributeError, KeyError, IndexError, ValueError, TypeError):
        return f"http://{get_address_host(scheduler['address'])}:{port}/status"
