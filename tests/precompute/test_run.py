"""Whole runs on a cluster in this process: commits, refusals, failures, resumed and extended stores."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from listener import Listener
from PIL import Image

from mobilesam.precompute import PrecomputeConfig, PrecomputeError, open_store
from mobilesam.sam import SamError
from mobilesam.store import EmbeddingStore, StoreError, StoreLocked, StoreMismatch

Run = Callable[..., dict[str, Any]]


def _embeddings(path: Path) -> dict[str, bytes]:
    """Payload of every done image, by key."""
    with EmbeddingStore.open(path) as store:
        return {
            record.key: store.read([record.row]).values.tobytes() for record in store.manifest.records("done")
        }


def _shard_files(path: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_ino, file.read_bytes()) for file in (path / "embeddings").glob("c.*")}


def test_every_image_is_embedded_once(run: Run, tmp_path: Path, listener: Listener) -> None:
    result = run(observer=listener)
    assert (result["images"], result["done"], result["done_before"], result["failed"]) == (7, 7, 0, 0)
    assert result["images_per_second"] > 0
    assert 0 < result["teacher_share"] <= 1
    assert result["decode_seconds"] > 0
    assert listener.snapshots[-1].computed == 7
    assert any("teacher vit_nano at 64 px" in message for message in listener.messages)
    again = run()
    assert (again["done"], again["done_before"], again["images_per_second"]) == (7, 7, None)
    assert not list((tmp_path / "store.zarr").rglob("*.partial"))


def test_the_store_records_how_it_was_made(run: Run, tmp_path: Path, photos: Path) -> None:
    run(dtype="float32", fraction=0.9, seed=5)
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        spec = store.spec
        assert (spec.teacher, spec.image_size, spec.dtype) == ("vit_nano", 64, "float32")
        assert spec.precision in ("float32", "bfloat16")
        assert spec.subset == {"fraction": 0.9, "seed": 5}
        assert spec.image_root == str(photos)
        assert {"mobilesam", "torch", "zarr", "pillow"} <= spec.versions.keys()
        assert store.read_head()
        record = store.manifest.records()[0]
        file = photos / record.key
        assert record.bytes == file.stat().st_size
        assert record.original_size == Image.open(file).size[::-1]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_batches_and_shards_do_not_change_an_embedding(run: Run, tmp_path: Path, dtype: str) -> None:
    run("a.zarr", dtype=dtype, shard_size=3, batch_size=2)
    run("b.zarr", dtype=dtype, shard_size=7, batch_size=2)
    assert _embeddings(tmp_path / "a.zarr") == _embeddings(tmp_path / "b.zarr")


def test_a_broken_image_fails_alone_and_changes_no_other_embedding(
    run: Run, tmp_path: Path, photos: Path, listener: Listener
) -> None:
    run("whole.zarr", batch_size=3)
    whole = _embeddings(tmp_path / "whole.zarr")
    (photos / "1-astronaut.png").write_bytes(b"not a picture")
    result = run("broken.zarr", batch_size=3, observer=listener)
    assert (result["done"], result["failed"]) == (6, 1)
    assert any(message.startswith("failed: 1-astronaut.png: ") for message in listener.messages)
    del whole["1-astronaut.png"]
    assert _embeddings(tmp_path / "broken.zarr") == whole


def test_retry_failed_computes_only_shards_with_failures(run: Run, tmp_path: Path, photos: Path) -> None:
    run("undisturbed.zarr")
    good = (photos / "4-retina.png").read_bytes()
    (photos / "4-retina.png").write_bytes(b"")
    run()
    store = tmp_path / "store.zarr"
    before = _shard_files(store)
    assert run()["failed"] == 1, "a plain rerun leaves failed images alone"
    (photos / "4-retina.png").write_bytes(good)
    result = run(retry_failed=True)
    assert (result["done"], result["done_before"], result["failed"]) == (7, 4, 0)
    after = _shard_files(store)
    assert {name for name in after if after[name] != before[name]} == {"c.1.0.0.0"}
    assert _embeddings(store) == _embeddings(tmp_path / "undisturbed.zarr")


def test_extend_recomputes_only_the_short_last_shard(run: Run, tmp_path: Path, photos: Path) -> None:
    run("undisturbed.zarr")
    run(limit=5)
    store = tmp_path / "store.zarr"
    before = _shard_files(store)
    with pytest.raises(PrecomputeError, match=r"2 images are not in the store of 5 yet.*--extend"):
        run()
    result = run(extend=True)
    assert (result["images"], result["done"], result["done_before"]) == (7, 7, 3)
    after = _shard_files(store)
    assert after["c.0.0.0.0"] == before["c.0.0.0.0"]
    assert after.keys() == {"c.0.0.0.0", "c.1.0.0.0", "c.2.0.0.0"}
    assert _embeddings(store) == _embeddings(tmp_path / "undisturbed.zarr")


def test_new_files_are_appended_in_their_own_order(run: Run, tmp_path: Path, photos: Path) -> None:
    run()
    shutil.copy(photos / "6-cat.png", photos / "0-aaa.png")
    shutil.copy(photos / "6-cat.png", photos / "9-zzz.png")
    run(extend=True)
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        keys = [record.key for record in store.manifest.records(None)]
        assert keys[:7] == sorted(keys[:7])
        assert keys[7:] == ["0-aaa.png", "9-zzz.png"]
        assert store.manifest.counts().done == 9


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"teacher": "vit_h"}, "teacher: store 'vit_nano', asked 'vit_h'"),
        ({"image_size": 128}, "image_size: store 64, asked 128"),
        ({"dtype": "int8"}, "dtype: store 'float16', asked 'int8'"),
        ({"shard_size": 4}, "shard_size: store 3, asked 4"),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    run: Run, tmp_path: Path, options: dict[str, Any], difference: str
) -> None:
    run(limit=3)
    before = _shard_files(tmp_path / "store.zarr")
    with pytest.raises(StoreMismatch, match=difference):
        run(limit=3, **options)
    assert _shard_files(tmp_path / "store.zarr") == before


def test_a_store_of_the_embedded_teachers_former_weights_is_refused_with_the_mend(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(limit=3)
    before = _shard_files(tmp_path / "store.zarr")
    monkeypatch.setattr(open_store, "embedded_sha256", lambda: "f" * 64)
    mend = (
        r"other weights of vit_nano .* this package's \(f{16}\): .* another --out, or install the mobilesam"
    )
    with pytest.raises(StoreMismatch, match=mend):
        run(limit=5, extend=True)
    assert _shard_files(tmp_path / "store.zarr") == before
    monkeypatch.undo()
    assert run(limit=5, extend=True)["done"] == 5


def test_another_precision_is_refused_and_auto_means_the_stores(run: Run, tmp_path: Path) -> None:
    run(limit=3, precision="float32")
    with pytest.raises(StoreMismatch, match="precision: store 'float32', asked 'bfloat16'"):
        run(limit=3, precision="bfloat16")
    assert run(limit=4, extend=True, precision="auto")["done"] == 4


def test_settings_that_are_not_given_are_taken_from_the_store(run: Run) -> None:
    run(limit=3, dtype="int8")
    result = run(extend=True, teacher=None, image_size=None, shard_size=None)
    assert (result["done"], result["failed"]) == (7, 0)


def test_a_folder_without_images_is_refused_and_no_store_is_made(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SamError, match="no images in"):
        run(images=(tmp_path / "empty",))
    assert not (tmp_path / "store.zarr").exists()


def test_a_removed_image_is_named_and_nothing_is_lost(run: Run, tmp_path: Path, photos: Path) -> None:
    run()
    (photos / "6-cat.png").unlink()
    with pytest.raises(PrecomputeError, match=r"1 of the store's 7 images is gone .*6-cat\.png"):
        run()
    assert len(_embeddings(tmp_path / "store.zarr")) == 7


def test_a_second_run_on_the_same_store_is_refused(run: Run, tmp_path: Path) -> None:
    run(limit=3)
    with (
        EmbeddingStore.open(tmp_path / "store.zarr", writable=True),
        pytest.raises(StoreLocked, match="is writing to this store"),
    ):
        run(limit=3)


def test_a_store_is_extended_from_a_moved_folder_of_the_same_images(
    run: Run, tmp_path: Path, photos: Path
) -> None:
    run(limit=4)
    moved = tmp_path / "elsewhere"
    photos.rename(moved)
    assert run(images=(moved,), extend=True)["done"] == 7


def test_images_in_a_tar_give_the_same_embeddings(run: Run, tmp_path: Path, photos: Path) -> None:
    import tarfile

    run("folder.zarr")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for file in sorted(photos.iterdir()):
            tar.add(file, arcname=f"./{file.name}")
    run("tar.zarr", images=(tmp_path / "all.tar",))
    from_tar = {
        key.removeprefix("all.tar/"): data for key, data in _embeddings(tmp_path / "tar.zarr").items()
    }
    assert from_tar == _embeddings(tmp_path / "folder.zarr")


def test_pending_images_of_a_rewritten_tar_are_read_at_their_new_offsets(
    run: Run, tmp_path: Path, photos: Path
) -> None:
    import tarfile

    def write(names: list[str]) -> None:
        with tarfile.open(tmp_path / "all.tar", "w") as tar:
            for name in names:
                tar.add(photos / name, arcname=name)

    names = sorted(file.name for file in photos.iterdir())
    write(names)
    run("first.zarr", images=(tmp_path / "all.tar",))
    run(images=(tmp_path / "all.tar",))
    with EmbeddingStore.open(tmp_path / "store.zarr", writable=True) as store:
        store.withdraw([0, 1, 2])
    write(names[::-1])
    run(images=(tmp_path / "all.tar",))
    assert _embeddings(tmp_path / "store.zarr") == _embeddings(tmp_path / "first.zarr")


def test_int8_is_near_float32(run: Run, tmp_path: Path) -> None:
    run("exact.zarr", dtype="float32")
    run("int8.zarr", dtype="int8")
    with (
        EmbeddingStore.open(tmp_path / "exact.zarr") as exact,
        EmbeddingStore.open(tmp_path / "int8.zarr") as small,
    ):
        truth = exact.read(range(7)).to_float32().astype(np.float64)
        error = small.read(range(7)).to_float32() - truth
    assert (error**2).sum() / ((truth - truth.mean(axis=(0, 2, 3), keepdims=True)) ** 2).sum() < 2e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "--fraction 0.0"),
        ({"fraction": 1.5}, "--fraction 1.5"),
        ({"limit": 0}, "--limit 0"),
        ({"image_size": 100}, "--image-size 100"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16"),
        ({"shard_size": -1}, "--shard-size -1"),
        ({"shard_size": 10**9}, "--shard-size 1000000000 is more than 10000"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_value(
    run: Run, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PrecomputeError, match=message):
        run(**options)


def test_a_path_that_is_taken_is_refused_before_any_work(run: Run, tmp_path: Path, photos: Path) -> None:
    (tmp_path / "store.zarr").mkdir()
    (tmp_path / "store.zarr" / "precious").write_text("data")
    with pytest.raises(StoreError, match="exists and is no mobilesam store"):
        # Nothing was listed: these images don't exist.
        run(images=(tmp_path / "nowhere",))


def test_an_extension_by_another_process_between_plan_and_lock_is_refused(
    run: Run, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mobilesam.precompute.run as module

    run(limit=3)
    find_teacher = module.find_teacher

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(module, "find_teacher", find_teacher)
        run(limit=5, extend=True)
        return find_teacher(*arguments)

    monkeypatch.setattr(module, "find_teacher", overtaken)
    with pytest.raises(PrecomputeError, match=r"extended .* just now, from 3 to 5 images: run the same"):
        run(extend=True)
    assert run(extend=True)["done"] == 7


def test_a_store_of_an_unofficial_checkpoint_asks_for_its_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mobilesam.precompute.open_store as module

    run(limit=3)
    official = replace(module.TEACHERS["vit_nano"], checkpoint=module.TEACHERS["vit_b"].checkpoint)
    monkeypatch.setattr(module, "TEACHERS", {"vit_nano": official})
    monkeypatch.setattr(
        module, "find_checkpoint", lambda *_: pytest.fail("looked for it, perhaps downloaded")
    )
    with pytest.raises(PrecomputeError, match="not the official vit_nano: name it with --checkpoint"):
        run(limit=3)


def test_a_file_too_large_to_be_an_image_fails_alone(run: Run, photos: Path, listener: Listener) -> None:
    with (photos / "7-huge.jpg").open("wb") as file:
        file.truncate(1 << 42)
    result = run(observer=listener)
    assert (result["done"], result["failed"]) == (7, 1)
    assert any("7-huge.jpg: too large: 4,398,046,511,104 bytes" in message for message in listener.messages)


def test_a_run_whose_images_all_fail_ends_with_a_warning(run: Run, photos: Path, listener: Listener) -> None:
    for file in photos.iterdir():
        file.write_bytes(b"")
    # One shard: of several, any may be committed first.
    result = run(audit=2, shard_size=7, observer=listener)
    assert (result["images"], result["done"], result["failed"]) == (7, 0, 7)
    assert (result["audit"], result["out_of_tolerance"]) == (None, False)
    assert listener.messages[-1].startswith(
        "WARNING: none of this run's 7 images could be embedded; the first: 0-admiral.png: "
    )


def test_a_worker_without_memory_for_a_batch_ends_the_run_with_the_mend(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*_: object) -> None:
        raise MemoryError("array")

    monkeypatch.setattr("mobilesam.precompute.shard_task.embed", starved)
    with pytest.raises(PrecomputeError, match="no memory for 2 images at once: lower --batch-size"):
        run(batch_size=2)


def test_a_single_path_instead_of_a_tuple_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="images must be a tuple of paths"):
        PrecomputeConfig(images=photos, out=tmp_path / "store.zarr")


def test_a_performance_report_that_cannot_be_written_is_refused_before_the_work(
    run: Run, tmp_path: Path
) -> None:
    for place in (tmp_path, tmp_path / "missing" / "dask.html"):
        with pytest.raises(PrecomputeError, match="--performance-report takes a file"):
            run(performance_report=place)
    assert not (tmp_path / "store.zarr").exists()
