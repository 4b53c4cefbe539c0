"""Guards: what a merge may cost beside the loss. Pure: what runs showed -> figures, and the cap that they break.

Five measures are taken from outside with every run: parameters and bytes of the weights that it hands over, its peak
memory while it trains, what its model takes to answer the scorer (inference) and what the whole evaluation takes, both
on the charging clock (CPU seconds of the box on a CPU, wall seconds on a GPU). ``[guards]`` may cap each as a multiple
of the campaign's *start*, not of the incumbent, so that five merges of 5 % each do not pass as five small steps.

Two kinds. Parameters and weights are counts: the largest of any run decides, and the tiny run shows them already. The
others jitter, so there are two estimates, and the smaller one counts. Pair by pair, both runs on one seed: the median
ratio of the candidate's pairs, times that of each merge before it; a machine that drifts over a night does not move it,
but its error grows with the merges. And the median of the candidate's runs over that of the start's: drift moves it,
and merges do not. What truly creeps in shows in both. A patch is refused only beyond the cap *and* a dead band
(``BAND``), twice as wide while there are fewer than ``FEW`` pairs.

Does not cover: measures that nothing shows from outside (parameters of a target that hands over no weights; the
evaluation of one that prints its own number), memory while it is scored, or speed of inference elsewhere than in the
scorer's batches. A pair whose runs an older version measured less of counts as unchanged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from agent.config import Guards
from agent.records import Guard, Result

EXACT = ("parameters", "weights")
BAND = {"memory": 0.05, "inference": 0.15, "evaluation": 0.15}
"""Dead band above a cap, relative: docs/configuration.md has the jitter that it was taken from."""
LEAST = {"memory": 64.0, "inference": 0.1, "evaluation": 0.1}
"""MiB and seconds below which all runs count as alike: memory is read five times a second, CPU time in hundredths."""
FEW = 3
"""Pairs below which the band is twice as wide."""

Pairs = Sequence[tuple[Result, Result]]
"""(incumbent's run, candidate's run) on one seed each."""


def seen(result: Result) -> dict[str, float]:
    """What a run shows of each measure: counts, bytes, MiB and charged seconds. What it does not show is left out."""
    found = {"parameters": result.parameters, "weights": result.weights_bytes,
             "memory": result.gpu_memory_mb or result.peak_memory_mb, "inference": result.inference_charge,
             "evaluation": result.evaluate_charge}
    return {name: float(value) for name, value in found.items() if value > 0}


def weigh(start: Sequence[Result], merged: Sequence[Pairs], own: Pairs) -> dict[str, Guard]:
    """How a candidate stands to the start, by measure. ``merged``: the pairs of each merge before it; ``own``: its own.

    A failed run says nothing. Measures that its runs or the start's do not show are left out.
    """
    own = [pair for pair in own if not pair[1].fault]
    first, mine = [seen(result) for result in start], [seen(new) for _, new in own]
    found: dict[str, Guard] = {}
    for name in (*EXACT, *BAND):
        before = [one[name] for one in first if name in one]
        after = [one[name] for one in mine if name in one]
        if not before or not after:
            continue
        if name in EXACT:
            found[name] = Guard(max(after), max(after) / statistics.median(before), len(after))
        elif ratios := _ratios(own, name):
            links = [statistics.median(link) for pairs in merged if (link := _ratios(pairs, name))]
            chained, value = math.prod([*links, statistics.median(ratios)]), statistics.median(after)
            direct = max(value, LEAST[name]) / max(statistics.median(before), LEAST[name])
            found[name] = Guard(value, min(chained, direct), len(ratios))
    return found


def complaint(caps: Guards, found: dict[str, Guard]) -> str:
    """The first cap that is broken, in one line; empty: none is."""
    for name, guard in found.items():
        cap: float = getattr(caps, name)
        band = BAND.get(name, 0.0) * (2 if guard.pairs < FEW else 1)
        if cap and guard.ratio > cap * (1 + band) * (1 + 1e-9):
            allowance = f" and {band:.0%} for jitter" if band else ""
            return (f"over the cap on {name}: {shown(name, guard.value)} is {guard.ratio:.3f} times the start's, and "
                    f"guards.{name} allows {cap:g}{allowance}")
    return ""


def unseen(caps: Guards, start: Sequence[Result]) -> list[str]:
    """Measures that are capped and that no run of the start shows: nothing could ever break such a cap."""
    shown = {name for result in start for name in seen(result)}
    return [name for name in (*EXACT, *BAND) if getattr(caps, name) and name not in shown]


def text(found: dict[str, Guard]) -> str:
    """For a trailer: ``parameters 1.20M (+0.0 %), weights 4.8 MB (+0.0 %), memory 310 MiB (+1.2 %), ...``."""
    return ", ".join(f"{name} {shown(name, guard.value)} ({change(guard)})" for name, guard in found.items())


def change(guard: Guard) -> str:
    """Against the start: ``+1.2 %``."""
    return f"{(guard.ratio - 1) * 100:+.1f} %"


def _ratios(pairs: Pairs, name: str) -> list[float]:
    """New over old, pair by pair, where both good runs show it; neither is taken below ``LEAST``."""
    least = LEAST[name]
    both = [(seen(old), seen(new)) for old, new in pairs if not (old.fault or new.fault)]
    return [max(new[name], least) / max(old[name], least) for old, new in both if name in old and name in new]


def shown(name: str, value: float) -> str:
    """A value of this measure with its unit."""
    if name in EXACT:
        unit = "" if name == "parameters" else "B"
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= size:
                return f"{value / size:.2f}{' ' if unit else ''}{letter}{unit}"
        return f"{value:.0f}{' ' if unit else ''}{unit}"
    return f"{value:.0f} MiB" if name == "memory" else f"{value:.2f} s"
