"""Intake: from what a proposer answers to a trial. How far ahead it is asked, what comes back, the patch that is made
of it, what is turned away before anything is run, and what is shown to the proposer to be mended.

Called from the campaign's own thread alone; the proposer may think in others (drafts.py).
"""

from __future__ import annotations

import dataclasses
import time
from typing import Literal, Protocol

from agent import git, scope
from agent.court import Court, Trial
from agent.court import Host as CourtHost
from agent.drafts import Answer, Draft, Drafts, Refusal
from agent.ledger import Attempt, State
from agent.llm.edit_modes import noted
from agent.llm.news import News
from agent.novelty import Novelty
from agent.opening import FINITE
from agent.patch import build
from agent.policy import PatchRefused
from agent.propose import MODELS, Finite, Proposer, add_costs, proposal_id
from agent.read import Briefing, Lines, brief
from agent.records import Candidate, Proposal
from agent.spending import lost

IN_VAIN = 30
"""Proposals of a model in a row that came to nothing before it is taken to be out of order: it would go on for ever,
where an idea book or a queue ends by itself."""


class Host(CourtHost, Protocol):
    """What it may ask of the campaign."""

    court: Court

    def admit(self, trial: Trial) -> None:
        """A new trial, which wants its tiny run first where the target has one."""


class Intake:
    """All proposals of one campaign on their way to be trials."""

    def __init__(self, host: Host, proposer: Proposer, news: News) -> None:
        self._host, self._proposer, self._news = host, proposer, news
        self._site, self._ledger, self._spending = host.site, host.ledger, host.spending
        self.drafts = Drafts(proposer, host.site.config.model.parallel if proposer.name in MODELS else 0)
        self.novelty, self._lines = Novelty(host.state), Lines()
        self._guidance = host.site.guidance()
        self.exhausted = False
        """Nothing more is to be proposed."""
        self._in_vain = 0
        self._begun: float | None = None
        """When the first candidate was tried, by this process's clock."""
        self._first_number = 0

    @property
    def _state(self) -> State:
        return self._host.state

    def begin(self) -> None:
        """A first full run of a candidate is about to start."""
        if self._begun is None:
            self._begun = time.monotonic()
            self._first_number = len(self._state.attempts) - len(self._host.trials)

    def came_to_nothing(self) -> None:
        """A model's proposal was refused before anything was run."""
        self._in_vain += 1
        if self._in_vain >= IN_VAIN and not self.exhausted:
            self.exhausted = True
            self._host.note(f"no more proposals: {self._in_vain} in a row came to nothing")

    def give_up(self) -> None:
        """Write down the replies that are still on their way at the end of the night."""
        if self.drafts.pending:
            lost(self._ledger, self.drafts.pending)
            self._host.note(f"{self.drafts.pending} replies of the model were still on their way: they are lost; under "
                            "a cap each counts as the dearest one")

    def ask_ahead(self) -> None:
        """Ask the model for as many proposals as the slots will soon need."""
        untried = [trial for trial in self._host.trials if not any(run.trains for run in trial.attempt.runs)]
        ahead = len(untried) + self.drafts.pending
        wanted = self.drafts.wanted(len(self._site.devices), self._candidate_seconds())
        while ahead < wanted and self.drafts.drafting < self.drafts.parallel and self.draw():
            ahead += 1

    def _candidate_seconds(self) -> float:
        """Wall seconds from one candidate to the next since the first was tried; 0 while that is not known."""
        done = len(self._state.attempts) - len(self._host.trials) - self._first_number
        return (time.monotonic() - self._begun) / done if self._begun is not None and done > 0 else 0.0

    def awaited(self) -> bool:
        """Whether the campaign waits for replies: not for new ideas once there is no budget to try them."""
        return self.drafts.pending > 0 and not self._spending.forbids("pair", self._host.clock())

    def draw(self) -> bool:
        """Ask for one proposal; False when there is nothing more to propose, or no budget to try it."""
        if not self.more() or self._spending.forbids_question():
            return False
        briefing = self._briefing()
        self.drafts.ask(Draft(dataclasses.replace(briefing, number=briefing.number + self.drafts.drafting)))
        if self.drafts.inline:
            self.receive()
        return not self.exhausted

    def receive(self) -> None:
        """Take what the proposer answered: a new proposal is built, a mended one is built again."""
        for text in self._news.take():
            self._host.note(text)
        for answer in self.drafts.ready():
            if answer.draft.broken is None:
                self._receive_new(answer)
            else:
                self._receive_mended(answer, answer.draft.broken)

    def _receive_new(self, answer: Answer) -> None:
        proposal = answer.proposal
        number = len(self._state.attempts) + 1
        if answer.failure is not None:  # a proposal that never came is an attempt that ended at the first stage
            title = "no usable proposal"
            failed = Proposal(proposal_id(number, title), answer.draft.briefing.tip, title, answer.failure.reason,
                              "llm", cost=answer.failure.cost, source=self._proposer.name,
                              replies=answer.failure.replies)
            self._ledger.append("proposal", failed)
            self._host.close(self._state.attempts[failed.id], "propose", answer.failure.reason)
        elif proposal is None:
            if self._proposer.name not in FINITE and not self.exhausted:  # those end when they are empty
                self._host.note(f"no more proposals: {self._proposer.ended}")
            self.exhausted = True
        else:
            # others may have come since it was asked for, so its number is known only now
            proposal = dataclasses.replace(proposal, id=proposal_id(number, proposal.title))
            self._ledger.append("proposal", proposal)
            self.build(self._state.attempts[proposal.id])

    def _receive_mended(self, answer: Answer, broken: Proposal) -> None:
        refusal = answer.draft.refusal
        assert refusal is not None
        if self._state.attempts[broken.id].verdict:  # vetoed meanwhile
            cost = answer.failure.cost if answer.failure else answer.proposal.cost if answer.proposal else None
            if cost is not None:
                self._ledger.append("proposal", dataclasses.replace(
                    broken, cost=add_costs(broken.cost, cost) if answer.failure else cost))
            return
        if answer.failure is not None:
            spent = dataclasses.replace(broken, cost=add_costs(broken.cost, answer.failure.cost),
                                        replies=(*broken.replies, *answer.failure.replies))
            self._ledger.append("proposal", spent)
        elif answer.proposal is not None:
            self._ledger.append("proposal", answer.proposal)
            self.build(self._state.attempts[broken.id], answer.draft.rounds)
            return
        self._host.close(self._state.attempts[broken.id], refusal.stage, refusal.reason, fault=refusal.fault)

    def build(self, attempt: Attempt, repairs: int = 0) -> None:
        """Patch the present tip: a trial. A refusal is shown to the proposer, which may mend it; else it is the
        verdict."""
        proposal = attempt.proposal
        if proposal.parts:
            self._host.close(attempt, "judge", "given up: the tip moved, or the process ended, before it was "
                             "certified", "inconclusive")
            return
        try:
            candidate = build(self._site.repo, self._site.prefix, self._state.tip, proposal,
                              self._site.config.source, self._host.clock())
        except PatchRefused as refused:
            reason = " ".join((refused.reason, "; ".join(" ".join(line.split())
                                                         for line in refused.nearest[:3]))).strip()
            if attempt.candidate is not None and attempt.candidate.base != self._state.tip:
                reason = f"conflicts with what was merged meanwhile: {reason}"
            self.note_reply(attempt, "patch", reason, refused.rule != "match")
            self.mend(attempt, str(refused), repairs, Refusal("patch", reason))
            return
        if not self.novelty.same_change(candidate, attempt) and (
                objection := self.novelty.objection(attempt, candidate)):
            git.update_ref(self._site.repo, f"refs/heads/{candidate.branch}", "", None)
            self.mend(attempt, objection, repairs, Refusal("patch", objection))
            return
        self._ledger.append("candidate", candidate)
        if self.turned_away(attempt, candidate):
            return
        self._in_vain = 0
        self._host.admit(Trial(attempt, candidate, repairs))

    def turned_away(self, attempt: Attempt, candidate: Candidate) -> bool:
        """Close an attempt that repeats another's change or is out of scope, before anything is run."""
        twin = self.novelty.same_change(candidate, attempt)
        reason = f"the same change as {twin}" if twin else scope.outside(self._site, attempt.proposal, candidate)
        if reason:
            self._host.close(attempt, "patch", reason)
        return bool(reason)

    def more(self) -> bool:
        """Whether there may be more proposals."""
        return not (self.exhausted or self._spending.questions_spent
                    or self._spending.forbids("pair", self._host.clock()))

    def left(self) -> int | None:
        """Proposals still to come, where it is known how many."""
        if self.exhausted:
            return 0
        return self._proposer.left(self._state.campaign["preset"]) if isinstance(self._proposer, Finite) else None

    def note_reply(self, attempt: Attempt, stage: Literal["patch", "preflight"], why: str, placed: bool = True) -> None:
        """Write down what became of a model's last reply."""
        known = noted(attempt.proposal, stage, why, placed)
        if known != attempt.proposal:
            self._ledger.append("proposal", known)

    def mend(self, attempt: Attempt, problem: str, repairs: int, refusal: Refusal) -> None:
        """Ask the proposer for a repair; ``refusal`` is the verdict where it has none."""
        if repairs >= self._site.config.model.repairs or self._spending.forbids_question():
            self._host.close(attempt, refusal.stage, refusal.reason, fault=refusal.fault)
            return
        self.drafts.ask(Draft(self._briefing(), attempt.proposal, problem, repairs + 1, refusal))
        if self.drafts.inline:
            self.receive()

    def _briefing(self) -> Briefing:
        editable, protected = self._site.texts(self._state.tip)
        found = brief(self._site.config, self._state, editable, protected, guidance=self._guidance,
                      lines=self._lines)
        if found.plateau and found.plateau.text not in self._state.notes and self._proposer.name not in FINITE:
            self._host.note(found.plateau.text)
        return found
