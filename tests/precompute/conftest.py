from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster
from listener import Listener
from one_process import one_process_cluster, precompute_small
from PIL import Image
from precompute_command import contents, run_command

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """Address of a cluster whose one worker lives in this process, so that there is no start-up to wait for."""
    with one_process_cluster() as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def own_cluster() -> Iterator[LocalCluster]:
    """Cluster that the test may take down."""
    with one_process_cluster() as cluster:
        yield cluster


@pytest.fixture
def listener() -> Listener:
    """Observer of one run, or several."""
    return Listener()


def cut_photos(folder: Path) -> Path:
    """Make a folder of seven small pictures, cut from the example photos."""
    folder.mkdir()
    for number, name in enumerate(["admiral", "astronaut", "coffee", "galaxies", "retina", "rocket"]):
        picture = Image.open(PHOTOS / f"{name}.jpg")
        picture.crop((0, 0, 120 + 10 * number, 160)).save(folder / f"{number}-{name}.png")
    shutil.copy(PHOTOS / "cat.png", folder / "6-cat.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven small pictures that the test may change."""
    return cut_photos(tmp_path / "photos")


@pytest.fixture(scope="session")
def shared_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Same pictures, for tests that don't change them."""
    return cut_photos(tmp_path_factory.mktemp("shared") / "photos")


@pytest.fixture(scope="session")
def undisturbed(shared_photos: Path) -> dict[str, bytes]:
    """Shard files of an undisturbed run of one local worker over the shared photos, in shards of one picture."""
    out = shared_photos.with_name("undisturbed.zarr")
    result = run_command(shared_photos, out, "--shard-size", "1")
    assert (result["images"], result["done"], result["done_before"]) == (7, 7, 0)
    assert (result["audit"]["rows"], result["out_of_tolerance"]) == (2, False)
    return contents(out)


@pytest.fixture
def run(
    scheduler: str, tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Function run(name, **options) that precomputes the photos at 64 pixels into a store under tmp_path."""

    def run_precompute(name: str = "store.zarr", **options: Any) -> dict[str, Any]:
        given = {"images": (photos,), "out": tmp_path / name, "scheduler": scheduler}
        return precompute_small(**(given | options))

    yield run_precompute
    # What goes wrong in an event handler, dask only logs.
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
