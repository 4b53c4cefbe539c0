"""Drafts: real threads around proposers that wait, fail and break."""

from __future__ import annotations

import threading
import time
from typing import cast

import pytest

from agent.drafts import Answer, Draft, Drafts
from agent.errors import UserError
from agent.propose import ProposeFailed
from agent.read import Briefing
from agent.records import Proposal

BRIEFING = cast(Briefing, None)  # the proposers here do not read it


class Slow:
    """Answers when it is let; counts how many ask at once."""

    name, ended = "llm", ""

    def __init__(self) -> None:
        self.let, self.asking, self.most = threading.Event(), 0, 0
        self.lock = threading.Lock()

    def next(self, briefing: Briefing) -> Proposal | None:
        with self.lock:
            self.asking += 1
            self.most = max(self.most, self.asking)
        self.let.wait(10)
        with self.lock:
            self.asking -= 1
        return Proposal("1", "base", "title", "because", "llm")

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        raise ProposeFailed(problem)


def collected(drafts: Drafts, count: int) -> list[Answer]:
    found: list[Answer] = []
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        found += drafts.ready()
        time.sleep(0.01)
    return found


def test_asking_never_waits_and_no_more_than_parallel_ask_at_once() -> None:
    slow = Slow()
    drafts = Drafts(slow, 3)
    begun = time.monotonic()
    for _ in range(5):
        drafts.ask(Draft(BRIEFING))
    assert time.monotonic() - begun < 1 and drafts.pending == drafts.drafting == 5 and drafts.ready() == []
    time.sleep(0.2)
    slow.let.set()
    found = collected(drafts, 5)
    assert len(found) == 5 and all(answer.proposal for answer in found)
    assert slow.most == 3 and drafts.pending == drafts.drafting == 0 and drafts.reply_seconds > 0.05


def test_a_failed_repair_is_an_answer_and_anything_else_is_raised_where_it_is_read() -> None:
    drafts = Drafts(Slow(), 1)
    broken = Proposal("1", "base", "title", "because", "llm")
    drafts.ask(Draft(BRIEFING, broken, "does not apply", 1))
    assert drafts.drafting == 0
    (answer,) = collected(drafts, 1)
    assert answer.failure is not None and answer.failure.reason == "does not apply"

    class Refused(Slow):
        def next(self, briefing: Briefing) -> Proposal | None:
            raise UserError("The key is refused.", "Set another.")

    refused = Drafts(Refused(), 2)
    refused.ask(Draft(BRIEFING))
    with pytest.raises(UserError, match="refused"):
        collected(refused, 1)
    assert refused.pending == 0


def test_inline_a_proposer_is_called_at_once() -> None:
    slow = Slow()
    slow.let.set()
    drafts = Drafts(slow, 0)
    before = threading.active_count()
    drafts.ask(Draft(BRIEFING))
    assert drafts.inline and len(drafts.ready()) == 1 and threading.active_count() <= before


def test_as_many_are_wanted_as_are_used_up_while_one_is_answered() -> None:
    drafts = Drafts(Slow(), 4)
    assert drafts.wanted(1, 0) == 5  # nothing is known yet
    drafts.reply_seconds = 1.0
    assert drafts.wanted(1, 10) == 2
    drafts.reply_seconds = 30.0
    assert drafts.wanted(1, 10) == 4 and drafts.wanted(2, 1) == 6
