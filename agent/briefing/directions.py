"""Directions: in which part of the training to look next, by what each has gained per training run. Pure.

A cost-aware bandit by Thompson sampling, after Xia et al. 2015 (budgeted bandits: reward sampled over cost): for each
direction a keep rate is drawn from its Beta posterior, and multiplied by the mean size of its gains over the mean runs
of its attempts, both drawn toward the mean of all while little is known. Old attempts count less (Raj and Kalyani
2017), since gains deplete and a merge changes what is worth trying. A share of the draws is uniform, so none is given
up.

Does not cover: which idea to try in a direction (the model's part), or gains that need two directions at once.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

DIRECTIONS = ("architecture", "optimizer", "schedule", "initialisation", "regularisation", "data order",
              "systems speed", "simplification", "ablation")
"""``ablation``: of parts that are there already. ``simplification``: the same effect with less code."""
KEEP_RATE, STRENGTH = 0.15, 4.0
"""Keep rate that is expected of a campaign, counted as this many attempts: public ones on fresh baselines keep 15 to
18 %. What the campaign has shown so far is expected of a direction, counted as as many."""
NEAR_MISS = 0.5
"""What a near miss counts for, of a merge of its size: most good patches are refused for want of power, and keep rates
of a few in a hundred would teach the bandit little."""
SHRINKAGE = 2.0
"""Attempts that the mean of all directions counts for, in a direction's mean gain and mean cost."""
UNIFORM = 0.15
"""Share of draws in which every direction has the same chance."""
HALF_LIFE = 300.0
"""Attempts after which one counts half."""

_WORDS = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in (
    ("ablation", r"ablat|undo|remov\w* (?:an? )?(?:existing|part)"),
    ("simplification", r"simplif|clean ?up|less code"),
    ("systems speed", r"speed|efficien|throughput|system|kernel|compile|fuse|memory|performance"),
    ("data order", r"data|batch|curricul|packing|shuffl|sequence length|augment"),
    ("regularisation", r"regulari[sz]|weight.?decay|dropout|smoothing|z.?loss|soft.?cap"),
    ("initialisation", r"initiali[sz]|\binit\b|scale of the weights"),
    ("schedule", r"schedul|warm.?up|warm.?down|cool.?down|anneal|decay of the rate"),
    ("optimizer", r"optimi[sz]|adam|muon|\bsgd\b|momentum|learning.?rate|\blr\b|betas?\b|gradient|clip"),
    ("architecture", r"architect|attention|embed|\bmlp\b|activation|norm|residual|depth|width|head|model"),
))


@dataclass(frozen=True, slots=True)
class Tried:
    """One attempt that was decided."""

    direction: str
    """As the proposal says it."""
    gain: float
    """Of a merged one or a near miss, how much better it was in the metric's unit (0 or more); 0 of all others."""
    runs: float
    """Training runs that it took."""
    merged: bool = True
    """False: a near miss, where ``gain`` is not 0."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What is known of a direction; old attempts and near misses count less, so these are no whole numbers."""

    direction: str
    tried: float = 0.0
    kept: float = 0.0
    gain: float = 0.0
    runs: float = 0.0

    @property
    def rate(self) -> float:
        """Gain per training run."""
        return self.gain / self.runs if self.runs else 0.0


@functools.lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """The direction that ``text`` names, one of DIRECTIONS; empty where it names none."""
    plain = " ".join(text.lower().replace("_", " ").replace("-", " ").split())
    if plain in DIRECTIONS:
        return plain
    return next((name for name, words in _WORDS if words.search(plain)), "")


def tallies(tried: Sequence[Tried], half_life: float = HALF_LIFE) -> tuple[Tally, ...]:
    """One Tally a direction, in the order of DIRECTIONS, of attempts with the oldest first."""
    sums = {name: [0.0, 0.0, 0.0, 0.0] for name in DIRECTIONS}
    for age, one in enumerate(reversed(tried)):
        name = canonical(one.direction)
        if name:
            weight, known = math.exp2(-age / half_life), sums[name]
            counts = weight if one.merged else weight * NEAR_MISS
            known[0] += weight
            known[1] += counts * (one.gain > 0)
            known[2] += counts * max(one.gain, 0.0)
            known[3] += weight * max(one.runs, 0.0)
    return tuple(Tally(name, *known) for name, known in sums.items())


def choose(known: Iterable[Tally], seed: str, among: Collection[str] = DIRECTIONS) -> str:
    """The direction of the next attempt: a fixed function of what is known and of ``seed``, so that a resumed campaign
    asks the same. Raises ValueError where ``among`` holds none of them."""
    tally = sorted((one for one in known if one.direction in among), key=lambda one: one.direction)
    if not tally:
        raise ValueError("there is no direction to choose from")
    rng = random.Random(f"direction {seed}")
    if rng.random() < UNIFORM:
        return rng.choice(tally).direction
    kept, tried = sum(one.kept for one in tally), sum(one.tried for one in tally)
    size = sum(one.gain for one in tally) / kept if kept else 1.0
    rate = (kept + STRENGTH * KEEP_RATE) / (tried + STRENGTH)
    cost = max(sum(one.runs for one in tally) / tried if tried else 1.0, 1e-9)

    def value(one: Tally) -> float:
        draws = random.Random(f"{one.direction} {seed}")
        chance = draws.betavariate(STRENGTH * rate + one.kept,
                                   STRENGTH * (1 - rate) + max(one.tried - one.kept, 0.0))
        gain = (one.gain + SHRINKAGE * size) / (one.kept + SHRINKAGE)
        runs = (one.runs + SHRINKAGE * cost) / (one.tried + SHRINKAGE)
        return chance * gain / max(runs, 1e-9)

    return max(tally, key=value).direction
