"""The bandit over models: properties, and accounts from a ledger's attempts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from night import Night

from agent.llm.minds import EXPLORE, Account, accounts, choose

COUNTS = st.integers(0, 200)


@st.composite
def account(draw: st.DrawFn) -> Account:
    asked = draw(COUNTS)
    merged = draw(st.integers(0, asked))
    usd = draw(st.just(0.0) | st.floats(1e-6, 2.0))
    return Account(asked, merged, merged * draw(st.floats(0.001, 1.0)), asked * usd)


ACCOUNTS = st.dictionaries(st.sampled_from("abcde"), account(), max_size=5)
NAMES = st.lists(st.sampled_from("abcde"), min_size=1, max_size=5)


@given(NAMES, ACCOUNTS, st.integers(0, 9), st.integers(1, 999))
def test_one_of_the_names_whatever_their_order_and_always_the_same(
        names: list[str], known: dict[str, Account], seed: int, number: int) -> None:
    chosen = choose(names, known, seed, number)
    assert chosen in names and chosen == choose(names[::-1], known, seed, number)


@given(NAMES, ACCOUNTS, st.integers(1, 999), st.sampled_from([0.25, 4.0, 1024.0]), st.sampled_from([0.5, 8.0]))
def test_neither_the_unit_of_the_metric_nor_of_money_matters(
        names: list[str], known: dict[str, Account], number: int, gain: float, usd: float) -> None:
    scaled = {name: Account(a.asked, a.merged, a.gain * gain, a.usd * usd) for name, a in known.items()}
    if any(known.get(name, Account()).merged for name in names):  # with no merge at all the unit is made up
        assert choose(names, known, 1, number) == choose(names, scaled, 1, number)


@given(st.integers(1, 60), st.floats(0.01, 10), st.floats(0.01, 10))
def test_a_cheaper_equal_is_asked_more_and_nobody_is_forgotten(asked: int, gain: float, usd: float) -> None:
    merged = max(1, asked // 3)
    known = {"cheap": Account(asked, merged, gain, usd), "dear": Account(asked, merged, gain, 20 * usd)}
    counts = [choose(["cheap", "dear"], known, 0, number) for number in range(400)]
    assert counts.count("cheap") > 250 and counts.count("dear") >= 400 * EXPLORE / 2 * 0.4


@pytest.mark.parametrize("usd", [0.0, 1.0])
def test_the_better_of_equal_price_wins_in_the_long_run_and_a_new_one_gets_its_chance(usd: float) -> None:
    known = {"good": Account(60, 12, 1.2, 60 * usd), "poor": Account(60, 1, 0.1, 60 * usd)}
    counts = [choose(["good", "poor", "new"], known, 3, number) for number in range(400)]
    assert counts.count("good") > 5 * counts.count("poor") and counts.count("new") > 100


def test_accounts_come_from_merges_alone_and_bundles_are_shared(tmp_path: Path) -> None:
    night = Night(tmp_path, "n")
    night.judge("alpha", -0.08, accept=True, usd=0.5)
    night.judge("beta", -0.5, accept=False, usd=0.25)
    attempts = [dataclasses.replace(a, proposal=dataclasses.replace(a.proposal, author="llm", source="m"))
                for a in night.state.attempts.values()]
    found = accounts(attempts, "min")
    assert found == {"m": Account(2, 1, pytest.approx(0.08), 0.75)}
    assert accounts(attempts, "max")["m"].gain == pytest.approx(-0.08)
    held = {run.id: 1800.0 for run in attempts[1].runs}
    assert accounts(attempts, "min", 2.0, held)["m"].usd == pytest.approx(0.75 + len(held) * 1.0)
    whole = dataclasses.replace(attempts[0], proposal=dataclasses.replace(
        attempts[0].proposal, id="gate", author="gate", parts=(attempts[1].proposal.id, "other")))
    parts = accounts([whole, attempts[1]], "min")
    assert parts == {"m": Account(1, 1, pytest.approx(0.04), 0.25)}
