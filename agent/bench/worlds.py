"""Simulated worlds for ``bench policy``: proposals of known worth, and runs that show them through noise.

Unit of loss: 1e-4 of the metric (u), lower is better. Calibrated on public logs of about 2,000 experiments
(docs/LOG.md, section "The gate"):

* A proposal is good with chance ``good`` (lognormal gain of median ``median``, log-sd 0.9), without effect in 30 % of
  cases, and harmful otherwise (lognormal, median 10 u, log-sd 1.1).
* Gains deplete: after a true gain of G a gain b is worth b exp(-G / 150); several at once, whose present gains sum to
  s, are worth 150 log(1 + s / 150), so that merging in batches earns nothing by itself. Harm does not deplete.
* Patches that are on together over the tip interact: each pair by N(0, (0.25 min(|g|, |h|))^2). One pair in ten does
  not merge.
* A wall-clock run is mu + sigma (0.5 u_seed + sqrt(0.75) e) + drift of the machine, AR(1) over 80 runs.
* A run at charged steps is mu + a_seed + the interaction with that seed of each patch in the tip and the arm, a fixed
  number of the two, + what differs between equal runs. A quarter of the patches pair badly.

Does not cover: faults, patches that slow a run, or effects that depend on the length of training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

SCALE = 150.0
"""True gain in u after which a good patch is worth 1 / e of what it was."""
NULLS, CLASHES, INTERACTION, MEMORY = 0.30, 0.10, 0.25, 80.0
MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Regime:
    """One kind of search space and noise; losses in u."""

    sd: float
    """Of the loss between seeds."""
    good: float
    median: float
    paired: float = 0.0
    """Typical sd of a patch's interaction with the seed; 0: a wall-clock run."""
    badly: float = 0.0
    """The same of a badly paired patch."""
    repeat: float = 0.0
    """Sd between equal runs at charged steps."""


REGIMES = {
    "easy": Regime(5.0, 0.18, 10.0),
    "h100": Regime(4.0, 0.13, 8.0),
    "real": Regime(10.0, 0.13, 8.0),
    "hard": Regime(25.0, 0.10, 6.0),
    "charged-h100": Regime(50.0, 0.13, 8.0, paired=15.0, badly=50.0, repeat=5.0),
    "charged-cpu": Regime(100.0, 0.13, 8.0, paired=25.0, badly=90.0),
}


@dataclass(frozen=True, slots=True)
class Proposal:
    """A patch: its gain in u before any depletion, and its sd over seeds at charged steps."""

    gain: float
    paired: float


class World:
    """One campaign's truth. A tip is named by its number of merges; earlier ones can still be run.

    Equal arguments make equal worlds. Nothing that a policy asks for changes what proposals it will be shown.
    """

    def __init__(self, regime: Regime, seed: int, drift: float = 0.0, null: bool = False) -> None:
        self.regime, self.drift, self.null = regime, drift * regime.sd, null
        self.key = seed
        self.proposals: list[Proposal] = []
        self.tips: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        self.runs = 0
        self._ideas, self._noise = random.Random(f"ideas {seed}"), random.Random(f"noise {seed}")
        self._now = self._noise.gauss(0.0, self.drift)
        self._seen: dict[tuple[int, int], float] = {}

    def draw(self) -> int:
        """Number of a new proposal."""
        rng, regime = self._ideas, self.regime
        kind, size, pairing = rng.random(), rng.gauss(0.0, 1.0), rng.random()
        spread = rng.gauss(0.0, 1.0)
        if self.null or regime.good <= kind < regime.good + NULLS:
            gain = 0.0
        elif kind < regime.good:
            gain = regime.median * math.exp(0.9 * size)
        else:
            gain = -10.0 * math.exp(1.1 * size)
        paired = regime.badly * math.exp(0.3 * spread) if pairing < 0.25 else regime.paired * math.exp(0.4 * spread)
        self.proposals.append(Proposal(gain, paired))
        return len(self.proposals) - 1

    def clash(self, a: int, b: int) -> bool:
        """Whether two proposals do not merge."""
        low, high = min(a, b), max(a, b)
        return _uniform(self.key, 1, low, high) < CLASHES

    def worth(self, arm: Sequence[int], tip: int | None = None) -> float:
        """True gain in u of switching on ``arm`` over a tip, the newest if left out."""
        depleted = math.exp(-max(self.tips[-1 if tip is None else tip][0], 0.0) / SCALE)
        gains = [p.gain * (depleted if p.gain > 0 else 1.0) for p in (self.proposals[number] for number in arm)]
        if len(arm) == 1:
            return gains[0]
        total = SCALE * math.log1p(sum(g for g in gains if g > 0) / SCALE) + sum(g for g in gains if g < 0)
        for i, a in enumerate(arm):
            if gains[i]:
                for j in range(i):
                    if gains[j]:
                        low, high = min(a, arm[j]), max(a, arm[j])
                        total += INTERACTION * min(abs(gains[i]), abs(gains[j])) * _normal(self.key, 2, low, high)
        return total

    def merge(self, arm: Sequence[int]) -> float:
        """Move the tip. Returns the true gain."""
        gain = self.worth(arm)
        total, merged = self.tips[-1]
        self.tips.append((total + gain, (*merged, *arm)))
        return gain

    def run(self, arm: Sequence[int], seed: int, tip: int | None = None) -> float:
        """Loss in u of one run."""
        self.runs += 1
        regime, number = self.regime, len(self.tips) - 1 if tip is None else tip
        level = -self.tips[number][0] - (self.worth(arm, number) if arm else 0.0)
        if self.drift:
            kept = math.exp(-1 / MEMORY)
            self._now = kept * self._now + math.sqrt(1 - kept * kept) * self._noise.gauss(0.0, self.drift)
            level += self._now
        if not regime.paired:
            return level + regime.sd * (0.5 * _normal(self.key, 3, seed, 0)
                                        + math.sqrt(0.75) * self._noise.gauss(0.0, 1.0))
        if (number, seed) not in self._seen:
            self._seen[number, seed] = regime.sd * _normal(self.key, 3, seed, 0) + sum(
                self._interaction(patch, seed) for patch in self.tips[number][1])
        return (level + self._seen[number, seed] + sum(self._interaction(patch, seed) for patch in arm)
                + (self._noise.gauss(0.0, regime.repeat) if regime.repeat else 0.0))

    def _interaction(self, patch: int, seed: int) -> float:
        return self.proposals[patch].paired * _normal(self.key, 4, seed, patch)


def _uniform(*words: int) -> float:
    """A number in (0, 1) that is a fixed function of the words (splitmix64)."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return ((state >> 11) + 0.5) / (1 << 53)


def _normal(*words: int) -> float:
    """A standard normal number that is a fixed function of the words."""
    return float(special.ndtri(_uniform(*words)))
