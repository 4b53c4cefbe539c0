"""Power and the small-sample statistics of a calibration, against simulation."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from scipy import special, stats

from agent import power
from agent.evidence import quantile

DRAWS = 100_000


def simulated(effect: float, sd: float, pairs: int, level: float, floor: float) -> float:
    """Share of simulated tests that find the effect, as the judge makes them: the sd is never below the floor."""
    gains = np.random.default_rng(3).normal(effect, sd, (DRAWS, pairs))
    spread = np.maximum(gains.std(axis=1, ddof=1), floor)
    return float(np.mean(gains.mean(axis=1) / (spread / math.sqrt(pairs)) > quantile(level, pairs)))


@pytest.mark.parametrize(("effect", "sd", "pairs", "level", "floor"), [
    (0.010, 0.005, 3, 0.0022, 0.0), (0.010, 0.005, 5, 0.0022, 0.0), (0.010, 0.005, 8, 0.0022, 0.0),
    (0.004, 0.005, 4, 0.05, 0.0), (0.0, 0.005, 4, 0.05, 0.0), (0.010, 0.005, 4, 0.0022, 0.002),
    (0.010, 0.001, 4, 0.0022, 0.002), (0.012, 0.004, 5, 0.0022, 0.006), (0.0, 0.004, 5, 0.05, 0.004)])
def test_the_chance_to_find_an_effect_is_what_simulation_finds(effect: float, sd: float, pairs: int, level: float,
                                                               floor: float) -> None:
    assert power.chance(effect, sd, pairs, level, floor) == pytest.approx(
        simulated(effect, sd, pairs, level, floor), abs=0.006)


def test_a_floor_of_nought_is_the_noncentral_t_and_a_tiny_one_changes_nothing() -> None:
    for pairs, level in itertools.product((2, 3, 5, 30), (0.05, 0.0022, 0.0004)):
        for effect in (0.0, 0.5, 2.0, 20.0):
            exact = power.chance(effect, 1.0, pairs, level)
            assert 0 <= exact <= 1
            assert power.chance(effect, 1.0, pairs, level, 1e-9) == pytest.approx(exact, abs=0.002)


@pytest.mark.parametrize("floor", [0.0, 0.002])
def test_the_minimal_detectable_effect_has_its_power_and_pairs_for_is_its_inverse(floor: float) -> None:
    sizes = [power.visible(0.005, pairs, 0.0022, floor) for pairs in (3, 4, 5, 6, 8)]
    assert sizes == sorted(sizes, reverse=True)
    for pairs, size in zip((3, 4, 5, 6, 8), sizes, strict=True):
        assert power.chance(size, 0.005, pairs, 0.0022, floor) == pytest.approx(0.8, abs=1e-6)
        assert power.pairs_for(size * 1.001, 0.005, 0.0022, floor) == pairs
    assert simulated(sizes[1], 0.005, 4, 0.0022, floor) == pytest.approx(0.8, abs=0.006)
    assert power.visible(0.010, 4, 0.0022) == pytest.approx(2 * power.visible(0.005, 4, 0.0022))


def test_without_any_noise_the_floor_alone_decides() -> None:
    needed = quantile(0.0022, 4) * 0.002 / 2
    assert power.visible(0.0, 4, 0.0022, 0.002) == pytest.approx(needed, rel=1e-6)
    assert power.visible(0.0, 4, 0.0022) < 1e-10


def test_an_effect_far_below_the_noise_is_never_seen() -> None:
    assert power.pairs_for(0.0001, 1.0, 0.0022) is None
    assert power.pairs_for(50.0, 1.0, 0.05) == 2


def test_the_interval_of_an_sd_covers_it() -> None:
    values = np.random.default_rng(5).normal(0, 2.0, (20_000, 6)).std(axis=1, ddof=1)
    met = [low <= 2.0 <= high for low, high in (power.spread(float(value), 5) for value in values)]
    assert statistics.fmean(met) == pytest.approx(0.9, abs=0.01)


def test_equal_variances_of_correlated_values_are_seldom_told_apart() -> None:
    draw = np.random.default_rng(7)
    shared, own = draw.normal(0, 1, (4000, 6)), draw.normal(0, 0.3, (2, 4000, 6))
    equal = [power.same_spread(list(a), list(b)) < 0.05 for a, b in zip(shared + own[0], shared + own[1], strict=True)]
    assert statistics.fmean(equal) == pytest.approx(0.05, abs=0.012)
    unequal = [power.same_spread(list(a), list(b)) < 0.05
               for a, b in zip(shared + own[0], 3 * shared + own[1], strict=True)]
    assert statistics.fmean(unequal) > 0.9
    assert power.same_spread([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]) == 1.0
    assert power.same_spread([1.0, 2.0, 4.0], [1.0, 2.0, 5.0]) == 1.0


# ---------------------------------------------------------------------------------------------------------- the line


def test_the_line_through_one_group_is_the_textbook_regression() -> None:
    draw = np.random.default_rng(2)
    x = draw.normal(100, 5, 12)
    y = 3 - 0.02 * x + draw.normal(0, 0.05, 12)
    found, known = power.line([list(zip(x, y, strict=True))]), stats.linregress(x, y)
    assert found is not None and found.degrees == 10
    assert (found.slope, found.error, found.p) == pytest.approx((known.slope, known.stderr, known.pvalue))
    assert found.share == pytest.approx(1 - (1 - known.rvalue ** 2) * 11 / 10)


def test_groups_have_each_their_own_height() -> None:
    groups = [[(x, height - 2.0 * x) for x in (1.0, 2.0, 4.0)] for height in (0.0, 100.0, -50.0)]
    found = power.line(groups)
    assert found is not None and found.degrees == 5
    assert (found.slope, found.share, found.p) == pytest.approx((-2.0, 1.0, 0.0), abs=1e-6)


def test_the_share_that_a_line_explains_is_neither_made_up_nor_lost() -> None:
    """The clock explains none, and then half, of the variance."""
    draw = np.random.default_rng(11)
    for slope, told in ((0.0, 0.0), (1.0, 0.5)):
        shares, alarms = [], []
        for _ in range(2000):
            groups = []
            for size in (6, 4, 4):
                x = draw.normal(0, 1, size)
                groups.append(list(zip(x, slope * x + draw.normal(0, 1, size), strict=True)))
            found = power.line(groups)
            assert found is not None
            shares.append(found.share)
            alarms.append(found.p < 0.05)
        assert statistics.median(shares) == pytest.approx(told, abs=0.05)
        if not slope:
            assert statistics.fmean(alarms) == pytest.approx(0.05, abs=0.015)


def test_there_is_no_line_where_nothing_differs() -> None:
    assert power.line([]) is None
    assert power.line([[(200.0, 1.0), (200.0, 1.1), (200.0, 1.2), (200.0, 0.9)]]) is None
    assert power.line([[(1.0, 1.0), (2.0, 1.1)], [(1.0, 2.0), (2.0, 3.0)]]) is None, "one degree of freedom"
    flat = power.line([[(1.0, 2.0), (2.0, 2.0), (3.0, 2.0), (4.0, 2.0)]])
    assert flat is not None and (flat.slope, flat.share, flat.p) == (0.0, 0.0, 1.0)


# ---------------------------------------------------------------------------------------------------------- the order


def test_the_rank_correlation_is_spearmans() -> None:
    a, b = [0.0, -0.03, 0.01, 0.01, -0.002], [0.0, -0.05, 0.02, 0.03, 0.004]
    found = power.order(a, b)
    assert found is not None and found.rho == pytest.approx(stats.spearmanr(a, b).statistic)


def test_the_p_value_of_four_things_counts_all_their_orders() -> None:
    best = power.order([1, 2, 3, 4], [10, 20, 30, 40])
    assert best is not None and (best.rho, best.p, best.least) == pytest.approx((1.0, 1 / 24, 1 / 24))
    near = power.order([1, 2, 3, 4], [10, 20, 40, 30])
    assert near is not None and (near.rho, near.p) == pytest.approx((0.8, 4 / 24))
    worst = power.order([1, 2, 3, 4], [4, 3, 2, 1])
    assert worst is not None and (worst.rho, worst.p) == pytest.approx((-1.0, 1.0))
    assert power.order([1.0, 1.0, 1.0], [1, 2, 3]) is None and power.order([1, 2], [1, 2]) is None


def test_the_approximation_of_many_things_is_near_the_count() -> None:
    draw = np.random.default_rng(1)
    a, b = list(draw.normal(size=9)), list(draw.normal(size=9))
    found = power.order(a, b)
    assert found is not None
    ranks, others = np.argsort(np.argsort(a)), np.argsort(np.argsort(b))
    drawn = [float(np.corrcoef(ranks, draw.permutation(others))[0, 1]) for _ in range(20_000)]
    assert found.p == pytest.approx(statistics.fmean(rho >= found.rho - 1e-9 for rho in drawn), abs=0.03)


def test_student_quantiles_are_those_of_scipy() -> None:
    assert quantile(0.0022, 5) == pytest.approx(stats.t.isf(0.0022, 4))
    assert power.spread(1.0, 5)[1] == pytest.approx(math.sqrt(5 / float(special.chdtri(5, 0.95))))
