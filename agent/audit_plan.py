"""What a closing audit examines: the commits from the campaign's start to the accepted tip, and the tip without each.

The tip without a commit is a three-way merge, or, where neighbouring lines forbid that and all commits are known, the
edits of all the others made again. Reads the clone; writes loose objects at most.
"""

from __future__ import annotations

from pathlib import Path

from agent import ablation, git, git_trees
from agent.config import Config
from agent.errors import UserError
from agent.ledger import State
from agent.patch import rebuilt
from agent.records import Examined, Merge, Plan


def plan(state: State, repo: Path, config: Config, pairs: int) -> Plan:
    """What an audit of the accepted branch would examine, and how. Reads the clone; writes loose objects at most.

    Raises UserError when the branch does not stand on the campaign's start.
    """
    start, tip = str(state.campaign["start"]), git.resolve(repo, git.ACCEPTED)
    try:
        line = git.history(repo, start, tip or "")
    except git.GitError as error:
        raise UserError(f"The accepted branch does not stand on the run's start {start[:12]}.",
                        f"Move it back:  git --git-dir {repo} update-ref {git.ACCEPTED} {state.tip[:12]}") from error
    merged = {one.new_tip: one for one in state.merges}
    gone = {commit for one in state.removals for commit in one.removes} | {one.new_tip for one in state.removals}
    gone |= {one.new_tip for one in state.merges} - {one.new_tip for one in state.kept}
    gone |= {one.new_tip for one in state.reverts}
    judge, prefix = config.judge, str(state.campaign.get("prefix") or "")
    now = _tip_steps(state)
    kept = [entry for entry in line if entry[0] not in gone]
    # where all of it is known, a merge between neighbours can be left out by making the others' edits again
    known = [merged[commit] for commit, _, _ in kept if commit in merged]
    whole = len(known) == len(kept)
    commits = []
    for commit, parent, title in kept:
        tree = git.without(repo, str(tip), [commit])
        if tree is None and whole:
            tree = rebuilt(repo, prefix, start, [state.attempts[one.candidate].proposal for one in known
                                                 if one.new_tip != commit], config.source)
        commits.append(_examined(state, repo, config, str(tip), commit, parent, title, tree or "", now))
    margin = ablation.margin(judge.audit_margin, judge.floor, None)
    return Plan(len(state.plans) + 1, str(tip), now, pairs, judge.alpha, margin, tuple(commits))


def _examined(state: State, repo: Path, config: Config, tip: str, commit: str, parent: str, title: str, tree: str,
              now: int) -> Examined:
    """``tree``: the tip without it, or empty."""
    merged = next((one for one in state.merges if one.new_tip == commit), None)
    prefix, note = str(state.campaign.get("prefix") or ""), ""
    if not tree:
        note = "later commits build on it"
    elif tree == git.resolve(repo, tip, "tree"):
        tree, note = "", "nothing of it is left in the tip"
    judge = config.judge
    if merged is None:
        paths = [change.path.removeprefix(f"{prefix}/") for change in git_trees.diff_raw(repo, parent, commit)]
        held = [path for path in paths if git.matches(path, config.source.protected)]
        told = "the ledger does not know it" + (f"; it changes protected {', '.join(held)}" if held else "")
        return Examined(commit, title, tree, now, ablation.margin(judge.audit_margin, judge.floor, None), "",
                        "; ".join(part for part in (told, note) if part))
    verdict = state.attempts[merged.candidate].verdict
    certified = verdict.estimate if verdict else None
    return Examined(commit, title, tree, _steps_without(state, merged, now),
                    ablation.margin(judge.audit_margin, judge.floor, certified), merged.candidate, note)


def _tip_steps(state: State) -> int:
    """Steps of the tip that the ledger knows."""
    if state.reverted:
        return state.reverted.steps
    if state.removals:
        return state.removals[-1].steps
    return _steps_of(state, state.merges[-1]) if state.merges else int(state.campaign["steps"])


def _steps_of(state: State, merged: Merge) -> int:
    runs_ = state.attempts[merged.candidate].runs
    return next((r.steps for r in reversed(runs_) if r.purpose == "pair"), int(state.campaign["steps"]))


def _steps_without(state: State, merged: Merge, now: int) -> int:
    """The tip's steps, less what this merge changed in them, and never more than the start's."""
    place, start = state.merges.index(merged), int(state.campaign["steps"])
    before = _steps_of(state, state.merges[place - 1]) if place else start
    return min(start, round(now * before / _steps_of(state, merged))) if now else 0


def runs_at_most(found: Plan, final_pairs: int) -> int:
    """Training runs of a plan if no commit is decided early, several are removed, and none is known yet."""
    count = sum(bool(one.tree) for one in found.commits)
    together = 2 * found.pairs if count > 1 else 0
    return found.pairs * (1 + count) * bool(count) + together + 2 * final_pairs
