"""Recompute: the figures of a verdict done again from the ledger's raw runs, beside what was written. Reads only.

From the results of the runs alone: scores (corrected where an audit did), pairs, effect and interval, t, p, level and
e-value. The level is done again from the order of the certifications and merges in the ledger. What is compared with
is the merge commit's trailers or, for a candidate that was refused, the verdict. Does not cover: training again
(``ratchet try`` does that), or whether the results in the ledger are those of the jobs (their folders have the logs).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from agent import ablation, audits, calls, git, merge
from agent.config import Config
from agent.errors import UserError
from agent.judge import Rule, Ruling, Standing, estimate, judge, rule_of
from agent.ledger import Attempt, State
from agent.records import Pair, Verdict


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the comparison."""

    name: str
    written: str
    again: str

    @property
    def same(self) -> bool:
        return self.written == self.again


def recompute(state: State, attempt: Attempt, repo: Path) -> list[Figure]:
    """The figures of ``attempt``. Raises UserError when it has none, or when runs behind it are not in the ledger."""
    verdict = attempt.verdict
    if verdict is None or not verdict.pairs:
        raise UserError(f"{attempt.proposal.id} was never compared with the incumbent, so there is nothing to compute.",
                        "`ratchet log` shows which attempts have pairs.")
    config = Config.model_validate(state.campaign["config"])
    rule = rule_of(config.judge, config.metric.direction, config.evaluate.tier == "sealed")
    pairs = [_pair(state, pair) for pair in verdict.pairs]
    if state.calls and verdict.stage == "judge" and (attempt.merge or attempt.proposal.parts):
        again = _gate_again(verdict, pairs, rule, state, attempt)
    elif state.calls and verdict.stage == "judge":
        said = calls.rulings(state, rule).get(attempt.proposal.id)
        again = replace(verdict, pairs=tuple(pairs), estimate=estimate(pairs, rule), outcome=said.outcome if said else
                        "inconclusive", evidence=(calls.plain(said.evidence) if said else {})
                        | audits.evidence(pairs, state))
    else:
        again = _again(verdict, pairs, rule, _standing(state, attempt), state)
    written = merge.figures(verdict)
    if attempt.merge is not None:
        written = {name: _trailer(repo, attempt.merge.new_tip, name) for name in written}
    found = [Figure(name, written[name], text) for name, text in merge.figures(again).items()]
    scores = [f"{pair.seed} {split} {value!r}" for one in (verdict.pairs, pairs) for pair in one
              for side in (pair.incumbent, pair.candidate) for split, value in sorted(side.items())]
    half = len(scores) // 2
    return [Figure("Scores", f"{half} kept", f"{sum(a == b for a, b in zip(scores[:half], scores[half:], strict=True))}"
                   " kept"), Figure("Outcome", verdict.outcome, again.outcome), *found]


def removal(state: State, wanted: str, repo: Path) -> list[Figure]:
    """The figures of the removal that closing audit ``wanted`` (audit-N) made. Raises UserError where there is none, or
    it was no matter of figures."""
    done = next((one for one in state.removals if wanted == f"audit-{one.audit}"), None)
    found = next((one for one in state.ablations if done and (one.audit, one.commits) == (done.audit, done.removes)),
                 None)
    plan = next((one for one in state.plans if done and one.audit == done.audit), None)
    if done is None or found is None or plan is None or not found.pairs:
        raise UserError(f"There is no removal {wanted} with figures in this run.", "`ratchet log` shows its audits.")
    config = Config.model_validate(state.campaign["config"])
    rule = rule_of(config.judge, config.metric.direction, config.evaluate.tier == "sealed")
    sign = 1.0 if config.metric.direction == "min" else -1.0
    pairs = tuple(_pair(state, pair) for pair in found.pairs)
    alone = [one.margin for one in plan.commits if (one.commit,) == found.commits]
    asked = ablation.Rule(plan.alpha, sum(bool(one.tree) for one in plan.commits), ablation.looks_of(plan.pairs),
                          rule.floor)
    decision = ablation.decide([sign * pair.effect(rule.split) for pair in pairs], alone[0] if alone else plan.margin,
                               asked)
    if isinstance(decision, int):
        raise UserError(f"{wanted} has {len(pairs)} pairs, where {decision} were wanted.", "The ledger was changed.")
    again = replace(found, pairs=pairs, estimate=estimate(pairs, replace(rule, min_effect=0.0)),
                    evidence=decision.evidence, reason=decision.reason)
    figures = merge.removal_figures(again)
    return [Figure("Outcome", found.outcome, decision.outcome),
            *(Figure(name, _trailer(repo, done.new_tip, name), text) for name, text in figures.items())]


def lines(figures: list[Figure]) -> list[str]:
    """For a person: each figure once if it agrees, else both."""
    shown = []
    for figure in figures:
        if figure.same:
            shown.append(f"same    {figure.name:<9} {figure.again}")
        else:
            shown += [f"DIFFERS {figure.name:<9} written     {figure.written}", f"{'':<18}recomputed  {figure.again}"]
    agreed = sum(figure.same for figure in figures)
    return [*shown, f"{agreed} of {len(figures)} agree to the last digit"]


def _pair(state: State, pair: Pair) -> Pair:
    """The pair with its scores read again from the two results."""
    if pair.fault:
        return pair
    missing = [name for name in (pair.incumbent_run, pair.candidate_run) if name not in state.results]
    if missing:
        raise UserError(f"The ledger has no result of run {missing[0]}.", "It was damaged, or cut short by hand.")
    old, new = (audits.values(state, state.results[name]) for name in (pair.incumbent_run, pair.candidate_run))
    return replace(pair, incumbent=old, candidate=new)


def _standing(state: State, attempt: Attempt) -> Standing:
    """From the order of events: the position of the candidate's last certification, and the merges before it."""
    places = [number for number, known in enumerate(state.certifications, 1)
              if attempt.candidate is not None and (known.candidate, known.tree) == (attempt.proposal.id,
                                                                                     attempt.candidate.tree)]
    if not places:
        return Standing()
    base = state.certifications[places[-1] - 1].base
    tips = [str(state.campaign["start"]), *(done.new_tip for done in state.merges),
            *(done.new_tip for done in state.reverts)]
    return Standing(places[-1], tips.index(base) if base in tips else 0)


def _again(verdict: Verdict, pairs: list[Pair], rule: Rule, standing: Standing, state: State) -> Verdict:
    """The verdict that the judge gives on these pairs. One that another stage gave keeps its outcome."""
    ruling = judge(pairs, rule, standing)
    if verdict.stage != "judge" or not isinstance(ruling, Ruling):
        return replace(verdict, pairs=tuple(pairs), estimate=estimate(pairs, rule))
    return replace(verdict, pairs=tuple(pairs), estimate=ruling.estimate, outcome=ruling.outcome,
                   evidence=ruling.evidence | audits.evidence(pairs, state))


def _gate_again(verdict: Verdict, pairs: list[Pair], rule: Rule, state: State, attempt: Attempt) -> Verdict:
    """The verdict that the gate gives on the fresh pairs, at the level that follows from its certification's place."""
    passed, why, told = calls.proven(state, attempt, pairs, rule)
    estimated = verdict.estimate
    if passed and estimated is not None:
        estimated = calls.estimated(told, rule)
    elif estimated is not None:
        estimated = estimate(pairs, rule)
    return replace(verdict, pairs=tuple(pairs), outcome="accepted" if passed else verdict.outcome if
                   verdict.outcome != "accepted" else "inconclusive", reason=why or verdict.reason, estimate=estimated,
                   evidence=calls.plain(told) | audits.evidence(pairs, state))


def _trailer(repo: Path, commit: str, name: str) -> str:
    text = git.run(repo, "log", "-1", f"--format=%(trailers:key={name},valueonly,unfold)", commit).decode()
    return text.strip()
