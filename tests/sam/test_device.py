from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mobilesam.common.errors import SamError
from mobilesam.sam.device import cpu_accelerates_bfloat16, resolve_device, resolve_precision


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, *, native: bool) -> None:
    class Context:
        def __init__(self, device: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Context)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )


@pytest.mark.usefixtures("no_cuda")
def test_auto_is_the_cpu_without_a_gpu() -> None:
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("asked", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1), (torch.device("cuda", 1), 1)]
)
def test_cuda_names_get_an_index(asked: str, index: int) -> None:
    assert resolve_device(asked) == torch.device("cuda", index)


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 switched on; the settings are restored afterwards."""
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [one.allow_tf32 for one in settings]
    for one in settings:
        one.allow_tf32 = True
    yield
    for one, was in zip(settings, before, strict=True):
        one.allow_tf32 = was


@pytest.mark.usefixtures("two_gpus", "tf32")
def test_float32_on_a_gpu_is_float32_in_convolutions_too() -> None:
    resolve_device("cpu")
    assert torch.backends.cudnn.allow_tf32
    resolve_device("auto")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("two_gpus")
def test_cpu_is_the_cpu_where_there_are_gpus_too() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_beyond_the_last_is_refused_with_the_number_of_gpus() -> None:
    with pytest.raises(SamError, match=r"cuda:2.*only 2 CUDA"):
        resolve_device("cuda:2")


@pytest.mark.usefixtures("no_cuda")
def test_cuda_without_a_gpu_is_refused_with_the_mend() -> None:
    with pytest.raises(SamError, match="--device cpu"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "", "cuda:x", "cuda:-1"])
def test_other_device_names_are_refused(name: str) -> None:
    with pytest.raises(SamError, match="unknown device"):
        resolve_device(name)


@pytest.mark.parametrize("accelerated", [True, False])
def test_auto_precision_on_a_cpu_follows_the_hardware(
    monkeypatch: pytest.MonkeyPatch, accelerated: bool
) -> None:
    flags = {"amx_bf16": False, "avx512_bf16": accelerated}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert resolve_precision("auto", "cpu") == ("bfloat16" if accelerated else "float32")


@pytest.mark.parametrize("accelerated", [True, False])
def test_older_torch_is_asked_by_its_private_names(
    monkeypatch: pytest.MonkeyPatch, accelerated: bool
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: accelerated, raising=False)
    assert cpu_accelerates_bfloat16() is accelerated


def test_this_cpus_answer_agrees_with_the_kernels_list_of_flags() -> None:
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(file.read().split())
    except FileNotFoundError:
        pytest.skip("no /proc/cpuinfo here")
    assert cpu_accelerates_bfloat16() == bool(flags & {"amx_bf16", "avx512_bf16"})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_precision_that_was_named_is_kept_on_any_cpu(precision: str) -> None:
    assert resolve_precision(precision, "cpu") == precision


@pytest.mark.parametrize("precision", ["float16", "bf16", ""])
def test_other_precisions_are_refused(precision: str) -> None:
    with pytest.raises(SamError, match="auto, float32 or bfloat16"):
        resolve_precision(precision, "cpu")


def test_auto_on_a_gpu_that_only_emulates_bfloat16_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, native=False)
    assert resolve_precision("auto", "cuda:0") == "float32"
    with pytest.raises(SamError, match=r"Tesla T4.*float32"):
        resolve_precision("bfloat16", "cuda:0")


def test_auto_on_a_gpu_with_bfloat16_is_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, native=True)
    assert resolve_precision("auto", "cuda:0") == "bfloat16"
