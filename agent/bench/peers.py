"""Peers for ``bench policy``: what others merge by, and what a live campaign does, each as one function over a
simulated world.

A peer draws proposals one by one until the runs are spent, and returns its merges. ``greedy`` is the habit of the
field; ``rigor3`` follows rigor.py of autoresearch-mlx (pull request 30), ``two_sigma`` the rule of autoresearch's pull
request 560, ``sequential`` is a classical sequential test of one proposal at a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from agent import evidence
from agent.bench.worlds import World
from agent.config import Judge
from agent.judge import SCREENS, Ask, Standing, judge, rule_of
from agent.records import Pair

SEED = 42
"""Of ``greedy_one_seed``."""
FLOOR = 1.0
"""In u: smallest sd of a paired difference that ``single`` believes."""


@dataclass(slots=True)
class Unit:
    """One merge: its patches, true gain and, where the policy says so, the gain it reports with its interval; in u."""

    patches: tuple[int, ...]
    true: float
    reported: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(slots=True)
class Night:
    """A simulated campaign's end."""

    units: list[Unit] = field(default_factory=list)
    reported: float | None = None
    """Gain in u that the policy claims for the whole campaign, if it is not the sum over its units."""
    proposals: int = 0


Policy = Callable[[World, int], Night]


def greedy(world: World, runs: int) -> Night:
    """One run a proposal, each on a new seed; merged when lower than the lowest that was merged."""
    return _threshold(world, runs, calibrate=1, sigmas=0.0, one_seed=False)


def greedy_one_seed(world: World, runs: int) -> Night:
    """The same on one fixed seed."""
    return _threshold(world, runs, calibrate=1, sigmas=0.0, one_seed=True)


def two_sigma(world: World, runs: int) -> Night:
    """Merged when lower than the last merged run by two standard deviations of five runs of the start."""
    return _threshold(world, runs, calibrate=5, sigmas=2.0, one_seed=False)


def _threshold(world: World, runs: int, calibrate: int, sigmas: float, one_seed: bool) -> Night:
    night = Night()
    start = [world.run((), SEED if one_seed else number) for number in range(calibrate)]
    best = first = statistics.fmean(start)
    needed = sigmas * statistics.stdev(start) if calibrate > 1 else 0.0
    for number in range(calibrate, runs):
        patch = world.draw()
        value = world.run((patch,), SEED if one_seed else number)
        if value < best - needed:
            night.units.append(Unit((patch,), world.merge((patch,))))
            best = value
    night.proposals, night.reported = runs - calibrate, first - best
    return night


def rigor3(world: World, runs: int) -> Night:
    """Dropped when the first run is no better than the mean of the incumbent's three; merged when at least 95 % of
    bootstrapped means of three seeds are better. The three runs are the incumbent's from then on."""
    night, base = Night(), [world.run((), number) for number in range(3)]
    first, seed = statistics.fmean(base), 3
    resampled = np.array([[a, b, c] for a in range(3) for b in range(3) for c in range(3)])
    while seed + 3 <= runs:
        patch = world.draw()
        night.proposals += 1
        found = [world.run((patch,), seed)]
        seed += 1
        if found[0] >= statistics.fmean(base):
            continue
        found += [world.run((patch,), seed), world.run((patch,), seed + 1)]
        seed += 2
        better = np.array(found)[resampled].mean(1)[:, None] < np.array(base)[resampled].mean(1)[None, :]
        if better.mean() >= 0.95:
            night.units.append(Unit((patch,), world.merge((patch,))))
            base = found
    night.reported = first - statistics.fmean(base)
    return night


def sequential(world: World, runs: int, threshold: float = 100.0, futile: float = 1.0, most: int = 12) -> Night:
    """One proposal at a time against a bank of six runs of the incumbent: merged when the e-value reaches
    ``threshold``, dropped when the mean gain is below ``futile`` standard deviations."""
    night = Night()
    bank = [world.run((), number) for number in range(6)]
    pooled, seed = evidence.Pooled().plus(bank), 6
    while seed < runs:
        patch = world.draw()
        night.proposals += 1
        values: list[float] = []
        while seed < runs and len(values) < most:
            values.append(world.run((patch,), seed))
            seed += 1
            gain = statistics.fmean(bank) - statistics.fmean(values)
            if gain < futile * pooled.sd:
                break
            information = 1 / (1 / len(values) + 1 / len(bank))
            spread = evidence.inflated(pooled.sd, pooled.degrees)
            if evidence.gaussian_e(gain / spread, information) >= threshold:
                night.units.append(Unit((patch,), world.merge((patch,)), gain))
                pooled = pooled.plus(values)
                more = min(max(6 - len(values), 0), runs - seed)
                bank = values + [world.run((), seed + number) for number in range(more)]
                seed += more
                break
    return night


def single(world: World, runs: int) -> Night:
    """What a live campaign does today: agent/judge.py itself, one candidate at a time, with the default rule.

    A screening pair costs one run where the tip has run that seed already, else two; a fresh pair costs two, and its
    runs are the tip's on that seed after a merge.
    """
    night, rule = Night(), rule_of(Judge(floor=FLOOR), "min", sealed=False)
    bank: dict[int, float] = {}
    hypotheses, pooled = 0, evidence.Pooled(2 * FLOOR**2, 2)

    def pair(patch: int, seed: int, fresh: bool) -> Pair:
        if seed not in bank:
            bank[seed] = world.run((), seed)
        return Pair(seed, {"val": bank[seed]}, {"val": world.run((patch,), seed)}, "", "", fresh=fresh)

    while world.runs + 2 <= runs:
        patch, pairs, standing = world.draw(), list[Pair](), Standing()
        night.proposals += 1
        while isinstance(asked := judge(pairs, rule, standing, pooled.sd), Ask):
            if asked.fresh and not any(one.fresh for one in pairs):
                hypotheses += 1
                standing = Standing(hypotheses, len(night.units))
            if world.runs + 2 * asked.pairs > runs:
                return night
            known = sum(one.fresh for one in pairs) if asked.fresh else len(pairs)
            seeds = ([1000 * standing.hypothesis + known + i for i in range(asked.pairs)] if asked.fresh else
                     [*sorted(bank, reverse=True), *range(1, 1 + SCREENS)][known:known + asked.pairs])
            pairs += [pair(patch, seed, asked.fresh) for seed in seeds]
        pooled = pooled.plus([one.effect("val") for one in pairs])
        if asked.outcome == "accepted" and asked.estimate is not None:
            found = asked.estimate
            night.units.append(Unit((patch,), world.merge((patch,)), -found.effect, (-found.high, -found.low)))
            bank = {one.seed: one.candidate["val"] for one in pairs if one.fresh}
    return night


PEERS: dict[str, Policy] = {
    "single": single,
    "greedy": greedy, "greedy-one-seed": greedy_one_seed, "two-sigma": two_sigma, "rigor3": rigor3,
    "seq": sequential,
}

