"""The morning after: a Markdown page and a picture that let a person decide in five minutes what to adopt.

``write`` makes ``report/report.md`` and ``report/progress.png`` from the ledger's State alone; both can be deleted
and made again. The page leads with the final number, which comes from fresh seeds on a split that nothing was
selected on. The sum of the merged effects is shown in the picture only, and named as what it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent import guards
from agent.ledger import State
from agent.records import Revert
from agent.show import audit_view, phases, view
from sandbox import box
from sandbox.job import write_atomically

PAGE, PLOT = "report.md", "progress.png"

_TIER = {
    "sealed": "**sealed**: a trusted scorer outside the box computed it from the weights; the patch never saw the "
              "held-out text and could not print the number.",
    "protected": "**protected**: the repo's own evaluation, restored from the base commit, printed it. A patch that "
                 "hands over something that misleads that evaluation is not excluded.",
    "reported": "**reported**: the training run printed it itself. A patch that prints a better number without being "
                "better is not excluded: read each merged diff with that in mind.",
}

def write(state: State, folder: Path) -> Path:
    """Write both files under ``folder/report`` and return the page's path. Overwrites older ones."""
    from agent.show import plot  # matplotlib takes longer to import than a killed campaign to go on

    report = folder / "report"
    report.mkdir(parents=True, exist_ok=True)
    write_atomically(report / PLOT, plot.png(state))
    page = report / PAGE
    write_atomically(page, markdown(state).encode())
    return page


def markdown(state: State) -> str:
    """The whole page."""
    rows = view.rows(state)
    name = view.clean(str(state.campaign.get("name", "")))
    parts = [f"# Ratchet run {name}", _facts(state), _summary(state, rows), f"![Progress]({PLOT})",
             _merged(state, rows), _audited(state), _promoted(state), _guards(state), _phases(state),
             _refused(rows, view.maximised(state)), _failed(rows), _adopt(state, name), _controlled(state)]
    if state.notes:
        parts.append("## Notes of the run\n\n" + "\n".join(f"- {_cell(note)}" for note in state.notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(state: State) -> str:
    facts = state.campaign
    previous = f" It goes on from the accepted tip of `{facts['previous']}`." if facts.get("previous") else ""
    return f"Target: {_cell(view.target_line(state))}. Proposer: {_cell(facts.get('proposer', '?'))}.{previous}"


def _summary(state: State, rows: list[view.Row]) -> str:
    count = {kind: sum(r.kind == kind for r in rows) for kind in ("accepted", "refused", "untrained", "failed")}
    merged = ", ".join(f"\"{_cell(r.title)}\"" for r in rows if r.kind == "accepted")
    parts = sum(r.kind == "bundled" for r in rows)
    bundled = f" {parts} of the attempts are in it as parts of bundles, certified together." if parts else ""
    back = f" You took {len(state.reverts)} of them back." if state.reverts else ""
    said = [f"**{count['accepted']} of {len(rows)} attempts were merged**{f': {merged}' if merged else ''}."
            f"{bundled}{back}",
            f"{count['refused']} were trained and not merged, {count['untrained']} were refused before a "
            f"full training run, {count['failed']} failed in a run.", _gain(state),
            f"All of it took {view.spent_line(state)}."]
    if state.phase != "finished":
        said.append(f"The run is not finished (it is {state.phase}): everything here is provisional.")
    tier, level = state.campaign.get("tier"), _level(state)
    if tier != "sealed":
        said.append(f"The metric is of tier *{_cell(tier)}*, so a patch could have influenced how it is printed.")
    if level is not None and level < 2:
        said.append(f"Runs were isolated at level {level} only (see the last section).")
    return " ".join(said)


def _gain(state: State) -> str:
    gain = state.gain
    if gain is None:
        return ("The final split was not opened, so **there is no unbiased number yet**; the effects in the table "
                "selected the patches and flatter them." if state.merges else "")
    low, high = (-gain.high, -gain.low) if view.maximised(state) else (gain.low, gain.high)
    verdict = "better" if high < 0 else "worse" if low > 0 else "not shown to differ: the interval includes zero"
    ends = f" ({gain.start:.4f} to {gain.tip:.4f})" if gain.start is not None and gain.tip is not None else ""
    text = ("which nothing was selected on, with" if gain.split == "final" else
            "whose text also selected the merges (this tier has no other), but with")
    return (f"Start against tip on split `{_cell(gain.split)}`, {text} {len(gain.pairs)} "
            f"fresh paired seeds: **{_cell(gain.metric)} {view.span(gain.effect, gain.low, gain.high)}**{ends}, "
            f"{view.better(state)}; {verdict}.")


def _merged(state: State, rows: list[view.Row]) -> str:
    merged = [r for r in rows if r.kind == "accepted"]
    if not merged:
        return "## Merged\n\nNothing was merged. The accepted branch is where it started."
    lines = [f"| # | commit | change | effect [interval], {view.better(state)} | pairs | by |",
             "|--:|---|---|---|--:|---|"]
    back = {one.candidate: one for one in state.reverts}
    lines += [f"| {r.number} | `{r.commit[:10] or 'not yet'}` | {_cell(r.title)}{_taken_back(back.get(r.id))} | "
              f"{r.effect} | {r.estimate.pairs if r.estimate else '-'} | {r.author} |" for r in merged]
    return ("## Merged, oldest first\n\n" + "\n".join(lines) + "\n\nEach effect is against the tip of its moment, on "
            "the runs that decided the merge. `ratchet show ID` gives its diff, its pairs and where its logs lie.")


def _taken_back(revert: Revert | None) -> str:
    return f" (taken back by you in `{revert.new_tip[:10]}`)" if revert else ""


def _audited(state: State) -> str:
    """What the closing audit found of each merge."""
    shown = "\n".join(line.replace("`", "'") for line in audit_view.lines(state))
    return f"## Closing audit\n\n```text\n{shown}\n```" if shown else ""


def _promoted(state: State) -> str:
    """What became of the gain at other budgets, where that was tried."""
    parts = []
    for found in state.promotions:
        lines = [f"| change | at {_cell(found.here)} | at {_cell(found.there)} | verdict |", "|---|---|---|---|"]
        lines += [f"| {_cell(one.title)} | {view.interval(one.here) if one.here else '-'} | "
                  f"{view.interval(one.there) if one.there else '-'} | **{one.verdict}**: {_cell(one.reason)} |"
                  for one in found.parts]
        parts.append("\n".join(lines))
    return "## At another budget\n\n" + "\n\n".join(parts) if parts else ""


def _guards(state: State) -> str:
    """What the tip costs beside the loss, as its merge found it."""
    verdict = state.attempts[state.merges[-1].candidate].verdict if state.merges else None
    if verdict is None or not verdict.guards:
        return ""
    caps: dict[str, float] = (state.campaign.get("config") or {}).get("guards") or {}
    lines = ["| measure | tip | against the start | cap |", "|---|--:|--:|--:|"]
    lines += [f"| {name} | {guards.shown(name, found.value)} | {guards.change(found)} | {_cap(caps.get(name, 0))} |"
              for name, found in verdict.guards.items()]
    return "## Beside the loss\n\n" + "\n".join(lines)


def _phases(state: State) -> str:
    """Where the slots' time went."""
    found = phases.of(state)
    if not state.runs or not found.room:
        return ""
    lines = ["| phase | seconds | of slot time |", "|---|--:|--:|"]
    lines += [f"| {name} | {found.seconds[name]:.0f} | {found.seconds[name] / found.room:.1%} |"
              for name in (*phases.JOB, "wait")]
    lines.append(f"| propose (beside it) | {found.seconds['propose']:.0f} | - |")
    devices = "\n".join(f"- {_cell(phases.line(device))}" for device in found.devices)
    return (f"## Time\n\n{found.experiments} experiments in {view.duration(found.wall)}, {found.per_hour:.1f} an "
            f"hour; slots were busy {found.busy:.1%}.\n\n" + "\n".join(lines) + "\n\n" + devices)


def _cap(cap: float) -> str:
    return f"{(cap - 1) * 100:+.1f} %" if cap else "none"


def _refused(rows: list[view.Row], maximised: bool) -> str:
    sign = -1 if maximised else 1
    measured = sorted((r for r in rows if r.kind == "refused"),
                      key=lambda r: (r.estimate is None, sign * r.estimate.effect if r.estimate else 0.0))
    before = [r for r in rows if r.kind == "untrained"]
    parts = []
    if measured:
        lines = ["| # | change | effect [interval] | reason |", "|--:|---|---|---|"]
        lines += [f"| {r.number} | {_cell(r.title)} | {r.effect} | {_reason(r)} |" for r in measured]
        parts.append("## Trained and not merged, nearest to a merge first\n\n" + "\n".join(lines))
    if before:
        lines = ["| stage | # | change | reason |", "|---|--:|---|---|"]
        for stage in view.UNTRAINED:
            lines += [f"| {stage} | {r.number} | {_cell(r.title)} | {_reason(r)} |" for r in before
                      if r.stage == stage]
        parts.append("## Refused before a full training run\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _failed(rows: list[view.Row]) -> str:
    failed = sorted((r for r in rows if r.kind == "failed"), key=lambda r: (r.fault or "", r.number))
    if not failed:
        return ""
    lines = ["| fault | # | change | what happened |", "|---|--:|---|---|"]
    lines += [f"| {r.fault} | {r.number} | {_cell(r.title)} | {_cell(r.reason)} |" for r in failed]
    return "## Failed in a training run\n\n" + "\n".join(lines)


def _adopt(state: State, name: str) -> str:
    start, tip = state.campaign.get("start", ""), state.tip
    if not state.merges:
        return ""
    return f"""## Review and adopt

Your checkout was not touched. The accepted commits are in this run's own clone, one a merge; run these in the run's
folder:

```sh
git --git-dir repo.git log --reverse {start[:12]}..{tip[:12]}    # hypothesis, effect and evidence of each merge
git --git-dir repo.git diff {start[:12]} {tip[:12]}              # everything at once
```

and these where you started `ratchet`:

```sh
ratchet show ID --name {name}             # one attempt: diff, pairs, logs
ratchet export {name} --out patches       # a patch series for `git am`
ratchet export {name} --branch ratchet    # or a branch in your repository; nothing is checked out
```"""


def _controlled(state: State) -> str:
    facts = state.campaign
    config: dict[str, Any] = facts.get("config") or {}
    judge: dict[str, Any] = config.get("judge") or {}
    lines = ["Seeds were chosen by the harness; candidate and incumbent were compared pair by pair on the same seeds."]
    if facts.get("unit"):
        amount = f" of {facts['amount']:g}" if facts.get("amount") else ""
        lines.append(f"Every run had the same budget{amount}, in {_cell(facts['unit'])}."
                     + ("" if facts["unit"] == "charged_steps" else " A patch that makes a step dearer is not "
                        "charged for it." if facts["unit"] == "steps" else " Speed of the machine counts as gain "
                        "or loss; pairs lessen that and do not remove it."))
    if judge:
        lines.append(f"The judge looked after {', '.join(map(str, judge.get('looks', ()))) or '?'} pairs on seeds that "
                     f"nothing had used before, kept the false discovery rate of all merges below "
                     f"{judge.get('alpha', '?')}, and never believed a pair's sd below {judge.get('floor', '?')}.")
    if facts.get("tier"):
        lines.append("The metric is " + _TIER.get(str(facts["tier"]), _cell(facts["tier"])))
    level = _level(state)
    if level is not None:
        lines.append(f"The weakest isolation of any run was {box.describe(level)}")
    lines.append("Not controlled: other budgets, sizes, data and hardware. An effect at this budget may vanish or "
                 "turn in longer training; `ratchet promote` tries it at a larger one. Repeat what you adopt at the "
                 "size you care about.")
    caps = config.get("guards") or {}
    free = [name for name in (*guards.EXACT, *guards.BAND) if not caps.get(name)]
    if free:
        lines.append(f"Not capped by `[guards]`: {', '.join(free)}.")
    return "## What was and was not controlled\n\n" + "\n".join(f"- {line}" for line in lines)


def _level(state: State) -> int | None:
    """The weakest isolation level that really held in a run; before any run, what the campaign found."""
    held = [result.level for result in state.results.values() if result.fault != "infra"]
    told = state.campaign.get("level")
    return min(held) if held else int(told) if told is not None else None


def _reason(r: view.Row) -> str:
    return (f"{r.fault}: " if r.fault else "") + _cell(r.reason)


def _cell(text: object) -> str:
    """Text from elsewhere, safe inside a Markdown table: no markup, no line breaks, no HTML."""
    plain = view.clean(str(text))
    for mark in ("\\", "|", "`", "*", "_", "[", "]", "<"):
        plain = plain.replace(mark, "\\" + mark)
    return plain
