"""Directions and plateau: the bandit's properties, and when a campaign counts as stuck."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.briefing.directions import DIRECTIONS, UNIFORM, Tally, Tried, canonical, choose, tallies
from agent.briefing.plateau import EACH, LONGEST, SHORTEST, watch

ONE = st.builds(Tried, st.sampled_from(DIRECTIONS), st.one_of(st.just(0.0), st.floats(1e-4, 1.0)), st.floats(1, 12))
MANY = st.lists(ONE, max_size=60)


def drawn(known: tuple[Tally, ...], draws: int = 400) -> Counter[str]:
    return Counter(choose(known, str(number)) for number in range(draws))


@pytest.mark.parametrize(("text", "name"), [
    ("Optimizer", "optimizer"), ("learning-rate tuning", "optimizer"), ("weight_decay", "regularisation"),
    ("data", "data order"), ("efficiency", "systems speed"), ("lr schedule", "schedule"), ("attention", "architecture"),
    ("ablation of existing parts", "ablation"), ("init", "initialisation"), ("cleanup", "simplification"), ("", ""),
    ("other", "")])
def test_free_text_is_a_direction(text: str, name: str) -> None:
    assert canonical(text) == name


@given(MANY, st.text(max_size=8))
@settings(deadline=None)
def test_a_choice_is_a_fixed_function_that_knows_no_order_and_no_unit(tried: list[Tried], seed: str) -> None:
    known = tallies(tried)
    found = choose(known, seed)
    assert found in DIRECTIONS and choose(known[::-1], seed) == found
    scaled = tallies([Tried(one.direction, one.gain * 4, one.runs * 2) for one in tried])
    if any(one.gain for one in tried):
        assert choose(scaled, seed) == found
    assert choose(known, seed, ("schedule",)) == "schedule"


@given(MANY)
@settings(deadline=None)
def test_tallies_count_each_attempt_once(tried: list[Tried]) -> None:
    known = tallies(tried, half_life=1e12)
    assert [one.direction for one in known] == list(DIRECTIONS)
    assert sum(one.tried for one in known) == pytest.approx(len(tried))
    assert sum(one.gain for one in known) == pytest.approx(sum(one.gain for one in tried))
    assert all(one.kept <= one.tried + 1e-9 for one in known)


@given(MANY, st.sampled_from(DIRECTIONS))
@settings(max_examples=15, deadline=None)
def test_dearer_attempts_never_make_a_direction_more_likely(tried: list[Tried], name: str) -> None:
    known = tallies(tried)
    dearer = tuple(Tally(one.direction, one.tried, one.kept, one.gain, one.runs * 3) if one.direction == name else one
                   for one in known)
    # the mean cost of all rises too, which others share; so compare with their cost held
    if known[DIRECTIONS.index(name)].tried > 5:
        assert drawn(dearer)[name] <= drawn(known)[name] + 12


def test_no_direction_is_given_up_and_the_best_is_asked_for_most() -> None:
    truth = {"optimizer": 0.3, "schedule": 0.15}
    tried, rng = list[Tried](), random.Random(1)
    for number in range(600):
        name = choose(tallies(tried), str(number))
        tried.append(Tried(name, 0.01 if rng.random() < truth.get(name, 0.02) else 0.0, 3))
    seen = Counter(one.direction for one in tried)
    assert seen.most_common(1)[0][0] == "optimizer" and seen["optimizer"] > 200
    assert min(seen[name] for name in DIRECTIONS) >= 600 * UNIFORM / 9 / 3


def test_gain_for_a_run_counts_not_gain() -> None:
    cheap = [Tried("systems speed", 0.01 * (number % 5 == 0), 1) for number in range(40)]
    dear = [Tried("architecture", 0.01 * (number % 5 == 0), 8) for number in range(40)]
    both = tallies([one for pair in zip(cheap, dear, strict=True) for one in pair])
    seen = drawn(both)
    assert seen["systems speed"] > 3 * seen["architecture"]


def test_there_is_something_to_choose_from() -> None:
    with pytest.raises(ValueError, match="no direction"):
        choose(tallies([]), "1", ())


# --- plateau ---------------------------------------------------------------------------------------------------------

@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 1.0)), max_size=120))
def test_a_plateau_is_never_called_early_and_never_after_the_longest(gains: list[float]) -> None:
    assert watch([*gains, 1e6]) is None
    found = watch(gains + [0.0] * LONGEST)
    assert found is not None and found.length >= LONGEST
    assert watch([*gains, *[1e6] * 3, *[0.0] * (SHORTEST - 1)]) is None


def test_the_patience_follows_the_campaigns_own_keep_rate() -> None:
    often, seldom = [0.1, 0.0] * 30, ([0.0] * 18 + [0.1]) * 6
    first = next(n for n in range(60) if watch(often + [0.0] * n))
    assert first < next(n for n in range(60) if watch(seldom + [0.0] * n)) <= LONGEST


def test_a_gain_that_does_not_matter_ends_nothing() -> None:
    gains = [0.1, 0.0, 0.1, 0.0] * 10 + [0.0] * 20
    assert watch([*gains, 0.001]) is not None and watch([*gains, 0.05]) is None


def test_the_question_changes_while_nothing_is_gained() -> None:
    asked = [found.question for n in range(LONGEST, LONGEST + 5 * EACH) if (found := watch([0.0] * n))]
    assert [name for name, _ in Counter(asked).items()][:5] == ["combine", "undo", "speed", "larger", ""]
    alone = watch([0.0] * LONGEST, near_misses=1)
    assert alone is not None and alone.question == "undo" and "undo an old choice" in alone.text
    texts = {found.text for n in range(LONGEST, LONGEST + 5 * EACH) if (found := watch([0.0] * n))}
    assert len(texts) <= 6
