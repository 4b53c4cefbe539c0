"""Merge exactly what was measured, or keep what was refused with its reason.

All rules of a merge: the verdict is ``accepted`` and is the candidate's own; the candidate stands on the tip; the new
commit's tree is the candidate's tree; one commit a merge on the branch's first-parent line, and for a bundle a second
parent that shows its parts one by one; the ref moves by compare-and-swap.
``prepare_merge`` makes the commit object and moves nothing; the caller writes the intent; ``complete_merge`` moves
the ref, and may be done again after a crash.
"""

from __future__ import annotations

import datetime
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from agent import git, guards
from agent.records import Ablation, Candidate, Merge, Order, Pair, Proposal, Removal, Revert, Tier, Verdict

REFUSED = "refs/ratchet/refused/"
SUBJECT_WIDTH, BODY_WIDTH = 72, 80
_BREAKS_MAIL = re.compile(r"^(?:---|diff -|Index: |>?From |#)")
"""Starts of lines at which git ends a message or drops a line when it reads it back from a patch."""


class MergeRefused(Exception):
    """A merge that would break a rule above. The caller's mistake or a lost race, never the patch's fault."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under what the candidate was measured: what its commit says besides the verdict."""

    metric: str
    direction: str
    budget: str
    """As a person would say it: ``300 charged_steps``."""
    device: str
    isolation: int
    tier: Tier
    device_seconds: float
    """Seconds that this candidate's jobs held a device."""
    gpu: bool
    campaign: str
    """Name of the run; with the candidate's id it is the Run-Id."""


def message(proposal: Proposal, verdict: Verdict, conditions: Conditions) -> str:
    """Commit message of a merge: subject, hypothesis, what was seen, trailers."""
    return _compose(subject(proposal.title), [proposal.hypothesis, _seen(verdict, conditions)],
                    _trailers(proposal, verdict, conditions))


def prepare_merge(
    repo: Path, candidate: Candidate, proposal: Proposal, verdict: Verdict, old_tip: str, conditions: Conditions,
    when: datetime.datetime | None = None,
) -> Merge:
    """The merge commit as an object; no ref moves. Raises MergeRefused when a rule would break."""
    if verdict.outcome != "accepted" or verdict.candidate != candidate.id or proposal.id != candidate.id:
        raise MergeRefused(f"the verdict on {verdict.candidate} is {verdict.outcome}: no merge of {candidate.id}")
    if candidate.base != old_tip:
        raise MergeRefused(f"{candidate.id} stands on {candidate.base[:12]}, the tip is {old_tip[:12]}")
    if git.resolve(repo, candidate.head, "tree") != candidate.tree:
        raise MergeRefused(f"the commit of {candidate.id} does not hold the tree that was measured")
    text = message(proposal, verdict, conditions)
    parents = (old_tip, candidate.head) if proposal.parts else (old_tip,)
    commit = git.commit_tree(repo, candidate.tree, parents, text, when)
    return Merge(candidate.id, old_tip, commit, candidate.tree, text.split("\n", 1)[0])


def prepare_removal(
    repo: Path, found: Ablation, titles: list[str], old_tip: str, steps: int, conditions: Conditions,
    when: datetime.datetime | None = None,
) -> Removal:
    """The commit, as an object, that takes ``found.commits`` out of the tip again: its tree is the tree that was
    measured without them. No ref moves. Raises MergeRefused when the audit did not decide so."""
    if found.outcome != "remove" or not found.tree:
        raise MergeRefused(f"the audit's decision on {', '.join(c[:12] for c in found.commits)} is {found.outcome}")
    what = f'Remove "{titles[0]}"' if len(titles) == 1 else f"Remove {len(titles)} changes"
    trailers = {
        "Metric": f"{conditions.metric} ({conditions.direction})", **removal_figures(found),
        "Budget": conditions.budget, "Device": conditions.device, "Isolation": f"level {conditions.isolation}",
        "Tier": conditions.tier, "Run-Id": f"{conditions.campaign}/audit-{found.audit}"}
    removes = "\n".join(f"Removes: {commit}" for commit in found.commits)
    body = ["The closing audit trained the tip with and without this on fresh seeds." if len(titles) == 1 else
            "The closing audit trained the tip with and without these together on fresh seeds: "
            + "; ".join(titles) + ".", f"Measured: {found.reason}."]
    text = _compose(subject(what), body, trailers).rstrip("\n") + f"\n{removes}\n"
    commit = git.commit_tree(repo, found.tree, (old_tip,), text, when)
    return Removal(found.audit, old_tip, commit, found.tree, steps, found.commits, text.split("\n", 1)[0])


def prepare_revert(repo: Path, order: Order, merged: Merge, old_tip: str, tree: str, steps: int, campaign: str,
                   when: datetime.datetime | None = None) -> Revert:
    """The commit, as an object, that takes ``merged`` out of the tip because a person said so; no ref moves.

    ``tree``: the tip without it. Nothing was measured of it: its message claims no effect.
    """
    body = ["The owner took this merge back while the campaign ran." + (f" Why: {order.text}" if order.text else "")]
    text = _compose(subject(f'Revert "{merged.subject}"'), body, {"Run-Id": f"{campaign}/order-{order.number}"})
    text = text.rstrip("\n") + f"\nReverts: {merged.new_tip}\n"
    commit = git.commit_tree(repo, tree, (old_tip,), text, when)
    return Revert(order.number, merged.candidate, old_tip, commit, tree, steps, text.split("\n", 1)[0])


def removal_figures(found: Ablation) -> dict[str, str]:
    """The trailers of a removal that follow from the runs alone. Effects are "without it" minus the tip."""
    return figures(Verdict("", "accepted", "judge", found.reason, None, found.estimate, found.pairs, found.evidence))


def complete_merge(repo: Path, merge: Merge | Removal | Revert, ref: str = git.ACCEPTED) -> None:
    """Move ``ref`` from the old tip to the new one. Done already: success. Raises git.RefMoved when it is elsewhere."""
    if git.resolve(repo, merge.new_tip, "tree") != merge.tree:
        raise MergeRefused(f"{merge.new_tip[:12]} does not hold the tree that was measured")
    try:
        git.update_ref(repo, ref, merge.new_tip, merge.old_tip)
    except git.RefMoved as error:
        if error.actual != merge.new_tip:
            raise


def refuse(
    repo: Path, candidate: Candidate, proposal: Proposal, verdict: Verdict, campaign: str,
    when: datetime.datetime | None = None,
) -> str:
    """Keep a refused candidate as ``refs/ratchet/refused/<id>``, whose message says why, and drop its branch.

    Returns the ref. May be done again after a crash.
    """
    ref = f"{REFUSED}{candidate.id}"
    if git.resolve(repo, ref) is None:
        trailers = {"Outcome": verdict.outcome, "Stage": verdict.stage, "Fault": verdict.fault or "",
                    "Effect": _effect(verdict), "Pairs": str(len(verdict.pairs)) if verdict.pairs else "",
                    "Guards": guards.text(verdict.guards), "Tier": verdict.tier or "",
                    "Isolation": f"level {verdict.level}" if verdict.level is not None else "",
                    "Proposer": _proposer(proposal), "Run-Id": f"{campaign}/{candidate.id}"}
        reason = f"{verdict.outcome.capitalize()} at {verdict.stage}: {verdict.reason}"
        text = _compose(subject(proposal.title), [proposal.hypothesis, reason], trailers)
        commit = git.commit_tree(repo, candidate.tree, (candidate.base,), text, when)
        git.update_ref(repo, ref, commit, "")
    branch = f"refs/heads/{candidate.branch}"
    if git.resolve(repo, branch) is not None:
        git.update_ref(repo, branch, "", None)
    return ref


def subject(title: str) -> str:
    """The title as a subject line: one line, a capital letter, no full stop, at most 72 characters."""
    line = _one_line(title).rstrip(".") or "Change the training code"
    line = line[0].upper() + line[1:]
    return textwrap.shorten(line, SUBJECT_WIDTH, placeholder=" ...") if len(line) > SUBJECT_WIDTH else line


def _seen(verdict: Verdict, conditions: Conditions) -> str:
    """What the measurement showed, in words."""
    estimate = verdict.estimate
    if estimate is None:
        return verdict.reason
    gain = estimate.effect < 0 if conditions.direction == "min" else estimate.effect > 0
    effects = ", ".join(f"{pair.effect(estimate.split):+.4f}" for pair in _proof(verdict)
                        if estimate.split in pair.candidate and estimate.split in pair.incumbent)
    each = f" Seed by seed: {effects}." if effects else ""
    return (f"Measured: {conditions.metric} {'better' if gain else 'worse'} by {abs(estimate.effect):.4f} on "
            f"{estimate.split}, {estimate.confidence:.0%} interval {estimate.low:+.4f} to {estimate.high:+.4f}, "
            f"{estimate.pairs} pairs.{each} {verdict.reason}")


def figures(verdict: Verdict) -> dict[str, str]:
    """The trailers that follow from the runs alone: what ``ratchet recompute`` does again."""
    evidence = "; ".join(f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
                         for key, value in verdict.evidence.items())
    return {"Effect": _effect(verdict) or "not estimated", "Pairs": _counted(verdict),
            "Seeds": " ".join(str(pair.seed) for pair in _proof(verdict)) or "none",
            "Evidence": evidence or verdict.reason}


def _trailers(proposal: Proposal, verdict: Verdict, conditions: Conditions) -> dict[str, str]:
    """Trailers in the order they are shown. On a CPU the GPU-seconds are 0 and Device-seconds tell the time."""
    seconds = f"{conditions.device_seconds:.1f}"
    return {
        "Metric": f"{conditions.metric} ({conditions.direction})",
        **figures(verdict),
        "Guards": guards.text(verdict.guards),
        "Budget": conditions.budget, "Device": conditions.device, "Isolation": f"level {conditions.isolation}",
        "Tier": conditions.tier,
        "GPU-seconds": seconds if conditions.gpu else "0",
        "Device-seconds": "" if conditions.gpu else seconds,
        "Cost-USD": f"{proposal.cost.usd:.4f}",
        "Proposer": _proposer(proposal),
        "Parts": " ".join(proposal.parts),
        "Run-Id": f"{conditions.campaign}/{verdict.candidate}",
    }


def _proof(verdict: Verdict) -> list[Pair]:
    """The pairs that count as evidence; all of them in verdicts that were written before some were told apart."""
    return [pair for pair in verdict.pairs if pair.fresh] or list(verdict.pairs)


def _counted(verdict: Verdict) -> str:
    proof = len(_proof(verdict))
    screening = len(verdict.pairs) - proof
    return f"{proof} fresh ({screening} screening)" if screening else str(proof)


def _effect(verdict: Verdict) -> str:
    estimate = verdict.estimate
    if estimate is None:
        return ""
    return (f"{estimate.effect:+.5f} ({estimate.confidence:.0%} CI {estimate.low:+.5f}..{estimate.high:+.5f}, "
            f"{estimate.split})")


def _proposer(proposal: Proposal) -> str:
    source = Path(proposal.source).name if proposal.author == "human" else proposal.source  # no path of a machine
    return f"{proposal.author} ({source})" if source else proposal.author


def _compose(head: str, paragraphs: list[str], trailers: dict[str, str]) -> str:
    """Subject, wrapped paragraphs, and a last paragraph of the trailers that have a value."""
    body = [wrapped for text in paragraphs for part in re.split(r"\n\s*\n", text) if (wrapped := _wrapped(part))]
    lines = [f"{key}: {_one_line(value)}" for key, value in trailers.items() if value.strip()]
    return "\n\n".join([head, *body, "\n".join(lines)]) + "\n"


def _wrapped(text: str) -> str:
    lines = textwrap.wrap(_one_line(text), BODY_WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f" {line}" if _BREAKS_MAIL.match(line) else line for line in lines)


def _one_line(text: str) -> str:
    """White space as single spaces; what does not print (a model's text may hold anything) as ``?``."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
