"""Devices and precisions: names such as `auto` resolved for this machine."""

from __future__ import annotations

import torch

from ..common.config import PRECISIONS
from ..common.errors import SamError, counted


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Resolve a device's name to a device of this machine.

    If it is a GPU, TF32 is switched off in this process: torch has it on for convolutions, so that float32 would be
    a precision of ten bits in SAM's neck and in most students, and in the audit of a store. bfloat16 isn't affected.

    Args:
        device: `auto` (the first CUDA device, else the CPU), `cpu`, `cuda` (the same as `cuda:0`) or `cuda:i`.

    Raises:
        SamError: the name is not one of these, or the CUDA device does not exist here.
    """
    name = str(device)
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise SamError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:i") from None
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type != "cuda":
        raise SamError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:i")
    return _existing_cuda(wanted)


def _existing_cuda(wanted: torch.device) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = wanted.index or 0
    if count == 0:
        raise SamError(f"device {wanted}: no CUDA device is usable here; use --device cpu")
    if index >= count:
        raise SamError(
            f"device {wanted}: only {counted(count, 'CUDA device')} here, cuda:0 to cuda:{count - 1}"
        )
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", index)


def resolve_precision(precision: str, device: str | torch.device) -> str:
    """Resolve a precision's name for a device.

    float16 is not supported: SAM's ViT overflows in it (segment-anything issues 540 and 696).

    Args:
        precision: `float32`, `bfloat16`, or `auto`, which is bfloat16 only if the hardware accelerates it.
        device: device that will compute.

    Returns:
        `float32` or `bfloat16`.

    Raises:
        SamError: another name, or bfloat16 for a GPU that can only emulate it.
    """
    device = torch.device(device)
    if precision == "auto":
        return "bfloat16" if accelerates_bfloat16(device) else "float32"
    if precision not in PRECISIONS:
        raise SamError(f"unknown precision {precision!r}: use auto, float32 or bfloat16")
    if precision == "bfloat16" and device.type == "cuda" and not accelerates_bfloat16(device):
        name = torch.cuda.get_device_name(device)
        raise SamError(f"{name} has no bfloat16 arithmetic: use --precision float32 (or auto)")
    return precision


def accelerates_bfloat16(device: torch.device) -> bool:
    """Return True if the device has hardware that makes matrix products in bfloat16 faster than in float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and cpu_accelerates_bfloat16()


def cpu_accelerates_bfloat16() -> bool:
    """Return True if this CPU has AMX bf16 or AVX-512 bf16."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    # Older versions of torch have the same functions under private names.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in names)
