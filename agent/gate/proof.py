"""Certification: a unit of candidates against the incumbent on seeds that neither has seen. The only way to a merge.

By intention to treat: a run of the unit that fails is a failed certification; a failure of the incumbent voids the
pair. In the paired gear the evidence is a one-sided Student t test of the unit's own differences, since patches differ
tenfold in how well they pair, at planned looks which share the level evenly. In the weighing gear the spread of a run
is known from many, and the evidence is an e-value with an inflated spread, which may be looked at after every pair.
Both are e-values of at least 1 / level when they merge (agent/evidence.py), and e-LOND sets the level beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from agent import evidence
from agent.gate.words import Gear, Outcome

Numbers = dict[str, float | str]


@dataclass(slots=True)
class Pair:
    """Runs of one fresh seed; None: not back yet."""

    seed: int
    base: Outcome | None = None
    arm: Outcome | None = None

    @property
    def complete(self) -> bool:
        return self.base is not None and self.arm is not None


@dataclass(slots=True)
class Proof:
    """One certification. Its level, looks and spread are frozen when it starts."""

    unit: tuple[str, ...]
    tip: int
    gear: Gear
    looks: tuple[int, ...]
    hypothesis: int
    merges: int
    level: float
    expected: float
    """Gain that selection promised; only for giving up early."""
    sd: float
    degrees: float
    """Of the weighing gear's run-to-run sd."""
    floor: float
    futile: float
    half: bool = False
    """A part of a unit that failed before."""
    pairs: list[Pair] = field(default_factory=list)

    def wants(self) -> bool:
        """Whether another pair may start: never beyond the next look, so that looks are where they were planned."""
        n = sum(pair.complete for pair in self.pairs)
        return len(self.pairs) < next((look for look in self.looks if look > n), 0)

    def effects(self) -> list[float]:
        """Differences of the good pairs, unit less incumbent: negative is better."""
        return [pair.arm.loss - pair.base.loss for pair in self.pairs
                if pair.base and pair.arm and not pair.base.fault and not pair.arm.fault]

    def fault(self) -> str | None:
        """Of the unit's own run."""
        return next((pair.arm.fault for pair in self.pairs if pair.arm and pair.arm.fault), None)

    def verdict(self) -> tuple[bool | None, str]:
        """(merge, why); None: more pairs are needed. Only asked when every pair is back."""
        effects = self.effects()
        n = len(effects)
        if n in self.looks and self._shown(effects):
            return True, f"better over {n} fresh pairs"
        if n >= self.looks[-1]:
            return False, f"not shown after {n} fresh pairs"
        if n >= 2 and -math.fsum(effects) / n < self.futile * self.expected:
            return False, f"not reproduced on {n} fresh pairs"
        return None, ""

    def _shown(self, effects: Sequence[float]) -> bool:
        if self.gear == "paired":
            return evidence.sample(effects, self.floor).p <= self.level / len(self.looks)
        return self._e(effects) >= 1 / self.level

    def _e(self, effects: Sequence[float]) -> float:
        spread = evidence.inflated(self.sd, self.degrees)
        return evidence.gaussian_e(-math.fsum(effects) / len(effects) / spread, len(effects) / 2)

    def numbers(self) -> Numbers:
        """The unit's effect (negative is better) with its 95 % interval, from these pairs alone, and the evidence."""
        effects = self.effects()
        told: Numbers = {"gear": self.gear, "pairs": float(len(effects)), "hypothesis": float(self.hypothesis),
                         "merges": float(self.merges), "level": self.level, "expected": -self.expected}
        if len(effects) < 2:
            return told
        found = evidence.sample(effects, self.floor)
        if self.gear == "paired":
            low, high = found.interval(0.95)
            told |= {"t": found.t, "p": found.p, "look_level": self.level / len(self.looks), "e": 1 / self.level,
                     "sd": found.sd}
        else:
            half = evidence.quantile(0.025, int(self.degrees) + 1) * self.sd * math.sqrt(2 / found.n)
            low, high = found.mean - half, found.mean + half
            told |= {"e": self._e(effects), "sd": self.sd}
        return told | {"effect": found.mean, "low": low, "high": high}
