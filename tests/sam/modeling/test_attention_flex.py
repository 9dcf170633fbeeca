"""Attention by FlexAttention: its numbers, where it is used, and what happens where it can't be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from upstream_vit import randomise, upstream_encoder

from mobilesam.sam import image_pixels, load_image
from mobilesam.sam.modeling import attention
from mobilesam.sam.modeling.attention import attend_compiled, attend_with_bias, attend_with_flex, suits_flex
from mobilesam.sam.modeling.vit import ViTEncoder

PHOTOS = Path(__file__).parents[3] / "examples" / "photos"
BFLOAT16 = torch.bfloat16

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _nothing_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins as a process does."""
    monkeypatch.setattr(attention, "_not_compilable", set())
    attention._compiled.cache_clear()
    torch.compiler.reset()


def scores_of(
    rows: int,
    columns: int,
    width: int,
    dtype: torch.dtype,
    device: str = "cpu",
    batch: int = 2,
    heads: int = 3,
) -> list[Tensor]:
    """Queries, keys, values and positions of a grid, queries to values with the strides that the encoder gives."""
    generator = torch.Generator().manual_seed(rows * columns)
    tokens = rows * columns
    qkv = torch.randn(3, batch, tokens, heads, width, generator=generator, dtype=torch.float64).transpose(
        2, 3
    )
    positions = [torch.randn(batch, heads, tokens, n, generator=generator, dtype=torch.float64)
                 for n in (rows, columns)]  # fmt: skip
    return [x.to(device, dtype) for x in (*qkv, *positions)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("rows", "columns", "width"), [(3, 5, 6), (4, 4, 16), (1, 6, 20), (7, 2, 80)])
def test_flex_attention_computes_what_attention_with_a_bias_does(
    rows: int, columns: int, width: int, dtype: torch.dtype, tolerance: float
) -> None:
    given = scores_of(rows, columns, width, dtype)
    found = attend_with_flex(*given)
    assert found.dtype == dtype
    torch.testing.assert_close(found, attend_with_bias(*given), rtol=tolerance, atol=tolerance)


@pytest.mark.long
@pytest.mark.parametrize(("rows", "columns", "width"), [(16, 16, 64), (12, 8, 80)])
def test_compiled_flex_attention_computes_what_attention_with_a_bias_does(
    rows: int, columns: int, width: int
) -> None:
    given = scores_of(rows, columns, width, torch.float32)
    found = attend_compiled(*given)
    assert found is not None
    torch.testing.assert_close(found, attend_with_bias(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("device_type", "dtype", "width", "places", "suits"),
    [
        ("cuda", BFLOAT16, 64, 128, True),
        ("cuda", BFLOAT16, 80, 128, True),
        ("cuda", BFLOAT16, 64, 28, False),
        ("cuda", torch.float32, 64, 128, False),
        ("cpu", BFLOAT16, 64, 128, False),
    ],
)
def test_flex_attention_is_for_whole_grids_in_bfloat16_on_cuda(
    device_type: str, dtype: torch.dtype, width: int, places: int, suits: bool
) -> None:
    assert suits_flex(device_type, dtype, width, places) == suits


@pytest.fixture
def whole_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend over whole grids by FlexAttention on a CPU, too, in any dtype."""
    monkeypatch.setattr(attention, "suits_flex", lambda *what: what[3] > what[2])


def encoders(
    image_size: int, width: int, heads: int, dtype: torch.dtype
) -> tuple[torch.nn.Module, ViTEncoder]:
    """segment_anything's encoder and ours with the same random weights, frozen; one block of three is global."""
    theirs = upstream_encoder(image_size, width, 3, heads, (1,)).to(dtype).requires_grad_(False)
    randomise(theirs, image_size)
    ours = ViTEncoder(image_size, width, 3, heads, (1,)).to(dtype).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.usefixtures("whole_grids")
def test_an_encoder_with_flex_attention_computes_upstreams_function(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []

    def counted(*given: Tensor) -> Tensor:
        calls.append(given[0].shape)
        return attend_with_flex(*given)

    monkeypatch.setattr(attention, "attend_compiled", counted)
    theirs, ours = encoders(256, 60, 2, torch.float64)
    x = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert calls == [(2, 2, 256, 30)], "the whole grid, and no windows"


@pytest.mark.usefixtures("whole_grids")
def test_attention_with_gradients_does_not_use_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attend_compiled", lambda *_: pytest.fail("asked for"))
    _, ours = encoders(64, 16, 2, torch.float32)
    ours.requires_grad_(True)(torch.randn(1, 3, 64, 64)).sum().backward()
    assert ours.blocks[1].attn.rel_pos_h.grad.abs().max() > 0


@pytest.mark.usefixtures("whole_grids")
def test_flex_attention_is_compiled_with_a_compiled_encoder() -> None:
    theirs, ours = encoders(256, 60, 2, torch.float32)
    # Traced as for any backend; torch's C++ one doesn't take positions that are computed in the same graph.
    ours.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    expected = theirs(x)
    assert (ours(x) - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def failing(error: Exception) -> Callable[[], Callable[..., Tensor]]:
    def attend(*_: Tensor) -> Tensor:
        raise error

    return lambda: attend


@pytest.mark.usefixtures("whole_grids")
def test_attention_continues_with_one_warning_if_flex_attention_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention, "_compiled", failing(RuntimeError("no C compiler\nand much more")))
    theirs, ours = encoders(256, 60, 2, torch.float64)
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert [record.getMessage() for record in caplog.records] == [
        "FlexAttention can't be compiled for float64 heads of 30 channels on cpu (RuntimeError: no C compiler); "
        "continuing without it"
    ]


def test_a_torch_without_flex_attention_counts_as_one_that_cannot_compile_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention, "_compiled", lambda: attend_with_flex)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.flex_attention", None)
    assert attend_compiled(*scores_of(2, 2, 4, torch.float32)) is None
    assert len(caplog.records) == 1


def test_running_out_of_memory_does_not_disable_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_compiled", failing(torch.OutOfMemoryError("20 GiB")))
    with pytest.raises(torch.OutOfMemoryError):
        attend_compiled(*scores_of(2, 2, 4, torch.float32))
    monkeypatch.setattr(attention, "_compiled", lambda: attend_with_flex)
    assert attend_compiled(*scores_of(2, 2, 4, torch.float32)) is not None


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("width", "heads"), [(128, 2), (160, 2)])
def test_bfloat16_on_cuda_has_a_cosine_of_0_9999_to_upstreams_float32_on_photos(
    width: int, heads: int, compiled: bool
) -> None:
    theirs, ours = encoders(1024, width, heads, torch.float32)
    theirs.cuda()
    ours.hold_in_bfloat16().cuda()
    if compiled:
        ours.compile(fullgraph=True, dynamic=False)
    for name in ("astronaut.jpg", "brick.png"):
        x = image_pixels(load_image((PHOTOS / name).read_bytes(), 1024), 1024, torch.device("cuda"))
        assert float(torch.cosine_similarity(ours(x), theirs(x), dim=1).mean()) >= 0.9999
    assert compiled or attention._compiled.cache_info().currsize == 1
    assert attention._not_compilable == set()


@pytest.mark.cuda
@pytest.mark.parametrize("width", [64, 80])
def test_flex_attention_on_cuda_is_as_near_to_float64_as_attention_with_channels(width: int) -> None:
    exact = scores_of(64, 64, width, torch.float64, batch=1)
    given = [x.to("cuda", BFLOAT16) for x in exact]
    wanted = attend_with_bias(*[x.double().cpu() for x in given])
    found = attend_compiled(*given)
    assert found is not None
    other = attention.attend_with_channels(*given)
    errors = [float((way.double().cpu() - wanted).square().mean()) for way in (found, other)]
    assert errors[0] <= 2 * errors[1]
