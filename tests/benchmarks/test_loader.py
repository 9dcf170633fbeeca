"""The loader's benchmark runs over every kind of store."""

from __future__ import annotations

import json

from click.testing import CliRunner

from benchmarks.loader import STORES, main


def test_it_compares_the_loader_with_its_parts_in_every_kind_of_store() -> None:
    small = ["--photos", "12", "--height", "60", "--image-size", "64", "--rounds", "1", "--threads", "2"]
    result = CliRunner().invoke(main, [*small, "--batch", "5", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [figure["what"].split(": ")[1] for figure in found["figures"]] == [
        f"{name}, 2 threads" for name in STORES
    ]
    assert all(figure["value"] > 0 for figure in found["figures"])
    assert len(found["notes"]) == 2 * len(STORES)
    assert all("images/s per core" in note for note in found["notes"][::2])
    assert all("computed from these, not measured" in note for note in found["notes"][1::2])
