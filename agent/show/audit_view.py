"""What the closing audit looks like to a person, and as JSON: for the screen, the report, `ratchet log` and `show`.

Pure, and clean of control characters, as all of ``view``.
"""

from __future__ import annotations

from typing import Any

from agent.ablation import unsettled
from agent.ledger import Attempt, State
from agent.records import Ablation, Closing, Plan, Removal, to_json
from agent.show import view


def facts(state: State) -> dict[str, Any]:
    """The object of ``ratchet audit --json``. Effects in the metric's own sign: without the commit minus the tip.
    ``earlier``: audits that this one goes on from, since they took out what did harm."""
    *earlier, plan = _rounds(state)
    closing = _closing(state, plan)
    return {
        "run": str(state.campaign.get("name", "")), **_examined(state, plan), "tip": state.tip,
        "earlier": [_examined(state, one) for one in earlier],
        "gain": to_json(closing.gain) if closing and closing.gain else None,
        "sooner": to_json(closing.sooner) if closing and closing.sooner else None}


def _examined(state: State, plan: Plan) -> dict[str, Any]:
    removal = _removal(state, plan)
    return {"audit": plan.audit, "pairs": plan.pairs, "alpha": plan.alpha, "examined": plan.tip,
            "commits": [_fact(one.commit, one.title, one.candidate, one.note, one.margin,
                              _of(state, plan, (one.commit,))) for one in plan.commits],
            "removed": list(removal.removes) if removal else []}


def _fact(commit: str, title: str, candidate: str, note: str, margin: float,
          found: Ablation | None) -> dict[str, Any]:
    effect = found.estimate if found else None
    return {"commit": commit, "title": view.clean(title), "attempt": candidate or None, "known": bool(candidate),
            "note": view.clean(note), "margin": margin, "outcome": found.outcome if found else None,
            "reason": view.clean(found.reason) if found else "",
            "effect": effect.effect if effect else None, "low": effect.low if effect else None,
            "high": effect.high if effect else None, "pairs": len(found.pairs) if found else 0}


def dry_lines(plan: Plan, most: int) -> list[str]:
    """``ratchet audit --dry-run``."""
    head = (f"at most {most} training runs: {len(plan.commits)} commits, {plan.pairs} pairs each; fewer where a commit "
            "is decided early or at most one may go") if most else "nothing to train: the run is audited already"
    return [head, *(f"  {one.commit[:9]}  {view.clean(one.title)}{f'  ({view.clean(one.note)})' if one.note else ''}"
                    for one in plan.commits)]


def lines(state: State) -> list[str]:
    """The newest audit as a table, after those that it goes on from; empty when there is none."""
    if not state.plans:
        return []
    *earlier, plan = _rounds(state)
    shown = [line for one in earlier for line in (*_table(state, one), _tip(state, one), "")] + _table(state, plan)
    closing = _closing(state, plan)
    if closing is None or _unsettled(state, plan):
        return [*shown, "the audit is not finished: the same command goes on"]
    gain = closing.gain
    shown.append(_tip(state, plan))
    if gain:
        shown.append(f"gain    {view.clean(gain.metric)} {view.span(gain.effect, gain.low, gain.high)} on split "
                     f"{view.clean(gain.split)}, {len(gain.pairs)} fresh pairs, start against tip")
    return [*shown, *([f"sooner  {sooner_line(closing)}"] if closing.sooner else [])]


def _table(state: State, plan: Plan) -> list[str]:
    removal = _removal(state, plan)
    gone = removal.removes if removal else ()
    shown = [f"closing audit of {len(plan.commits)} commits; effect of taking one out, {view.better(state)}:"]
    for one in plan.commits:
        found = _of(state, plan, (one.commit,))
        word: str = "removed" if one.commit in gone else found.outcome if found else "in work"
        if word == "remove" and removal:
            word = "asked again" if _unsettled(state, plan) else "stays"
        effect = view.interval(found.estimate) if found and found.estimate else "-"
        note = f"  ({view.clean(one.note)})" if one.note else ""
        shown.append(f"  {one.commit[:9]}  {word:<13}  {effect:<28}  {view.clean(one.title)}{note}"
                     + (f"  | {view.clean(found.reason)}" if found else ""))
    return shown + [f"  together   {one.outcome:<13}  {view.interval(one.estimate) if one.estimate else '-':<28}  "
                    f"{view.clean(one.reason)}" for one in state.ablations
                    if one.audit == plan.audit and len(one.commits) > 1]


def _tip(state: State, plan: Plan) -> str:
    removal, closing = _removal(state, plan), _closing(state, plan)
    return (f"tip     {(closing.tip if closing else plan.tip)[:12]}"
            + (f"  {view.clean(removal.subject)}" if removal else "  unchanged"))


def sooner_line(closing: Closing) -> str:
    """Steps and charged seconds that the tip saves on the way to the start's final training loss."""
    s = closing.sooner
    if s is None or not s.reached:
        return "the tip never reaches the training loss at which the start ends"
    missed = f"; not reached on {s.pairs - s.reached}" if s.reached < s.pairs else ""
    return (f"at the start's final training loss {s.steps:.0f} (sd {s.steps_sd:.0f}) of {s.start_steps:.0f} steps and "
            f"{s.seconds:.1f} (sd {s.seconds_sd:.1f}) of {s.start_seconds:.1f} charged seconds earlier, "
            f"{s.reached} seeds{missed}")


def of_attempt(state: State, attempt: Attempt) -> list[str]:
    """Lines on one merged attempt: what the audits found of it."""
    commit = attempt.merge.new_tip if attempt.merge else ""
    shown = []
    for one in state.ablations:
        if commit and one.commits == (commit,):
            effect = f" {view.interval(one.estimate)}" if one.estimate else ""
            shown.append(f"audit {one.audit}     {one.outcome}:{effect} {view.clean(one.reason)}")
    return shown + [f"removed by  {done.new_tip}" for done in state.removals if commit in done.removes]


def _unsettled(state: State, plan: Plan) -> bool:
    return unsettled(plan.audit, state.ablations, state.removals)


def _rounds(state: State) -> list[Plan]:
    """The newest audit, after those that it goes on from."""
    found = [state.plans[-1]]
    for plan in reversed(state.plans[:-1]):
        if not _unsettled(state, plan):
            break
        found.insert(0, plan)
    return found


def _of(state: State, plan: Plan, commits: tuple[str, ...]) -> Ablation | None:
    return next((one for one in reversed(state.ablations) if one.commits == commits and one.audit == plan.audit), None)


def _closing(state: State, plan: Plan) -> Closing | None:
    return next((one for one in state.closings if one.audit == plan.audit), None)


def _removal(state: State, plan: Plan) -> Removal | None:
    return next((one for one in state.removals if one.audit == plan.audit), None)
