"""Durable files, and the operating system's errors in words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mobilesam.common.durable import explain_os_errors, final_name, write_atomic
from mobilesam.store import StoreError


@pytest.mark.parametrize(
    ("number", "mend"),
    [
        (errno.EIO, "the disk is failing: check it"),
        (errno.ENOSPC, "free some room"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_an_error_of_the_operating_system_names_its_mend(tmp_path: Path, number: int, mend: str) -> None:
    with pytest.raises(StoreError, match=mend) as caught, explain_os_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("s/c.0.0.0.0.0a1b2c.partial", "s/c.0.0.0.0"),
        ("s/0.tar.0a1b2c.partial", "s/0.tar"),
        ("masks/.0a1b2c3d.partial", "masks"),
        ("r/.page.html.77.partial", "r/page.html"),
        ("new.zarr.0a1b2c3d.partial/embeddings/manifest.sqlite", "new.zarr/embeddings/manifest.sqlite"),
        ("mine.partial", "mine.partial"),
        ("plain.jpg", "plain.jpg"),
    ],
)
def test_a_hidden_draft_is_named_as_the_file_that_it_will_be(written: str, meant: str) -> None:
    assert final_name(written) == meant
    with pytest.raises(StoreError, match=f"^{meant}: "), explain_os_errors(Path("elsewhere")):
        raise OSError(errno.ENOSPC, "No space left on device", written)


def test_a_file_that_can_not_be_written_is_named_and_not_its_draft(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone/x\.json'$"):
        write_atomic(tmp_path / "gone" / "x.json", b"")
