"""Is a run folder sound? What its ledger, its job folders and its clone say of each other. Changes nothing.

``problems`` are contradictions: a result that was lost or counted twice, a branch that is not where the ledger says.
What a killed process left behind is no problem but work for the next start, which does it by itself; ``ratchet doctor
RUN`` says what that will be. Does not cover: whether the figures of a verdict follow from its runs (``ratchet
recompute``), nor whether commits made by hand are of use (``ratchet audit``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent import data_sums, git, merge, runs
from agent.doctor.checks import Check
from agent.errors import UserError
from agent.ledger import State, events, replay, torn_bytes
from agent.records import Run
from sandbox.engine import LocalEngine
from sandbox.job import read_result


@dataclass(frozen=True, slots=True)
class Tally:
    """Contradictions in a run folder, each in one line."""

    lost: tuple[str, ...] = ()
    """Results that lie in a job folder and that the ledger has not, or has otherwise."""
    doubled: tuple[str, ...] = ()
    """Runs, verdicts or merges that count twice."""
    tip: tuple[str, ...] = ()
    """Where branch, commits and ledger disagree."""

    @property
    def problems(self) -> tuple[str, ...]:
        return (*self.lost, *self.doubled, *self.tip)


def tally(folder: Path) -> Tally:
    """The contradictions in run ``folder``. Raises UserError when its ledger cannot be read."""
    state, _ = replay(folder / runs.LEDGER)
    if not state.campaign:  # killed before its first line: there is nothing that could contradict
        return Tally()
    return Tally(tuple(_lost(folder, state)), tuple(_doubled(folder, state)), tuple(_tip(folder, state)))


def find(folder: Path, named: Path | None) -> Path | None:
    """The run folder that ``named`` names, by its path or by its name in the folder of the runs; None: it is none."""
    places = () if named is None else (named, folder / named)
    return next((place.resolve() for place in places if (place / runs.LEDGER).is_file()), None)


def examine(folder: Path) -> Iterator[Check]:
    """One line a check of run ``folder``; an error is what no later start would mend."""
    try:
        state, _ = replay(folder / runs.LEDGER)
    except UserError as error:
        yield Check("ledger", "error", error.problem, error.mend)
        return
    yield from _ledger(folder)
    alive = runs.held(folder)
    yield Check("lock", "ok", "a living ratchet works on it" if alive else "free")
    yield from _open_work(folder, state, alive)
    if not (folder / "repo.git").is_dir():
        yield Check("repo", "error", f"{folder / 'repo.git'} is gone", "Restore it from a backup, or start a new run.")
        return
    yield from _repo(folder, state, alive)
    for problem in (found := tally(folder)).problems if not alive else ():
        yield Check("facts", "error", problem, "Decisions since then rest on it: read them with `ratchet log`, and "
                    "start a new run with --name where in doubt.")
    if alive or not found.problems:
        yield Check("facts", "ok", "not compared while it runs" if alive else
                    "no result lost, nothing counted twice, the tip is what was merged")
    yield from _data(folder)


def _ledger(folder: Path) -> Iterator[Check]:
    path = folder / runs.LEDGER
    torn = torn_bytes(path)
    if torn:
        yield Check("ledger", "warning", f"its last line is torn ({torn} bytes): the machine or the process died while "
                    "it was written", "Nothing: the next start cuts it off; what it told of is done again.")
    numbers, times = [], []
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n") and b"\0" not in line:
                entry = json.loads(line)
                numbers.append(int(entry["n"]))
                times.append(str(entry["t"]))
    gap = next((at for at, number in enumerate(numbers) if number != at), None)
    if gap is not None:
        yield Check("ledger", "error", f"line {gap + 1} has the number {numbers[gap]}: lines are missing or were "
                    "written twice", "Restore the file from a backup.")
    back = next((at for at in range(1, len(times)) if times[at] < times[at - 1]), None)
    if back is not None:
        yield Check("clock", "warning", f"the machine's clock went back at line {back + 1} ({times[back - 1]} to "
                    f"{times[back]})", "Nothing: order and waiting times do not depend on it; --until does.")
    if not torn and gap is None:
        yield Check("ledger", "ok", f"{len(numbers)} events, the last at {times[-1] if times else 'no time'}")


def _open_work(folder: Path, state: State, alive: bool) -> Iterator[Check]:
    """What was begun and not finished, and what the next start makes of it."""
    engine = LocalEngine()
    kinds = Counter(_fate(folder, run, engine) for run in state.open_runs)
    does = {"alive": "run on: it is taken over", "done": "finished meanwhile: it is read",
            "lost": "lost: it is run again", "damaged": "left half a result: it is run again"}
    for kind, count in sorted(kinds.items()):
        yield Check("jobs", "ok" if alive or kind in ("alive", "done") else "warning",
                    f"{count} {'job' if count == 1 else 'jobs'} {does[kind]}", "" if alive else "Nothing: the next "
                    "start does it.")
    for pending, what in ((state.pending_merge, "merge"), (state.pending_removal, "removal")):
        if pending is not None:
            yield Check("merge", "ok" if alive else "warning", f"a {what} was begun and is not finished "
                        f"({pending.subject})", "" if alive else "Nothing: the next start finishes it.")
    waiting = sum(attempt.verdict is None for attempt in state.attempts.values())
    if waiting:
        yield Check("ideas", "ok", f"{waiting} attempts have no verdict yet")
    left = [place for pattern in ("jobs/*/.*.tmp", "source/.*", "repo.git/objects/??/tmp_obj_*")
            for place in folder.glob(pattern)]
    if left and not alive:
        yield Check("litter", "ok", f"{len(left)} half-written files of killed processes, which nothing reads")


def _fate(folder: Path, run: Run, engine: LocalEngine) -> str:
    place = folder / run.folder
    if engine.alive(place):
        return "alive"
    try:
        return "done" if read_result(place) is not None else "lost"
    except ValueError:
        return "damaged"


def _repo(folder: Path, state: State, alive: bool) -> Iterator[Check]:
    repo = folder / "repo.git"
    locks = [path.relative_to(repo) for path in git.stale_locks(repo)] if not alive else []
    if locks:
        yield Check("repo", "warning", f"a killed git left {', '.join(map(str, locks))}",
                    "Nothing: the next start removes it.")
    try:
        git.run(repo, "rev-list", "--objects", "--quiet", "--all")
    except git.GitError as error:
        yield Check("repo", "error", f"objects are missing or damaged ({error.stderr.strip().splitlines()[-1][:120]})",
                    "Restore repo.git from a backup, or start a new run.")
        return
    pending = state.pending_merge or state.pending_removal
    found = git.resolve(repo, git.ACCEPTED)
    if pending is None or found not in (pending.old_tip, pending.new_tip):
        state_ok = found == state.tip
        yield Check("branch", "ok" if state_ok else "error", f"the accepted branch is at {str(found)[:12]}" + (
            "" if state_ok else f", the ledger says {state.tip[:12]}"), "" if state_ok else
            f"Move it back:  git --git-dir {repo} update-ref {git.ACCEPTED} {state.tip[:12]}")
    known = git.refs(repo)
    unkept = [a.proposal.id for a in state.refused if a.candidate and merge.REFUSED + a.proposal.id not in known]
    if unkept and not alive:
        yield Check("refused", "warning" if state.phase != "finished" else "error",
                    f"{len(unkept)} refused candidates have no ref yet", "Nothing: the next start writes them."
                    if state.phase != "finished" else "Their patches are in the ledger: `ratchet show ID`.")


def _data(folder: Path) -> Iterator[Check]:
    for place in sorted((folder.parent / ".data").glob("*/")):
        broken = data_sums.broken(place, thorough=True)
        if broken:
            yield Check("data", "error", f"{place / broken} is not what data.prepare wrote",
                        f"Remove {place}: the next start prepares it again.")


def _lost(folder: Path, state: State) -> Iterator[str]:
    for run in state.runs.values():
        result = state.results.get(run.id)
        try:
            there = read_result(folder / run.folder)
        except ValueError:
            continue  # half a result is none
        if there is None or there.fault == "infra":
            continue
        if result is None and state.phase == "finished":
            yield f"{run.id} has a result that the ledger does not know"
        elif result is not None and result != there:
            yield f"{run.id} has another result in its folder than in the ledger"


def _doubled(folder: Path, state: State) -> Iterator[str]:
    finished: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    merges: Counter[str] = Counter()
    for event, data, _ in events(folder / runs.LEDGER):
        if event == "run_finished":
            finished[data["id"]] += 1
        elif event == "verdict":
            verdicts[data["candidate"]] += 1
        elif event == "merge":
            merges[data["candidate"]] += 1
    for what, counts in (("result of", finished), ("verdict on", verdicts), ("merge of", merges)):
        yield from (f"the {what} {name} counts {count} times" for name, count in counts.items() if count > 1)
    made = Counter((run.purpose == "preflight", run.tree, run.seed, run.steps, run.audits, run.candidate
                    if run.purpose == "preflight" else "") for run in state.runs.values()
                   if (result := state.results.get(run.id)) is not None and result.fault != "infra")
    yield from (f"tree {key[1][:12]} was run {count} times on seed {key[2]}"
                for key, count in made.items() if count > 1)
    for attempt in state.attempts.values():
        if attempt.verdict is not None:
            seeds = Counter(pair.seed for pair in attempt.verdict.pairs)
            yield from (f"the verdict on {attempt.proposal.id} counts seed {seed} {count} times"
                        for seed, count in seeds.items() if count > 1)


def _tip(folder: Path, state: State) -> Iterator[str]:
    """The accepted branch is the start and then exactly the moves that the ledger knows, each of the measured tree."""
    repo = folder / "repo.git"
    start, pending = str(state.campaign["start"]), state.pending_merge or state.pending_removal
    found = git.resolve(repo, git.ACCEPTED)
    if found != state.tip and not (pending is not None and found == pending.new_tip):
        yield f"the accepted branch is at {str(found)[:12]}, the ledger says {state.tip[:12]}"
    try:
        line = git.history(repo, start, state.tip)
    except git.GitError as error:
        yield f"the accepted branch cannot be read: {error}"
        return
    told = {move.new_tip: move for move in (*state.merges, *state.removals, *getattr(state, "reverts", ()))}
    if not state.plans and [commit for commit, _, _ in line] != list(told):
        yield f"the branch has {len(line)} commits, the ledger {len(told)}"
    for commit, parent, _ in line:
        move = told.get(commit)
        if move is not None and (parent != move.old_tip or git.resolve(repo, commit, "tree") != move.tree):
            yield f"{commit[:12]} does not hold the tree that was measured, on the tip that it was measured against"
    for one in state.merges:
        attempt = state.attempts[one.candidate]
        if attempt.candidate is None or attempt.verdict is None or attempt.verdict.outcome != "accepted":
            yield f"{one.candidate} was merged without a verdict that accepts it"
        elif attempt.candidate.tree != one.tree:
            yield f"{one.candidate} was merged with another tree than its candidate's"
