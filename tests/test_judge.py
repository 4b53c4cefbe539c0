"""The judge: its false-merge rate by simulation, and what must hold for any pairs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from agent.config import Judge
from agent.judge import SCREENS, Ask, Rule, Ruling, Standing, estimate, judge
from agent.records import Pair

SHIPPED = Judge()
RULE = Rule(SHIPPED.alpha, tuple(SHIPPED.looks), SHIPPED.floor, SHIPPED.min_effect)
FIRST = Standing()
LAST = max(RULE.looks)


def pairs(effects: list[float], confirm: list[float] | None = None, fresh: bool = False) -> list[Pair]:
    other = effects if confirm is None else confirm
    return [Pair(seed, {"val": 2.0, "confirm": 2.5}, {"val": 2.0 + a, "confirm": 2.5 + b}, f"i{seed}", f"c{seed}",
                 fresh=fresh) for seed, (a, b) in enumerate(zip(effects, other, strict=True), 1)]


def play(effects: list[float], rule: Rule = RULE, screens: list[float] | None = None, standing: Standing = FIRST,
         val: list[float] | None = None) -> tuple[Ruling, int]:
    """Give the judge what it asks for until it rules; (ruling, fresh pairs used). ``effects`` are the fresh ones on
    the confirming split, ``val`` on the other; the screening ones are good if left out."""
    screening, proof = pairs(screens or [-0.1, -0.1]), pairs(val or effects, effects, fresh=True)
    known, given_ = 0, 0
    while True:
        answer = judge([*screening[:known], *proof[:given_]], rule, standing, 0.002)
        if isinstance(answer, Ruling):
            return answer, given_
        assert answer.pairs >= 1
        if answer.fresh:
            given_ += answer.pairs
        else:
            known += answer.pairs
        assert given_ <= max(rule.looks) and known <= SCREENS


@pytest.mark.parametrize("standing", [FIRST, Standing(7, 3)])
@pytest.mark.parametrize("sd", [0.0005, 0.002, 0.01])
def test_null_candidates_pass_no_oftener_than_their_level(sd: float, standing: Standing) -> None:
    generator = np.random.default_rng(round(sd * 1e6) + standing.hypothesis)
    trials = 3_000
    accepted = sum(play([float(e) for e in effects], standing=standing)[0].outcome == "accepted"
                   for effects in generator.normal(0, sd, (trials, LAST)))
    promised = standing.level(RULE) * len(RULE.looks)
    assert accepted / trials <= promised + 3 * math.sqrt(promised * (1 - promised) / trials)


def test_a_campaign_of_nulls_merges_anything_no_oftener_than_alpha() -> None:
    """60 candidates each, screened and certified with what the campaign would pass in."""
    generator = np.random.default_rng(11)
    campaigns, any_merge = 200, 0
    for _ in range(campaigns):
        certified = merged = 0
        for _ in range(60):
            screens = [float(e) for e in generator.normal(0, 0.004, SCREENS)]
            asked = judge(pairs(screens[:1]), RULE, FIRST, 0.004)
            if asked == Ask(1):
                asked = judge(pairs(screens), RULE, FIRST, 0.004)
            if isinstance(asked, Ruling):
                continue
            certified += 1
            fresh = [float(e) for e in generator.normal(0, 0.004, LAST)]
            merged += play(fresh, screens=screens, standing=Standing(certified, merged))[0].outcome == "accepted"
        any_merge += merged > 0
    assert any_merge / campaigns <= RULE.alpha


def test_what_screens_is_never_evidence() -> None:
    for screens in ([-0.1, -0.1], [-0.001, -0.002], [-5.0, -5.0]):
        assert play([-0.05, 0.06, -0.05, 0.05, 0.0, 0.0, 0.0, 0.0], screens=screens)[0].outcome == "rejected"
    found = estimate([*pairs([-9.0, -9.0]), *pairs([-0.01, -0.03], fresh=True)], RULE)
    assert found is not None and found.effect == pytest.approx(-0.02) and found.pairs == 2


def test_a_first_seed_that_is_no_better_ends_it() -> None:
    for effect in (0.0, 1e-9, 0.3):
        ruling, used = play([-1.0] * LAST, screens=[effect])
        assert ruling.outcome == "rejected" and used == 0 and "first seed" in ruling.reason


def test_a_doubtful_first_seed_asks_for_a_second_and_a_clear_one_does_not() -> None:
    assert judge(pairs([-0.001]), RULE, FIRST, 0.002) == Ask(1)
    assert judge(pairs([-0.02]), RULE, FIRST, 0.002) == Ask(min(RULE.looks), fresh=True)
    assert judge(pairs([-0.02]), RULE, FIRST, 0.05) == Ask(1)
    assert judge(pairs([-0.001, -0.001]), RULE, FIRST, 0.002) == Ask(min(RULE.looks), fresh=True)
    assert isinstance(judge(pairs([-0.001, 0.002]), RULE, FIRST, 0.002), Ruling)


@pytest.mark.parametrize(("effect", "sd"), [(-0.02, 0.002), (-0.05, 0.005), (-0.2, 0.02)])
def test_large_effects_are_merged(effect: float, sd: float) -> None:
    generator = np.random.default_rng(5)
    found = [play([float(e) for e in generator.normal(effect, sd, LAST)]) for _ in range(200)]
    assert sum(ruling.outcome == "accepted" for ruling, _ in found) >= 190
    assert all(used in RULE.looks for ruling, used in found if ruling.outcome == "accepted")


def test_student_quantiles_agree_with_scipy_stats() -> None:
    effects = [-0.051, -0.054, -0.049, -0.052]
    found = estimate(pairs(effects, fresh=True), RULE)
    assert found is not None
    half = stats.t.isf(0.025, 3) * found.sd / 2
    assert found.low == pytest.approx(found.effect - half) and found.high == pytest.approx(found.effect + half)
    ruling = play(effects)[0]
    assert ruling.outcome == "accepted"
    t, level = float(ruling.evidence["t"]), float(ruling.evidence["level"])
    assert ruling.evidence["p"] == pytest.approx(stats.t.cdf(t, 3)) and float(ruling.evidence["p"]) < level
    assert ruling.evidence["e"] == pytest.approx(1 / level) and float(ruling.evidence["bound"]) < 0


def test_a_failed_run_rejects_whatever_the_others_say() -> None:
    good = pairs([-0.5, -0.5, -0.5], fresh=True)
    bad = Pair(4, {}, {}, "i4", "c4", "nan", fresh=True)
    ruling = judge([*good, bad], RULE, FIRST)
    assert isinstance(ruling, Ruling) and ruling.outcome == "rejected" and "seed 4 failed: nan" in ruling.reason
    assert ruling.estimate is not None and ruling.estimate.pairs == 3


def test_equal_differences_do_not_beat_the_floor() -> None:
    assert play([-0.0005] * LAST)[0].outcome == "rejected"
    assert play([-0.05] * LAST)[0].outcome == "accepted"


def test_the_confirming_split_alone_certifies() -> None:
    effects = [-0.05, -0.051, -0.049, -0.05]
    ruling, _ = play([0.01, -0.01, 0.0, 0.002] * 2, val=effects * 2)
    assert ruling.outcome == "rejected" and ruling.evidence["split"] == "confirm"
    assert play(effects, val=[9.0] * 4)[0].outcome == "accepted"
    alone = dataclasses.replace(RULE, confirm=None)
    assert play([9.0] * 4, alone, val=effects)[0].outcome == "accepted"


def test_min_effect_must_be_exceeded_by_the_interval() -> None:
    effects = [-0.05, -0.052, -0.048, -0.05] * 2
    assert play(effects, dataclasses.replace(RULE, min_effect=0.01))[0].outcome == "accepted"
    assert play(effects, dataclasses.replace(RULE, min_effect=0.05))[0].outcome == "rejected"


def test_nothing_yet_asks_for_one_pair() -> None:
    assert judge([], RULE, FIRST) == Ask(1)
    assert judge(pairs([-0.1], fresh=True), RULE, FIRST) == Ask(min(RULE.looks) - 1, fresh=True)
    with pytest.raises(ValueError):
        judge([], dataclasses.replace(RULE, looks=()), FIRST)


EFFECTS = st.lists(st.integers(-512, 512).map(lambda i: i / 1024), min_size=LAST, max_size=LAST)
"""Dyadic, so that adding and taking away a score is exact."""


@settings(max_examples=150, deadline=None)
@given(EFFECTS)
def test_max_is_min_with_the_sign_turned(effects: list[float]) -> None:
    turned = dataclasses.replace(RULE, direction="max")
    low, used = play(effects)
    high, again = play([-e for e in effects], turned, screens=[0.1, 0.1])
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
