"""The arithmetic of the gate, against scipy's own distributions and against its promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from agent import evidence
from agent.evidence import Pooled, Sample, gaussian_e, inflated, level, paired_e, posterior, sample, share


@pytest.mark.parametrize(("n", "t"), [(2, 1.0), (3, 8.0), (5, 4.9), (8, -2.0), (12, 3.0)])
def test_the_paired_e_value_is_the_ratio_of_students_densities(n: int, t: float) -> None:
    found = paired_e(Sample(n, -t / math.sqrt(n), 1.0))  # gains are negative effects
    ratios = [stats.nct.pdf(t, n - 1, d * math.sqrt(n)) / stats.t.pdf(t, n - 1) for d in evidence.DELTAS]
    assert found == pytest.approx(float(np.mean(ratios)), rel=1e-3, abs=1e-9)


def test_e_values_have_a_mean_of_at_most_one_without_an_effect() -> None:
    generator = np.random.default_rng(3)
    for n in (2, 5):
        found = [paired_e(sample([float(x) for x in row], 1e-9)) for row in generator.normal(0, 1, (4000, n))]
        error = float(np.std(found)) / math.sqrt(len(found))
        assert 0.5 < np.mean(found) <= 1 + 4 * error  # heavy tails: a sample's mean tends to lie below
    gauss = [gaussian_e(float(x), 4.0) for x in generator.normal(0, 0.5, 20_000)]
    assert np.mean(gauss) <= 1 + 4 * float(np.std(gauss)) / math.sqrt(len(gauss))
    assert paired_e(Sample(1, -5.0, 1.0)) == 1.0


def test_the_levels_of_a_whole_campaign_sum_to_alpha() -> None:
    shares = [share(t) for t in range(1, 200_000)]
    assert math.fsum(shares) == pytest.approx(1.0, abs=0.01) and math.fsum(shares) < 1
    assert shares[:100] == sorted(shares[:100], reverse=True)
    assert level(0.1, 5, 3) == pytest.approx(4 * level(0.1, 5, 0)) and level(0.1, 500, 499) <= 0.1
    for hypothesis, merges in ((0, 0), (1, 1), (3, -1)):
        with pytest.raises(ValueError, match="no level"):
            level(0.1, hypothesis, merges)


def test_e_lond_holds_the_false_discovery_rate() -> None:
    """Half of the hypotheses are true nulls; tests at e-LOND's levels, in 400 campaigns of 40."""
    generator = np.random.default_rng(8)
    rates = []
    for _ in range(400):
        merged = false = 0
        for t in range(1, 41):
            null = generator.random() < 0.5
            p = generator.random() if null else generator.random() * 1e-3
            if p <= level(0.1, t, merged):
                merged, false = merged + 1, false + null
        rates.append(false / max(merged, 1))
    assert np.mean(rates) <= 0.1


def test_an_interval_covers_and_a_bound_is_its_one_sided_end() -> None:
    found = sample([-0.02, -0.01, -0.03], 0.001)
    assert found.mean == pytest.approx(-0.02) and found.sd == pytest.approx(0.01)
    low, high = found.interval(0.95)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, -0.02, 0.01 / math.sqrt(3)))
    assert found.bound(0.025) == pytest.approx(high)
    assert found.p == pytest.approx(stats.ttest_1samp([-0.02, -0.01, -0.03], 0, alternative="less").pvalue)
    assert sample([0.0, 0.0], 0.002).sd == 0.002 and sample([0.0], 0.0).sd > 0


def test_pooling_adds_cells() -> None:
    pooled = Pooled().plus([1.0, 3.0]).plus([10.0]).plus([0.0, 0.0, 3.0])
    assert pooled == Pooled(8.0, 3) and pooled.sd == pytest.approx(math.sqrt(8 / 3))
    assert inflated(1.0, 4) == 1.5


def test_the_prior_is_a_distribution_and_data_move_it() -> None:
    _, weights = evidence.prior()
    assert math.fsum(weights) == pytest.approx(1.0)
    assert posterior(0.0, 0.0)[0] == pytest.approx(0.15)
    assert posterior(30.0, 10.0)[0] > 0.999 and posterior(-30.0, 10.0)[0] < 0.001


@given(st.floats(-6, 6), st.floats(0.1, 40))
def test_more_seen_gain_is_never_less_likely_gain(gain: float, information: float) -> None:
    lower, higher = posterior(gain * information, information), posterior((gain + 0.5) * information, information)
    assert higher[0] >= lower[0] - 1e-12 and higher[1] >= lower[1] - 1e-12
