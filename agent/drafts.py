"""Drafts: proposals that are being made while the devices train. A proposer that waits for a model works in threads;
one that answers at once (the idea book, a queue of patches) is simply called.

How many are asked for at a time follows from how long a reply takes and how soon a candidate is used up
(``wanted``), so that no device waits for a model and no money is spent on proposals that would never run.

A thread only asks. What came back is handed over by ``ready`` in the campaign's own thread, which alone writes the
ledger. Does not cover: replies still on their way when the campaign ends; they are lost, and only their number is in
the ledger (``pending``).
"""

from __future__ import annotations

import math
import queue
import threading
import time
from dataclasses import dataclass

from agent.propose import ProposeFailed, Proposer
from agent.read import Briefing
from agent.records import Fault, Proposal, Stage


@dataclass(frozen=True, slots=True)
class Refusal:
    """How an attempt ends if it is not mended."""

    stage: Stage
    reason: str
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """One question to the proposer: a new proposal, or the repair of one."""

    briefing: Briefing
    broken: Proposal | None = None
    """The proposal to mend; None for a new one."""
    problem: str = ""
    rounds: int = 0
    """Repair rounds of it, this one included."""
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a draft: a proposal, a failure, or nothing (the proposer has no more, or cannot mend)."""

    draft: Draft
    proposal: Proposal | None = None
    failure: ProposeFailed | None = None
    error: BaseException | None = None
    """Something that the campaign must hear of in its own thread: a UserError, or a defect."""
    seconds: float = 0.0


class Drafts:
    """Questions on their way to one proposer, at most ``parallel`` at a time; 0: each is answered at once, inline."""

    def __init__(self, proposer: Proposer, parallel: int) -> None:
        self._proposer, self.parallel = proposer, parallel
        self._questions: queue.SimpleQueue[Draft] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._threads = 0
        self.pending = 0
        """Questions without an answer."""
        self.drafting = 0
        """Those of them that ask for a new proposal."""
        self.reply_seconds = 0.0
        """Running mean of what an answer takes."""

    @property
    def inline(self) -> bool:
        return self.parallel == 0

    def ask(self, draft: Draft) -> None:
        """Put a question. Never waits for a model."""
        self.pending += 1
        self.drafting += draft.broken is None
        if self.inline:
            self._answers.put(self._answer(draft))
            return
        self._questions.put(draft)
        if self._threads < min(self.parallel, self.pending):
            self._threads += 1
            threading.Thread(target=self._work, name=f"draft-{self._threads}", daemon=True).start()

    def ready(self) -> list[Answer]:
        """Answers that have come. Raises what a thread raised."""
        found: list[Answer] = []
        while True:
            try:
                answer = self._answers.get_nowait()
            except queue.Empty:
                return found
            self.pending -= 1
            self.drafting -= answer.draft.broken is None
            if answer.error is not None:
                raise answer.error
            weight = 0.3 if self.reply_seconds else 1.0
            self.reply_seconds += weight * (answer.seconds - self.reply_seconds)
            found.append(answer)

    def wanted(self, slots: int, candidate_seconds: float) -> int:
        """Candidates and questions that should be ahead of the devices: one a slot, and as many as are used up while
        one reply is awaited, but never more than ``parallel`` beyond the slots.

        ``candidate_seconds``: the campaign's wall seconds from one candidate to the next; 0 while that is not known:
        then as many as may be, since a campaign that starts with one slow reply at a time waits for each.
        """
        known = candidate_seconds and self.reply_seconds
        used = math.ceil(self.reply_seconds / candidate_seconds) if known else self.parallel
        return slots + max(1, min(self.parallel, used))

    def _work(self) -> None:
        while True:
            self._answers.put(self._answer(self._questions.get()))

    def _answer(self, draft: Draft) -> Answer:
        begun = time.monotonic()
        try:
            proposal = (self._proposer.next(draft.briefing) if draft.broken is None else
                        self._proposer.repair(draft.briefing, draft.broken, draft.problem))
        except ProposeFailed as failure:
            return Answer(draft, failure=failure, seconds=time.monotonic() - begun)
        except BaseException as error:  # handed over to the campaign's thread, which raises it
            return Answer(draft, error=error)
        return Answer(draft, proposal, seconds=time.monotonic() - begun)
