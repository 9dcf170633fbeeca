"""Which device computes, and in which precision."""

from __future__ import annotations

import torch

from ..common.config import PRECISIONS
from ..common.errors import SamError


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:i`` into a device that exists here.

    ``auto`` is the first CUDA device, else the CPU. ``cuda`` is ``cuda:0``.

    Raises:
        SamError: the name is not one of these, or the CUDA device does not exist here.
    """
    name = str(device)
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
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
        raise SamError(f"device {wanted}: only {count} CUDA device(s) here, cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def resolve_precision(precision: str, device: str | torch.device) -> str:
    """Turn ``auto`` into ``float32`` or ``bfloat16`` for this device; pass those two through.

    ``auto`` is bfloat16 only where the hardware accelerates it. float16 is never offered: SAM's ViT
    overflows in it (segment-anything issues 540 and 696).

    Raises:
        SamError: another name, or bfloat16 asked of a GPU that can only emulate it.
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
    """Whether matrix products in bfloat16 are faster than float32 by hardware on this device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and cpu_accelerates_bfloat16()


def cpu_accelerates_bfloat16() -> bool:
    """Whether this CPU has AMX bf16 or AVX-512 bf16."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    # Older torch knows the same under private names.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in names)
