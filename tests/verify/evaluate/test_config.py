from __future__ import annotations

from typing import Any

import pytest

from mobilesam.verify import EvaluateConfig, VerifyError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "at least one --model NAME=FILE"),
        ({"models": (("a", ""),)}, "--model a=: give NAME=FILE"),
        ({"models": (("a", "x"), ("a", "y"))}, "2 models are named a"),
        ({"store": None}, "give --store STORE or --images DIR"),
        ({"teacher": "vit_h"}, "--teacher has nothing to do"),
        ({"store": None, "images": "p", "teacher": "vit_x"}, "there is no 'vit_x'"),
        ({"checkpoint": "x.pt"}, "--checkpoint is a teacher's"),
        ({"store": None, "images": "p", "split": "val"}, "--split val is of a store's rows"),
        ({"split": "train"}, "--split 'train'"),
        ({"points": 65}, "--points 65"),
        ({"distances": (100, 0)}, "--distances"),
        ({"distances": (100, 100)}, "a distance is repeated"),
        ({"max_objects": 0}, "--max-objects 0"),
        ({"limit": 0}, "--limit 0"),
        ({"seed": -1}, "--seed -1"),
        ({"image_size": 100}, "--image-size 100"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_work(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(VerifyError, match=message):
        EvaluateConfig(**({"models": (("a", "x"),), "store": "s"} | options))
