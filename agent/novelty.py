"""Novelty: whether a candidate is new. There are three ways to be old:

* the same change, by the normalised diff (policy.py), before anything is run;
* the same behaviour, by runs: two candidates that hand over the same weights from the same seed and steps, or, where no
  weights are handed over, print the same long curve and score to the last digit, are one, however differently they are
  written. A served target's tiny run shows it before a full run is spent.
* a refused idea again: a model's patch that changes the same lines as one that was refused or is being tried, but for
  its numbers, must say what is different. It is not forbidden: another value can be right where one was wrong.

An index over the ledger's state, rebuilt with each process. Does not cover: an idea in other words and other lines.
"""

from __future__ import annotations

import re

from agent.ledger import Attempt, State
from agent.records import Candidate, Result, Run

ALIKE = 0.8
"""Share of changed lines in common (Jaccard) from which two patches are the same idea."""
POINTS = 8
"""Distinct losses that a curve must have to stand for the weights."""
LONGEST_SHAPE = 400
"""Changed lines beyond which a patch is not compared: it is no retry of a small idea."""

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])")
Key = tuple[object, ...]


class Novelty:
    """What has been tried, by behaviour and by shape."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._behaviour: dict[Key, str] = {}
        self._shapes: dict[str, frozenset[str]] = {}
        for run in list(state.runs.values()):
            if run.id in state.results:
                self._note(run, state.results[run.id])

    def same_as(self, run: Run, result: Result) -> str:
        """Id of another attempt that was seen to behave as the candidate of ``run`` does, or an empty string.

        Of two that are on their way, the one whose run ends first stays.
        """
        key = _behaviour(run, result)
        if key is None or run.candidate is None or not self._counts(run.candidate):
            return ""
        first = self._behaviour.setdefault(key, run.candidate)
        if first != run.candidate and not _stands(self._state.attempts.get(first)):
            self._behaviour[key] = run.candidate
            return ""
        return first if first != run.candidate else ""

    def same_change(self, candidate: Candidate, attempt: Attempt) -> str:
        """Id of an earlier attempt with the same change, or an empty string."""
        change = candidate.patch.normalised_hash
        for name in self._state.changes.get(change, ()):
            other = self._state.attempts[name]  # which may have been mended into another change since
            if other.number < attempt.number and other.candidate and other.candidate.patch.normalised_hash == change:
                return name
        return ""

    def objection(self, attempt: Attempt, candidate: Candidate) -> str:
        """Why a model's new patch is turned away as a retry, worded for the model; an empty string where it is not.

        Asked once: a patch that is built again on a new tip was let through before.
        """
        proposal = attempt.proposal
        if proposal.author != "llm" or attempt.candidate is not None or (
                proposal.prediction is not None and proposal.prediction.different):
            return ""
        mine = shape(candidate.patch.diff)
        if not mine:
            return ""
        for other in reversed(list(self._state.attempts.values())):
            if not _tried(other) or other.number >= attempt.number:
                continue
            theirs = self._shape_of(other)
            if theirs and len(mine & theirs) >= ALIKE * len(mine | theirs):
                ended = "was refused" if other.verdict else "is being tried"
                return (f"like {other.proposal.id} ({other.proposal.title}), which {ended}, but for its numbers: a "
                        "retry must say in `different` what is different and why that should help")
        return ""

    def _shape_of(self, attempt: Attempt) -> frozenset[str]:
        assert attempt.candidate is not None
        key = attempt.candidate.patch.normalised_hash
        if key not in self._shapes:
            self._shapes[key] = shape(attempt.candidate.patch.diff)
        return self._shapes[key]

    def _counts(self, candidate: str) -> bool:
        """A bundle may well be what one of its parts is."""
        attempt = self._state.attempts.get(candidate)
        return attempt is not None and attempt.proposal.author != "gate"

    def _note(self, run: Run, result: Result) -> None:
        key = _behaviour(run, result)
        if key is not None and run.candidate is not None and self._counts(run.candidate):
            self._behaviour.setdefault(key, run.candidate)


def shape(diff: str) -> frozenset[str]:
    """The changed lines of a diff by file, without white space and with every number masked; empty where they are too
    many to be a small idea."""
    lines, path = set(), ""
    for line in diff.split("\n"):
        if line.startswith("+++ ") or line.startswith("--- "):
            path = line[4:].removeprefix("a/").removeprefix("b/") if line[4:] != "/dev/null" else path
        elif line[:1] in ("+", "-") and line[1:].strip():
            lines.add(f"{path}{line[0]}{_NUMBER.sub('#', ' '.join(line[1:].split()))}")
    return frozenset(lines) if len(lines) <= LONGEST_SHAPE else frozenset()


def _tried(attempt: Attempt) -> bool:
    """Whether it was tried and did not help, or is on its way."""
    verdict = attempt.verdict
    return attempt.candidate is not None and attempt.proposal.author != "gate" and (
        verdict is None or (verdict.outcome == "rejected" and verdict.stage in ("preflight", "measure", "judge")))


def _stands(attempt: Attempt | None) -> bool:
    """Whether it is on its way or was judged by its own runs, so that a second one like it would tell nothing new."""
    return attempt is not None and (attempt.verdict is None or (
        attempt.verdict.outcome != "inconclusive" and attempt.verdict.stage not in ("propose", "patch")))


def _behaviour(run: Run, result: Result) -> Key | None:
    """What two runs must share to count as one behaviour; None where a run does not show it."""
    if result.fault or run.purpose not in ("pair", "preflight"):
        return None
    tiny = run.purpose == "preflight"
    scores = tuple(sorted((name, score.bulk if score.bulk is not None else score.value)
                          for name, score in result.scores.items()))
    if result.weights_sha256:
        return "weights", tiny, run.seed, run.steps, result.weights_sha256, scores
    if scores and len({loss for _, loss in result.curve}) >= POINTS:
        return "curve", tiny, run.seed, run.steps, result.curve, scores
    return None
