"""The benchmark of whole precompute runs works, with the embedded teacher in ViT-B's place."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks.pipeline import main


# Each of the teacher's measurements and precompute's worker start a Python with torch.
@pytest.mark.long
def test_it_tells_how_near_precompute_comes_to_its_teacher_and_where_the_rest_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the processes that it starts
    small = ["--teacher", "vit_nano", "--photos", "4", "--rounds", "1", "--shard-size", "2", "--json"]
    result = CliRunner().invoke(main, [*small, "--height", "60", "--image-size", "64"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    share, loop = found["figures"]
    assert share["value"] > 0
    assert (loop["value"], loop["reached"]) == (None, None)
    notes = "\n".join(found["notes"])
    assert "in 4 batches" in notes
    assert "between shards" in notes
    assert "JPEG by Pillow, draft" in notes
