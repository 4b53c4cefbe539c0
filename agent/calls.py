"""Calls: what the ledger keeps of a campaign's gate, and how the same gate is made of it again. Pure.

Every call that changes the gate is one event ``gate``, in order, with what the host told it:

    {"admit": name, "clashes": [names]}     {"withdraw": name}      {"refused": name}
    {"next": [slots, may_draw, left], "asks": [ids]}
    {"told": ask, "run": id, "value": loss, "audited": whether an audit had corrected it}   or with "fault" for "value"
    {"moved": [names that still apply], "tip": commit}              {"resume": reason of the pause}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agent import audits
from agent.config import Config
from agent.errors import UserError
from agent.evidence import level
from agent.gate import Ask, Draw, Failed, Gate, Outcome, Pause, Proof, Ruling, Settings
from agent.gate.proof import Numbers
from agent.gate.proof import Pair as Fresh
from agent.judge import Rule
from agent.ledger import Attempt, State
from agent.records import Estimate, Pair

Said = Ask | Draw | Ruling | Failed | Pause
ENDING = 40
"""Runs left, at most, at which the gate brings what it knows to an end; and at most this share of the whole budget:"""
ENDING_SHARE = 0.25


def settings_of(campaign: Mapping[str, Any]) -> Settings:
    """The gate's settings: they follow from what the campaign was started with (the ledger's ``started`` event)."""
    config = Config.model_validate(campaign["config"])
    return Settings(alpha=config.judge.alpha, gear=config.judge.gear, floor=config.judge.floor,
                    seed=int(campaign["seed"]), first_seed=config.seeds.first, ending=int(campaign["ending"]))


def ending(budget_runs: int | None) -> int:
    """Runs left at which a campaign of so many runs brings to an end what it knows."""
    return ENDING if budget_runs is None else min(ENDING, int(ENDING_SHARE * budget_runs))


def rulings(state: State, rule: Rule) -> dict[str, Ruling]:
    """The gate's last ruling on each candidate, by attempt: all its calls made again on the results in the ledger.

    Raises UserError where they do not repeat.
    """
    machine, found = Gate(settings_of(state.campaign)), dict[str, Ruling]()
    asks: dict[int, Ask] = {}
    for call in state.calls:
        if "told" in call and "value" in call:
            result = state.results[call["run"]]
            values = audits.values(state, result) if call["audited"] else {
                split: score.value for split, score in result.scores.items()}
            value = values[rule.split if asks[call["told"]].stage == "certify" else rule.select]
            call = {**call, "value": value if rule.direction == "min" else -value}
        said = make(machine, call)
        asks |= {step.id: step for step in said if isinstance(step, Ask)}
        found |= {name.split("~")[0]: step for step in said if isinstance(step, Ruling) for name in step.unit}
    return found


def make(machine: Gate, call: Mapping[str, Any]) -> list[Said]:
    """Make a call of the ledger on a gate. Raises UserError where it asks for other runs than it did."""
    said: list[Said] = []
    if "next" in call:
        slots, draw, left = call["next"]
        said = machine.next(slots, draw, left)
        if [step.id for step in said if isinstance(step, Ask)] != call["asks"]:
            raise UserError("The gate does not repeat what it decided when this run was made.", "The run was made by "
                            "another version: go on with that one, or start a new run:  ratchet run --name NEW")
    elif "admit" in call:
        machine.admit(str(call["admit"]), call["clashes"])
    elif "withdraw" in call:
        machine.withdraw(call["withdraw"])
    elif "told" in call:
        machine.told(call["told"], Outcome(call.get("value"), call.get("fault")))
    elif "moved" in call:
        machine.moved(call["moved"])
    elif "refused" in call:
        machine.refused()
    elif "resume" in call:
        machine.resume()
    return said


def proven(state: State, attempt: Attempt, pairs: Sequence[Pair], rule: Rule) -> tuple[bool, str, Numbers]:
    """(merge, why, figures) of a certified unit, from its fresh pairs and from what was written when its certification
    began. Raises UserError where that is missing."""
    known = next((one for one in reversed(state.certifications) if attempt.candidate is not None and (
        one.candidate, one.tree) == (attempt.proposal.id, attempt.candidate.tree)), None)
    if known is None or not known.gear:
        raise UserError(f"The ledger has no certification of {attempt.proposal.id}.", "It was damaged, or cut short.")
    tips = [str(state.campaign["start"]), *(done.new_tip for done in state.merges)]
    merges = tips.index(known.base) if known.base in tips else known.merges
    sign = 1.0 if rule.direction == "min" else -1.0
    fresh = [Fresh(pair.seed, Outcome(sign * pair.incumbent[rule.split]), Outcome(None, pair.fault) if pair.fault else
                   Outcome(sign * pair.candidate[rule.split])) for pair in pairs if pair.fresh]
    proof = Proof((attempt.proposal.id,), merges, known.gear, known.looks, known.hypothesis, merges,
                  level(rule.alpha, known.hypothesis, merges), known.expected, known.sd, known.degrees, known.floor,
                  Settings().futile, pairs=fresh)
    passed, why = proof.verdict()
    return bool(passed), why, proof.numbers()


def estimated(evidence: Mapping[str, float | str], rule: Rule) -> Estimate:
    """The effect of an accepted unit from its certification's pairs alone, in the metric's own sign."""
    sign = 1.0 if rule.direction == "min" else -1.0
    effect, low, high, pairs, sd = (float(evidence[key]) for key in ("effect", "low", "high", "pairs", "sd"))
    ends = sorted((sign * low, sign * high))
    return Estimate(rule.split, sign * effect, ends[0], ends[1], int(pairs), sd)


def plain(evidence: Mapping[str, float | str]) -> dict[str, float | str]:
    """Evidence of the gate as a verdict keeps it: the effect and its interval are in the estimate."""
    return {key: value for key, value in evidence.items() if key not in ("effect", "low", "high", "fault")}
