from __future__ import annotations

import copy
import functools
import inspect
import textwrap
import types
import warnings
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mobilesam.sam.modeling.tiny_vit import (
    CLASSIFIER_PREFIXES,
    VARIANTS,
    TinyViT,
    TinyViTConfig,
    bias_indices,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports timm by names that timm deprecates
    upstream = pytest.importorskip("mobile_sam.modeling.tiny_vit_sam")

PARAMETERS_5M = 5_743_892


def upstream_tiny_vit(variant: str, image_size: int) -> torch.nn.Module:
    config = VARIANTS[variant]
    return upstream.TinyViT(
        img_size=image_size,
        embed_dims=list(config.widths),
        depths=list(config.depths),
        num_heads=list(config.heads),
        window_sizes=list(config.windows),
        drop_path_rate=0.0,
        layer_lr_decay=0.8,
    )


def random_state_dict(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state in which every tensor matters: no zeros, no ones, positive variances."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for key, value in network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if not value.is_floating_point():
            state[key] = torch.tensor(7)
        elif key.endswith("running_var"):
            state[key] = 1 + 0.5 * noise.abs()
        elif value.dim() == 1:
            state[key] = value + 0.2 * noise
        else:
            state[key] = noise * (0.5 if "attention_biases" in key else value[0].numel() ** -0.5)
    return state


def without_classifier(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(CLASSIFIER_PREFIXES)}


def pixels(image_size: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(5))


def any_size(network: torch.nn.Module) -> torch.nn.Module:
    """Upstream's network, its own forward changed in the one place where it takes the grid to be 64 x 64."""
    source = textwrap.dedent(inspect.getsource(upstream.TinyViT.forward_features))
    fixed, free = "x.view(B, 64, 64, C)", "x.view(B, round(_ ** 0.5), round(_ ** 0.5), C)"
    assert source.count(fixed) == 1
    changed: dict[str, types.FunctionType] = {}
    exec(source.replace(fixed, free), vars(upstream), changed)
    network.forward_features = types.MethodType(changed["forward_features"], network)
    return network


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / (wanted.max() - wanted.min()))


def pair(image_size: int, variant: str = "5m") -> tuple[torch.nn.Module, TinyViT]:
    """Upstream's and ours with the same weights, to be changed."""
    return copy.deepcopy(_pair(image_size, variant))


@functools.cache  # drawing weights that are replaced at once takes longest here
def _pair(image_size: int, variant: str) -> tuple[torch.nn.Module, TinyViT]:
    theirs = any_size(upstream_tiny_vit(variant, image_size))
    state = random_state_dict(theirs)
    theirs.load_state_dict(state)
    ours = TinyViT(image_size, variant)
    ours.load_state_dict(without_classifier(state))
    return theirs.eval(), ours.eval()


def test_tiny_vit_has_the_published_number_of_parameters() -> None:
    assert sum(parameter.numel() for parameter in TinyViT(256).parameters()) == PARAMETERS_5M


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_and_shapes_are_upstreams_without_the_classifier(variant: str) -> None:
    theirs = without_classifier(upstream_tiny_vit(variant, 224).state_dict())
    ours = TinyViT(1024, variant).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }


def test_one_forward_at_1024_equals_upstreams_own() -> None:
    theirs, ours = pair(1024)
    theirs.forward_features = types.MethodType(upstream.TinyViT.forward_features, theirs)
    x = pixels(1024)
    with torch.no_grad():
        wanted, found = theirs(x), ours(x)
    assert found.shape == (1, 256, 64, 64)
    assert relative_error(found, wanted) < 1e-5


SIZES = [(64, "5m"), (112, "5m"), (256, "5m"), (320, "5m"), (128, "11m"), (128, "21m")]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("image_size", "variant"), SIZES)
def test_other_sizes_and_variants_equal_upstreams_own_forward(
    image_size: int, variant: str, training: bool
) -> None:
    theirs, ours = pair(image_size, variant)
    theirs.train(training)
    ours.train(training)
    x = pixels(image_size, batch=2)
    with torch.no_grad():
        wanted, found = theirs(x), ours(x)
    assert found.shape == (2, 256, image_size // 16, image_size // 16)
    assert relative_error(found, wanted) < 1e-5
    statistics = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        if "running" in key:
            torch.testing.assert_close(buffer, statistics[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_upstream_computes_the_same_from_our_weights(variant: str) -> None:
    ours = TinyViT(128, variant)
    ours.load_state_dict(random_state_dict(ours))
    theirs = any_size(upstream_tiny_vit(variant, 128))
    classifier = {key: v for key, v in theirs.state_dict().items() if key.startswith(CLASSIFIER_PREFIXES)}
    theirs.load_state_dict({**ours.state_dict(), **classifier}, strict=True)
    x = pixels(128)
    with torch.no_grad():
        assert relative_error(ours.eval()(x), theirs.eval()(x)) < 1e-5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_float64_are_upstreams(variant: str, training: bool) -> None:
    theirs, ours = (network.double().train(training) for network in pair(64, variant))
    x = pixels(64, batch=2).double()
    target = torch.randn(2, 256, 4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    # Where it evaluates, upstream uses biases gathered before, which have no gradient.
    gathered = set() if training else {key for key, _ in ours.named_parameters() if "attention_biases" in key}
    for network in (theirs, ours):
        (network(x) - target).square().mean().backward()
    wanted = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    largest = max(float(g.norm()) for g in wanted.values() if g is not None)
    for key, parameter in ours.named_parameters():
        if key in gathered:
            continue
        assert parameter.grad is not None, key
        error = float((parameter.grad - wanted[key]).norm())
        # The floor is for biases before a batch norm, whose true gradient is zero.
        assert error < 1e-9 * float(wanted[key].norm()) + 1e-12 * largest, key


def test_gradients_in_float32_are_upstreams_but_for_rounding() -> None:
    theirs, ours = (network.train() for network in pair(128))
    x = pixels(128, batch=2)
    target = torch.randn(2, 256, 8, 8, generator=torch.Generator().manual_seed(9))
    for network in (theirs, ours):
        (network(x) - target).square().mean().backward()
    wanted = {key: value.grad for key, value in theirs.named_parameters() if value.grad is not None}
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        # The floor is for biases before a batch norm: their true gradient is zero, what is seen is rounding.
        allowed = 1e-3 * float(wanted[key].norm()) + 1e-6 * largest
        assert float((parameter.grad - wanted[key]).norm()) < allowed, key


@pytest.mark.parametrize("image_size", [16, 48, 240, 512])
def test_any_multiple_of_16_gives_a_sixteenth_of_it_as_grid(image_size: int) -> None:
    network = TinyViT(image_size).eval()
    with torch.no_grad():
        assert network(pixels(image_size)).shape == (1, 256, image_size // 16, image_size // 16)


class MostDimensions(TorchDispatchMode):
    """Keeps the largest number of dimensions of any tensor computed inside it."""

    most = 0

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        self.most = max(self.most, *(one.dim() for one in tensors), 0)
        return result


@pytest.mark.parametrize("image_size", [240, 256, 448])
def test_no_tensor_has_more_than_the_four_dimensions_that_compilers_for_phones_take(image_size: int) -> None:
    with torch.no_grad(), MostDimensions() as seen:
        TinyViT(image_size).eval()(torch.zeros(1, 3, image_size, image_size))
    assert seen.most == 4


def test_weights_loaded_in_evaluation_mode_take_effect() -> None:
    # Upstream keeps gathered biases from when it entered evaluation mode: the trap of sam-hq issue 44.
    theirs, ours = pair(112)
    changed = {
        key: value * 3 if key.endswith("attention_biases") else value
        for key, value in ours.state_dict().items()
    }
    ours.load_state_dict(changed)
    fresh = TinyViT(112)
    fresh.load_state_dict(changed)
    x = pixels(112)
    with torch.no_grad():
        assert torch.equal(ours(x), fresh.eval()(x))
        assert relative_error(ours(x), theirs(x)) > 1e-3


def test_evaluation_of_an_image_does_not_depend_on_its_batch() -> None:
    _, ours = pair(128)
    x = pixels(128, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[1:2], ours(x[1:2]), rtol=1e-4, atol=1e-4)


def test_channels_last_gives_the_same_embedding() -> None:
    _, ours = pair(128)
    x = pixels(128)
    with torch.no_grad():
        wanted = ours(x)
        found = ours.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert relative_error(found, wanted) < 1e-5


def test_bfloat16_autocast_stays_close() -> None:
    _, ours = pair(128)
    x = pixels(128)
    with torch.no_grad():
        wanted = ours(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(x)
    cosine = torch.nn.functional.cosine_similarity(found.float(), wanted, dim=1)
    assert cosine.mean() > 0.999


def test_bias_indices_name_each_distance_once() -> None:
    window = 7
    indices = bias_indices(window)
    by_distance: dict[tuple[int, int], set[int]] = {}
    for a in range(window**2):
        for b in range(window**2):
            distance = (abs(a // window - b // window), abs(a % window - b % window))
            by_distance.setdefault(distance, set()).add(int(indices[a, b]))
    assert all(len(found) == 1 for found in by_distance.values())
    assert len(set.union(*by_distance.values())) == len(by_distance) == window**2


@pytest.mark.parametrize("image_size", [0, -16, 100, 1000])
def test_an_image_size_that_is_no_multiple_of_16_is_refused(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"{image_size}"):
        TinyViT(image_size)


def test_pixels_of_another_size_are_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 128, 128\).*256"):
        TinyViT(256)(pixels(128))


def test_unknown_variants_and_indivisible_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="5m, 11m, 21m"):
        TinyViT(256, "6m")
    with pytest.raises(ValueError, match="100 is not divisible by 3"):
        TinyViTConfig(widths=(100, 128, 160, 320), heads=(3, 4, 5, 10))


@pytest.mark.parametrize(("size", "strides"), [(128, []), (96, ["8"]), (64, ["8"]), (32, ["4", "8"])])
def test_a_smaller_input_adds_projections_of_earlier_maps_and_nothing_else(
    size: int, strides: list[str]
) -> None:
    whole, small = TinyViT(128).state_dict(), TinyViT(128, student_size=size).state_dict()
    assert list(small)[: len(whole)] == list(whole)
    assert list(small)[len(whole) :] == [f"laterals.{stride}.weight" for stride in strides]
    assert all(small[key].shape == value.shape for key, value in whole.items())


def test_the_maps_of_a_smaller_input_are_projected_resized_and_summed() -> None:
    torch.manual_seed(0)
    network = TinyViT(128, student_size=64).eval()
    seen: dict[str, torch.Tensor] = {}
    for name in ("layers.1.blocks.1", "layers.3.blocks.1"):
        network.get_submodule(name).register_forward_hook(
            lambda module, given, made, name=name: seen.update({name: made})
        )
    with torch.no_grad():
        found = network(pixels(64))
        fine, coarse = seen["layers.1.blocks.1"], seen["layers.3.blocks.1"]
        assert (fine.shape[1:], coarse.shape[1:]) == ((128, 8, 8), (320, 4, 4))
        upsampled = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=False)
        weights = torch.cat([network.laterals["8"].weight, network.neck[0].weight], 1)
        joined = torch.nn.functional.conv2d(torch.cat([fine, upsampled], 1), weights)
        torch.testing.assert_close(found, network.neck[1:](joined), rtol=1e-4, atol=1e-5)
