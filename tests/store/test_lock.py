"""The writer's lock: refused, released, inherited from the dead, seen without being taken."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from mobilesam.store import (
    EmbeddingStore,
    StoreLocked,
)
from mobilesam.store.layout import PRIVATE
from mobilesam.store.lock import WriterLock

HOLD_LOCK = """
import sys, time
from mobilesam.store import EmbeddingStore
store = EmbeddingStore.open(sys.argv[1], writable=True)
print("held", flush=True)
time.sleep(600)
"""
NewStore = Callable[..., EmbeddingStore]


def test_a_second_writer_is_refused_and_the_first_is_named(full_store: EmbeddingStore) -> None:
    with pytest.raises(StoreLocked, match=rf"process {os.getpid()} on "):
        EmbeddingStore.open(full_store.path, writable=True)


def test_readers_open_a_store_while_a_writer_holds_the_lock(full_store: EmbeddingStore) -> None:
    with EmbeddingStore.open(full_store.path) as reader:
        assert reader.manifest.counts().done == 8


def test_a_killed_writers_lock_is_released(full_store: EmbeddingStore) -> None:
    full_store.close()
    writer = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(full_store.path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "held\n"
    with pytest.raises(StoreLocked, match=f"process {writer.pid}"):
        EmbeddingStore.open(full_store.path, writable=True)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with EmbeddingStore.open(full_store.path, writable=True) as store:
        assert store.manifest.counts().done == 8


@pytest.mark.parametrize("left", [b'{"host": "here", "pid": 1}', b"", b"[]", b"\xff" * 9000])
def test_whatever_a_dead_owner_left_is_overwritten(full_store: EmbeddingStore, left: bytes) -> None:
    full_store.close()
    owner = full_store.path / PRIVATE / "writer.json"
    owner.write_bytes(left.replace(b"here", socket.gethostname().encode()))
    assert WriterLock(full_store.path / PRIVATE).live_owner() is None
    with EmbeddingStore.open(full_store.path, writable=True):
        mine = {"host": socket.gethostname(), "pid": os.getpid()}
        assert json.loads(owner.read_bytes()) == mine
        assert WriterLock(full_store.path / PRIVATE).live_owner() == mine
    assert not owner.exists()
    assert WriterLock(full_store.path / PRIVATE).live_owner() is None


def test_an_owner_of_another_host_counts_as_live_where_a_lock_need_not_reach_it(
    full_store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_store.close()
    (full_store.path / PRIVATE / "writer.json").write_text('{"host": "elsewhere", "pid": 7}')
    lock = WriterLock(full_store.path / PRIVATE)
    assert lock.live_owner() is None
    monkeypatch.setattr("mobilesam.store.lock._on_network", lambda path: True)
    assert lock.live_owner() == {"host": "elsewhere", "pid": 7}


def test_looking_for_a_writer_does_not_keep_one_from_starting(store: EmbeddingStore) -> None:
    from mobilesam.store.layout import PRIVATE
    from mobilesam.store.lock import WriterLock

    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            WriterLock(store.path / PRIVATE).live_owner()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(20):
            EmbeddingStore.open(store.path, writable=True).close()
    finally:
        stop.set()
        thread.join()
