"""Ablation: may a merge be taken out of the tip again? Pure: no clock, disk, net or chance.

Asked of each merge's own paired differences "tip without it" minus "tip" on seeds that nothing had used before, signed
so that negative means that the removal is better. At each number of pairs in ``looks``, in this order:

* **keep**: the lower one-sided Student bound is above 0, so the removal is shown to be worse;
* **remove**: the upper bound is below ``margin``, so the removal is shown to lose less than that (non-inferiority);
* **undecided** at the last look: nothing is shown, and the merge stays.

The level of each bound is alpha / ((merges + 1) * looks): the one more is the test of several removals together.
By Bonferroni, whatever the dependence (all ablations share the tip's runs), the chance that an audit takes out *any*
merge whose removal loses ``margin`` or more, or several that lose it together, is at most alpha; the chance of any
false "removal is worse" is at most alpha too. A merge that does harm is removed with the power of ``power.chance``.

The margin (``margin``) is the owner's ``judge.audit_margin``, by default the judge's floor: an effect that the owner
does not believe in one pair is no reason to keep code. It is never more than half of what the merge was certified to
gain at least (the end nearer to zero of its interval). So a merge whose certified effect is real, and still there
beside the later ones, lies beyond its margin and falls under the guarantee. A commit that no certificate
stands behind has the whole margin.

What a commit is worth is asked beside all the others, so where some do harm nothing is known of the rest without them:
one of those that do goes, and the rest is asked again (``unsettled``).

Does not cover: differences far from Gaussian; merges that help only together (each alone may then be undecided or
removed, and the combined test measures the rest); several audits of one campaign, each of which has an alpha of its
own, those that ask again too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from agent.evidence import Sample, sample
from agent.records import Ablation, Estimate, Removal

Outcome = Literal["keep", "remove", "undecided"]
SHARE = 0.5
"""Of what a merge was certified to gain at least, the most that its removal may lose."""
FAILS = "the tip fails"
"""The rule by which a commit goes without which alone the tip runs."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Fixed before the first run of an audit."""

    alpha: float
    merges: int
    """Merges that are examined."""
    looks: tuple[int, ...]
    floor: float

    @property
    def level(self) -> float:
        """One-sided level of each bound."""
        return self.alpha / ((self.merges + 1) * len(self.looks))


@dataclass(frozen=True, slots=True)
class Decision:
    """What the differences show. ``evidence`` is what a reader needs to do the sum again."""

    outcome: Outcome
    reason: str
    evidence: dict[str, float | str]


def looks_of(pairs: int) -> tuple[int, ...]:
    """Half of the pairs, and all; below four pairs only all. Raises ValueError below two."""
    if pairs < 2:
        raise ValueError("one pair shows no spread")
    return (pairs,) if pairs < 4 else ((pairs + 1) // 2, pairs)


def margin(wanted: float | None, floor: float, certified: Estimate | None) -> float:
    """What the removal of one merge may lose, in the metric's unit: ``wanted`` or the floor, and at most SHARE of the
    certified effect's end nearer to zero. 0 where its interval holds zero: then only a removal that is better counts.
    """
    most = floor if wanted is None else wanted
    if certified is None:
        return most
    nearer = min(abs(certified.low), abs(certified.high)) if certified.low * certified.high > 0 else 0.0
    return min(most, SHARE * nearer)


def decide(effects: Sequence[float], allowed: float, rule: Rule) -> Decision | int:
    """The decision, or how many pairs are wanted in all. ``allowed``: the margin of this merge.

    Raises ValueError when there are more effects than the last look.
    """
    n, last = len(effects), max(rule.looks)
    if n > last:
        raise ValueError(f"{n} pairs where the rule looks at {last} at most")
    if n not in rule.looks:
        return min(look for look in rule.looks if look > n)
    found = sample(effects, rule.floor)
    low, high = bounds(found, rule.level)
    evidence: dict[str, float | str] = {
        "rule": "paired t, non-inferiority", "sigma": found.sd, "nu": float(n - 1), "level": rule.level,
        "margin": allowed, "low": low, "high": high}
    if low > 0:
        return Decision("keep", f"without it the tip is worse on {sum(e > 0 for e in effects)} of {n} pairs", evidence)
    if high < allowed:
        how = "better" if high < 0 else f"worse by less than {allowed:.4f}"
        return Decision("remove", f"without it the tip is {how}, {n} pairs", evidence)
    if n == last:
        return Decision("undecided", f"{n} pairs show neither that it helps nor that it can go", evidence)
    return min(look for look in rule.looks if look > n)


def harmful(evidence: Mapping[str, float | str]) -> bool:
    """Whether what was shown is that the tip is better without it, not only little worse."""
    return evidence.get("rule") == FAILS or float(evidence.get("high", 0.0)) < 0


def unsettled(audit: int, found: Sequence[Ablation], removals: Sequence[Removal]) -> bool:
    """Whether that audit took out what does harm, and of some other commit did not show that the tip needs it: that
    must be asked again, since it was measured beside what did harm."""
    taken = {commit for one in removals if one.audit == audit for commit in one.removes}
    alone = {one.commits[0]: one for one in found if one.audit == audit and len(one.commits) == 1}
    return bool(taken) and all(harmful(alone[commit].evidence) for commit in taken) and any(
        one.outcome != "keep" for commit, one in alone.items() if commit not in taken)


def bounds(found: Sample, level: float) -> tuple[float, float]:
    """Lower and upper one-sided bound, each at ``level``."""
    high = found.bound(level)
    return 2 * found.mean - high, high
