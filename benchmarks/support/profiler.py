"""Shares of a call's time by kind of operator, from torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

OTHER = "other"
GROUPS = (
    ("convolution backward", ("convolution_backward",)),
    ("convolution forward", ("convolution", "conv2d")),
    ("batch norm", ("batch_norm",)),
    ("layer norm", ("layer_norm",)),
    ("GELU", ("gelu",)),
    ("attention", ("scaled_dot_product", "flash_attention", "softmax")),
    ("matrix products", ("aten::mm", "addmm", "bmm", "matmul", "linear", "mkldnn_linear")),
    ("optimizer and clipping", ("adam", "foreach", "_norm", "optimizer")),
    ("copies", ("copy_", "clone", "contiguous", "pad", "cat", "to_copy", "index", "fill_", "zero_")),
    ("sums and products", ("aten::add", "aten::mul", "aten::sub", "aten::div", "aten::sum", "aten::pow")),
)
"""Group -> parts of operators' names; the first group that matches counts."""


def shares(name: str, call: Callable[[], object], warm_calls: int = 1) -> list[str]:
    """Return one line for each group of operators: its share of the time in operators; on a GPU, of the GPU's time.

    Args:
        name: of the call, for the first line.
        call: what is profiled, once.
        warm_calls: unprofiled calls before, which fill caches and allocators.
    """
    for _ in range(warm_calls):
        call()
    activities = [ProfilerActivity.CPU]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
    spent: Counter[str] = Counter()
    for event in profile.key_averages():
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue  # an operator on the CPU counts the kernels that it launched: they would count twice
        spent[group_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(spent.values())
    lines = [f"  {group}: {time / total:.1%}" for group, time in spent.most_common() if time]
    return [f"{name}, shares of {total / 1e6:.3g} s in operators:", *lines]


def group_of(operator: str) -> str:
    """Return the group that an operator belongs to, by its name."""
    lower = operator.lower()
    return next((group for group, parts in GROUPS if any(part in lower for part in parts)), OTHER)
