"""Several models and what stands in for them, over real loopback HTTP: outages, rests, returns, late replies, costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_propose import OBJECT, make_briefing

from agent import config
from agent.errors import UserError
from agent.llm import relay
from agent.llm.answers import Auth, RateLimited, Transient
from agent.llm.breaker import LONGEST_REST, PATIENCE, REST, Breaker
from agent.llm.endpoint import Endpoint
from agent.llm.minds import Account
from agent.llm.proposer import LlmProposer
from agent.llm.relay import Mind, Relay, fits
from agent.llm.review import Reviewer
from agent.llm.scripted import Delay, Fixed, Item, Say, ScriptedModel, Status
from agent.propose import ProposeFailed, Proposer
from agent.read import Briefing
from agent.records import Edit, Proposal

PROMPTS = Path(__file__).parents[1] / "prompts"
KEY = "sk-test-0123456789abcdef"
DOWN, GONE = Status(503, "down"), Status(401, "revoked")


class Cards:
    """A stand-in with so many cards."""

    name, ended = "ideas", ""

    def __init__(self, *cards: Proposal) -> None:
        self.cards = list(cards)

    def next(self, briefing: Briefing) -> Proposal | None:
        return self.cards.pop(0) if self.cards else None

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        return None


def card(name: str, search: str = "lr = 0.1") -> Proposal:
    return Proposal(name, "base", name, "because", "ideas", (Edit("train.py", search, "lr = 0.3"),), source=name)


def mind(url: str, name: str = "scripted", fallback: bool = False, breaker: Breaker | None = None,
         **settings: Any) -> Mind:
    model = config.Model(**{"attempts": 1, "timeout_seconds": 5, "repairs": 0, **settings})
    endpoint = Endpoint(model, KEY, url, name, sleep=lambda _: None, jitter=lambda: 0.0)
    return Mind(endpoint, LlmProposer(endpoint, model, PROMPTS), breaker or Breaker(jitter=lambda: 0.0), fallback)


def relay_of(minds: Sequence[Mind], *stand_ins: Proposer, answered: bool = True, **settings: Any) -> Relay:
    for one in minds:
        one.endpoint.answered = answered
    return Relay(minds, stand_ins, **{"parallel": 4, "deadline": 20.0, "outage_seconds": 60.0, "seed": 1, **settings})


def told(found: Relay) -> str:
    return "\n".join(found.news.take())


def ask(found: Relay) -> Proposal:
    proposal = found.next(make_briefing())
    assert proposal is not None
    return proposal


# ------------------------------------------------------------------------------------------------------- the breaker


def test_a_breaker_opens_rests_longer_each_time_and_closes() -> None:
    now = [0.0]
    breaker = Breaker(lambda: now[0], lambda: 0.0)
    assert [breaker.failed(Transient("x")) for _ in range(PATIENCE)] == [False] * (PATIENCE - 1) + [True]
    rests = []
    for _ in range(8):
        began = now[0]
        assert not breaker.closed and not breaker.probe()
        while not breaker.probe():
            now[0] += 1
        assert not breaker.probe()  # one probe at a time
        rests.append(now[0] - began)
        assert not breaker.failed(Transient("still down"))
    assert rests == [min(LONGEST_REST, REST * 2 ** n) for n in range(8)]
    now[0] += LONGEST_REST
    assert breaker.probe()
    breaker.recovered()
    assert breaker.closed and breaker.failed(Transient("again")) and not breaker.closed  # one failure, after a probe
    breaker.worked()
    assert breaker.closed and not breaker.failed(Transient("x"))


def test_what_no_waiting_mends_opens_at_once_and_a_server_is_believed() -> None:
    now = [0.0]
    breaker = Breaker(lambda: now[0], lambda: 0.0)
    assert breaker.failed(Auth("401", 401)) and breaker.lasting
    now[0] = 299
    assert not breaker.probe()
    breaker = Breaker(lambda: now[0], lambda: 0.0)
    assert breaker.failed(RateLimited("429", 40)) and not breaker.lasting
    now[0] += 39
    assert not breaker.probe()
    now[0] += 1
    assert breaker.probe()
    late = Breaker(lambda: now[0], lambda: 0.0)
    late.failed(Auth("401", 401))
    assert not late.failed(Transient("asked before it opened")) and late.lasting


# --------------------------------------------------------------------------------------------- models and stand-ins


def test_the_fallback_answers_within_the_same_question_and_the_cost_is_kept() -> None:
    with ScriptedModel([], then=DOWN) as down, ScriptedModel([], then=Say(OBJECT)) as good:
        found = relay_of([mind(down.base_url, "first"), mind(good.base_url, "second", fallback=True)])
        one, two, three = ask(found), ask(found), ask(found)
        assert len(down.requests) == PATIENCE and len(good.requests) == 3
    assert [p.source for p in (one, two, three)] == ["second"] * 3
    assert one.cost.calls == 2 and three.cost.calls == 1  # the first failed call is paid for; the third asked one alone
    news = told(found)
    assert news.count("first did not answer in") == 2 and "overloaded (503: down)" in news
    assert "it rests, and goes on once it answers again; meanwhile: second" in news


def test_an_outage_is_bridged_by_the_stand_in_and_the_model_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.llm.breaker.REST", 0.2)
    alive = threading.Event()

    def answer(_: dict[str, Any]) -> Fixed:
        return Say(OBJECT) if alive.is_set() else DOWN

    with ScriptedModel([], then=answer) as model:
        cards = Cards(card("no place", "not in the file"), *(card(f"card {n}") for n in range(200)))
        found = relay_of([mind(model.base_url)], cards)
        first = [ask(found) for _ in range(3)]
        assert [p.author for p in first] == ["ideas"] * 3 and first[0].title == "card 0"
        assert first[0].cost.calls >= 1  # what the failed questions cost is not forgotten
        alive.set()
        deadline = time.monotonic() + 20
        while (back := ask(found)).author != "llm":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert back.source == "scripted"
    news = told(found)
    assert "proposals come from ideas until a model answers" in news and "scripted answers again" in news


def test_a_refused_key_without_a_stand_in_ends_it_and_what_it_cost_is_told() -> None:
    with ScriptedModel([Say(OBJECT)], then=GONE) as model:
        found = relay_of([mind(model.base_url)], Cards(card("one")))
        assert [ask(found).author for _ in range(2)] == ["llm", "ideas"]
        assert found.next(make_briefing()) is None and found.next(make_briefing()) is None
        assert len(model.requests) == 2
        assert found.repair(make_briefing(), card("x"), "problem") is None
    assert "refuses further calls (401: revoked)" in found.ended and "key refused (401: revoked)" in told(found)


def test_what_the_user_must_mend_is_said_before_a_first_answer_unless_another_model_goes_on() -> None:
    with ScriptedModel([], then=GONE) as model, ScriptedModel([], then=Say(OBJECT)) as good:
        with pytest.raises(UserError, match=r"refused the key|wants a key"):
            relay_of([mind(model.base_url)], Cards(card("one")), answered=False).next(make_briefing())
        found = relay_of([mind(model.base_url, "a"), mind(good.base_url, "b", fallback=True)], answered=False)
        assert ask(found).source == "b"


@pytest.mark.parametrize("answers", [True, False])
def test_of_first_questions_side_by_side_one_that_fails_waits_for_the_others(answers: bool) -> None:
    """Else a refusal that overtakes the first answer would end the night at its start."""
    slow = Delay(1.0, Say(OBJECT) if answers else GONE)
    outcomes: list[object] = []

    def one(found: Relay) -> None:
        try:
            outcomes.append(found.next(make_briefing()))
        except (UserError, ProposeFailed) as error:
            outcomes.append(error)

    with ScriptedModel([slow], then=GONE) as model:
        found = relay_of([mind(model.base_url)], answered=False, deadline=10.0)
        threads = [threading.Thread(target=one, args=(found,)) for _ in range(2)]
        for thread in threads:
            thread.start()
            until_ = time.monotonic() + 5
            while len(model.requests) < 1 and time.monotonic() < until_:
                time.sleep(0.01)
        for thread in threads:
            thread.join(8)
    if answers:
        assert not any(isinstance(outcome, UserError) for outcome in outcomes), outcomes
        assert sum(isinstance(outcome, Proposal) for outcome in outcomes) == 1
    else:
        assert [type(outcome) for outcome in outcomes] == [UserError, UserError]


def test_a_passing_outage_is_waited_for_only_so_long() -> None:
    with ScriptedModel([], then=DOWN) as model:
        found = relay_of([mind(model.base_url)], outage_seconds=0.3)
        with pytest.raises(ProposeFailed, match="no model has answered") as caught:
            found.next(make_briefing())
        assert caught.value.cost.calls == PATIENCE and found.next(make_briefing()) is None
    assert "nothing else has a proposal left: waiting" in told(found)


def test_a_late_reply_is_bridged_and_handed_over_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "LATE", 0.3)
    with ScriptedModel([Delay(1.5, Say(OBJECT))], then=Delay(30, Say(OBJECT))) as model:
        found = relay_of([mind(model.base_url, timeout_seconds=25)], Cards(card("one"), card("two")), parallel=1)
        begun = time.monotonic()
        assert ask(found).title == "one" and ask(found).title == "two"  # the second one found no room to ask
        assert time.monotonic() - begun < 1.4 and len(model.requests) == 1
        assert ask(found).author == "llm" and len(model.requests) == 1


def test_threads_wait_for_no_model_that_hangs() -> None:
    with ScriptedModel([], then=Delay(60, Say(OBJECT))) as model:
        found = relay_of([mind(model.base_url, timeout_seconds=0.5)], Cards(*(card(str(n)) for n in range(9))))
        answers: list[Proposal] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(found))) for _ in range(8)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(answers) == 8 and time.monotonic() - begun < 10
        assert {answer.author for answer in answers} == {"ideas"}


def test_a_model_that_gives_no_patch_rests_too() -> None:
    with ScriptedModel([], then=Say("I would rather not.")) as useless, ScriptedModel([], then=Say(OBJECT)) as good:
        found = relay_of([mind(useless.base_url, "a"), mind(good.base_url, "b", fallback=True)])
        for _ in range(relay.USELESS):
            with pytest.raises(ProposeFailed, match="no usable patch"):
                found.next(make_briefing())
        assert ask(found).source == "b"
    assert "a gave 5 replies in a row without a usable patch" in told(found)


def test_a_repair_goes_to_the_model_that_proposed_or_to_another() -> None:
    mended = {**OBJECT, "edits": [{"path": "train.py", "search": "lr = 0.1", "replace": "lr = 0.15"}]}
    with ScriptedModel([], then=GONE) as first, ScriptedModel([], then=Say(mended)) as second:
        found = relay_of([mind(first.base_url, "a", repairs=2), mind(second.base_url, "b", repairs=2)])
        broken = Proposal("1", "base", "t", "h", "llm", (Edit("train.py", "x", "y"),), source="a")
        again = found.repair(make_briefing(), broken, "no such line")
        assert again is not None and again.edits[0].replace == "lr = 0.15" and again.cost.calls == 2
        assert len(first.requests) == 1
        assert found.repair(make_briefing(), broken, "no such line") is not None and len(first.requests) == 1


def test_the_better_model_is_asked_more() -> None:
    with ScriptedModel([], then=Say(OBJECT)) as one, ScriptedModel([], then=Say(OBJECT)) as two:
        record = {"good": Account(40, 10, 1.0, 1.0), "poor": Account(40, 0, 0.0, 1.0)}
        found = relay_of([mind(one.base_url, "good"), mind(two.base_url, "poor")], record=lambda: record)
        for number in range(1, 60):
            briefing = make_briefing()
            object.__setattr__(briefing, "number", number)
            assert found.next(briefing) is not None
        assert len(one.requests) > 3 * len(two.requests) > 0


def test_no_question_outlives_its_deadline() -> None:
    slow: list[Item] = [Delay(1.2, Say("no patch")), Delay(1.2, Say("none")), Delay(9, Say(OBJECT))]
    with ScriptedModel(slow, then=Delay(60, Say(OBJECT))) as model, \
            ScriptedModel([], then=Delay(60, Say(OBJECT))) as other:
        found = relay_of([mind(model.base_url, "a", repairs=9), mind(other.base_url, "b", fallback=True)],
                         Cards(card("one")), deadline=4.0)
        begun = time.monotonic()
        assert ask(found).title == "one"
        assert time.monotonic() - begun < 6


@pytest.mark.parametrize(("item", "why", "unreviewed"), [
    (Say({"in_scope": True, "reason": "fine"}), "", ""),
    (Say('Well: {"in_scope": false, "reason": "It trains for\nlonger."}'), "by critic: It trains for longer", ""),
    (Say("Looks good to me"), "", "no verdict in its reply"),
    (DOWN, "", "overloaded"),
])
def test_a_reviewer_may_only_turn_away(item: Fixed, why: str, unreviewed: str) -> None:
    with ScriptedModel([], then=Say(OBJECT)) as model, ScriptedModel([], then=item) as critic:
        reviewer = Reviewer(mind(critic.base_url, "critic").endpoint, PROMPTS)
        found = relay_of([mind(model.base_url)], reviewer=reviewer)
        if why:
            with pytest.raises(ProposeFailed, match=why) as caught:
                found.next(make_briefing())
            assert caught.value.cost.calls == 2
        else:
            assert ask(found).cost.calls == 2
        prompt = critic.requests[0].prompt
        assert "improve val_bpb" in prompt and '"replace": "lr = 0.2"' in prompt and "def batches" not in prompt
    assert (f"gave no review: {unreviewed}" in told(found)) if unreviewed else "review" not in told(found)


def test_an_ended_night_lets_its_threads_go() -> None:
    with ScriptedModel([], then=DOWN) as model:
        found = relay_of([mind(model.base_url)], outage_seconds=3600.0)
        waiting = threading.Thread(target=found.next, args=(make_briefing(),), daemon=True)
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive()
        found.news.over.set()
        waiting.join(10)
        assert not waiting.is_alive()


def test_what_fits_has_its_one_place() -> None:
    briefing = make_briefing()
    assert fits(card("a"), briefing) and not fits(card("b", "nowhere"), briefing)
    new = Proposal("n", "b", "t", "h", "ideas", (Edit("new.py", "", "x = 1\n"),))
    taken = Proposal("n", "b", "t", "h", "ideas", (Edit("train.py", "", "x"),))
    assert fits(new, briefing) and not fits(taken, briefing)
