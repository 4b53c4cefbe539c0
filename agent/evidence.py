"""Evidence: what paired or unpaired runs say about an effect, and how much of it a merge needs. Pure arithmetic.

Effects are signed so that negative is better, except in ``posterior`` and ``gaussian_e``, which speak of *gains* in
units of the noise (positive is better), as their sources do.

Two ideas carry the gate:

* **A level that is fixed before the runs is an e-value.** A test of level a that rejects has the e-value 1 / a, one
  that does not has 0: its mean without an effect is at most 1. So tests at predictable levels feed e-LOND (Xu and
  Ramdas, "Online multiple testing with e-values", arXiv 2311.06412), which keeps the false discovery rate of all
  merges at alpha at every time, under any dependence, and the chance of any merge in a campaign without a true effect
  too. Measured here (docs/LOG.md): with three to eight pairs such a test finds 10 to 30 points more than an e-process.
* **An e-process may be looked at whenever one likes.** ``paired_e`` is the scale-invariant one of a patch's own
  differences and is shown beside the test; ``gaussian_e``, for a known spread, certifies in the weighing gear of gate/.

Does not cover: differences that are far from Gaussian (the planned tests are Student's), or a trend in time, which
pairs that run side by side do not see.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEAD = 10
"""Terms by which the level stream starts late: the first hypotheses then share alpha nearly evenly."""
DELTAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Effects in standard deviations of one pair over which ``paired_e`` is mixed, evenly."""
GAINS, GAIN_WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0), (0.10, 0.25, 0.30, 0.25, 0.10)
"""Mixture of ``gaussian_e``."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Signed paired effects (negative is better). ``sd`` is the observed one, or the floor where that is larger."""

    n: int
    mean: float
    sd: float

    @property
    def t(self) -> float:
        """Student's t against no effect, with n - 1 degrees of freedom."""
        return self.mean / (self.sd / math.sqrt(self.n))

    @property
    def p(self) -> float:
        """One-sided p-value of "not better"; 1 below two pairs."""
        return float(special.stdtr(self.n - 1, self.t)) if self.n > 1 else 1.0

    def bound(self, level: float) -> float:
        """Upper end of the one-sided confidence interval at ``level``."""
        return self.mean + quantile(level, self.n) * self.sd / math.sqrt(self.n)

    def interval(self, confidence: float) -> tuple[float, float]:
        """The two-sided Student interval."""
        half = quantile((1 - confidence) / 2, self.n) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def sample(effects: Sequence[float], floor: float) -> Sample:
    """Mean and sd of one or more effects. The sd is never below ``floor``: a deterministic target can show two equal
    differences by chance, and a no-op shows none at all."""
    n = len(effects)
    mean = math.fsum(effects) / n
    sd = math.sqrt(math.fsum((e - mean) ** 2 for e in effects) / (n - 1)) if n > 1 else floor
    return Sample(n, mean, max(sd, floor, 1e-12))


def quantile(level: float, n: int) -> float:
    """Upper quantile of Student's t of ``n`` pairs. From scipy.special: scipy.stats takes a second to import."""
    return -float(special.stdtrit(n - 1, level))


# --------------------------------------------------------------------------------------------------- over a campaign


def share(hypothesis: int) -> float:
    """Term ``hypothesis`` (from 1) of a sequence that sums to 1: (t + LEAD) ** -1.5, normalised."""
    return float((hypothesis + LEAD) ** -1.5 / special.zeta(1.5, LEAD + 1))


def level(alpha: float, hypothesis: int, merges: int) -> float:
    """e-LOND's level for certification number ``hypothesis`` (from 1) after ``merges`` merges: alpha * share * (R + 1).

    A merge needs an e-value of at least 1 / level. Never more than alpha itself. Raises ValueError for a hypothesis
    below 1 or more merges than hypotheses before it.
    """
    if hypothesis < 1 or not 0 <= merges < hypothesis:
        raise ValueError(f"no level for hypothesis {hypothesis} after {merges} merges")
    return min(alpha, alpha * share(hypothesis) * (merges + 1))


# ------------------------------------------------------------------------------------------------------- e-processes


def paired_e(found: Sample) -> float:
    """e-value of a better candidate by n paired differences of unknown spread.

    The likelihood ratio of Student's t under effects of ``DELTAS`` standard deviations against none, which depends on
    the data by t alone (Wang and Ramdas, "Anytime-valid t-tests and confidence sequences for Gaussian means with
    unknown variance", arXiv 2310.03722). A martingale in n as long as the floor does not bind, which only lowers it. 1
    below two pairs.
    """
    if found.n < 2:
        return 1.0
    t = -found.t  # gains are positive
    degrees = found.n - 1
    cosine = t / math.sqrt(t * t + degrees)
    logs = [-found.n * d * d / 2 + _log_moment(degrees, math.sqrt(found.n) * d * cosine) - _log_moment(degrees, 0.0)
            for d in DELTAS]
    return math.exp(min(700.0, float(special.logsumexp(logs)) - math.log(len(DELTAS))))


def _log_moment(power: int, tilt: float) -> float:
    """log of the integral over u > 0 of u ** power * exp(-u**2 / 2 + tilt * u)."""
    top = (tilt + math.sqrt(tilt * tilt + 4 * power)) / 2  # where the integrand is largest
    u = np.linspace(max(top - 12.0, 0.0), top + 12.0, 301)[1:]  # smooth: the error is 1e-9
    return float(special.logsumexp(power * np.log(u) - u * u / 2 + tilt * u)) + math.log((u[-1] - u[0]) / (len(u) - 1))


def gaussian_e(gain: float, information: float) -> float:
    """e-value of a mean gain of ``gain`` noise units whose variance is 1 / ``information``: a mixture of one-sided
    Gaussian likelihood ratios (Robbins 1970). An e-process for "gain <= 0" if the unit is not below the true noise."""
    logs = [math.log(weight) + g * information * gain - g * g * information / 2
            for g, weight in zip(GAINS, GAIN_WEIGHTS, strict=True)]
    return math.exp(min(700.0, float(special.logsumexp(logs))))


def inflated(sd: float, degrees: float) -> float:
    """An sd that was estimated on ``degrees`` degrees of freedom, made larger against having been lucky: s (1 + 1 /
    sqrt(nu))."""
    return sd * (1 + 1 / math.sqrt(degrees))


@dataclass(frozen=True, slots=True)
class Pooled:
    """A variance from several cells: sum of squares over degrees of freedom."""

    squares: float = 0.0
    degrees: int = 0

    def plus(self, values: Sequence[float]) -> Pooled:
        """With one more cell of replicated values; fewer than two add nothing."""
        if len(values) < 2:
            return self
        mean = math.fsum(values) / len(values)
        return Pooled(self.squares + math.fsum((v - mean) ** 2 for v in values), self.degrees + len(values) - 1)

    @property
    def sd(self) -> float:
        """Raises ZeroDivisionError before the first cell."""
        return math.sqrt(self.squares / self.degrees)


# ------------------------------------------------------------------------------------------------------ what to expect


@functools.cache
def prior() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(gains in noise units, weights) that screening expects of a proposal before any run.

    15 % good, lognormal of median 1.2 and log-sd 1; 30 % without effect; 55 % harm, lognormal of median 1.5 and log-sd
    1.1. Fixed: from public logs of two thousand experiments; learning it from the campaign gained nothing.
    """
    nodes = [(i + 0.5) / 12 for i in range(12)]
    good = [1.2 * math.exp(float(special.ndtri(u))) for u in nodes]
    harm = [-1.5 * math.exp(1.1 * float(special.ndtri(u))) for u in nodes]
    return (*good, 0.0, *harm), (*[0.15 / 12] * 12, 0.30, *[0.55 / 12] * 12)


def posterior(weighted: float, information: float) -> tuple[float, float]:
    """(chance that the gain is positive, mean gain counting losses as they are) after data with sufficient statistic
    ``weighted`` = information * mean gain, in noise units."""
    gains, weights = prior()
    logs = [math.log(w) + g * weighted - g * g * information / 2 for g, w in zip(gains, weights, strict=True)]
    top = max(logs)
    masses = [math.exp(value - top) for value in logs]
    total = math.fsum(masses)
    chance = math.fsum(mass for mass, g in zip(masses, gains, strict=True) if g > 0) / total
    return chance, math.fsum(mass * g for mass, g in zip(masses, gains, strict=True)) / total
