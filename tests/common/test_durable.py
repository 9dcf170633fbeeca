"""Durable files, and the operating system's errors in words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mobilesam.common.durable import explain_os_errors
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
