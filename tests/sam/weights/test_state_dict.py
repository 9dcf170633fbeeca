"""State dicts found in what training scripts save, and the names of other programs' SAM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mobilesam.sam.registry import TEACHERS
from mobilesam.sam.teacher import state_shapes
from mobilesam.sam.weights.state_dict import MAX_DEPTH, find_state_dicts, huggingface_name

ONE = torch.zeros(1)
SAM = {
    "image_encoder.patch_embed.proj.weight": ONE,
    "image_encoder.neck.0.weight": ONE,
    "prompt_encoder.no_mask_embed.weight": ONE,
    "mask_decoder.iou_token.weight": ONE,
}


def first(loaded: object) -> dict[str, Tensor]:
    return find_state_dicts(loaded)[0].state


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_fsdp_wrapped_module.",
        "sam.",
        "model.net.",
    ],
)
def test_words_before_the_parts_of_sam_are_removed(prefix: str) -> None:
    assert first({prefix + key: value for key, value in SAM.items()}) == SAM


def test_words_of_torchs_containers_are_removed_inside_of_names_too() -> None:
    inner = {key.replace("encoder.", "encoder._orig_mod.module."): value for key, value in SAM.items()}
    assert first(inner) == SAM


def test_names_that_would_become_equal_keep_their_words() -> None:
    both = {"module.a": ONE, "a": ONE}
    assert first(both) == both


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.backbone."])
def test_a_bare_encoders_names_get_their_parts_name(prefix: str) -> None:
    bare = {"patch_embed.proj.weight": ONE, "blocks.0.norm1.weight": ONE, "neck.0.weight": ONE}
    found = find_state_dicts({prefix + key: value for key, value in bare.items()})[0]
    assert found.state == {f"image_encoder.{key}": value for key, value in bare.items()}
    assert found.encoder_alone


def test_other_networks_keep_their_names() -> None:
    other = {
        "patch_embed.proj.weight": ONE,
        "blocks.0.norm1.weight": ONE,
        "head.weight": ONE,
        "cls_token": ONE,
    }
    assert first(other) == other


@pytest.mark.parametrize("key", ["model", "state_dict", "weights", "net", "anything at all"])
def test_the_weights_are_found_under_any_key(key: str) -> None:
    optimizer = {"state": {0: {"exp_avg": ONE}}, "param_groups": [{"lr": 0.1}]}
    found = find_state_dicts({"epoch": 3, "optimizer": optimizer, key: SAM})[0]
    assert (found.place, found.state) == ((key,), SAM)


@pytest.mark.parametrize("content", [(SAM, {"epoch": 1}), [SAM], {"models": [SAM]}, {0: SAM}])
def test_the_weights_are_found_in_lists_and_under_numbers(content: object) -> None:
    assert first(content) == SAM


def test_weights_in_a_dictionary_for_each_of_sams_parts_are_joined() -> None:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in SAM.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})["module." + name] = value
    assert first(parts) == SAM
    assert first({"model": {**parts, "epoch": 1}, "optimizer": {0: {"exp_avg": ONE}}}) == SAM


def test_a_dictionary_that_stands_in_many_places_is_searched_once() -> None:
    assert len(find_state_dicts({f"copy{i}": SAM for i in range(1000)})) == 1


def test_the_set_of_weights_is_chosen_by_fit_then_by_sams_names_then_as_an_average() -> None:
    fewer = dict.fromkeys(list(SAM)[:2], ONE)
    average = dict.fromkeys(SAM, ONE + 1)
    saved: dict[str, Any] = {"best": fewer, "model": SAM, "model_ema": {"module": average, "updates": 3}}
    assert find_state_dicts(saved)[0].place == ("model_ema", "module")
    assert find_state_dicts({"best": fewer, "model": SAM})[0].place == ("model",)
    assert find_state_dicts({"a": SAM, "b": dict(SAM)})[0].place == ("a",)
    assert find_state_dicts(saved, lambda state: len(state) == 2)[0].place == ("best",)
    assert find_state_dicts({"model": SAM, "schema": dict(SAM), "demand": dict(SAM)})[0].place == ("model",)
    assert find_state_dicts({"model": SAM, "EMA": dict(SAM)})[0].place == ("EMA",)


def test_pixel_statistics_are_no_weights() -> None:
    assert first(SAM | {"pixel_mean": ONE, "pixel_std": ONE}) == SAM


def test_dictionaries_in_each_other_are_followed_to_a_limit() -> None:
    saved: object = SAM
    for _ in range(MAX_DEPTH - 1):
        saved = {"in": saved}
    assert find_state_dicts(saved)[0].state == SAM
    assert find_state_dicts({"in": saved}) == []


@pytest.mark.parametrize(("kind", "teacher"), [("Sam", "vit_b"), ("SamHQ", "hq_vit_b")])
def test_hugging_faces_names_and_shapes_become_those_of_sams_checkpoint(kind: str, teacher: str) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")())
    found = find_state_dicts(model.state_dict())[0]
    assert found.huggingface
    assert {key: value.shape for key, value in found.state.items()} == state_shapes(TEACHERS[teacher])


@pytest.mark.parametrize("key", SAM)
def test_sams_own_names_are_left_as_they_are(key: str) -> None:
    assert huggingface_name(key) == key
