"""The judge: given the pairs of one candidate, ask for more, accept or reject. Pure: no clock, disk, net or chance.

The rule for now is a plain paired one (the interface is what a sequential e-process or a weighing design needs too):

* A candidate run that failed rejects the candidate, with its fault.
* Effects are taken within pairs (same seed, same data order, same kind of device), candidate minus incumbent, signed
  so that negative is better. Their standard deviation is the observed one, but never below ``floor``: a deterministic
  target can show two equal differences by chance.
* At each number of pairs in ``looks`` a one-sided Student t test (n - 1 degrees of freedom) is made on the selecting
  split at level alpha / (candidates x looks). By the union bound the chance of any false merge among ``candidates``
  candidates without effect is then at most alpha, if paired differences are Gaussian.
* The confirming split, which never selects, must agree: its own one-sided bound at ``CONFIRM_LEVEL`` lies below zero.
* Futility between looks only costs power, never validity: after the first pair a candidate that lost is dropped, later
  one whose t statistic is above ``FUTILE_T``.

Covers: chance of a false merge from run-to-run noise. Does not cover: dependence on the seeds shared by all candidates
of a campaign, drift between an incumbent's banked run and the candidate's, or transfer to longer runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import special

from agent.records import Estimate, Outcome, Pair

CONFIRM_LEVEL = 0.05
FUTILE_T = -1.0


@dataclass(frozen=True, slots=True)
class Rule:
    """Parameters of the decision, fixed before the campaign starts."""

    alpha: float
    candidates: int
    looks: tuple[int, ...]
    floor: float
    min_effect: float = 0.0
    direction: Literal["min", "max"] = "min"
    select: str = "val"
    confirm: str | None = "confirm"

    @property
    def level(self) -> float:
        """One-sided level of one look at one candidate."""
        return self.alpha / (self.candidates * len(self.looks))


@dataclass(frozen=True, slots=True)
class Ask:
    """Run this many pairs more, then ask again."""

    pairs: int


@dataclass(frozen=True, slots=True)
class Ruling:
    """The end of a candidate."""

    outcome: Outcome
    reason: str
    estimate: Estimate | None
    evidence: dict[str, float | str]


@dataclass(frozen=True, slots=True)
class Sample:
    """Signed paired effects of one split (negative is better), with the floored standard deviation."""

    n: int
    mean: float
    sd: float

    @property
    def t(self) -> float:
        return self.mean / (self.sd / math.sqrt(self.n))

    def bound(self, level: float) -> float:
        """Upper end of the one-sided confidence interval at ``level``."""
        return self.mean + _quantile(level, self.n) * self.sd / math.sqrt(self.n)


def judge(pairs: Sequence[Pair], rule: Rule) -> Ask | Ruling:
    """What to do with a candidate that has these pairs. Raises ValueError when the rule has no looks."""
    failed = next((pair for pair in pairs if pair.fault), None)
    if failed:
        return Ruling("rejected", f"its run on seed {failed.seed} failed: {failed.fault}",
                      estimate(pairs, rule), {"fault": str(failed.fault)})
    n, last = len(pairs), max(rule.looks)
    if n == 0:
        return Ask(1)
    effects = _signed(pairs, rule.select, rule)
    if n == 1:
        if effects[0] >= 0:
            effect = _unsign(effects[0], rule)
            return Ruling("rejected", f"no better than the incumbent on its first seed ({effect:+.4f})",
                          estimate(pairs, rule), {"rule": "first pair"})
        return Ask(1)
    sample = _sample(effects, rule.floor)
    if n in rule.looks:
        ruling = _accept(pairs, sample, rule)
        if ruling:
            return ruling
    if sample.t > FUTILE_T or n >= last:
        why = "futile" if n < last else f"not shown after {n} pairs"
        needed = f", below {-_quantile(rule.level, n):.2f} was needed" if n >= last else ""
        return Ruling("rejected", f"{why}: mean effect {_unsign(sample.mean, rule):+.4f} on {rule.select}, "
                      f"t = {sample.t:.2f}{needed}",
                      estimate(pairs, rule), {"rule": why, "t": sample.t, "level": rule.level})
    return Ask(min(look for look in rule.looks if look > n) - n)


def estimate(pairs: Sequence[Pair], rule: Rule, confidence: float = 0.95) -> Estimate | None:
    """Mean effect in the metric's own sign with its two-sided Student interval, on the confirming split if there is
    one. None below two good pairs."""
    good = [pair for pair in pairs if not pair.fault]
    if len(good) < 2:
        return None
    split = rule.confirm or rule.select
    sample = _sample([pair.effect(split) for pair in good], rule.floor)
    half = _quantile((1 - confidence) / 2, sample.n) * sample.sd / math.sqrt(sample.n)
    return Estimate(split, sample.mean, sample.mean - half, sample.mean + half, sample.n, sample.sd, confidence)


def _accept(pairs: Sequence[Pair], sample: Sample, rule: Rule) -> Ruling | None:
    bound = sample.bound(rule.level)
    if bound >= -rule.min_effect:
        return None
    evidence: dict[str, float | str] = {"rule": "paired t", "t": sample.t, "level": rule.level, "bound": bound,
                                        "p": float(special.stdtr(sample.n - 1, sample.t))}
    if rule.confirm:
        confirm = _sample(_signed(pairs, rule.confirm, rule), rule.floor)
        evidence |= {"confirm_t": confirm.t, "confirm_bound": confirm.bound(CONFIRM_LEVEL)}
        if confirm.bound(CONFIRM_LEVEL) >= 0:
            return Ruling("rejected", f"better on {rule.select} but not on the sealed {rule.confirm} split",
                          estimate(pairs, rule), evidence)
    return Ruling("accepted", f"better on {sample.n} of {sample.n} pairs" if all(e < 0 for e in _signed(
        pairs, rule.select, rule)) else f"better on average over {sample.n} pairs", estimate(pairs, rule), evidence)


def _quantile(level: float, n: int) -> float:
    """Upper quantile of Student's t of ``n`` pairs. From scipy.special: scipy.stats takes a second to import."""
    return -float(special.stdtrit(n - 1, level))


def _signed(pairs: Sequence[Pair], split: str, rule: Rule) -> list[float]:
    sign = 1.0 if rule.direction == "min" else -1.0
    return [sign * pair.effect(split) for pair in pairs]


def _unsign(effect: float, rule: Rule) -> float:
    return effect if rule.direction == "min" else -effect


def _sample(effects: Sequence[float], floor: float) -> Sample:
    n = len(effects)
    mean = math.fsum(effects) / n
    sd = math.sqrt(math.fsum((e - mean) ** 2 for e in effects) / (n - 1)) if n > 1 else floor
    return Sample(n, mean, max(sd, floor, 1e-12))
