"""What the gate believes while it selects. None of it enters the evidence for a merge, which comes from fresh runs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agent import evidence

SPREADS = np.array([0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0])
SPREAD_WEIGHTS = np.array([0.10, 0.18, 0.25, 0.18, 0.10, 0.10, 0.09])
"""Paired sds of patches as multiples of the typical one: they differ tenfold (a small patch pairs far better than one
that touches the initialisation)."""

TAIL = 1.2
"""Log-sd of gains and harms that are expected in the paired gear."""

Place = Literal["waiting", "screening", "survivor", "weighing", "staged", "certifying"]


@dataclass(frozen=True, slots=True)
class Belief:
    """Chance of a gain, its mean counting losses as they are, and the sd of one pair; in the metric's unit."""

    chance: float
    mean: float
    sd: float


@dataclass(slots=True)
class Candidate:
    """One admitted candidate. Gains are the incumbent's loss less its own: positive is better."""

    name: str
    clashes: set[str]
    place: Place = "waiting"
    total: float = 0.0
    """Sum of information times gain against the incumbent's mean, and in weighing designs."""
    information: float = 0.0
    paired: list[tuple[float, float]] = field(default_factory=list)
    """(gain, weight) against the incumbent's run on the same seed."""
    losses: list[float] = field(default_factory=list)
    """Of the runs behind ``paired``."""
    used: set[int] = field(default_factory=set)
    """Seeds that it ran, or is running."""
    running: int = 0
    rounds: int = 0
    sounding: bool = False

    def read(self, gain: float, information: float) -> None:
        """A gain whose variance is 1 / ``information`` seed variances."""
        self.total += information * gain
        self.information += information

    def fade(self) -> None:
        """The tip moved: what was measured on an older one counts half."""
        self.total, self.information = self.total / 2, self.information / 2
        self.paired = [(gain, weight / 2) for gain, weight in self.paired]

    def weighed(self, sd: float) -> Belief:
        """By seed sds."""
        chance, mean = _posterior(self.total / sd, self.information)
        return Belief(chance, mean * sd, sd)

    @property
    def measured(self) -> float:
        """Mean gain as it was measured, with no prior; 0 before the first reading."""
        weight = math.fsum(weight for _, weight in self.paired)
        if weight:
            return math.fsum(gain * weight for gain, weight in self.paired) / weight
        return self.total / self.information if self.information else 0.0

    def matched(self, typical: float, scale: float) -> Belief:
        """By its own pairs, whose sd is known only within ``SPREADS`` times the typical one.

        Gains are expected to be about ``scale`` times those of ``evidence.prior``, in typical sds.
        """
        return _matched(tuple(self.paired), typical, scale)


_posterior = functools.lru_cache(4096)(evidence.posterior)


@functools.lru_cache(4096)
def _matched(paired: tuple[tuple[float, float], ...], typical: float, scale: float) -> Belief:
    gains, prior = _grid(scale)
    values, weights = np.array(paired, float).reshape(-1, 2).T
    n = float(weights.sum())
    middle = float((weights * values).sum()) / n / typical if n else 0.0
    squares = float((weights * (values / typical - middle) ** 2).sum())
    precision = 1 / SPREADS[:, None] ** 2
    logs = (n / 2) * np.log(precision) - precision * (squares + n * (middle - gains[None, :]) ** 2) / 2
    mass = prior * np.exp(logs - logs.max())
    mass /= mass.sum()
    return Belief(float(mass[:, gains > 0].sum()), float((mass.sum(0) * gains).sum()) * typical,
                  math.sqrt(float((mass.sum(1) * SPREADS ** 2).sum())) * typical)


@functools.cache
def _grid(scale: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gains in typical sds, and the prior mass of each spread (rows) with each gain.

    The shares and medians of ``evidence.prior``, on a grid that reaches much further: where patches pair well, an
    effect of thirty sds is nothing rare, and must not be taken for a patch that pairs badly.
    """
    sizes = np.geomspace(0.03, 60.0, 28)
    good = np.exp(-(np.log(sizes / (1.2 * scale)) / TAIL) ** 2 / 2)
    harm = np.exp(-(np.log(sizes / (1.5 * scale)) / TAIL) ** 2 / 2)
    weights = np.concatenate([0.15 * good / good.sum(), [0.30], 0.55 * harm / harm.sum()])
    return np.concatenate([sizes, [0.0], -sizes]), SPREAD_WEIGHTS[:, None] * weights[None, :]


class Pairing:
    """The typical paired sd of this campaign's patches: most likely value on a grid, each reading's sd being one of
    ``SPREADS`` times it. Fed with a reading less the one before, over sqrt(2)."""

    def __init__(self, seed_sd: float, floor: float) -> None:
        low, high = max(seed_sd * 0.005, floor, 1e-12), max(seed_sd * 3, floor * 2, 2e-12)
        self._grid = np.geomspace(low, high, 60)
        self._logs = np.zeros(60)
        self.readings = 0

    def read(self, step: float) -> None:
        sds = self._grid[:, None] * SPREADS[None, :]
        z = np.minimum(np.abs(step) / sds, 1e6)
        logs = np.log(SPREAD_WEIGHTS) - z * z / 2 - np.log(sds)
        top = logs.max(1)
        self._logs += top + np.log(np.exp(logs - top[:, None]).sum(1))
        self.readings += 1

    @property
    def typical(self) -> float:
        """The posterior mean of its logarithm, all sizes being alike before."""
        mass = np.exp(self._logs - self._logs.max())
        return math.exp(float((mass * np.log(self._grid)).sum() / mass.sum()))


@dataclass(slots=True)
class Incumbent:
    """Runs of the tip: by seed for pairs, and their fading mean for unpaired comparisons."""

    by_seed: dict[int, float] = field(default_factory=dict)
    mean: float = 0.0
    weight: float = 0.0

    def read(self, loss: float, cap: float, weight: float = 1.0, seed: int | None = None) -> None:
        """A run, or a fitted one of this weight."""
        if seed is not None:
            self.by_seed[seed] = loss
        self.mean = (self.mean * self.weight + loss * weight) / (self.weight + weight)
        self.weight = min(self.weight + weight, cap)
