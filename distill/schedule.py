"""The learning rate as a function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, base: float, warmup: float) -> float:
    """The rate of optimizer step `step` (from 0) out of `steps`.

    The first `warmup` share of all steps (rounded up) rises linearly and ends at `base`; what is left falls
    along a half cosine towards 0, which the step after the last one would reach.
    """
    warm_steps = min(math.ceil(warmup * steps), steps)
    if step < warm_steps:
        return base * (step + 1) / warm_steps
    progress = (step - warm_steps) / (steps - warm_steps)
    return base * 0.5 * (1 + math.cos(math.pi * progress))
