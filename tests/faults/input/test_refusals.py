"""Resuming with other settings: refused with the difference, the store unchanged byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.fault_log import FaultLog
from faults.fixtures import contents, mobilesam, refused
from faults.recovery import Snapshot, missing_rows, wrong_reads

from mobilesam.precompute import PrecomputeError
from mobilesam.sam import SamError
from mobilesam.sam.modeling.head_shapes import head_shapes
from mobilesam.sam.modeling.tiny_vit import TinyViT
from mobilesam.store import StoreError, StoreMismatch

pytestmark = pytest.mark.fault

Run = Callable[..., dict[str, Any]]


def refuse(
    run: Run,
    fault_log: FaultLog,
    store: Path,
    error: type[Exception],
    match: str,
    *,
    phase: str,
    **options: Any,
) -> None:
    """Assert that a run with changed options is an error that leaves the store unchanged."""
    before, undisturbed = contents(store), Snapshot.of(store)
    with pytest.raises(error, match=match) as caught:
        run(**options)
    after = contents(store)
    wrong, lost = wrong_reads(store, undisturbed), missing_rows(store, undisturbed)
    fault_log.record(
        call="refuse", ordinal=0, file="*", phase=phase, fired=True, lost=len(lost), wrong=len(wrong)
    )  # fmt: skip
    assert after == before
    assert not lost
    assert not wrong
    assert 1 <= len(str(caught.value).splitlines()) <= 2


def checkpoint(path: Path, seed: int) -> Path:
    """Write a mobile_sam checkpoint with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = {f"image_encoder.{key}": value for key, value in TinyViT(1024).state_dict().items()}
    torch.save(encoder | {key: torch.zeros(shape) for key, shape in head_shapes().items()}, path)
    return path


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"teacher": "vit_b"}, r"teacher: store 'vit_nano', asked 'vit_b'"),
        ({"image_size": 128}, r"image_size: store 64, asked 128"),
        ({"dtype": "int8"}, r"dtype: store 'float16', asked 'int8'"),
        ({"dtype": "float32"}, r"dtype: store 'float16', asked 'float32'"),
        ({"precision": "bfloat16"}, r"precision: store 'float32', asked 'bfloat16'"),
        ({"shard_size": 4}, r"shard_size: store 3, asked 4"),
    ],
)
@pytest.mark.parametrize("state", ["whole", "half done"])
def test_another_setting_is_refused(
    run: Run, fault_log: FaultLog, tmp_path: Path, options: dict[str, Any], difference: str, state: str
) -> None:
    from mobilesam.store import EmbeddingStore

    run(precision="float32")
    if state == "half done":
        with EmbeddingStore.open(tmp_path / "store.zarr", writable=True) as store:
            store.withdraw([1])
    wanted = {"precision": "float32"} | options
    refuse(
        run, fault_log, tmp_path / "store.zarr", StoreMismatch, difference,
        phase=f"{next(iter(options))}, {state}", **wanted,
    )  # fmt: skip
    assert run(precision="float32")["done"] == 7


def test_another_checkpoint_is_refused(run: Run, fault_log: FaultLog, tmp_path: Path) -> None:
    first, second = (checkpoint(tmp_path / f"{seed}.pt", seed) for seed in (1, 2))
    settings = {"teacher": "mobile_sam", "limit": 3}
    run(checkpoint=first, **settings)
    store = tmp_path / "store.zarr"
    refuse(
        run,
        fault_log,
        store,
        StoreMismatch,
        "checkpoint_sha256: store",
        phase="checkpoint",
        checkpoint=second,
        **settings,
    )
    # Also under the first one's name: the content is compared.
    shutil.copy(second, first)
    refuse(
        run, fault_log, store, StoreMismatch, "checkpoint_sha256: store", phase="checkpoint replaced",
        checkpoint=first, **settings,
    )  # fmt: skip
    refuse(
        run, fault_log, store, PrecomputeError, "not the official mobile_sam: name it with --checkpoint",
        phase="checkpoint left out", **settings,
    )  # fmt: skip


def test_another_preprocessing_is_refused(
    run: Run, fault_log: FaultLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilesam.precompute import open_store

    run()
    recipe = open_store.preprocessing_recipe(64)
    name, value = next((name, value) for name, value in recipe.items() if isinstance(value, str))
    with monkeypatch.context() as patch:
        patch.setattr(open_store, "preprocessing_recipe", lambda size: recipe | {name: f"not {value}"})
        refuse(
            run, fault_log, tmp_path / "store.zarr", StoreMismatch, f"preprocessing.{name}: store '{value}'",
            phase="preprocessing",
        )  # fmt: skip
    assert run()["done_before"] == 7


def test_removed_images_are_refused(run: Run, fault_log: FaultLog, tmp_path: Path, pictures: Path) -> None:
    run()
    (pictures / "3.png").rename(tmp_path / "aside.png")
    match = r"1 of the store's 7 images is gone .*3\.png"
    refuse(run, fault_log, tmp_path / "store.zarr", PrecomputeError, match, phase="image removed")
    assert run(extend=True)["done"] == 7  # which only adds: the row stays
    for file in pictures.iterdir():
        file.unlink()
    refuse(run, fault_log, tmp_path / "store.zarr", SamError, "no images in", phase="all images removed")
    pictures.rmdir()
    refuse(run, fault_log, tmp_path / "store.zarr", SamError, "no such folder", phase="folder removed")


def test_added_images_are_refused_without_extend(
    run: Run, fault_log: FaultLog, tmp_path: Path, pictures: Path
) -> None:
    run(limit=5)
    store = tmp_path / "store.zarr"
    refuse(
        run,
        fault_log,
        store,
        PrecomputeError,
        r"2 images are not in the store of 5 yet.*--extend",
        phase="images added",
    )
    # Also an image that sorts between others: rows are append-only.
    shutil.copy(pictures / "1.png", pictures / "0a.png")
    refuse(run, fault_log, store, PrecomputeError, "--extend", phase="image added before others", limit=6)
    assert run(extend=True)["done"] == 8


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"limit": 3}, "--limit 3 is fewer than the 7"),
        ({"fraction": 0.3}, "--fraction 0.3 --seed 0 leaves out"),
    ],
)
def test_fewer_images_than_the_store_has_are_refused(
    run: Run, fault_log: FaultLog, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    run()
    refuse(
        run,
        fault_log,
        tmp_path / "store.zarr",
        PrecomputeError,
        match,
        phase=f"less {next(iter(options))}",
        **options,
    )


def test_a_folder_that_is_no_store_is_refused_and_unchanged(
    run: Run, fault_log: FaultLog, tmp_path: Path
) -> None:
    """Nothing in the folder is changed."""
    place = tmp_path / "store.zarr"
    place.mkdir()
    (place / "precious.txt").write_text("mine")
    with pytest.raises(StoreError, match="exists and is no mobilesam store"):
        run()
    fault_log.record(call="refuse", ordinal=0, file="*", phase="place taken", fired=True, lost=0, wrong=0)
    assert contents(place) == {"precious.txt": b"mine"}


def test_the_command_line_refuses_with_exit_code_3(
    run: Run, fault_log: FaultLog, tmp_path: Path, pictures: Path
) -> None:
    store = tmp_path / "store.zarr"
    run(limit=5, precision="float32")
    before, undisturbed = contents(store), Snapshot.of(store)
    asked = ("precompute", "--images", pictures, "--out", store, "--json")
    for options, message in (
        (("--limit", "5", "--dtype", "int8"), "dtype: store 'float16', asked 'int8'"),
        (("--limit", "5", "--precision", "bfloat16"), "precision: store 'float32', asked 'bfloat16'"),
        ((), "2 images are not in the store of 5 yet"),
    ):
        refused(mobilesam(*asked, *options), message)
        wrong, lost = wrong_reads(store, undisturbed), missing_rows(store, undisturbed)
        fault_log.record(
            call="refuse",
            ordinal=0,
            file="*",
            phase="command line",
            fired=True,
            lost=len(lost),
            wrong=len(wrong),
        )
        assert contents(store) == before
