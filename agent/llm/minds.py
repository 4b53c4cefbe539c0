"""Which of several models to ask: a bandit over what each has gained a dollar. Pure: the ledger in, a name out.

A gain is the certified effect of a merge, so neither a screening nor a model's own promise counts; a bundle's gain is
shared by its parts. An arm is chosen by Thompson sampling (Thompson 1933; Russo et al. 2018, arXiv 1707.02038) of

    chance of a merge, drawn from Beta(1 + merged, 1 + asked - merged)
    x gain of a merge / dollars of a proposal, each shrunk to the mean of all models by one observation

and with a chance of ``EXPLORE`` by lot, since models and prices change behind a name. Draws follow from the campaign's
seed and the attempt's number, so a resumed campaign chooses the same. Neither the unit of the metric nor that of money
matters. Where nothing costs anything, dollars drop out, and it is gain a proposal.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agent.ledger import Attempt, State

EXPLORE = 0.1


@dataclass(frozen=True, slots=True)
class Account:
    """What one model did: proposals, merges, their gain together (metric's unit, positive is better), dollars."""

    asked: int = 0
    merged: int = 0
    gain: float = 0.0
    usd: float = 0.0


def choose(names: Sequence[str], accounts: Mapping[str, Account], seed: int, number: int) -> str:
    """The one of ``names`` (not empty) to ask for attempt ``number``. The order of ``names`` does not matter."""
    arms = sorted(set(names))
    draw = random.Random(f"{seed}/minds/{number}")
    if len(arms) == 1:
        return arms[0]
    if draw.random() < EXPLORE:
        return draw.choice(arms)
    known = {name: accounts.get(name, Account()) for name in arms}
    merged, asked = sum(a.merged for a in known.values()), sum(a.asked for a in known.values())
    gain = sum(a.gain for a in known.values()) / merged if merged else 1.0
    usd = sum(a.usd for a in known.values()) / asked if asked else 0.0

    def worth(name: str) -> float:
        one = known[name]
        chance = draw.betavariate(1 + one.merged, 1 + max(0, one.asked - one.merged))
        size = (one.gain + gain) / (one.merged + 1)
        cost = (one.usd + usd) / (one.asked + 1) if usd > 0 else 1.0
        return chance * size / cost

    return max(arms, key=worth)


def accounts(attempts: Iterable[Attempt], direction: str, usd_per_hour: float = 0.0,
             seconds: Mapping[str, float] | None = None) -> dict[str, Account]:
    """Model name -> its account, from the attempts of a campaign that have a verdict.

    ``usd_per_hour``: price of an hour that a job holds a slot; ``seconds``: what each run held one for, by its id.
    """
    listed = [attempt for attempt in attempts if attempt.verdict is not None]
    gains: dict[str, float] = {}
    for attempt in listed:
        verdict = attempt.verdict
        if attempt.merge is None or verdict is None or verdict.estimate is None:
            continue
        gain = verdict.estimate.effect if direction == "max" else -verdict.estimate.effect
        for part in attempt.proposal.parts or (attempt.proposal.id,):
            gains[part] = gains.get(part, 0.0) + gain / max(1, len(attempt.proposal.parts))
    found: dict[str, Account] = {}
    for attempt in listed:
        proposal = attempt.proposal
        if proposal.author != "llm":
            continue
        held = sum((seconds or {}).get(run.id, 0.0) for run in attempt.runs)
        old = found.get(proposal.source, Account())
        gain_of = gains.get(proposal.id)
        found[proposal.source] = Account(
            old.asked + 1, old.merged + (gain_of is not None), old.gain + (gain_of or 0.0),
            old.usd + proposal.cost.usd + held / 3600 * usd_per_hour)
    return found


def of_state(state: State, usd_per_hour: float = 0.0) -> dict[str, Account]:
    """``accounts`` of a campaign. Any thread may call it while the campaign's own writes."""
    seconds = {name: result.seconds for name, result in list(state.results.items())}
    return accounts(list(state.attempts.values()), str(state.campaign["direction"]), usd_per_hour, seconds)
