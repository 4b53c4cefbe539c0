"""Promotion: what became of a gain at a larger preset or a longer budget. Pure: pairs at both -> a verdict.

A gain at a small budget that is gone at the next one is the field's commonest disappointment. Both ends are measured
on the same seeds, which nothing used before, and on the final split; effects are candidate minus base in the metric's
own sign, each with its two-sided 95% Student interval (sd never below ``judge.floor``). The rule, applied in this
order, speaks of the larger budget alone, but for the last step:

    reverses       the interval lies on the worse side of zero, or the changed code fails there and its base does not
    does not show  the interval holds zero: the gain may be gone, or too small for so many pairs (``visible`` says
                   which effect would have been found four times in five)
    shrinks        shown, and less than half (``KEPT``) of the effect at the campaign's budget is left
    transfers      shown, and at least half of it is left, or nothing was shown at the campaign's budget to compare with

The share that is left is a ratio of two means of unlike experiments, with Fieller's 95% interval (E. C. Fieller, "Some
problems in interval estimation", 1954), on the degrees of freedom of the end with fewer pairs. It may well reach across
``KEPT``: the verdict is the point's, and the interval says how sure it is.

Does not cover: several verdicts at once (each interval is for itself), audits (the code was audited before its merge),
charging (the tip gets the same share of the start's steps as in the campaign, whatever a step of it costs at the other
size), and any size beyond the one that was tried. A loss usually falls with size, so the same effect in bits is a
larger share of what is left to gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from agent import power
from agent.evidence import quantile
from agent.judge import Rule, estimate
from agent.records import Estimate, Pair, Promotion, Transfer
from agent.show.view import clean, span, transfer_line

KEPT = 0.5

Outcome = Literal["transfers", "shrinks", "does not show", "reverses", "not measured"]


def transfer(of: str, title: str, here: Sequence[Pair], there: Sequence[Pair], rules: tuple[Rule, Rule]) -> Transfer:
    """The verdict on one change: the whole campaign (``of`` empty), or the merge of candidate ``of``.

    ``here``, ``there``: pairs at the campaign's budget and at the larger one; a ``fault`` is the changed code's.
    ``rules``: of both ends; what counts is direction, floor and the selecting split.
    """
    small, large = estimate(here, rules[0]), estimate(there, rules[1])
    failed = next((pair for pair in there if pair.fault), None)
    kept = share(small, large) if small and large else ()

    def told(verdict: Outcome, reason: str) -> Transfer:
        return Transfer(of, title, verdict, reason, small, large, kept, tuple(here), tuple(there))

    if failed is not None:
        return told("reverses", f"it fails there on seed {failed.seed} ({failed.fault}) and its base does not")
    if large is None:
        return told("not measured", "fewer than two pairs came about at the larger budget")
    sign = 1.0 if rules[1].direction == "min" else -1.0
    best, worst = sorted((sign * large.low, sign * large.high))
    if best > 0:
        return told("reverses", "it is worse there: the interval excludes zero")
    if worst >= 0:
        return told("does not show", f"its interval there holds zero; an effect of {visible(large, rules[1]):.4f} "
                                     f"would have been found four times in five")
    if small is None or max(sign * small.low, sign * small.high) >= 0:
        return told("transfers", "it is shown there, and was not shown at the campaign's budget on these seeds")
    left = large.effect / small.effect
    if left < KEPT:
        return told("shrinks", f"it is shown there, and {left:.0%} of it is left")
    return told("transfers", f"it is shown there, and {left:.0%} of it is left")


def visible(found: Estimate, rule: Rule) -> float:
    """The effect that so many pairs of such a spread would show at the interval's level, four times in five."""
    return power.visible(found.sd, found.pairs, (1 - found.confidence) / 2, rule.floor)


def share(here: Estimate, there: Estimate) -> tuple[float, ...]:
    """(share of the effect that is left, low, high) by Fieller; empty where the effect here is not shown, since then
    any share would do."""
    if _holds_zero(here):
        return ()
    t = quantile((1 - here.confidence) / 2, min(here.pairs, there.pairs))
    a = here.effect**2 - t * t * here.sd**2 / here.pairs
    if a <= 0:  # shown with its own degrees of freedom and not with the fewer of the other end
        return ()
    b, c = here.effect * there.effect, there.effect**2 - t * t * there.sd**2 / there.pairs
    root = math.sqrt(max(b * b - a * c, 0.0))
    return there.effect / here.effect, (b - root) / a, (b + root) / a


def order(parts: Sequence[Transfer]) -> power.Order | None:
    """Whether the merges keep their order of worth; None below three that were measured at both ends."""
    both = [(one.here.effect, one.there.effect) for one in parts if one.of and one.here and one.there]
    return power.order([a for a, _ in both], [b for _, b in both]) if len(both) > 2 else None


def lines(found: Promotion) -> list[str]:
    """For a person: a table with one line a change, and the verdict on the whole."""
    total = found.parts[0]
    better = "higher" if found.direction == "max" else "lower"
    rows = [("change", f"at {found.here}", f"at {found.there}", "left", "verdict")]
    rows += [(clean(one.title), _end(one.here), _end(one.there), _share(one.kept), one.verdict) for one in found.parts]
    widths = [max(len(row[at]) for row in rows) for at in range(4)]
    told = [f"{clean(found.metric)} on split {clean(found.split)} ({better} is better), "
            f"{len(total.there_pairs)} pairs on seeds from {found.first_seed}; {clean(found.device)}", "",
            *("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
              for row in rows)]
    ranks = order(found.parts)
    if ranks is not None:
        told += ["", f"order of the merges: rho {ranks.rho:+.2f} over {ranks.n}, p = {ranks.p:.2g} "
                     f"(a perfect order has {ranks.least:.2g})"]
    told += [f"{clean(one.title)}: {clean(one.reason)}" for one in found.parts[1:] if one.verdict == "not measured"]
    return [*told, "", f"verdict    {transfer_line(found, found.parts[0])}"]


def _holds_zero(found: Estimate) -> bool:
    return found.low <= 0 <= found.high


def _end(found: Estimate | None) -> str:
    return span(found.effect, found.low, found.high) if found else "-"


def _share(kept: tuple[float, ...]) -> str:
    return f"{kept[0]:.0%} [{kept[1]:.0%}, {kept[2]:.0%}]" if kept and kept[0] > 0 else "-"
