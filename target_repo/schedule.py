"""Editable: how learning rate, momentum and weight decay move over a run. Pure functions of the step."""

import math

from settings.base import Settings


def learning_rate(step: int, steps: int, s: Settings) -> float:
    """Multiplier of every learning rate: linear warm-up, a plateau, linear warm-down to ``final_lr``."""
    warmup, warmdown = round(s.warmup * steps), round(s.warmdown * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step <= steps - warmdown:
        return 1.0
    left = (steps - step) / max(1, warmdown)
    return left + (1 - left) * s.final_lr


def momentum(step: int, steps: int, s: Settings) -> float:
    """Muon's momentum: rises from ``momentum_start`` to ``momentum``."""
    rise = s.momentum_steps * steps if s.momentum_steps < 1 else s.momentum_steps
    share = min(1.0, step / max(1.0, rise))
    return (1 - share) * s.momentum_start + share * s.momentum


def weight_decay(step: int, steps: int, s: Settings) -> float:
    """Multiplier of every weight decay."""
    share = step / max(1, steps)
    if s.decay_schedule == "linear":
        return 1 - share
    if s.decay_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1.0
