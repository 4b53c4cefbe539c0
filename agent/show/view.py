"""What a ledger's State looks like to a person: the rows and lines that status, log, show and the report share.

Pure: no disk, no clock, no colour. Titles, reasons and log tails come from models and from jobs, so every text that
leaves here has its control characters removed (``clean``, ``block``): a patch cannot drive the reader's terminal.
"""

from __future__ import annotations

import datetime
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from agent import guards
from agent.errors import UserError
from agent.ledger import Attempt, State
from agent.records import Estimate, Fault, Order, Outcome, Pair, Promotion, Stage, Transfer
from agent.show import phases

Kind = Literal["accepted", "bundled", "refused", "untrained", "failed", "open"]
"""accepted; merged as a part of a bundle that was; trained and not merged; refused before a full run; failed in a
run; not yet decided."""

UNTRAINED: tuple[Stage, ...] = ("propose", "patch", "preflight")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]")


@dataclass(frozen=True, slots=True)
class Row:
    """One attempt in one line."""

    number: int
    id: str
    title: str
    author: str
    kind: Kind
    outcome: Outcome | None
    stage: Stage | None
    reason: str
    fault: Fault | None
    estimate: Estimate | None
    commit: str

    @property
    def effect(self) -> str:
        """The effect with its interval, or a dash."""
        return interval(self.estimate) if self.estimate else "-"


def clean(text: str) -> str:
    """``text`` on one line without control characters."""
    return " ".join(_CONTROL.sub(" ", text).split())


def block(text: str) -> str:
    """``text`` with its lines but without any other control character."""
    return _CONTROL.sub("", text.replace("\r\n", "\n"))


def span(effect: float, low: float, high: float) -> str:
    """An effect with its interval: ``-0.0243 [-0.0291, -0.0195]``."""
    return f"{effect:+.4f} [{low:+.4f}, {high:+.4f}]"


def interval(estimate: Estimate) -> str:
    return span(estimate.effect, estimate.low, estimate.high)


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def kind(attempt: Attempt) -> Kind:
    verdict = attempt.verdict
    if verdict is None:
        return "open"
    if verdict.outcome == "accepted":
        return "bundled" if verdict.unit else "accepted"
    if verdict.stage in UNTRAINED:
        return "untrained"
    return "failed" if verdict.fault not in (None, "behind") else "refused"


def row(attempt: Attempt) -> Row:
    verdict, proposal = attempt.verdict, attempt.proposal
    return Row(
        number=attempt.number, id=clean(proposal.id), title=clean(proposal.title) or clean(proposal.id),
        author=proposal.author, kind=kind(attempt), outcome=verdict.outcome if verdict else None,
        stage=verdict.stage if verdict else None, reason=clean(verdict.reason) if verdict else "",
        fault=verdict.fault if verdict else None, estimate=verdict.estimate if verdict else None,
        commit=attempt.merge.new_tip if attempt.merge else "")


def rows(state: State) -> list[Row]:
    """Every attempt in the order of the night."""
    return [row(attempt) for attempt in state.attempts.values()]


def maximised(state: State) -> bool:
    return state.campaign.get("direction") == "max"


def metric(state: State) -> str:
    return clean(str(state.campaign.get("metric") or "metric"))


def better(state: State) -> str:
    """``lower is better`` or ``higher is better``."""
    return "higher is better" if maximised(state) else "lower is better"


def merged_sum(state: State) -> float:
    """Sum of the accepted estimates. Selected on the same runs that made them, so it flatters; see ``Gain``."""
    return sum(r.estimate.effect for r in rows(state) if r.kind == "accepted" and r.estimate)


def training_runs(state: State) -> int:
    """Full training runs that were started; the tiny preflight runs are not counted."""
    return sum(run.trains for run in state.runs.values())


def status(state: State, alive: bool) -> dict[str, Any]:
    """The object of ``ratchet status --json``.

    ``gain.effect`` is negative when the tip is better, whichever way the metric goes: for a metric that is maximised
    the sign is turned. ``time`` is there once a run was started (phases.py). ``promoted``, where that was tried, is the
    verdict by preset and budget.

    ``alive``: a process holds the run's lock; without it a running ledger is a stopped run.
    """
    kinds = [r.kind for r in rows(state)]
    return {
        "run": str(state.campaign.get("name", "")),
        "state": "stopped" if state.phase == "running" and not alive else state.phase,
        "attempts": len(kinds),
        "merged": len(state.merges),
        "refused": len(state.refused),
        "reverted": len(state.reverts),
        "waiting": sorted(state.waiting),
        "paused": state.paused,
        "forecast": state.forecasts[-1] if state.forecasts else None,
        "tip": state.tip,
        "gain": _gain(state),
        "spent": {"runs": training_runs(state), "seconds": round(state.device_seconds, 3),
                  "usd": round(state.usd, 6)},
    } | ({"time": phases.facts(state)} if state.runs else {}) | (
        {"promoted": {one.there: one.parts[0].verdict for one in state.promotions}} if state.promotions else {})


def _gain(state: State) -> dict[str, Any] | None:
    gain = state.gain
    if gain is None:
        return None
    effect, low, high = gain.effect, gain.low, gain.high
    if maximised(state):
        effect, low, high = -effect, -high, -low
    return {"metric": gain.metric, "split": gain.split, "effect": _finite(effect), "low": _finite(low),
            "high": _finite(high)}


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def gain_line(state: State) -> str:
    """The final gain in one line, or why there is none."""
    gain = state.gain
    if gain is None and state.phase == "finished":
        return "not measured; the notes say why" if state.kept else "none: nothing was merged"
    if gain is None:
        return "not measured yet: that is done once, at the end of the run, on fresh seeds"
    ends = f" ({gain.start:.4f} -> {gain.tip:.4f})" if gain.start is not None and gain.tip is not None else ""
    return (f"{clean(gain.metric)} {span(gain.effect, gain.low, gain.high)}{ends} on split {clean(gain.split)}, "
            f"{len(gain.pairs)} fresh pairs, {better(state)}")


def transfer_line(found: Promotion, part: Transfer) -> str:
    """What became of a change at another budget, in one line."""
    there = f": {interval(part.there)} there" if part.there else ""
    here = f", {interval(part.here)} at {clean(found.here)}" if part.here else ""
    return f"{part.verdict} at {clean(found.there)}{there}{here}; {clean(part.reason)}"


def spent_line(state: State) -> str:
    return f"{training_runs(state)} runs, {duration(state.device_seconds)} on devices, ${state.usd:.2f} for models"


def status_lines(state: State, alive: bool) -> list[str]:
    """``ratchet status`` for a person."""
    told, facts = status(state, alive), state.campaign
    undecided = told["attempts"] - told["refused"] - sum(r.kind in ("accepted", "bundled") for r in rows(state))
    lines = [
        f"run       {clean(told['run'])} ({told['state']})",
        f"target    {target_line(state)}",
        f"attempts  {told['attempts']}: {told['merged']} merged, {told['refused']} refused"
        + (f", {undecided} in work" if undecided else ""),
        f"tip       {state.tip[:12]}" + (" (the start: nothing merged yet)" if not state.merges else
                                         f" {clean((state.reverted or state.merges[-1]).subject)}"),
        *(["paused    no further job is started until `ratchet resume`"] if state.paused else []),
        *(f"waiting   {clean(name)} for approval: ratchet approve {state.attempts[name].number}"
          for name in state.waiting),
        *(f"order     {order_line(one)}" for one in state.orders[-3:]),
        f"gain      {gain_line(state)}",
        *(f"promoted  {transfer_line(one, one.parts[0])}" for one in state.promotions if one.tip == state.tip),
        f"spent     {spent_line(state)}",
        *([f"forecast  {forecast_line(state.forecasts[-1])}"] if state.forecasts else []),
        *phases.lines(state),
        f"time      {_clock(state.first_time)} to {_clock(state.last_time)} UTC",
    ]
    if facts.get("previous"):
        lines.insert(1, f"goes on   from the accepted tip of {clean(str(facts['previous']))}")
    last = [r for r in rows(state) if r.outcome][-3:]
    return lines + [f"last      {log_line(r)}" for r in last] + [f"note      {clean(n)}" for n in state.notes[-3:]]


HOUR = "one hour"
"""What a forecast says that ends the campaign where nothing does: it looks an hour ahead."""


def forecast_line(found: dict[str, Any]) -> str:
    """What a campaign will have spent at its end: ``about 96 experiments, 8.1 GPU-h in 2.1 h, at most $14``."""
    money = (f", at most ${found['usd_at_most']:.2f}" if found["usd_at_most"] else
             f", about ${found['usd']:.2f}" if found["usd"] else "")
    tokens = f", {found['tokens']:,} tokens" if found["tokens"] else ""
    widest = max((found.get("off") or {}).values(), default=0.0)
    basis = {"limits": "before the first run", "baseline": "after the baseline", "rough": "rough",
             "calibrated": "calibrated"}
    good = f", good to {100 * widest:.0f} %" if widest else ""
    end = "without a cap: an hour from now" if found["ends"] == HOUR else f"ended by {found['ends']}"
    return (f"about {found['experiments']} experiments, {found['gpu_hours']:.2g} GPU-h in {found['hours']:.2g} h"
            f"{tokens}{money} ({basis[found['basis']]}{good}: {found['seconds_a_run']:.3g} s a run; "
            f"{end}; {found['reserved_runs']} runs held back)")


def revert_lines(state: State) -> list[str]:
    """The merges that a person took back, one a line."""
    return [f"taken back by order {one.order}: {clean(one.candidate)}, as {one.new_tip[:12]}" for one in state.reverts]


def order_line(order: Order) -> str:
    """What a person told the campaign, in one line."""
    said = " ".join(clean(part) for part in (order.kind, order.candidate, order.text) if part)
    return f"{order.number}: {said}" + (f" (not followed: {clean(order.refused)})" if order.refused else "")


def target_line(state: State) -> str:
    facts = state.campaign
    preset = f", preset {clean(str(facts['preset']))}" if facts.get("preset") else ""
    return (f"{clean(str(facts.get('target_name') or facts.get('target') or '?'))}{preset}, "
            f"from {str(facts.get('start', ''))[:12]}, device {clean(str(facts.get('device', '?')))}, "
            f"isolation level {facts.get('level', '?')}")


def log_line(r: Row) -> str:
    """One attempt in one line of fixed columns."""
    pairs = f"{r.estimate.pairs} pairs" if r.estimate else ""
    head = f"{r.number:>3}  {r.outcome or 'in work':<12}  {r.stage or '':<9}  {r.effect:<28}  {pairs:<8}  {r.title}"
    why = f"  [{r.fault}]" if r.fault else ""
    return f"{head}{why}" + (f"  | {r.reason}" if r.reason else "")


def find(state: State, wanted: str) -> Attempt:
    """The attempt of that id, number, commit or unambiguous part of an id. Raises UserError otherwise."""
    attempts = list(state.attempts.values())
    if wanted in state.attempts:
        return state.attempts[wanted]
    number = wanted.removeprefix("#")
    if number.isdigit():
        for attempt in attempts:
            if attempt.number == int(number):
                return attempt
    if number.isdigit() and len(number) < 7:
        raise UserError(f"There is no attempt {number}.", f"This run has {len(attempts)}; `ratchet log` lists them.")
    found = [a for a in attempts if a.merge and len(wanted) >= 7 and a.merge.new_tip.startswith(wanted)]
    found = found or [a for a in attempts if wanted.lower() in a.proposal.id.lower()]
    if len(found) == 1:
        return found[0]
    ids = ", ".join(clean(a.proposal.id) for a in (found or attempts)[-8:]) or "none yet"
    problem = f"{wanted!r} fits {len(found)} attempts." if found else f"There is no attempt {wanted!r}."
    raise UserError(problem, f"Give an id or a number of `ratchet log`, e.g.: {ids}.")


def show_lines(state: State, attempt: Attempt, folder: str) -> list[str]:
    """Everything on one attempt. ``folder``: where the campaign lies, to say where the logs are."""
    r, proposal, verdict = row(attempt), attempt.proposal, attempt.verdict
    lines = [f"# {r.number}  {r.title}", "",
             f"id          {r.id}",
             f"author      {r.author}{f' ({clean(proposal.source)})' if proposal.source else ''}",
             f"base        {proposal.base[:12]}",
             f"hypothesis  {clean(proposal.hypothesis) or '-'}"]
    if proposal.reference:
        lines.append(f"reference   {clean(proposal.reference)}")
    if proposal.expected_effect is not None:
        lines.append(f"expected    {proposal.expected_effect:+.4f}")
    if proposal.cost.calls:
        cost = proposal.cost
        lines.append(f"cost        ${cost.usd:.4f}, {cost.prompt_tokens} + {cost.completion_tokens} tokens, "
                     f"{cost.calls} calls")
    lines += [f"verdict     {r.outcome or 'none yet'}{f' at {r.stage}' if r.stage else ''}"
              f"{f' [{r.fault}]' if r.fault else ''}",
              f"reason      {r.reason or '-'}", f"effect      {_effect_line(state, r)}"]
    if attempt.merge:
        lines.append(f"merged as   {attempt.merge.new_tip} (tree {attempt.merge.tree[:12]})")
        lines += [f"taken back  {one.new_tip}, by order {one.order}" for one in state.reverts
                  if one.candidate == proposal.id]
        lines += [f"promoted    {transfer_line(one, part)}" for one in state.promotions for part in one.parts
                  if part.of == proposal.id]
    if verdict and verdict.evidence:
        lines.append("evidence    " + ", ".join(f"{clean(k)}: {_value(v)}" for k, v in verdict.evidence.items()))
    if verdict and verdict.tier:
        level = f", isolation level {verdict.level}" if verdict.level is not None else ""
        lines.append(f"trust       tier {verdict.tier}{level}")
    if verdict and verdict.guards:
        lines.append(f"guards      {guards.text(verdict.guards)} against the start")
    return (lines + _preflight(attempt) + _pairs(verdict.pairs if verdict else ()) + _runs(state, attempt, folder)
            + _diff(attempt))


def _effect_line(state: State, r: Row) -> str:
    if not r.estimate:
        return "-"
    e = r.estimate
    return (f"{interval(e)} {metric(state)} on split {clean(e.split)} ({better(state)}), {e.pairs} pairs, "
            f"{e.confidence:.0%} interval, sd of a pair {e.sd:.4f}")


def _preflight(attempt: Attempt) -> list[str]:
    told = attempt.preflight
    if told is None:
        return []
    fault = f" [{told.fault}]" if told.fault else ""
    lines = ["", "## Preflight", "",
             f"{'passed' if told.ok else 'refused'}{fault} in {duration(told.seconds)}: {clean(told.reason) or '-'}",
             f"step cost {told.ratio:.3f} x the incumbent's; {told.steps} steps granted for a full run"]
    return lines + (["", *block(told.log_tail).rstrip().splitlines()] if told.log_tail.strip() else [])


def _pairs(pairs: tuple[Pair, ...]) -> list[str]:
    """One line a seed and split: incumbent, candidate, difference, and the two runs."""
    if not pairs:
        return []
    lines = ["", "## Pairs (candidate minus incumbent)", "",
             f"{'seed':>10}  {'for':<7}  {'split':<8}  {'incumbent':>10}  {'candidate':>10}  {'effect':>8}  runs"]
    for pair in pairs:
        ran = f"{clean(pair.incumbent_run)} | {clean(pair.candidate_run)}"
        for split in sorted(set(pair.incumbent) | set(pair.candidate)) or ["-"]:
            old, new = pair.incumbent.get(split), pair.candidate.get(split)
            effect = f"{new - old:+.4f}" if old is not None and new is not None else (pair.fault or "-")
            use = "proof" if pair.fresh else "screen"
            lines.append(f"{pair.seed:>10}  {use:<7}  {clean(split):<8}  {_score(old):>10}  {_score(new):>10}  "
                         f"{effect:>8}  {ran}")
    return lines


def _runs(state: State, attempt: Attempt, folder: str) -> list[str]:
    if not attempt.runs:
        return []
    lines = ["", "## Runs and their logs", ""]
    for run in attempt.runs:
        result = state.results.get(run.id)
        how = "no result" if result is None else (
            f"{result.fault}: {clean(result.message)}" if result.fault else f"ok, {duration(result.seconds)}")
        lines.append(f"{run.purpose:<9}  seed {run.seed}  {run.device}  {how}  {folder}/{run.folder}/log.txt")
    failed = [state.results[run.id] for run in attempt.runs if run.id in state.results and state.results[run.id].fault]
    tail = block(failed[-1].log_tail).rstrip() if failed else ""
    return lines + (["", "last lines of the failed run:", "", *tail.splitlines()[-30:]] if tail else [])


def _diff(attempt: Attempt) -> list[str]:
    candidate = attempt.candidate
    if candidate:
        patch = candidate.patch
        head = f"## Diff: {', '.join(map(clean, patch.files))} (+{patch.added} -{patch.removed}), {candidate.branch}"
        return ["", head, "", *block(patch.diff).rstrip().splitlines()]
    if attempt.proposal.diff:
        return ["", "## Diff as handed in (not applied)", "", *block(attempt.proposal.diff).rstrip().splitlines()]
    lines = ["", "## Edits (not applied)"] if attempt.proposal.edits else []
    for edit in attempt.proposal.edits:
        lines += ["", clean(edit.path), *(f"- {line}" for line in block(edit.search).splitlines()),
                  *(f"+ {line}" for line in block(edit.replace).splitlines())]
    return lines


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _value(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else clean(str(value))


def _clock(time: str) -> str:
    """``2026-03-01 02:03`` of a ledger's time stamp."""
    try:
        return datetime.datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return "?"
