"""Power: what a paired test can see before it is made, and what a handful of runs says about its own noise. Pure
arithmetic; the test itself is in ``evidence.py``.

Effects are sizes here (positive), in the unit of the metric, as are standard deviations. Everything assumes Gaussian
differences. From scipy.special alone: scipy.stats takes a second to import.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from agent.evidence import quantile

MOST_PAIRS = 200
"""Pairs beyond which an effect counts as not to be seen."""
EXACT = 8
"""Ranks up to which all orders are counted (8! = 40,320); beyond it Student's approximation serves."""
_CELLS = (np.arange(1000) + 0.5) / 1000
"""Midpoints over which the observed sd is averaged: right to 0.002 (tests/test_power.py)."""


# --------------------------------------------------------------------------------------------------------- the pairs


@dataclass(frozen=True, slots=True)
class Paired:
    """Variant against start on the same seeds: effects are variant minus start, in the metric's unit."""

    n: int
    effect: float | None
    """Mean over the seeds; None without a good pair."""
    error: float | None
    """Standard error of the mean, sd / sqrt(n); None below two pairs."""
    sd: float | None
    """Standard deviation of one paired effect (n - 1)."""
    correlation: float | None
    """Pearson's, over seeds, between start and variant: near 1 is why pairs need fewer runs."""


def paired(start: Sequence[float], variant: Sequence[float]) -> Paired:
    """Summary of pairs that share their seed, in the same order."""
    effects = [after - before for before, after in zip(start, variant, strict=True)]
    sd = deviation(effects)
    try:
        correlation: float | None = statistics.correlation(start, variant)
    except statistics.StatisticsError:  # fewer than two pairs, or one side without any spread
        correlation = None
    return Paired(len(effects), statistics.fmean(effects) if effects else None,
                  None if sd is None else sd / math.sqrt(len(effects)), sd, correlation)


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1), None below two values."""
    return statistics.stdev(values) if len(values) > 1 else None


# ---------------------------------------------------------------------------------------------------------- the test


def chance(effect: float, sd: float, pairs: int, level: float, floor: float = 0.0) -> float:
    """Chance that the one-sided Student test at ``level`` finds ``effect`` in ``pairs`` (two or more) differences of
    true standard deviation ``sd``, whose observed sd is never believed below ``floor``.

    Without a floor the statistic is Student's noncentral t of pairs - 1 degrees of freedom and noncentrality
    effect * sqrt(pairs) / sd (Johnson, Kotz and Balakrishnan, Continuous univariate distributions 2, chapter 31).
    With one it is averaged over the observed sd, which is sd * sqrt(chi2 / (pairs - 1)) and independent of the mean.
    """
    sd = max(sd, 1e-12)
    shift, needed, degrees = effect * math.sqrt(pairs) / sd, quantile(level, pairs), pairs - 1
    if floor <= 0:
        return 1.0 - float(special.nctdtr(degrees, shift, needed))
    return float(np.mean(special.ndtr(shift - needed * np.maximum(_observed(degrees), floor / sd))))


@functools.cache
def _observed(degrees: int) -> npt.NDArray[np.float64]:
    """The observed sd at each of _CELLS, for a true one of 1."""
    return np.asarray(np.sqrt(special.chdtri(degrees, 1 - _CELLS) / degrees))


def visible(sd: float, pairs: int, level: float, floor: float = 0.0, power: float = 0.8) -> float:
    """The minimal detectable effect: the smallest one that ``chance`` finds with ``power``."""
    low, high = 0.0, max(sd, floor, 1e-12)
    while chance(high, sd, pairs, level, floor) < power:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle, sd, pairs, level, floor) >= power else (middle, high)
    return high


def pairs_for(effect: float, sd: float, level: float, floor: float = 0.0, power: float = 0.8) -> int | None:
    """Fewest pairs with which ``chance`` finds ``effect`` with ``power``; None: more than MOST_PAIRS."""
    return next((pairs for pairs in range(2, MOST_PAIRS + 1) if chance(effect, sd, pairs, level, floor) >= power), None)


# --------------------------------------------------------------------------------------------------- spread, measured


def spread(sd: float, degrees: int, confidence: float = 0.9) -> tuple[float, float]:
    """Two-sided interval of the true sd behind one estimated on ``degrees`` degrees of freedom (chi-square)."""
    tail = (1 - confidence) / 2
    low, high = (sd * math.sqrt(degrees / float(special.chdtri(degrees, p))) for p in (tail, 1 - tail))
    return low, high


def same_spread(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of "equal variances" for paired values (Pitman 1939, Morgan 1939): sum and difference are
    uncorrelated exactly then. 1 below four pairs, or where one of them has no spread."""
    n = len(first)
    sums = [a + b for a, b in zip(first, second, strict=True)]
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    r = correlation(sums, gaps)
    if n < 4 or r is None:
        return 1.0
    return _two_sided(r * math.sqrt((n - 2) / max(1 - r * r, 1e-12)), n - 2)


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None where one side has no spread."""
    a, b = np.subtract(x, np.mean(x)), np.subtract(y, np.mean(y))
    size = math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, float(a @ b) / size)) if size > 0 else None


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line through several groups that share its slope and have each their own height."""

    slope: float
    error: float
    """Standard error of the slope."""
    p: float
    """Two-sided p-value of "no slope"."""
    share: float
    """Share of the variance within the groups that the line explains, adjusted for its degree of freedom (0 or more:
    chance alone would otherwise explain 1 / degrees of it)."""
    degrees: int
    """Residual degrees of freedom."""


def line(groups: Sequence[Sequence[tuple[float, float]]]) -> Line | None:
    """Least squares of y on x, both centred within each group. None where x never differs, or fewer than two degrees
    of freedom are left."""
    parts = [np.array(group, float) - np.mean(group, axis=0) for group in groups if len(group) > 1]
    if not parts:
        return None
    x, y = np.concatenate(parts).T
    degrees = len(x) - len(parts) - 1
    size, total = float(x @ x), float(y @ y)
    if degrees < 2 or size <= 0:
        return None
    slope = float(x @ y) / size
    rest = max(total - slope * slope * size, 0.0)
    error = math.sqrt(rest / degrees / size)
    share = max(0.0, 1 - (rest / degrees) / (total / (degrees + 1))) if total > 0 else 0.0
    p = _two_sided(slope / error, degrees) if error > 0 else float(slope == 0)
    return Line(slope, error, p, share, degrees)


def _two_sided(t: float, degrees: int) -> float:
    return 2 * float(special.stdtr(degrees, -abs(t)))


# ----------------------------------------------------------------------------------------------------------- the order


@dataclass(frozen=True, slots=True)
class Order:
    """How well two orders of the same ``n`` things agree: Spearman's ``rho``, and the one-sided p-value of "no better
    than chance", exact up to EXACT things. ``least``: the p-value of a perfect agreement."""

    n: int
    rho: float
    p: float
    least: float


def order(first: Sequence[float], second: Sequence[float]) -> Order | None:
    """Spearman's rank correlation, ties at their mean rank. None where one side is all ties, or below three things."""
    a, b = _ranks(first), _ranks(second)
    rho = correlation(a, b)
    if len(a) < 3 or rho is None:
        return None
    return Order(len(a), rho, _by_chance(a, b, rho), _by_chance(a, a, 1.0))


def _by_chance(a: Sequence[float], b: Sequence[float], rho: float) -> float:
    """Chance that a random order of ``b`` agrees with ``a`` at least as well as ``rho``."""
    n = len(a)
    if n > EXACT:
        t = rho * math.sqrt((n - 2) / max(1 - rho * rho, 1e-12))
        return float(special.stdtr(n - 2, -t))
    orders = np.array(list(itertools.permutations(b)))
    met = orders @ np.array(a) >= float(np.dot(a, b)) - 1e-9
    return float(np.mean(met))


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
            for value in values]
