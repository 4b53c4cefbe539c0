"""Read: the repository at the tip and the ledger's state -> Briefing, all that a proposer may know.

A briefing holds source text, titles, outcomes and effects rounded to three decimals. It never holds training data,
held-out text, a score of the confirm or final split, or a key. ``prompts/README.md`` says what of it leaves the
machine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from agent.config import Config
from agent.edit_modes import Tried, tried
from agent.ledger import Attempt, State
from agent.quote import one_line, rounded
from agent.records import Outcome, Stage, Tier, Verdict
from agent.wishes import wishes

SHOWN_CHARACTERS = 400_000
"""Editable source shown at most: about 115,000 tokens at 3.5 characters each."""
PROTECTED_CHARACTERS = 60_000
"""Protected source shown at most; it is there for its interface only."""


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


@dataclass(frozen=True, slots=True)
class Briefing:
    """What a proposer sees before it proposes."""

    tip: str
    """Commit that the edits must fit."""
    number: int
    """Number of the attempt that this briefing is for, from 1."""
    files: dict[str, str]
    """Editable source by path relative to the target."""
    protected: dict[str, str]
    """Source that a patch may not change, shown for its interface."""
    omitted: tuple[str, ...]
    """Paths of files that were too many to show."""
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
    tried: tuple[Tried, ...] = ()
    """What became of a model's earlier replies, by the form of edits they were asked in."""


def brief(config: Config, state: State, files: Mapping[str, str], protected: Mapping[str, str], *,
          calibration: str = "", budget: str = "", attempts_left: int | None = None) -> Briefing:
    """The briefing for the next attempt. ``files`` and ``protected`` are the target's text files at ``state.tip``.

    ``calibration`` is what is known of the noise; ``budget`` replaces the text made from the config (a campaign
    knows the granted steps better). Attempts without a verdict are left out of the history.
    """
    shown, left_out = _fit(files, SHOWN_CHARACTERS, config.train.command)
    interface, hidden = _fit(protected, PROTECTED_CHARACTERS, config.train.command)
    back = {one.candidate for one in state.reverts}
    finished = [attempt for attempt in state.attempts.values() if attempt.verdict]
    return Briefing(
        tip=state.tip, number=len(state.attempts) + 1, files=shown, protected=interface,
        omitted=(*left_out, *hidden), editable=tuple(config.source.editable),
        max_patch_lines=config.source.max_patch_lines, metric=config.metric.name, direction=config.metric.direction,
        budget=budget or budget_text(config), tier=config.evaluate.tier, calibration=rounded(calibration),
        history=tuple(_line(attempt, back) for attempt in finished), preset=config.preset, attempts_left=attempts_left,
        wishes=wishes(state), tried=tried(attempt.proposal for attempt in state.attempts.values()))


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
        seen = [pair.effect("val") for pair in verdict.pairs if "val" in pair.candidate and "val" in pair.incumbent]
        effect = round(sum(seen) / len(seen), 3) if seen else None
    taken_back = "the owner took it back; " if attempt.proposal.id in back else ""
    return HistoryLine(
        id=attempt.proposal.id, title=one_line(attempt.proposal.title, 100), outcome=verdict.outcome,
        stage=verdict.stage, reason=one_line(taken_back + _reason(verdict), 240), effect=effect, low=low, high=high)


def _reason(verdict: Verdict) -> str:
    """Why, in the judge's rounded words. Of an audit and of a certification on a sealed split only the fact: a proposer
    that saw those numbers could fit them."""
    if verdict.evidence.get("split", "val") != "val":
        return verdict.reason.partition(":")[0]
    if verdict.fault == "non_causal":
        return "non_causal: predictions change when later tokens are hidden, so they did not count"
    return rounded(verdict.reason)


def _fit(files: Mapping[str, str], room: int, command: str) -> tuple[dict[str, str], list[str]]:
    """(files that fit into ``room`` characters, paths left out). Files that the command names come first, then
    the shallow ones: in a large repository those are the likeliest to hold the training loop."""
    def rank(path: str) -> tuple[bool, int, str]:
        return path not in command.split(), path.count("/"), path

    kept, left_out = {}, []
    for path in sorted(files, key=rank):
        if len(files[path]) <= room:
            room -= len(files[path])
            kept[path] = files[path]
        else:
            left_out.append(path)
    return kept, left_out
