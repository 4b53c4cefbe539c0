"""The judge: its false-merge rate by simulation, and what must hold for any pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from agent.config import Judge
from agent.judge import Ask, Rule, Ruling, estimate, judge
from agent.records import Pair

SHIPPED = Judge()
RULE = Rule(SHIPPED.alpha, SHIPPED.candidates, tuple(SHIPPED.looks), SHIPPED.floor, SHIPPED.min_effect)


def pairs(effects: list[float], confirm: list[float] | None = None) -> list[Pair]:
    other = effects if confirm is None else confirm
    return [Pair(seed, {"val": 2.0, "confirm": 2.5}, {"val": 2.0 + a, "confirm": 2.5 + b}, f"i{seed}", f"c{seed}")
            for seed, (a, b) in enumerate(zip(effects, other, strict=True), 1)]


def play(effects: list[float], rule: Rule = RULE, confirm: list[float] | None = None) -> tuple[Ruling, int]:
    """Give the judge what it asks for until it rules; (ruling, pairs used)."""
    every, given_ = pairs(effects, confirm), 0
    while True:
        answer = judge(every[:given_], rule)
        if isinstance(answer, Ruling):
            return answer, given_
        assert answer.pairs >= 1
        given_ += answer.pairs
        assert given_ <= max(rule.looks)


@pytest.mark.parametrize("sd", [0.0005, 0.002, 0.01])
def test_null_candidates_are_merged_no_oftener_than_promised(sd: float) -> None:
    generator = np.random.default_rng(round(sd * 1e6))
    trials = 20_000
    accepted = 0
    for effects in generator.normal(0, sd, (trials, max(RULE.looks))):
        if effects[0] >= 0:  # ruled on at once, as play() would find
            continue
        accepted += play([float(e) for e in effects])[0].outcome == "accepted"
    promised = RULE.alpha / RULE.candidates
    assert accepted / trials <= promised + 3 * math.sqrt(promised * (1 - promised) / trials)


def test_the_first_pair_rule_is_what_the_simulation_assumes() -> None:
    for effect in (0.0, 1e-9, 0.3):
        ruling, used = play([effect])
        assert ruling.outcome == "rejected" and used == 1


@pytest.mark.parametrize(("effect", "sd"), [(-0.02, 0.002), (-0.05, 0.005), (-0.2, 0.02)])
def test_large_effects_are_merged(effect: float, sd: float) -> None:
    generator = np.random.default_rng(5)
    found = [play([float(e) for e in generator.normal(effect, sd, 6)]) for _ in range(200)]
    assert sum(ruling.outcome == "accepted" for ruling, _ in found) >= 190
    assert all(used in (4, 6) for ruling, used in found if ruling.outcome == "accepted")


def test_student_quantiles_agree_with_scipy_stats() -> None:
    sample = pairs([-0.011, -0.014, -0.009, -0.012])
    found = estimate(sample, RULE)
    assert found is not None
    half = stats.t.isf(0.025, 3) * found.sd / 2
    assert found.low == pytest.approx(found.effect - half) and found.high == pytest.approx(found.effect + half)
    ruling = play([-0.011, -0.014, -0.009, -0.012])[0]
    assert ruling.outcome == "accepted"
    t = float(ruling.evidence["t"])
    assert ruling.evidence["p"] == pytest.approx(stats.t.cdf(t, 3)) and ruling.evidence["p"] < RULE.level  # type: ignore[operator]


def test_a_failed_run_rejects_whatever_the_others_say() -> None:
    good = pairs([-0.5, -0.5, -0.5])
    bad = Pair(4, {}, {}, "i4", "c4", "nan")
    ruling = judge([*good, bad], RULE)
    assert isinstance(ruling, Ruling) and ruling.outcome == "rejected" and "seed 4 failed: nan" in ruling.reason
    assert ruling.estimate is not None and ruling.estimate.pairs == 3


def test_equal_differences_do_not_beat_the_floor() -> None:
    assert play([-0.0005] * 6)[0].outcome == "rejected"
    assert play([-0.02] * 6)[0].outcome == "accepted"


def test_the_confirming_split_has_a_veto() -> None:
    ruling, _ = play([-0.05, -0.051, -0.049, -0.05], confirm=[0.01, -0.01, 0.0, 0.002])
    assert ruling.outcome == "rejected" and "sealed confirm split" in ruling.reason
    assert play([-0.05] * 4, confirm=[-0.03] * 4)[0].outcome == "accepted"
    alone = Rule(0.1, 25, (4, 6), 0.002, confirm=None)
    assert play([-0.05] * 4, alone, confirm=[9.0] * 4)[0].outcome == "accepted"


def test_min_effect_must_be_exceeded_by_the_interval() -> None:
    effects = [-0.05, -0.052, -0.048, -0.05, -0.05, -0.05]
    assert play(effects, Rule(0.1, 25, (4, 6), 0.002, min_effect=0.01))[0].outcome == "accepted"
    assert play(effects, Rule(0.1, 25, (4, 6), 0.002, min_effect=0.05))[0].outcome == "rejected"


def test_nothing_yet_asks_for_one_pair() -> None:
    assert judge([], RULE) == Ask(1) and judge(pairs([-0.1]), RULE) == Ask(1)
    assert judge(pairs([-0.1, -0.1]), RULE) == Ask(2)
    with pytest.raises(ValueError):
        judge([], Rule(0.1, 25, (), 0.002))


EFFECTS = st.lists(st.integers(-512, 512).map(lambda i: i / 1024), min_size=6, max_size=6)
"""Dyadic, so that adding and taking away a score is exact."""


@settings(max_examples=150, deadline=None)
@given(EFFECTS)
def test_max_is_min_with_the_sign_turned(effects: list[float]) -> None:
    turned = Rule(RULE.alpha, RULE.candidates, RULE.looks, RULE.floor, direction="max")
    low, used = play(effects)
    high, again = play([-e for e in effects], turned)
    assert (low.outcome, used) == (high.outcome, again)
    if low.estimate and high.estimate:
        assert low.estimate.effect == pytest.approx(-high.estimate.effect, abs=1e-12)
        assert low.estimate.low == pytest.approx(-high.estimate.high, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(EFFECTS, st.integers(0, 512).map(lambda i: i / 1024))
def test_a_uniformly_better_candidate_is_never_judged_worse(effects: list[float], shift: float) -> None:
    """Not so for a single better pair: it also widens the spread."""
    if play(effects)[0].outcome == "accepted":
        assert play([e - shift for e in effects])[0].outcome == "accepted"


@settings(max_examples=150, deadline=None)
@given(EFFECTS, st.floats(-0.2, 0.2))
def test_the_level_of_the_seed_cancels(effects: list[float], level: float) -> None:
    moved = [Pair(p.seed, {k: v + level * p.seed for k, v in p.incumbent.items()},
                  {k: v + level * p.seed for k, v in p.candidate.items()}, p.incumbent_run, p.candidate_run)
             for p in pairs(effects)]
    one, other = estimate(pairs(effects), RULE), estimate(moved, RULE)
    assert one is not None and other is not None and one.effect == pytest.approx(other.effect, abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(EFFECTS)
def test_every_candidate_is_ruled_on_within_the_looks(effects: list[float]) -> None:
    ruling, used = play(effects)
    assert ruling.outcome in ("accepted", "rejected") and used <= max(RULE.looks) and ruling.reason
    if ruling.outcome == "accepted":
        assert used in RULE.looks and ruling.estimate is not None and ruling.estimate.high < 0
