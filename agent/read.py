"""Read: the repository at the tip and the ledger's state -> Briefing, all that a proposer may know.

A briefing holds source text, titles, outcomes and effects rounded to three decimals. It never holds training data,
held-out text, a score of the confirm or final split, or a key. ``prompts/README.md`` says what of it leaves the
machine. It holds more than one prompt can show: llm/messages.py picks what fits the budget of tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from agent.briefing import incumbent, predictions
from agent.briefing.directions import Tally, Tried, tallies
from agent.briefing.plateau import Plateau, watch
from agent.config import Config
from agent.ledger import Attempt, State
from agent.llm import edit_modes
from agent.llm.quote import one_line, quoted, rounded
from agent.records import Outcome, Stage, Tier, Verdict
from agent.wishes import wishes

LEAST = 1e-9
"""Gain of a merge of which val shows none: it was shown on the split that certifies."""
NEAR: tuple[Stage, ...] = ("judge", "measure")
"""Where an attempt that looked better may have ended without being merged."""
PAST_CHARACTERS = 8000
"""Of the patch of one past attempt, as a model may look it up."""


@dataclass(frozen=True, slots=True)
class HistoryLine:
    """One finished attempt. Effect and interval are candidate minus incumbent on the val split, in three decimals."""

    id: str
    title: str
    outcome: Outcome
    stage: Stage
    reason: str
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    fault: str = ""
    direction: str = ""


@dataclass(frozen=True, slots=True)
class Briefing:
    """What a proposer sees before it proposes."""

    tip: str
    """Commit that the edits must fit."""
    number: int
    """Number of the attempt that this briefing is for, from 1."""
    files: dict[str, str]
    """Editable source by path relative to the target, all of it."""
    protected: dict[str, str]
    """Source that a patch may not change, shown for its interface."""
    editable: tuple[str, ...]
    """Globs that a patch may touch."""
    max_patch_lines: int
    metric: str
    direction: str
    """``min`` or ``max``."""
    budget: str
    tier: Tier
    calibration: str
    history: tuple[HistoryLine, ...]
    preset: str
    attempts_left: int | None
    """Attempts after this one; None where only the clock limits them."""
    wishes: tuple[str, ...] = ()
    """What the owner said while the campaign ran, oldest first."""
    tried: tuple[edit_modes.Tried, ...] = ()
    """What became of a model's earlier replies, by the form of edits they were asked in."""
    tokens: int = 60_000
    """What the prompt may come to."""
    command: str = ""
    """Of a training run: where the source begins."""
    guidance: str = ""
    """The owner's words on what to look for, from a file of the target."""
    incumbent: str = ""
    """Curve and profile of a run of the tip, as the harness measured them."""
    printed: str = ""
    """What that run printed of itself."""
    tallies: tuple[Tally, ...] = ()
    """Gain per training run by direction."""
    seed: int = 0
    """Of the campaign: with ``number`` it fixes which direction is asked for."""
    plateau: Plateau | None = None
    predictions: str = ""
    """How good the model's earlier predictions were."""
    touched: tuple[str, ...] = ()
    """Editable files that merges have changed, the newest first."""
    findings: str = ""
    """What was looked up for this proposal, ready to show."""
    past: Callable[[str], str] = field(default=lambda name: "", compare=False, repr=False)
    """Id or number of an earlier attempt -> all of it that a proposer may know, ready to show; empty: there is none."""


Lines = dict[str, tuple[Verdict, HistoryLine, Tried | None]]
"""What was made of each verdict: its line, and what it tells of its direction."""


def brief(config: Config, state: State, files: Mapping[str, str], protected: Mapping[str, str], *,
          calibration: str = "", budget: str = "", attempts_left: int | None = None, guidance: str = "",
          lines: Lines | None = None) -> Briefing:
    """The briefing for the next attempt. ``files`` and ``protected`` are the target's text files at ``state.tip``.

    ``calibration`` replaces what the campaign's own runs say of the noise, ``budget`` the text made from the config.
    ``lines`` is kept by a caller that asks often: what was made of earlier verdicts. Attempts without a verdict are
    left out of the history.
    """
    known: Lines = {} if lines is None else lines
    history, done = [], []
    back = {one.candidate for one in state.reverts}
    sign = 1.0 if config.metric.direction == "min" else -1.0
    for name, attempt in state.attempts.items():
        verdict = attempt.verdict
        if verdict is not None and attempt.proposal.author != "gate":
            # what a part gained is known only once its bundle's verdict is there
            if name in back or name not in known or known[name][0] is not verdict or verdict.unit:
                known[name] = verdict, _line(attempt, back), _tried(state, attempt, sign)
            history.append(known[name][1])
            if (one := known[name][2]) is not None:
                done.append(one)
    run = incumbent.find(state)
    return Briefing(
        tip=state.tip, number=len(state.attempts) + 1, files=dict(files), protected=dict(protected),
        editable=tuple(config.source.editable), max_patch_lines=config.source.max_patch_lines,
        metric=config.metric.name, direction=config.metric.direction, budget=budget or budget_text(config),
        tier=config.evaluate.tier, calibration=rounded(calibration or incumbent.calibration(config, state)),
        history=tuple(history), preset=config.preset, attempts_left=attempts_left, tokens=config.model.briefing_tokens,
        command=config.train.command, guidance=guidance, seed=int(state.campaign.get("seed", 0)),
        incumbent=incumbent.profile(run, config.metric.name) if run else "",
        printed=incumbent.printed(run) if run else "", tallies=tuple(
            one for one in tallies(done) if one.direction not in closed(config)),
        plateau=stalled(state, sign, history),
        predictions=predictions.told(predictions.score(predicted(history, state))),
        touched=_touched(state, files), wishes=wishes(state),
        tried=edit_modes.tried([attempt.proposal for attempt in state.attempts.values()]),
        past=lambda name: past(state, name))


def closed(config: Config) -> tuple[str, ...]:
    """Directions that a patch of this target cannot take: where the harness serves the batches, their order is its."""
    return ("data order",) if config.train.served else ()


def _tried(state: State, attempt: Attempt, sign: float) -> Tried | None:
    """What a decided attempt tells of its direction; None where it was not trained. ``sign``: 1 where lower is better,
    else -1."""
    verdict, proposal = attempt.verdict, attempt.proposal
    if verdict is None or not proposal.direction or not any(run.trains for run in attempt.runs):
        return None
    merged = verdict.outcome == "accepted"
    return Tried(proposal.direction, gain(state, attempt, sign) if merged else _nearly(verdict, sign),
                 _runs(state, attempt), merged)


def stalled(state: State, sign: float, history: list[HistoryLine]) -> Plateau | None:
    """The plateau that the campaign is on, if any. Attempts that never became a patch do not count, nor do those that
    the machine ended."""
    gains = [gain(state, attempt, sign) for attempt in state.attempts.values()
             if (verdict := attempt.verdict) is not None and attempt.proposal.author != "gate"
             and verdict.stage != "propose" and verdict.fault != "infra"]
    return watch(gains, sum(is_near(line, sign) for line in history))


def is_near(line: HistoryLine, sign: float) -> bool:
    """Whether an attempt looked better and was not merged."""
    return line.outcome != "accepted" and line.stage in NEAR and not line.fault and (
        line.effect is not None and sign * line.effect < 0)


def gain(state: State, attempt: Attempt, sign: float) -> float:
    """By how much a merged attempt was better on val, in the metric's unit, and more than 0; 0 of every other.

    A part of a bundle that was never paired alone has its share of the bundle's.
    """
    verdict = attempt.verdict
    if verdict is None or verdict.outcome != "accepted":
        return 0.0
    seen, share = _val_effects(verdict), 1
    if not seen and verdict.unit in state.attempts:
        unit = state.attempts[verdict.unit]
        seen, share = _val_effects(unit.verdict) if unit.verdict else [], max(len(unit.proposal.parts), 1)
    return max(-sign * statistics.fmean(seen) / share, LEAST) if seen else LEAST


def _nearly(verdict: Verdict, sign: float) -> float:
    """What is left of the gain of one that was not merged, one standard error taken off; 0 where nothing is."""
    seen = _val_effects(verdict)
    if verdict.fault or len(seen) < 2:
        return 0.0
    return max(-sign * statistics.fmean(seen) - statistics.stdev(seen) / math.sqrt(len(seen)), 0.0)


def _val_effects(verdict: Verdict) -> list[float]:
    """On the split that a proposer may see; what certifies is another."""
    return [pair.effect("val") for pair in verdict.pairs
            if not pair.fault and "val" in pair.candidate and "val" in pair.incumbent]


def predicted(history: list[HistoryLine], state: State) -> list[predictions.Outcome]:
    """What models predicted of their newest attempts, and what came of it."""
    found: list[predictions.Outcome] = []
    for line in reversed(history):
        attempt = state.attempts[line.id]
        said = attempt.proposal.prediction
        if said is not None:
            measured = attempt.preflight.ratio if attempt.preflight and attempt.preflight.ok else None
            found.append(predictions.Outcome(said, attempt.proposal.expected_effect, line.effect, measured))
        if len(found) == predictions.RECENT:
            break
    return found[::-1]


def past(state: State, name: str) -> str:
    """One earlier attempt in full, ready to show; empty where there is none of that id or number."""
    attempt = state.attempts.get(name) or next(
        (one for one in list(state.attempts.values()) if str(one.number) == name.strip().lstrip("#0")), None)
    if attempt is None:
        return ""
    proposal, parts = attempt.proposal, []
    parts.append(f"{proposal.id}: {one_line(proposal.title, 100)}\n{one_line(proposal.hypothesis, 1200)}")
    if attempt.verdict is not None:
        line = _line(attempt, {one.candidate for one in state.reverts})
        seen = "" if line.effect is None else f", effect {line.effect:+.3f}"
        parts.append(f"{line.outcome} at {line.stage}{seen}: {line.reason}")
    if attempt.candidate is not None:
        parts.append(quoted(attempt.candidate.patch.diff, PAST_CHARACTERS))
    if attempt.preflight is not None and attempt.preflight.fault:
        parts.append(quoted(attempt.preflight.log_tail, 2000))
    return "\n".join(parts)


def budget_text(config: Config) -> str:
    """The budget of one training run in words."""
    budget = config.budget
    if not budget.amount:
        return "whatever the training command does by default"
    if budget.unit == "charged_steps":
        return (f"{budget.amount:g} charged steps: a patch whose step is slower by more than {budget.dead_band:.0%} "
                "gets fewer steps, one whose step is faster gets more")
    return f"{budget.amount:g} {budget.unit}"


def _line(attempt: Attempt, back: Collection[str] = ()) -> HistoryLine:
    """``back``: ids of the merges that the owner took back."""
    verdict = attempt.verdict
    assert verdict is not None
    estimate = verdict.estimate
    effect = low = high = None
    if estimate is not None and estimate.split == "val":
        effect, low, high = (round(value, 3) for value in (estimate.effect, estimate.low, estimate.high))
    else:  # the estimate is on a split that a proposer never sees: the mean on val instead
        seen = _val_effects(verdict)
        effect = round(sum(seen) / len(seen), 3) if seen else None
    taken_back = "the owner took it back; " if attempt.proposal.id in back else ""
    return HistoryLine(
        id=attempt.proposal.id, title=one_line(attempt.proposal.title, 100), outcome=verdict.outcome,
        stage=verdict.stage, reason=one_line(taken_back + _reason(verdict), 240), effect=effect, low=low, high=high,
        fault=verdict.fault or "", direction=attempt.proposal.direction)


def _reason(verdict: Verdict) -> str:
    """Why, in the judge's rounded words. Of an audit and of a certification on a sealed split only the fact: a proposer
    that saw those numbers could fit them."""
    if verdict.evidence.get("split", "val") != "val":
        return verdict.reason.partition(":")[0]
    if verdict.fault == "non_causal":
        return "non_causal: predictions change when later tokens are hidden, so they did not count"
    return rounded(verdict.reason)


def _runs(state: State, attempt: Attempt) -> float:
    """Training runs that an attempt took, with its share of its bundle's."""
    unit = state.attempts.get(attempt.verdict.unit) if attempt.verdict and attempt.verdict.unit else None
    shared = sum(run.trains for run in unit.runs) / max(len(unit.proposal.parts), 1) if unit else 0.0
    return sum(run.trains for run in attempt.runs) + shared


def _touched(state: State, files: Mapping[str, str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for merged in reversed(state.merges):
        candidate = state.attempts[merged.candidate].candidate
        found |= dict.fromkeys(path for path in (candidate.patch.files if candidate else ()) if path in files)
    return tuple(found)
