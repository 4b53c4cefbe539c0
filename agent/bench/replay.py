"""Bench ``replay``: whole campaigns of the shipped judge on real runs that ``bench bank`` has kept.

A campaign meets every arm of the bank once, in random order. An arm is screened on seeds of the incumbent and certified
on others, drawn at random from the bank's; each of its differences is a real run minus the start's real run on that
seed, so that noise, its shape and how well a patch pairs are the target's own. Preflight is left out: nulls that are
identical to the bit are met too.

Beside it, on the same runs, a greedy loop that keeps whatever prints a lower number: on a fresh seed each time, against
the best number so far; and on one fixed seed. What it kept stays: a run's value is the start's plus the differences of
all that was kept, on its seed.

Does not cover: what merges do to each other (effects are taken to add), or more seeds than the bank has: certifications
of one campaign share some.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import config as configuration
from agent import resources
from agent.bench.finding import Finding
from agent.errors import UserError
from agent.evidence import Pooled
from agent.ground import Say, count
from agent.judge import SCREENS, Rule, Ruling, Standing, judge, rule_of
from agent.records import Pair
from sandbox import early
from sandbox.early import Curve

Scores = dict[str, float]


@dataclass(frozen=True, slots=True)
class Kept:
    """The bank: scores of the start by seed, and each arm's kind and scores by seed."""

    start: dict[int, Scores]
    kinds: dict[str, str]
    arms: dict[str, dict[int, Scores]]
    curves: dict[str, dict[int, Curve]]
    """Training curve of each arm and of ``start`` by seed."""
    steps: int

    def stopped(self, arm: str, share: float) -> float:
        """Share of the seeds on which a run of ``arm`` would be stopped early after ``share`` of its steps."""
        at = int(share * self.steps)
        return statistics.fmean(early.behind(curve, self.curves["start"][seed], at)
                                for seed, curve in self.curves[arm].items())

    def effect(self, arm: str, split: str, seeds: Sequence[int]) -> float:
        """Mean difference from the start over ``seeds``."""
        return statistics.fmean(self.arms[arm][seed][split] - self.start[seed][split] for seed in seeds)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bank", type=Path, required=True, help="JSON file that `ratchet bench bank` wrote")
    parser.add_argument("--preset", default="cpu", help="preset of the default target whose [judge] is replayed")
    parser.add_argument("--campaigns", type=count, default=1000, help="campaigns to replay")
    parser.add_argument("--seed", type=int, default=900_000, help="of the order and the seeds drawn")


def replay(options: argparse.Namespace, say: Say) -> Finding:
    """Shipped judge and greedy loops over ``--campaigns`` campaigns."""
    kept = read(options.bank)
    settings = configuration.load(resources.default_target(), options.preset)
    rule, share = rule_of(settings.judge, settings.metric.direction, settings.evaluate.tier == "sealed"), (
        settings.judge.early_stop)
    gated = [campaign(kept, rule, random.Random(options.seed + number)) for number in range(options.campaigns)]
    facts: dict[str, Any] = {"campaigns": options.campaigns, "seeds": len(kept.start), "arms": {}, "greedy": {}}
    for name, kind in kept.kinds.items():
        found = [one[name] for one in gated]
        merged = [one for one in found if one["merged"]]
        truth = kept.effect(name, rule.split, list(kept.start))
        facts["arms"][name] = {
            "kind": kind, "effect": truth, "merged": len(merged) / len(found), "stopped": kept.stopped(name, share),
            "runs": statistics.fmean(one["runs"] for one in found),
            "reported_over_true": statistics.fmean(one["reported"] for one in merged) / truth if merged and truth
            else None}
    facts["false_merges"] = statistics.fmean(
        sum(one[name]["merged"] for name, kind in kept.kinds.items() if kind == "null") for one in gated)
    facts["runs"] = statistics.fmean(sum(arm["runs"] for arm in one.values()) for one in gated)
    reported = [(arm["reported"], arm["again"]) for one in gated for name, arm in one.items()
                if arm["merged"] and kept.kinds[name] != "null"]
    facts["reported_over_remeasured"] = sum(a for a, _ in reported) / sum(b for _, b in reported) if reported else None
    for fixed in (False, True):
        found = [greedy(kept, rule, random.Random(options.seed + number), fixed) for number in range(options.campaigns)]
        facts["greedy"]["one seed" if fixed else "fresh seeds"] = {
            "false_merges": statistics.fmean(one["false"] for one in found),
            "merged": {name: statistics.fmean(name in one["kept"] for one in found) for name in kept.kinds},
            "reported_over_true": sum(one["reported"] for one in found) / sum(one["true"] for one in found)}
    rows = [(name, arm["kind"], f"{arm['effect']:+.4f}", f"{arm['merged']:.1%}", f"{arm['runs']:.1f}",
             "-" if arm["reported_over_true"] is None else f"{arm['reported_over_true']:.3f}",
             f"{arm['stopped']:.1%}",
             *(f"{loop['merged'][name]:.1%}" for loop in facts["greedy"].values()))
            for name, arm in facts["arms"].items()]
    return Finding(f"{options.campaigns} campaigns replayed on {len(kept.start)} seeds of {len(kept.kinds)} patches",
                   facts, ("patch", "kind", "effect", "merged", "runs", "reported / true", "stopped early",
                           "greedy, fresh seeds", "greedy, one seed"), rows,
                   [f"false merges a campaign: {facts['false_merges']:.4f}; greedy "
                    + ", ".join(f"{name} {loop['false_merges']:.2f}" for name, loop in facts["greedy"].items()),
                    f"runs a campaign: {facts['runs']:.0f}; reported over re-measured on the other seeds: "
                    f"{_ratio(facts['reported_over_remeasured'])}; greedy's claim over the truth: "
                    + ", ".join(f"{name} {loop['reported_over_true']:.2f}"
                                for name, loop in facts["greedy"].items())])


def read(path: Path) -> Kept:
    """The bank's good runs on seeds on which the start ran. Raises UserError when the file is not one."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        arms = {name: {int(run["seed"]): run["scores"] for run in arm["runs"] if "scores" in run}
                for name, arm in raw["arms"].items()}
        kinds = {name: str(arm["kind"]) for name, arm in raw["arms"].items() if name != "start"}
        start = arms.pop("start")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no bank of runs ({type(error).__name__}: {error}).",
                        "`ratchet bench bank` writes one.") from error
    whole = [seed for seed in start if all(seed in runs for runs in arms.values())]
    if len(whole) < 12:
        raise UserError(f"{path} has {len(whole)} seeds on which every arm ran; a replay needs 12.",
                        "Run `ratchet bench bank` with more --seeds.")
    curves = {name: {int(run["seed"]): run["curve"] for run in arm["runs"] if int(run["seed"]) in whole}
              for name, arm in raw["arms"].items()}
    return Kept({seed: start[seed] for seed in whole}, kinds,
                {name: {seed: runs[seed] for seed in whole} for name, runs in arms.items()}, curves, int(raw["steps"]))


def campaign(kept: Kept, rule: Rule, chance: random.Random) -> dict[str, dict[str, Any]]:
    """What the shipped judge does with each arm: merged or not, runs, the reported effect, and the same on seeds that
    the certification did not use."""
    seeds = list(kept.start)
    chance.shuffle(seeds)
    screening, others = seeds[:SCREENS], seeds[SCREENS:]
    order = list(kept.kinds)
    chance.shuffle(order)
    noise, certified, merges = Pooled(2 * rule.floor**2, 2), 0, 0
    found: dict[str, dict[str, Any]] = {}
    for name in order:
        fresh = chance.sample(others, max(rule.looks))
        pairs: list[Pair] = []
        standing: Standing | None = None
        while True:
            ruling = judge(pairs, rule, standing or Standing(), noise.sd)
            if isinstance(ruling, Ruling):
                break
            if ruling.fresh and standing is None:
                certified += 1
                standing = Standing(certified, merges)
            for _ in range(ruling.pairs):
                used = sum(pair.fresh == ruling.fresh for pair in pairs)
                seed = fresh[used] if ruling.fresh else screening[used]
                pairs.append(Pair(seed, kept.start[seed], kept.arms[name][seed], "", "", fresh=ruling.fresh))
        merges += ruling.outcome == "accepted"
        noise = noise.plus([pair.effect(rule.select) for pair in pairs])
        proof = [pair.seed for pair in pairs if pair.fresh]
        found[name] = {"merged": ruling.outcome == "accepted", "runs": len(pairs) + len(proof),
                       "reported": ruling.estimate.effect if ruling.estimate else None,
                       "again": kept.effect(name, rule.split, [seed for seed in seeds if seed not in proof])}
    return found


def greedy(kept: Kept, rule: Rule, chance: random.Random, fixed: bool) -> dict[str, Any]:
    """A loop that keeps a patch when one run prints a better number than the best so far."""
    seeds, order, sign = list(kept.start), list(kept.kinds), 1 if rule.direction == "min" else -1
    chance.shuffle(order)
    first = chance.choice(seeds)
    best = start = kept.start[first][rule.select]
    merged: list[str] = []
    for name in order:
        seed = first if fixed else chance.choice(seeds)
        value = kept.start[seed][rule.select] + sum(kept.arms[one][seed][rule.select] - kept.start[seed][rule.select]
                                                    for one in (*merged, name))
        if sign * (value - best) < 0:
            best = value
            merged.append(name)
    return {"kept": merged, "false": sum(kept.kinds[name] == "null" for name in merged), "reported": best - start,
            "true": sum(kept.effect(name, rule.select, seeds) for name in merged)}


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
