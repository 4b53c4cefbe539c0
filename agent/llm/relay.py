"""Relay: several models and those that need none, asked as one proposer, so that a night outlives any of them.

    models      shared out by what they have gained a dollar (minds.py); then the fallbacks, in their order
    stand-ins   proposers that answer at once (idea book, search): while no model is in use, or one is late

A question goes to one model; if it gives no answer, to the next, within one deadline. A model that fails rests behind
its breaker, and is asked again once a small question of the relay's own, put in a thread apart, was answered; so nobody
waits for an endpoint that is down. A model that is late, by the habit of replies and by at least ``LATE`` seconds, is
waited for by nobody either: others are asked until its reply comes, which is handed over then. When all are down and
no stand-in has anything left, ``next`` waits: for a model that may come back for ``outage_seconds``, for others not at
all.

An endpoint that gives no answer makes no attempt in the ledger: ``news`` says in a line what happened, and what the
failed calls cost is added to the next proposal.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from agent.llm import minds
from agent.llm.answers import EndpointError, Transient
from agent.llm.breaker import Breaker
from agent.llm.endpoint import Endpoint
from agent.llm.news import News
from agent.llm.proposer import LlmProposer, NoAnswer
from agent.llm.quote import one_line
from agent.llm.review import Reviewer
from agent.propose import ProposeFailed, Proposer, add_costs
from agent.read import Briefing
from agent.records import Cost, Proposal

USELESS = 5
"""Replies of a model in a row without a usable patch after which it rests."""
LATE, LATE_FACTOR = 20.0, 3.0
"""A reply is late after so many seconds, and so many times what replies took before."""
TICK = 1.0
PROBE_SECONDS = 30.0
_PING = [{"role": "user", "content": 'Answer with this JSON object and nothing else: {"ok": true}'}]
_PONG = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}


@dataclass(slots=True)
class Mind:
    """One model. A ``fallback`` is asked only while none of the others can be."""

    endpoint: Endpoint
    proposer: LlmProposer
    breaker: Breaker
    fallback: bool = False
    down_since: float | None = None
    alias: str = ""
    """Another name under which its server answered, once that was said."""
    late: int = 0
    """Questions to it that nobody waits for any longer, and that are still on their way."""
    useless: int = 0
    """Replies in a row without a usable patch."""

    @property
    def name(self) -> str:
        return self.endpoint.name


@dataclass(slots=True)
class Question:
    """One question on its way. ``outcome``: a proposal, what to raise, or None where no model answered."""

    mind: Mind
    begun: float
    done: bool = False
    left: bool = False
    """Whoever put it waits for it no longer."""
    late: bool = False
    outcome: Proposal | BaseException | None = None


@dataclass(slots=True)
class _Told:
    """What was already said of the present outage."""

    stand_in: bool = False
    waiting: bool = False


class Relay:
    """A proposer over ``minds`` and ``stand_ins``; any number of threads may ask.

    ``record`` gives what each model has cost and gained, by name. ``deadline``: seconds of one proposal or repair.
    """

    name = "llm"

    def __init__(self, models: Sequence[Mind], stand_ins: Sequence[Proposer], *, parallel: int, deadline: float,
                 outage_seconds: float, seed: int, news: News | None = None,
                 reviewer: Reviewer | None = None,
                 record: Callable[[], Mapping[str, minds.Account]] = dict,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.ended = ""
        self.news, self._reviewer = news or News(), reviewer
        self._minds, self._stand_ins = list(models), list(stand_ins)
        self._parallel, self._deadline, self._outage, self._seed = parallel, deadline, outage_seconds, seed
        self._record, self._clock = record, clock
        self._changed = threading.Condition()
        self._orphans: deque[Question] = deque()
        self._outstanding = 0
        self._doubting = 0
        """Questions that failed and wait to hear whether another one is answered."""
        self._usual = 0.0
        self._owed = Cost()
        self._silent_since: float | None = None
        self._told = _Told()
        self._last, self._unreviewed = "", False

    # ------------------------------------------------------------------------------------------------- a proposal

    def next(self, briefing: Briefing) -> Proposal | None:
        question: Question | None = None
        failed, served = False, True
        while True:
            self._probe()
            with self._changed:
                if self._orphans and (question is None or not question.done):
                    if question is not None:
                        question.left = True  # its own answer will be handed over as readily
                    return self._handed(self._orphans.popleft())
                if question is not None and question.done:
                    if question.outcome is not None:
                        return self._handed(question)
                    question, failed = None, True
                elif question is not None and self._clock() - question.begun >= self._late():
                    question.left = question.late = True
                    question.mind.late += 1
                    question = None
                if self.ended or self.news.over.is_set():
                    return None
                if question is None and not (failed and served):
                    question = self._ask(briefing)
                if question is None and served:
                    stand_in = self._stand_in(briefing)
                    served = stand_in is not None
                    if stand_in is not None:
                        return self._paid(stand_in)
                if question is not None or self._outstanding:
                    self._changed.wait(TICK)
                elif self._over():
                    return None
                elif not failed or self._pick([], briefing.number) is None:
                    self._changed.wait(TICK)

    def _ask(self, briefing: Briefing) -> Question | None:
        """Put the question to a model, in a thread; None where none is in use, or too many replies are late."""
        first = self._pick([], briefing.number)
        if first is None or self._outstanding >= self._parallel:
            return None
        question = Question(first, self._clock())
        self._outstanding += 1
        threading.Thread(target=self._work, args=(question, first, briefing), name="question", daemon=True).start()
        return question

    def _work(self, question: Question, first: Mind, briefing: Briefing) -> None:
        try:
            question.outcome = self._through(first, briefing, question.begun + self._deadline)
        except BaseException as error:  # handed over to whoever asks, who raises it
            question.outcome = error
        with self._changed:
            question.done = True
            self._outstanding -= 1
            question.mind.late -= question.late
            if question.left and question.outcome is not None:
                self._orphans.append(question)
            self._changed.notify_all()

    def _through(self, first: Mind, briefing: Briefing, end: float) -> Proposal | None:
        """One question to ``first``, then to those that are left; None where no model answers."""
        spent, tried, mind = Cost(), [first], first
        while True:
            rest = self._pick(tried, briefing.number)
            begun = self._clock()
            try:
                proposal = mind.proposer.next(briefing, end if rest is None else begun + (end - begun) / 2)
            except NoAnswer as failed:
                self._no_answer(mind, failed, begun)
                spent = add_costs(spent, failed.cost)
                if rest is None or self._clock() >= end:
                    self._owe(spent)
                    return None
                mind = rest
                tried.append(mind)
                continue
            except ProposeFailed as failed:
                self._answered(mind, begun, failed)
                failed.cost = add_costs(spent, failed.cost)
                raise
            self._answered(mind, begun)
            assert proposal is not None  # a model has no end of its own
            return self._reviewed(briefing, dataclasses.replace(proposal, cost=add_costs(spent, proposal.cost)), end)

    def _reviewed(self, briefing: Briefing, proposal: Proposal, end: float) -> Proposal:
        """``proposal`` with the cost of its review. Raises ProposeFailed where that turned it away."""
        if self._reviewer is None:
            return proposal
        complaint, cost, failed = self._reviewer.complaint(briefing, proposal, end)
        whole = add_costs(proposal.cost, cost)
        if failed and not self._unreviewed:
            self.news.tell(f"{self._reviewer.name} gave no review: {failed}; proposals go on without")
        self._unreviewed = bool(failed)
        if complaint:
            raise ProposeFailed(f"{proposal.title!r} was turned away by {self._reviewer.name}: {complaint}", whole)
        return dataclasses.replace(proposal, cost=whole)

    def _pick(self, tried: Sequence[Mind], number: int) -> Mind | None:
        """Who is asked next, of those in use, not late and not yet ``tried``."""
        awake = [mind for mind in self._minds if mind.breaker.closed and not mind.late and mind not in tried]
        peers = {mind.name: mind for mind in awake if not mind.fallback}
        if len(peers) == 1:
            return next(iter(peers.values()))
        if peers:
            return peers[minds.choose(sorted(peers), self._record(), self._seed, number)]
        return awake[0] if awake else None

    def _late(self) -> float:
        return max(LATE, LATE_FACTOR * self._usual)

    def _handed(self, question: Question) -> Proposal:
        outcome = question.outcome
        if isinstance(outcome, Proposal):
            return self._paid(outcome)
        assert outcome is not None
        if isinstance(outcome, ProposeFailed):
            outcome.cost, self._owed = add_costs(outcome.cost, self._owed), Cost()
        raise outcome

    # ------------------------------------------------------------------------------------------------------ a repair

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        """By the model that proposed it, else by another one that is in use."""
        if proposal.author != "llm":
            return None
        end, spent = self._clock() + self._deadline, Cost()
        for mind in sorted(self._minds, key=lambda mind: mind.name != proposal.source):
            if not mind.breaker.closed or self._clock() >= end:
                continue
            begun = self._clock()
            try:
                mended = mind.proposer.repair(briefing, proposal, problem, end)
            except NoAnswer as failed:
                self._no_answer(mind, failed, begun)
                spent = add_costs(spent, failed.cost)
                continue
            except ProposeFailed as failed:
                self._answered(mind, begun, failed)
                failed.cost = add_costs(spent, failed.cost)
                raise
            if mended is not None:
                self._answered(mind, begun)
                return dataclasses.replace(mended, cost=add_costs(spent, mended.cost))
            break
        if spent.calls:
            raise ProposeFailed("no model answered", spent)
        return None

    # ------------------------------------------------------------------------------------------ who is down, who is up

    def _no_answer(self, mind: Mind, failed: NoAnswer, begun: float) -> None:
        """Count it. Raises UserError where a person must mend something before there can be a first answer."""
        if failed.mend is not None and len(self._minds) == 1 and self._hopeless(mind):
            raise failed.mend
        opened = mind.breaker.failed(failed.error)
        now, self._last = self._clock(), str(failed.error)
        with self._changed:
            if self._silent_since is None and not any(one.breaker.closed for one in self._minds):
                self._silent_since = now
            if opened:
                mind.down_since = now
            self.news.tell(f"{mind.name} did not answer in {now - begun:.1f} s: {failed.error.kind} ({failed.error})"
                          + (f"; it rests, and goes on once it answers again{self._instead(mind)}" if opened else ""))

    def _hopeless(self, mind: Mind) -> bool:
        """Whether ``mind`` never answered, once no question is on its way that it may still answer: of those that are
        asked side by side, one may fail before another is answered."""
        with self._changed:
            self._doubting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: mind.endpoint.answered or self._outstanding <= self._doubting)
            self._doubting -= 1
            return not mind.endpoint.answered

    def _instead(self, mind: Mind) -> str:
        others = [one.name for one in self._minds if one is not mind and one.breaker.closed]
        return f"; meanwhile: {', '.join(others)}" if others else ""

    def _answered(self, mind: Mind, begun: float, failed: ProposeFailed | None = None) -> None:
        """A reply came. One after the other without a usable patch (``failed``) are no better than none."""
        mind.useless = mind.useless + 1 if failed else 0
        seconds = self._clock() - begun
        said = mind.proposer.answered_as
        if said not in ("", mind.alias) and not same_model(mind.name, said):
            mind.alias = said
            self.news.tell(f"{mind.name} was asked, and the server says another model answers: {one_line(said, 80)}")
        with self._changed:
            self._usual += (0.3 if self._usual else 1.0) * (seconds - self._usual)
            if mind.useless < USELESS:
                mind.breaker.worked()
                self._back(mind)
            elif mind.breaker.trip(Transient("useless", kind="no patch")):
                mind.down_since = self._clock()
                self.news.tell(f"{mind.name} gave {mind.useless} replies in a row without a usable patch: it rests"
                              + self._instead(mind))

    def _back(self, mind: Mind) -> None:
        self._silent_since, self._told = None, _Told()
        if mind.down_since is not None:
            self.news.tell(f"{mind.name} answers again, {self._clock() - mind.down_since:.0f} s after it was given a "
                          "rest")
            mind.down_since = None
        self._changed.notify_all()

    def _probe(self) -> None:
        """Ask each model whose rest is over whether it is back, in a thread."""
        for mind in self._minds:
            if mind.breaker.probe():
                threading.Thread(target=self._ping, args=(mind,), name=f"probe-{mind.name}", daemon=True).start()

    def _ping(self, mind: Mind) -> None:
        try:
            reply = mind.endpoint.complete(_PING, _PONG, self._clock() + min(PROBE_SECONDS, self._deadline))
        except EndpointError as error:
            mind.breaker.failed(error)
            cost = error.cost
        else:
            mind.breaker.recovered()
            cost = reply.cost
            with self._changed:
                self._back(mind)
        self._owe(cost)

    def _owe(self, cost: Cost) -> None:
        """Cost of calls that made no proposal; without their seconds, which were not those of the next one."""
        with self._changed:
            self._owed = add_costs(self._owed, dataclasses.replace(cost, seconds=0.0))

    def _paid(self, proposal: Proposal) -> Proposal:
        owed, self._owed = self._owed, Cost()
        return dataclasses.replace(proposal, cost=add_costs(proposal.cost, owed))

    # ------------------------------------------------------------------------------------------------- without a model

    def _stand_in(self, briefing: Briefing) -> Proposal | None:
        """The next proposal of one that needs no model; what plainly does not fit the source is passed over."""
        for one in self._stand_ins:
            while (proposal := one.next(briefing)) is not None:
                if fits(proposal, briefing):
                    if not self._told.stand_in:
                        self.news.tell(f"proposals come from {one.name} until a model answers")
                        self._told.stand_in = True
                    return proposal
        return None

    def _over(self) -> bool:
        """Whether no model can be expected back. Says so in ``ended``, and raises what is still to be paid for."""
        if any(mind.breaker.closed for mind in self._minds):
            return False
        waited = self._clock() - (self._silent_since or self._clock())
        lasting = all(mind.breaker.lasting for mind in self._minds)
        if not lasting and waited < self._outage:
            if not self._told.waiting:
                self.news.tell("nothing else has a proposal left: waiting for a model to answer again")
                self._told.waiting = True
            return False
        self.ended = (f"the model endpoint refuses further calls ({self._last})" if lasting else
                      f"no model has answered for {waited / 3600:.1f} h (last: {self._last})")
        if self._owed.calls:
            owed, self._owed = self._owed, Cost()
            raise ProposeFailed(self.ended, owed)
        return True


def same_model(asked: str, said: str) -> bool:
    """Whether a server's name for a model may be the one asked for: dated, with a maker before it, or a file of it."""
    one, two = (name.rstrip("/").rpartition("/")[2].lower() for name in (asked, said))
    return one in two or two in one


def fits(proposal: Proposal, briefing: Briefing) -> bool:
    """Whether every edit has its one place in the files shown. A diff is left to the patch stage."""
    return all(briefing.files.get(edit.path, "").count(edit.search) == 1 if edit.search else
               edit.path not in briefing.files for edit in proposal.edits)
