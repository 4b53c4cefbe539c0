"""Which form of edits a model is asked for, and the account of its replies."""

from __future__ import annotations

import random

from agent.llm.edit_modes import EXPECTED, Mode, Tried, accounts, apply_rates, choose_mode, noted, possible_modes, tried
from agent.records import Proposal, Said, from_json, to_json

ALL = tuple(EXPECTED)


def replies(mode: Mode, *applied: bool, model: str = "m") -> tuple[Tried, ...]:
    return tuple(Tried(model, mode, one) for one in applied)


def test_the_order_of_the_first_choices() -> None:
    seen: list[Mode] = []
    history: tuple[Tried, ...] = ()
    for _ in range(10):
        seen.append(choose_mode(history, "m", ALL))
        history += replies(seen[-1], False)
    assert seen[:3] == ["json", "anchored", "blocks"] and list(dict.fromkeys(seen)) == list(ALL)


def test_one_bad_reply_after_good_ones_changes_nothing() -> None:
    assert choose_mode(replies("json", *[True] * 8, False), "m", ALL) == "json"
    assert choose_mode(replies("json", *[True] * 3, *[False] * 3), "m", ALL) == "anchored"


def test_a_mode_that_works_is_kept_and_others_models_replies_do_not_count() -> None:
    history = replies("json", False, False) + replies("anchored", *[True] * 5)
    assert choose_mode(history, "m", ALL) == "anchored"
    assert choose_mode(history, "another", ALL) == "json"


def test_the_rate_is_of_the_recent_replies() -> None:
    old = replies("json", *[False] * 100)
    assert apply_rates(old + replies("json", *[True] * 30), "m")["json"] > 0.95
    assert choose_mode(old + replies("json", *[True] * 30), "m", ALL) == "json"


def test_the_best_mode_of_a_made_up_model_is_found() -> None:
    """For each mode: a model that is good at it alone (0.9, others 0.2) is asked in it in most of 100 proposals."""
    for best in ALL:
        chance, history, asked = random.Random(best), tuple[Tried, ...](), []
        for _ in range(100):
            mode = choose_mode(history, "m", ALL)
            asked.append(mode)
            history += replies(mode, chance.random() < (0.9 if mode == best else 0.2))
        assert asked[-50:].count(best) >= 45, (best, asked)


def test_what_a_source_allows() -> None:
    assert possible_modes({"a.py": "x\n" * 10}, pinned=True) == ALL
    assert possible_modes({"a.py": "x\n" * 300, "b.py": "x\n" * 300}, pinned=False) == ("json", "blocks", "diff")


def make_proposal(*said: Said) -> Proposal:
    return Proposal("001-a", "c0ffee", "t", "h", "llm", replies=said)


def test_replies_go_through_the_ledgers_json_and_become_history() -> None:
    proposal = make_proposal(Said("m", "json", "", "propose", "no edits", False), Said("m", "json", "json"))
    assert from_json(Proposal, to_json(proposal)) == proposal
    assert tried([proposal]) == replies("json", False, True)
    assert tried([make_proposal()]) == () and tried([proposal], most=1) == replies("json", True)


def test_a_refusal_by_a_rule_or_a_crash_does_not_count_against_the_mode() -> None:
    proposal = make_proposal(Said("m", "blocks", "files"))
    assert tried([noted(proposal, "patch", "prepare.py is protected")]) == replies("blocks", True)
    assert tried([noted(proposal, "preflight", "crash")]) == replies("blocks", True)
    lost = noted(proposal, "patch", "no such lines", placed=False)
    assert tried([lost]) == replies("blocks", False)
    assert noted(lost, "preflight", "another") == lost and noted(make_proposal(), "patch", "x") == make_proposal()


def test_every_reply_has_one_fate() -> None:
    said = (Said("m", "json", "", "propose", "no edits", False),
            Said("m", "json", "json", "patch", "no such lines", False),
            Said("m", "json", "json"))
    assert [fate for _, fate in accounts(make_proposal(*said))] == ["repaired", "repaired", "applied"]
    assert [fate for _, fate in accounts(make_proposal(*said[:2]))] == ["repaired", "refused"]
