"""Gain: the number of the night. Start against tip, on fresh seeds and the final split, which nothing has read before.

Selected merges flatter themselves (each stopped at the look that convinced); these runs were selected for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from agent import audits
from agent.court import Host
from agent.judge import Rule, estimate
from agent.measure import forget_weights
from agent.needs import Need
from agent.records import Gain, Pair, Result
from agent.show.screen import Observer

FINAL_SEED = 1_000_000_007
"""Final seeds start here: never used to select."""


class Night(Host, Protocol):
    """What it needs of a campaign."""

    observer: Observer

    def complete(self, needs: list[Need], late: Callable[[], bool] = ...) -> list[Result]: ...


def measure(night: Night) -> None:
    """Start against tip on fresh seeds and the final split, which nothing has read before."""
    if not night.state.kept or night.state.gain is not None:
        return
    night.observer.phase("measuring the gain on fresh seeds")
    config, count = night.site.config, night.spending.final_pairs(night.clock())
    if count < 2:
        night.note("the gain was not measured: too few runs were left of the budget")
        return
    wanted = [(Need("final", night.site.start, seed, int(night.state.campaign["steps"])),
               Need("final", night.state.tip, seed, night.bank.tip_steps))
              for seed in range(FINAL_SEED, FINAL_SEED + count)]
    night.complete([need for both in wanted for need in both], lambda: night.spending.late(night.clock()))
    whole = [both for both in wanted if all(map(night.needs.known, both))]
    if len(whole) < count:
        night.note(f"the time was up after {len(whole)} of {count} final pairs"
                   + (": the gain was not measured" if len(whole) < 2 else ""))
    if len(whole) < 2:
        return
    results = night.complete([need for both in whole for need in both])
    if len({tuple(sorted(result.fingerprint.items())) for result in results}) > 1:
        night.note("the gain was not measured: its runs were made on different machines or versions")
        return
    if audits.wanted(config):
        again = night.complete([night.needs.audit(result) for result in results if not result.fault])
        faulty = {night.state.runs[found.id].audits: found.fault for found in again if found.fault}
        results = [dataclasses.replace(result, fault=faulty.get(result.id, result.fault)) for result in results]
        forget_weights(night.site, [night.state.runs[result.id] for result in results])
    for result in results:
        if result.fault:
            night.note(f"{result.id} failed on a final seed ({result.fault}): its pair is left out of the gain")
    split = "final" if config.evaluate.tier == "sealed" else "val"
    pairs = tuple(
        Pair(seed, {split: night.bank.values(a)[split]}, {split: night.bank.values(b)[split]}, a.id, b.id)
        for seed, a, b in zip((need.seed for need, _ in whole), results[::2], results[1::2], strict=True)
        if not (a.fault or b.fault))
    final = Rule(night.rule.alpha, (count,), night.rule.floor, 0, night.rule.direction, split, None)
    found = estimate(pairs, final)
    if found is None:
        night.note("the gain was not measured: runs on the fresh seeds failed")
    else:
        night.ledger.append("gain", Gain(
            config.metric.name, split, found.effect, found.low, found.high, pairs,
            sum(p.incumbent[split] for p in pairs) / len(pairs),
            sum(p.candidate[split] for p in pairs) / len(pairs)))
