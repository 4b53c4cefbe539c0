"""The judge: given the pairs of one candidate, ask for more, accept or reject. Pure: no clock, disk, net or chance.

Two stages, because looking for a good patch and proving it are different things:

* **Screen**, on seeds that the incumbent has run already: one run a pair. A candidate that is not better on its first
  seed is dropped. One that is may go on to a second, unless the first is convincing by itself (``noise`` is the sd that
  a paired difference usually has on this target). Whatever is seen here chooses; it is never evidence.
* **Certify**, on fresh seeds that nothing has used before, both sides run anew. At each number of pairs in ``looks`` a
  one-sided Student t test of this candidate's own differences is made, at a level that was fixed when its
  certification began: e-LOND's for this certification (``evidence.level``), divided over the looks. The confirming
  split decides, which never selects. Patches differ tenfold in how well they pair, so no pooled sd is used; the sd is
  never taken below ``floor``.

Since the seeds are fresh and the level is predictable, a test that rejects is an e-value of 1 / level, whatever was
screened before and however often: the false discovery rate of all merges of a campaign, and the chance of any merge
in a campaign without a true effect, stay below alpha if paired differences are Gaussian.

Between looks a candidate is dropped as futile when its t is above ``FUTILE_T``: that costs power, never validity. A
run that fails rejects its candidate, whatever its other runs showed (intention to treat); where the incumbent fails,
the caller takes another seed.

Covers: chance from run-to-run noise, the pick of the lucky among many, and drift, since both sides of a fresh pair run
at the same time. Does not cover: transfer to longer runs or other machines, or what merges do to each other later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agent.config import Judge
from agent.evidence import Sample, level, paired_e, posterior, quantile, sample
from agent.records import Estimate, Outcome, Pair

FUTILE_T = -1.0
CONVINCING = 0.9
"""Chance of an effect after one screening pair, beyond which a second is not asked for."""
SCREENS = 2


@dataclass(frozen=True, slots=True)
class Rule:
    """Parameters of the decision, fixed before the campaign starts."""

    alpha: float
    looks: tuple[int, ...]
    """Numbers of fresh pairs at which a certification is decided."""
    floor: float
    min_effect: float = 0.0
    direction: Literal["min", "max"] = "min"
    select: str = "val"
    confirm: str | None = "confirm"

    @property
    def split(self) -> str:
        """The split that certifies."""
        return self.confirm or self.select


def rule_of(judge: Judge, direction: Literal["min", "max"], sealed: bool) -> Rule:
    """The rule of a campaign: its ``[judge]``, its metric's direction, and whether there is a split to certify on."""
    return Rule(judge.alpha, tuple(judge.looks), judge.floor, judge.min_effect, direction,
                confirm="confirm" if sealed else None)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where in the campaign a certification began, which fixes its level."""

    hypothesis: int = 1
    """Number of this certification, from 1."""
    merges: int = 0
    """Merges before it."""

    def level(self, rule: Rule) -> float:
        """One-sided level of each look."""
        return level(rule.alpha, self.hypothesis, self.merges) / len(rule.looks)


@dataclass(frozen=True, slots=True)
class Ask:
    """Run this many pairs more, then ask again."""

    pairs: int
    fresh: bool = False
    """On fresh seeds, to certify; else on the incumbent's."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """The end of a candidate."""

    outcome: Outcome
    reason: str
    estimate: Estimate | None
    evidence: dict[str, float | str]


def judge(pairs: Sequence[Pair], rule: Rule, standing: Standing, noise: float = 0.0) -> Ask | Ruling:
    """What to do with a candidate that has these pairs. ``noise``: usual sd of a paired difference, at least the
    floor; it only chooses. Raises ValueError when the rule has no looks."""
    if not rule.looks:
        raise ValueError("a rule without looks never decides")
    failed = next((pair for pair in pairs if pair.fault), None)
    if failed:
        how = "was stopped early" if failed.fault == "behind" else f"failed: {failed.fault}"
        return Ruling("rejected", f"its run on seed {failed.seed} {how}",
                      estimate(pairs, rule), {"fault": str(failed.fault)})
    fresh = [pair for pair in pairs if pair.fresh]
    if fresh:
        return _certify(fresh, pairs, rule, standing)
    return _screen(pairs, rule, max(noise, rule.floor, 1e-12))


def estimate(pairs: Sequence[Pair], rule: Rule, confidence: float = 0.95) -> Estimate | None:
    """Mean effect in the metric's own sign with its two-sided Student interval. None below two good pairs.

    From the fresh pairs on the certifying split; of a candidate that never came so far, from its screening pairs.
    """
    good = [pair for pair in pairs if not pair.fault]
    fresh = [pair for pair in good if pair.fresh]
    used = fresh if len(fresh) > 1 else good
    if len(used) < 2:
        return None
    found = sample([pair.effect(rule.split) for pair in used], rule.floor)
    low, high = found.interval(confidence)
    return Estimate(rule.split, found.mean, low, high, found.n, found.sd, confidence)


def _screen(pairs: Sequence[Pair], rule: Rule, noise: float) -> Ask | Ruling:
    """On the selecting split: more pairs, a certification, or the end."""
    if not pairs:
        return Ask(1)
    effects = _signed(pairs, rule.select, rule)
    n, mean = len(effects), sum(effects) / len(effects)
    if mean >= 0:
        seen = "its first seed" if n == 1 else f"{n} seeds"
        return Ruling("rejected", f"no better than the incumbent on {seen} ({_unsign(mean, rule):+.4f})",
                      estimate(pairs, rule), {"rule": "screen"})
    chance, _ = posterior(-mean / noise * n, n)
    if n < SCREENS and chance < CONVINCING:
        return Ask(1)
    return Ask(min(rule.looks), fresh=True)


def _certify(fresh: Sequence[Pair], pairs: Sequence[Pair], rule: Rule, standing: Standing) -> Ask | Ruling:
    """On the certifying split, by this candidate's own differences."""
    n, last = len(fresh), max(rule.looks)
    effects = _signed(fresh, rule.split, rule)
    found = sample(effects, rule.floor)
    each = standing.level(rule)
    if n in rule.looks and found.bound(each) < -rule.min_effect:
        won = sum(effect < 0 for effect in effects)
        return Ruling("accepted", f"better on {won} of {n} fresh pairs", estimate(pairs, rule),
                      _evidence(found, rule, standing))
    if n >= last or (n > 1 and found.t > FUTILE_T) or (n == 1 and effects[0] >= 0):
        why = "futile" if n < last else f"not shown after {n} fresh pairs"
        t = f", t = {found.t:.2f}" if n > 1 else ""
        needed = f", below {-quantile(each, n):.2f} was needed" if n >= last > 1 else ""
        return Ruling("rejected", f"{why}: mean effect {_unsign(found.mean, rule):+.4f} on {rule.split}{t}{needed}",
                      estimate(pairs, rule), _evidence(found, rule, standing))
    return Ask(min(look for look in rule.looks if look > n) - n, fresh=True)


def _evidence(found: Sample, rule: Rule, standing: Standing) -> dict[str, float | str]:
    """What a reader needs to do the sum again: ``ratchet recompute``."""
    each = standing.level(rule)
    shown: dict[str, float | str] = {
        "rule": "paired t on fresh seeds", "split": rule.split, "sigma": found.sd, "nu": float(found.n - 1),
        "level": each, "hypothesis": float(standing.hypothesis), "merges": float(standing.merges)}
    if found.n > 1:
        shown |= {"t": found.t, "p": found.p, "bound": found.bound(each), "e": 1 / each if found.bound(
            each) < -rule.min_effect and found.n in rule.looks else 0.0, "e_needed": 1 / each,
            "e_anytime": paired_e(found)}
    return shown


def _signed(pairs: Sequence[Pair], split: str, rule: Rule) -> list[float]:
    sign = 1.0 if rule.direction == "min" else -1.0
    return [sign * pair.effect(split) for pair in pairs]


def _unsign(effect: float, rule: Rule) -> float:
    return effect if rule.direction == "min" else -effect
