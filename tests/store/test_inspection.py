"""Output of `inspect`: description, lines, and the command that resumes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_store import EVERYTHING, HEAD, compute, embeddings, images, make_spec
from store_damage import flip_byte, shard_file

from mobilesam.store import (
    EmbeddingStore,
    ImageRef,
    Selection,
    StoreDamaged,
    StoreNotFound,
)
from mobilesam.store.inspection import inspect_store, inspection_lines
from mobilesam.store.layout import MANIFEST

NewStore = Callable[..., EmbeddingStore]


def test_a_whole_store_is_described_and_whole(store: EmbeddingStore) -> None:
    result = inspect_store(store.path, check=True)
    files = [path for path in store.path.rglob("*") if path.is_file()]
    assert result["rows"] == {"done": 7, "pending": 0, "failed": 1}
    assert result["shards"] == {"committed": 3, "all": 3}
    assert result["bytes"] == sum(path.stat().st_size for path in files)
    assert (result["teacher"], result["dtype"], result["image_size"]) == ("vit_nano", "int8", 64)
    assert result["subset"] == {"fraction": 1.0, "seed": 0, "limit": None}
    assert result["checked"]
    assert result["problems"] == []
    assert result["audit"] is result["writer"] is result["repaired"] is result["command"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert inspection_lines(result)[-1] == "check         whole"


def test_checking_and_describing_change_nothing(store: EmbeddingStore) -> None:
    def state() -> dict[str, tuple[int, int, bytes]]:
        return {
            str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(store.path.rglob("*"))
            if path.is_file()
        }

    flip_byte(shard_file(store, 0), 0)
    (store.path / "embeddings" / "c.9.0.0.0").write_bytes(b"x")
    before = state()
    inspect_store(store.path)
    inspect_store(store.path, check=True)
    assert state() == before


def test_no_store_a_foreign_manifest_and_a_lost_one_are_errors(new_store: NewStore, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        inspect_store(tmp_path / "none.zarr")
    store, other = new_store("a.zarr"), new_store("b.zarr")
    shutil.copy(other.path / MANIFEST, store.path / MANIFEST)
    with pytest.raises(StoreDamaged, match="belongs to store"):
        inspect_store(store.path)
    (store.path / MANIFEST).unlink()
    with pytest.raises(StoreDamaged, match=r"manifest\.sqlite is missing"):
        inspect_store(store.path)


def test_the_command_repeats_what_was_asked_for_in_words_that_a_shell_gives_back(tmp_path: Path) -> None:
    sources = ("/my photos/it's", os.fsdecode(b"/caf\xe9\n"), "/日本")
    selection = Selection(fraction=0.25, seed=7, limit=8, sources=sources, checkpoint="/w/sam b.pth")
    path = tmp_path / "my store.zarr"
    EmbeddingStore.create(path, make_spec(), images(), selection, HEAD).close()
    result = inspect_store(path)
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {result['command']}"], capture_output=True, check=True
    ).stdout.split(b"\0")[:-1]
    assert [os.fsdecode(word) for word in words] == [
        "mobilesam", "precompute", "--images", *sources, "--out", str(path), "--teacher", "vit_nano",
        "--checkpoint", "/w/sam b.pth", "--fraction", "0.25", "--seed", "7", "--limit", "8",
    ]  # fmt: skip
    assert json.loads(json.dumps(result)) == result


def test_names_that_cant_be_printed_are_escaped_in_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    new = [ImageRef(key=os.fsdecode(b"caf\xe9\n.jpg"), size=100)]
    with EmbeddingStore.create(path, make_spec(), new, EVERYTHING, HEAD) as store:
        compute(store, embeddings())
        flip_byte(shard_file(store, 0), 0)
    (line,) = (
        line for line in inspection_lines(inspect_store(path, check=True)) if line.startswith("problem")
    )
    assert r"caf\udce9\n.jpg" in line
    assert line.isprintable()


def test_a_plain_inspection_imports_nothing_heavy(store: EmbeddingStore) -> None:
    script = (
        "import sys\n"
        "from mobilesam.store.inspection import inspect_store\n"
        "from mobilesam.store.inspection import inspection_lines\n"
        "inspection_lines(inspect_store(sys.argv[1]))\n"
        "print(sorted({'torch', 'zarr', 'dask', 'safetensors', 'distributed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(store.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
