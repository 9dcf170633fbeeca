"""The scripts behind `make paper`: their control, their tables, and that they run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from photo_store import make_photo_store
from PIL import Image

from mobilesam.store import EmbeddingStore

ROOT = Path(__file__).parents[1]
LENGTHS = ((4, 2, 500), (8, 4, 500), (8, 8, 1000))


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """paper_tables and shuffled_store, found as their own scripts find them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import paper_tables
        import shuffled_store

        yield paper_tables, shuffled_store


def outcome(miou: float, seed: int, objective: str, batch: int, epochs: int, steps: int) -> dict[str, Any]:
    options = {"objective": objective, "batch_size": batch, "epochs": epochs, "seed": seed}
    return {
        "run": f"{options}",
        "options": options,
        "status": "done",
        "steps": steps,
        "seconds": 1800.0,
        "judged_seconds": 0.0,
        "images": {"train": 380, "val": 20},
        "test": {"miou": miou, "images": 60, "prompts": 16},
    }


def comparisons(lengths: list[list[float]], ways: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "scale": {"image_size": 256},
        "cores": 2,
        "lengths": [
            outcome(miou, seed, "decoupled", *length)
            for length, values in zip(LENGTHS, lengths, strict=True)
            for seed, miou in enumerate(values)
        ],
        "ways": [
            outcome(m, s, name, 8, 4, 500) for name, values in ways.items() for s, m in enumerate(values)
        ],
        "control": [{**outcome(0.25, 0, "decoupled", 8, 4, 500), "run": "control"}],
    }


def recipe() -> dict[str, Any]:
    costs = {"encoder_parameters": 5_740_000, "encoder_macs": 2.5e9, "encoder_ms": 21.0, "decoder_ms": 4.0}
    labels = {name: {"miou": 0.5} for name in ("box", "center", "center_picked", "center_oracle")}
    pairs = {f"pair_{distance}": {"miou": 0.71} for distance in (11, 23, 34, 46)}
    teacher = {"point": {"miou": 0.7512}, **pairs, "pair_57": None}
    return {
        "scale": {"image_size": 256, "distances": [11, 23, 34, 46, 57]},
        "cores": 2,
        "student": [outcome(0.75, 0, "decoupled", 8, 8, 5700)],
        "control": [outcome(0.27, 0, "decoupled", 8, 1, 713)],
        "evaluation": {
            "labelled": 60,
            "models": [
                {"name": "student", "teacher": teacher, "labels": labels, **costs},
                {"name": "vit_nano", "teacher": teacher, "labels": labels, **costs},
            ],
        },
    }


WAYS = {"decoupled": [0.5, 0.52], "coupled": [0.6, 0.62]}


def test_ours_stand_beside_the_papers(scripts: tuple[ModuleType, ModuleType]) -> None:
    lines = scripts[0].comparison_lines(comparisons([[0.4, 0.42], [0.5, 0.52], [0.6, 0.62]], WAYS))
    assert "| 4 / 2 / 50k | 0.7057 | 4 / 2 / 500 | 0.4100 ± 0.0141 | 0.4000 | 0.4200 |" in lines
    assert any(
        line.startswith("| coupled | 0.72 | batch 128") and "0.6100 ± 0.0141" in line for line in lines
    )
    assert "| embeddings of other pictures | 8 / 4 / 500 | 0.2500 | 0.2500 | 0.2500 |" in lines
    (own,) = [line for line in lines if line.startswith("| its own embeddings |")]
    assert own == "| its own embeddings | 8 / 4 / 500 | 0.5100 ± 0.0141 | 0.5000 | 0.5200 |"
    # Two runs appear among lengths and ways alike, and are counted once.
    assert "seeds 0, 1. 9 runs took 4.50 hours of training and evaluation on 2 cores" in lines[0]


def test_pairs_labels_and_cost_stand_beside_the_papers(scripts: tuple[ModuleType, ModuleType]) -> None:
    lines = scripts[0].recipe_lines(recipe())
    assert "seed 0. 2 runs took 1.00 hours" in lines[0]
    assert "| its own embeddings | 8 / 8 / 5,700 | 0.7500 | 0.7500 | 0.7500 |" in lines
    assert "| embeddings of other pictures | 8 / 1 / 713 | 0.2700 | 0.2700 | 0.2700 |" in lines
    assert "| MobileSAM, in the paper |  | 0.73 | 0.71 | 0.74 | 0.73 | 0.73 |" in lines
    assert "| our student | 0.7512 | 0.7100 | 0.7100 | 0.7100 | 0.7100 |  |" in lines
    assert any(
        line.endswith(
            "| 100 px, 11 here | 200 px, 23 here | 300 px, 34 here | 400 px, 46 here | 500 px, 57 here |"
        )
        for line in lines
    )
    assert "| vit_nano | 0.5000 | 0.5000 | 0.5000 | 0.5000 |" in lines
    assert "| our student | 5,740,000 | 2.5 G | 21.0 | 4.0 |" in lines
    assert not any(line.startswith("| vit_nano | 0.75") for line in lines)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ([0.40, 0.41], [0.50, 0.51], "the same order, at 14.1 standard errors"),
        ([0.50, 0.51], [0.40, 0.41], "the opposite order, at 14.1 standard errors"),
        ([0.40, 0.50], [0.42, 0.52], "too close to tell, the standard error being 0.0707"),
        ([0.40], [0.50], "one seed, so it may be chance"),
        ([0.40, 0.40], [0.50, 0.50], "the same order"),
    ],
)
def test_an_order_is_told_only_where_it_is_clear_of_the_spread(
    scripts: tuple[ModuleType, ModuleType], first: list[float], second: list[float], told: str
) -> None:
    lines = scripts[0].comparison_lines(comparisons([first, second, [0.9, 0.9]], WAYS))
    (line,) = [line for line in lines if line.startswith("- 8 / 4 / 500 against 4 / 2 / 500")]
    assert told in line


def test_each_parts_figures_go_between_its_markers(scripts: tuple[ModuleType, ModuleType]) -> None:
    tables = scripts[0]
    text = (ROOT / "docs" / "PAPER.md").read_text()
    found = {"comparisons": comparisons([[0.4], [0.5], [0.6]], WAYS), "recipe": recipe()}
    for part, results in found.items():
        once = tables.document(text, part, results)
        assert once.split(f"<!-- {part} -->")[0] == text.split(f"<!-- {part} -->")[0]
        assert once.split(f"<!-- /{part} -->")[1] == text.split(f"<!-- /{part} -->")[1]
        assert "\n".join(tables.PARTS[part](results)) in once
        assert tables.document(once, part, results) == once
        with pytest.raises(ValueError, match=f"needs the markers <!-- {part} -->"):
            tables.document("no markers", part, results)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_in_a_shuffled_store_every_image_has_another_ones_embedding(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path, dtype: str
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(7):
        Image.new("RGB", (64, 40 + number), (30 * number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    emb_NCHW = np.random.default_rng(0).standard_normal((7, 256, 4, 4), np.float32)
    head = {"mask_decoder.w": np.zeros(3, np.float32)}
    make_photo_store(
        tmp_path / "a.zarr", tmp_path / "photos", head=head, embeddings=emb_NCHW, dtype=dtype, failed=(2,)
    )
    scripts[1].shuffle_store(tmp_path / "a.zarr", tmp_path / "b.zarr", 0)
    with (
        EmbeddingStore.open(tmp_path / "a.zarr") as before,
        EmbeddingStore.open(tmp_path / "b.zarr") as after,
    ):
        olds, news = before.manifest.records("done"), after.manifest.records("done")
        assert [(old.key, old.sha256, old.resized_size) for old in olds] == [
            (new.key, new.sha256, new.resized_size) for new in news
        ]
        old_NCHW = before.read([record.row for record in olds]).to_float32()
        new_NCHW = after.read([record.row for record in news]).to_float32()
        taken = [int(np.abs(old_NCHW - new_CHW).sum(axis=(1, 2, 3)).argmin()) for new_CHW in new_NCHW]
        assert sorted(taken) == list(range(6))
        assert all(place != other for place, other in enumerate(taken))
        np.testing.assert_allclose(new_NCHW, old_NCHW[taken], atol=0.02)
        assert after.read_head() == before.read_head()
        assert after.spec.store_id != before.spec.store_id
    with pytest.raises(FileExistsError):
        scripts[1].shuffle_store(tmp_path / "a.zarr", tmp_path / "b.zarr", 0)


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_a_derangement_moves_everything(scripts: tuple[ModuleType, ModuleType], count: int) -> None:
    places = scripts[1].derangement(count, 5)
    assert sorted(places) == list(range(count))
    assert all(place != other for place, other in enumerate(places))


def test_one_image_cannot_change_places(scripts: tuple[ModuleType, ModuleType]) -> None:
    with pytest.raises(ValueError, match="give at least 2"):
        scripts[1].derangement(1, 0)


@pytest.mark.long
def test_the_small_scale_runs_goes_on_and_writes_the_document(tmp_path: Path) -> None:
    document = tmp_path / "PAPER.md"
    document.write_text((ROOT / "docs" / "PAPER.md").read_text())
    command = [sys.executable, str(ROOT / "examples" / "paper.py"), "--scale", "small", "--seeds", "0"]
    write = [*command, "--write-docs", "--document", str(document)]
    early = subprocess.run(write, cwd=tmp_path, capture_output=True, text=True)
    assert early.returncode == 1
    assert "paper-small has no results" in early.stderr
    for part in ("comparisons", "recipe"):
        first = subprocess.run([*command, "--part", part], cwd=tmp_path, capture_output=True, text=True)
        assert first.returncode == 0, first.stderr
        again = subprocess.run([*command, "--part", part], cwd=tmp_path, capture_output=True, text=True)
        assert again.stdout == first.stdout
        assert "epoch" not in again.stderr
        written = subprocess.run(write, cwd=tmp_path, capture_output=True, text=True)
        assert written.returncode == 0, written.stderr
        assert first.stdout.strip() in document.read_text()
    ways = json.loads((tmp_path / "paper-small" / "comparisons.json").read_text())["ways"]
    assert [run["options"]["objective"] for run in ways] == [
        "decoupled",
        "semi_coupled",
        "coupled",
        "decoder",
    ]
    other = subprocess.run([*command, "--pictures", "9"], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 1
    assert "pictures: 14 then, 9 now" in other.stderr
