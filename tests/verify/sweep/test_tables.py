from __future__ import annotations

from typing import Any

from mobilesam.verify.sweep.tables import caption, failure_lines, sweep_tables


def outcome(miou: float | None, seed: int = 0, test: float | None = None, **options: Any) -> dict[str, Any]:
    numbers = {"miou": miou, "skill_valid": 0.5, "cosine_valid": {"mean": 0.9}, "prompts": 16, "images": 7}
    shared = {"student": "tiny_vit", "objective": "decoupled", "batch_size": 8, "epochs": 4}
    return {
        "name": f"{seed}-{options}",
        "options": {**shared, **options, "seed": seed},
        "status": "done",
        "steps": 1200,
        "seconds": 60.0 + seed,
        "images": {"train": 90, "val": 10},
        "val": numbers,
        "judged": {"test_store": None if test is None else "/data/held-out.zarr"},
        **({} if test is None else {"test": {**numbers, "miou": test, "images": 30}}),
    }


def test_the_table_of_lengths_has_a_row_for_each_batch_and_number_of_epochs() -> None:
    runs = [
        outcome(0.1 * b + 0.01 * s, s, batch_size=b, epochs=e) for s in (0, 1) for b in (8, 4) for e in (2, 1)
    ]
    (table,) = sweep_tables(runs)
    assert list(table.columns[:5]) == ["batch", "epochs", "iterations", "seeds", "mIoU"]
    assert [tuple(row[:2]) for row in table.rows] == [("4", "1"), ("4", "2"), ("8", "1"), ("8", "2")]
    assert table.rows[0][2:7] == ["1,200", "2", "0.4050 ± 0.0071", "0.4000", "0.4100"]


def test_the_table_of_objectives_is_there_when_there_are_several() -> None:
    table = sweep_tables([outcome(0.7), outcome(0.6, objective="coupled"), outcome(0.8, 1)])[1]
    assert list(table.columns) == [
        "objective",
        "mIoU",
        "batch",
        "iterations",
        "images",
        "epochs",
        "seeds",
        "seconds",
    ]
    assert table.rows[0] == ["decoupled", "0.7500 ± 0.0707", "8", "1,200", "90", "4", "2", "60 ± 1"]
    assert table.rows[1][:2] == ["coupled", "0.6000"]


def test_the_test_stores_numbers_count_where_there_are_any() -> None:
    runs = [outcome(0.7, test=0.4), outcome(0.8, 1, test=0.5)]
    assert sweep_tables(runs)[0].rows[0][4].startswith("0.4500")
    assert caption(runs) == "mIoU with the teacher's masks, 16 points an image, 30 images of held-out.zarr"


def test_an_undefined_number_is_a_dash() -> None:
    assert sweep_tables([outcome(None)])[0].rows[0][4:7] == ["-", "-", "-"]


def test_the_lines_and_the_markdown_have_the_same_cells() -> None:
    (table,) = sweep_tables([outcome(0.7), outcome(0.8, lr=0.5)])
    for row, line, marked in zip(table.rows, table.lines()[2:], table.markdown()[4:], strict=True):
        assert line.split() == " ".join(row).split()
        assert [cell.strip() for cell in marked.strip("|").split("|")] == list(row)


def test_nothing_done_has_no_table_and_failures_are_one_line_each() -> None:
    broken = {"name": "a", "status": "failed", "error": "no\nroom"}
    assert sweep_tables([broken]) == []
    assert failure_lines([broken]) == ["FAILED  a: no room"]
    assert caption([broken]) == "nothing was measured"


def test_the_caption_counts_students_that_are_no_better_than_a_constant() -> None:
    constant = {"no_better_than_constant": True, "too_few_steps": True}
    runs = [outcome(0.3) | constant, outcome(0.2, 1) | constant | {"too_few_steps": False}, outcome(0.7, 2)]
    assert caption(runs).endswith(
        "7 held-out images; 2 of 3 students no better than a constant on their training rows; 1 of them had too few "
        "steps, and --epochs auto takes enough"
    )
    assert caption(runs[1:]).endswith("; 1 of 2 students no better than a constant on their training rows")


def test_seeds_whose_number_is_undefined_are_counted() -> None:
    (table,) = sweep_tables([outcome(0.3, 0), outcome(None, 1)])
    assert table.rows[0][3:5] == ["2, 1 undefined", "0.3000"]


def test_files_of_one_name_are_counted_apart_by_more_of_their_paths() -> None:
    paths = ["/runs/a/student.safetensors", "/runs/b/student.safetensors", "/x.pt", None]
    (table,) = sweep_tables([outcome(0.3, init=path) for path in paths])
    assert [row[0] for row in table.rows] == [
        "a/student.safetensors",
        "b/student.safetensors",
        "x.pt",
        "none",
    ]


def test_a_run_that_fails_in_a_later_sweep_keeps_its_numbers() -> None:
    kept = outcome(0.3) | {"error": "its photos are away"}
    assert sweep_tables([kept]) == sweep_tables([outcome(0.3)])
    (line,) = failure_lines([kept])
    assert line.endswith("its photos are away; its earlier numbers are kept")
