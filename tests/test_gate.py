"""The gate as a state machine: what must hold for any answers, in any order, from any number of workers."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from agent import evidence
from agent.gate import Ask, Draw, Gate, Outcome, Pause, Ruling, Settings, design
from agent.gate.beliefs import Candidate
from agent.gate.book import Book

Step = Ask | Draw | Ruling | Pause
Runs = Callable[[Ask], Outcome]
SHIPPED = Settings()
SOON = Settings(calibrate=3, soundings=(2, 3), rows=4, trigger=1.0)
GEARS = ["auto", "paired", "weighing"]


class Host:
    """Serves a gate from a list of candidates, ``slots`` runs at a time, and keeps all that was said."""

    def __init__(self, settings: Settings, runs: Runs, candidates: int, slots: int = 1, left: int = 400,
                 shuffle: random.Random | None = None) -> None:
        self.gate, self.runs, self.slots, self.left = Gate(settings), runs, slots, left
        self.names, self.shuffle = [f"c{number}" for number in range(candidates)], shuffle
        self.offered = list(self.names)
        self.tips: list[tuple[str, ...]] = [()]
        self.said: list[Step] = []

    def play(self) -> list[Ruling]:
        """To the end; all rulings."""
        while steps := self.gate.next(self.slots, bool(self.offered), self.left):
            self.said += steps
            asks = [step for step in steps if isinstance(step, Ask)]
            if self.shuffle:
                self.shuffle.shuffle(asks)
            for ask in asks:
                self.gate.told(ask.id, self.runs(dataclasses.replace(ask, arm=(*self.tips[ask.tip], *ask.arm))))
            self.left -= len(asks)
            for step in steps:
                if isinstance(step, Draw) and self.offered:
                    self.gate.admit(self.offered.pop(0))
                elif isinstance(step, Ruling) and step.outcome == "accepted":
                    self.tips.append((*self.tips[-1], *step.unit))
                    self.gate.moved(self.gate.live)
                elif isinstance(step, Pause):
                    self.gate.resume()
        self.said += self.gate.close()
        return [step for step in self.said if isinstance(step, Ruling)]


def noise(*key: object) -> float:
    """A standard normal number that belongs to the key."""
    return random.Random(" ".join(map(str, key))).gauss(0.0, 1.0)


def runs_of(effects: dict[str, float], sd: float, paired: float, world: int = 0) -> Runs:
    """Losses with a seed effect of ``sd``, and an interaction of patch and seed. The arm holds what was merged, too."""
    def run(ask: Ask) -> Outcome:
        return Outcome(3.0 + sd * noise(world, ask.seed) + sum(
            effects.get(name, 0.0) + paired * noise(world, name, ask.seed) for name in ask.arm))
    return run


def unpaired(effects: dict[str, float], sd: float, world: int = 0) -> Runs:
    """Losses whose noise belongs to the run alone."""
    return lambda ask: Outcome(3.0 + sum(effects.get(name, 0.0) for name in ask.arm) + sd * noise(world, ask))


# ------------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("gear", GEARS)
@hypothesis_settings(max_examples=12, deadline=None)
@given(world=st.integers(0, 10**6), slots=st.integers(1, 8), faulty=st.floats(0, 1), bad=st.floats(0, 0.2))
def test_every_candidate_ends_in_one_ruling_and_faults_merge_nothing(gear: str, world: int, slots: int, faulty: float,
                                                                    bad: float) -> None:
    def run(ask: Ask) -> Outcome:
        draw = random.Random(f"{world} {ask}")
        if draw.random() < (faulty if ask.arm else bad):
            return Outcome(None, draw.choice(["crash", "nan", "timeout", "infra"]))
        return Outcome(3.0 + 0.01 * noise(world, ask.seed))

    host = Host(dataclasses.replace(SOON, gear=gear), run, 12, slots, left=150)
    rulings = host.play()
    ended = Counter(name for ruling in rulings for name in ruling.unit)
    assert ended == Counter(set(host.names) - set(host.offered))
    assert all(ruling.outcome != "accepted" for ruling in rulings)
    assert host.gate.live == ()


@pytest.mark.parametrize("gear", GEARS)
@hypothesis_settings(max_examples=8, deadline=None)
@given(world=st.integers(0, 10**6), slots=st.integers(1, 8))
def test_the_order_of_results_does_not_matter_and_a_replay_is_equal(gear: str, world: int, slots: int) -> None:
    effects = {f"c{number}": 0.03 * noise(world, "effect", number) for number in range(14)}
    settings = dataclasses.replace(SOON, gear=gear, seed=world)
    runs = runs_of(effects, 0.01, 0.002, world)
    hosts = [Host(settings, runs, 14, slots, 200), Host(settings, runs, 14, slots, 200),
             Host(settings, runs, 14, slots, 200, random.Random(world))]
    for host in hosts:
        host.play()
    assert hosts[0].said == hosts[1].said == hosts[2].said


@pytest.mark.parametrize("gear", GEARS)
def test_no_run_is_asked_beyond_what_is_left_and_slots_are_kept(gear: str) -> None:
    gate = Gate(dataclasses.replace(SOON, gear=gear))
    assert len(gate.next(3)) == 3
    assert len(gate.next(8, True, 1)) == 1
    assert gate.next(8, True, 0) == []


@hypothesis_settings(max_examples=60, deadline=None)
@given(alpha=st.floats(1e-4, 0.5), merges=st.lists(st.booleans(), min_size=1, max_size=80))
def test_levels_never_exceed_alpha(alpha: float, merges: list[bool]) -> None:
    spent, merged = 0.0, 0
    for number, merge in enumerate(merges, 1):
        level = evidence.level(alpha, number, merged)
        assert 0 < level <= alpha
        spent += evidence.level(alpha, number, 0)
        merged += merge
    assert spent <= alpha


@pytest.mark.parametrize("gear", GEARS)
def test_certifications_take_levels_in_order_and_fresh_seeds(gear: str) -> None:
    effects = {f"c{number}": -0.05 if number % 3 == 0 else 0.02 for number in range(60)}
    runs = runs_of(effects, 0.01, 0.002) if gear == "paired" else unpaired(effects, 0.01)
    host = Host(dataclasses.replace(SHIPPED, gear=gear), runs, 60)
    merged = [ruling for ruling in host.play() if ruling.outcome == "accepted"]
    assert merged
    for number, ruling in enumerate(merged):
        assert ruling.evidence["merges"] == number
        assert ruling.evidence["level"] == evidence.level(0.1, int(ruling.evidence["hypothesis"]), number)
        assert ruling.evidence["low"] < ruling.evidence["effect"] < 0
    asks = [step for step in host.said if isinstance(step, Ask)]
    first = {}
    for ask in asks:
        first.setdefault(ask.seed, ask.stage)
    fresh = [ask for ask in asks if ask.stage == "certify"]
    assert all(first[ask.seed] == "certify" for ask in fresh)
    assert max(Counter(ask.seed for ask in fresh).values()) == 2


# --------------------------------------------------------------------------------------- A/A and power


@pytest.mark.parametrize("drop", [0.0, 1e-6])
def test_bit_equal_patches_and_differences_below_the_floor_are_not_merged(drop: float) -> None:
    settings = dataclasses.replace(SHIPPED, gear="paired", floor=1e-4)
    host = Host(settings, runs_of({f"c{n}": -drop for n in range(40)}, 0.01, 0.0), 40)
    assert all(ruling.outcome != "accepted" for ruling in host.play())


@pytest.mark.parametrize("gear", GEARS)
def test_patches_without_effect_are_hardly_ever_merged(gear: str) -> None:
    merged = 0
    for world in range(6):
        runs = runs_of({}, 0.01, 0.003, world) if gear == "paired" else unpaired({}, 0.01, world)
        host = Host(dataclasses.replace(SHIPPED, gear=gear, seed=world), runs, 60, left=200)
        merged += any(ruling.outcome == "accepted" for ruling in host.play())
    assert merged <= 1


@pytest.mark.parametrize("bundles", [True, False])
@pytest.mark.parametrize("gear", ["paired", "weighing"])
def test_large_effects_are_merged_alone_or_together(gear: str, bundles: bool) -> None:
    effects = {f"c{number}": -0.04 for number in (1, 4, 9, 16)}
    runs = runs_of(effects, 0.01, 0.003) if gear == "paired" else unpaired(effects, 0.01)
    host = Host(dataclasses.replace(SHIPPED, gear=gear, bundles=bundles), runs, 24, slots=4)
    merged = [ruling.unit for ruling in host.play() if ruling.outcome == "accepted"]
    found = {name for unit in merged for name in unit}
    assert found & set(effects) and len(found & set(effects)) >= 3 and len(found - set(effects)) <= 1
    assert bundles or all(len(unit) == 1 for unit in merged)


@given(jitter=st.lists(st.floats(-1e-7, 1e-7), min_size=3, max_size=3), order=st.permutations(range(3)))
def test_far_beyond_the_prior_the_measured_gain_orders_a_bundle(jitter: list[float], order: list[int]) -> None:
    """An audit moves a loss by its last digits: it must not change which patch comes first."""
    book = Book(SHIPPED)
    book.gear = "paired"
    for seed, loss in enumerate((3.061, 3.047, 3.064)):
        book.incumbent_ran(loss, seed)
    book.calibrated()
    gains = (0.46, 1.14, 0.45)
    for name in order:
        readings = [(gains[name] + 0.001 * seed + jitter[name], 1.0) for seed in (1, 2)]
        book.candidates[f"c{name}"] = Candidate(f"c{name}", set(), paired=readings)
    means = [book.belief(candidate).mean for candidate in book.candidates.values()]
    assert max(means) - min(means) < 1e-6 * max(means)  # all at the prior's end
    assert [candidate.name for candidate in book.clique(book.candidates.values(), 2)] == ["c1", "c0"]


def test_the_gear_follows_how_well_patches_pair() -> None:
    paired = Host(SHIPPED, runs_of({}, 0.01, 0.001), 30, left=60)
    apart = Host(SHIPPED, unpaired({}, 0.01), 30, left=60)
    paired.play()
    apart.play()
    assert (paired.gate.gear, apart.gate.gear) == ("paired", "weighing")


# ------------------------------------------------------------------------------------ faults and moves


def until(gate: Gate, runs: Runs, stage: str) -> Ask:
    """Serve the gate until it asks for a run of this stage, and leave that one open."""
    number = len(gate.live)
    for _ in range(500):
        for step in gate.next(1):
            if isinstance(step, Draw):
                number += 1
                gate.admit(f"c{number}")
            elif isinstance(step, Ask):
                if step.stage == stage:
                    return step
                gate.told(step.id, runs(step))
    raise AssertionError(f"no {stage}")


def test_an_incumbent_that_fails_twice_pauses_and_a_machine_fault_is_tried_again() -> None:
    gate = Gate(SOON)
    for _ in range(2):
        ask = gate.next(1)[0]
        assert isinstance(ask, Ask) and ask.arm == ()
        gate.told(ask.id, Outcome(None, "crash"))
    assert gate.next(1) == [Pause("the incumbent failed twice in a row (crash)")]
    gate.resume()
    ask = gate.next(1)[0]
    assert isinstance(ask, Ask)
    gate.told(ask.id, Outcome(None, "infra"))
    again = gate.next(1)[0]
    assert isinstance(again, Ask) and (again.seed, again.stage, again.arm) == (ask.seed, ask.stage, ask.arm)


def test_a_tip_that_moved_voids_the_certification_and_halves_what_was_screened() -> None:
    runs = runs_of({f"c{n}": -0.05 for n in range(200)}, 0.01, 0.001)
    gate = Gate(dataclasses.replace(SHIPPED, gear="paired"))
    ask = until(gate, runs, "certify")
    gate.moved(gate.live)
    gate.told(ask.id, runs(ask))
    later = until(gate, runs, "certify")
    assert later.tip == 1 and later.seed > ask.seed and gate.merges == 0 and gate.hypotheses == 2
    with pytest.raises(KeyError):
        gate.told(ask.id, runs(ask))


def test_what_does_not_merge_with_the_new_tip_is_inconclusive() -> None:
    runs = runs_of({f"c{n}": -0.05 for n in range(200)}, 0.01, 0.001)
    gate = Gate(dataclasses.replace(SHIPPED, gear="paired"))
    until(gate, runs, "certify")
    gone = gate.live
    gate.moved(())
    rulings = [step for step in gate.next(1) if isinstance(step, Ruling)]
    assert {ruling.unit[0] for ruling in rulings} == set(gone) and {r.outcome for r in rulings} == {"inconclusive"}


def test_a_unit_that_fails_while_it_is_certified_is_not_merged() -> None:
    runs = runs_of({f"c{n}": -0.05 for n in range(60)}, 0.01, 0.001)
    host = Host(dataclasses.replace(SHIPPED, gear="paired"), lambda ask: Outcome(None, "oom") if ask.stage == "certify"
                and ask.arm and ask.seed % 3 == 0 else runs(ask), 60)
    rulings = host.play()
    assert not any(ruling.outcome == "accepted" for ruling in rulings)
    assert any("certification run failed: oom" in ruling.reason for ruling in rulings)


def test_a_patch_that_fails_in_company_is_blamed_and_the_others_are_weighed() -> None:
    effects = {f"c{n}": -0.012 for n in range(40)}
    runs = unpaired(effects, 0.01)
    host = Host(dataclasses.replace(SHIPPED, gear="weighing"), lambda ask: Outcome(None, "crash")
                if ask.stage == "weigh" and "c3" in ask.arm else runs(ask), 40)
    rulings = host.play()
    guilty = [ruling for ruling in rulings if "every run with it failed" in ruling.reason]
    assert [ruling.unit for ruling in guilty] == [("c3",)]
    assert any(ruling.outcome == "accepted" for ruling in rulings)


@pytest.mark.parametrize("gear", ["paired", "weighing"])
def test_patches_that_clash_never_run_together(gear: str) -> None:
    effects = {f"c{number}": -0.03 for number in range(0, 40, 2)}
    runs = runs_of(effects, 0.01, 0.003) if gear == "paired" else unpaired(effects, 0.01)
    gate, left, drawn, clashes = Gate(dataclasses.replace(SHIPPED, gear=gear)), 250, 0, set()
    together: set[frozenset[str]] = set()
    while steps := gate.next(1, drawn < 40, left):
        for step in steps:
            if isinstance(step, Draw):
                against = [name for name in gate.live if (int(name[1:]) + drawn) % 3 == 0]
                clashes |= {frozenset((name, f"c{drawn}")) for name in against}
                gate.admit(f"c{drawn}", against)
                drawn += 1
            elif isinstance(step, Ask):
                left -= 1
                together |= {frozenset((a, b)) for a in step.arm for b in step.arm if a != b}
                gate.told(step.id, runs(step))
            elif isinstance(step, Ruling) and step.outcome == "accepted":
                gate.moved(gate.live)
    assert together and not together & clashes


def test_a_unit_that_the_host_refuses_leaves_the_tip_and_the_night_goes_on() -> None:
    runs = runs_of({f"c{n}": -0.05 for n in range(200)}, 0.01, 0.001)
    gate, drawn, rulings, left = Gate(dataclasses.replace(SHIPPED, gear="paired")), 0, [], 150
    while steps := gate.next(1, True, left):
        for step in steps:
            if isinstance(step, Draw):
                drawn += 1
                gate.admit(f"c{drawn}")
            elif isinstance(step, Ask):
                left -= 1
                assert step.tip == 0
                gate.told(step.id, runs(step))
            elif isinstance(step, Ruling) and step.outcome == "accepted":
                assert gate.next(4) == []
                gate.refused()
                rulings.append(step)
    assert len(rulings) >= 2 and gate.merges == 0
    assert all(ruling.evidence["merges"] == 0 for ruling in rulings)


def test_a_known_name_and_an_unknown_run_are_refused() -> None:
    gate = Gate(SHIPPED)
    gate.admit("c1")
    with pytest.raises(ValueError, match="admitted before"):
        gate.admit("c1")
    with pytest.raises(KeyError):
        gate.told(7, Outcome(1.0))


# --------------------------------------------------------------------------------------------- designs


@pytest.mark.parametrize("order", design.ORDERS)
def test_hadamard_columns_are_orthogonal(order: int) -> None:
    made = design.hadamard(order)
    assert (made.T @ made == order * np.eye(order)).all()
    assert (made[:, 0] == 1).all()


@given(rows=st.sampled_from(design.ORDERS), seed=st.integers(0, 1000), data=st.data())
@hypothesis_settings(max_examples=40, deadline=None)
def test_designs_are_balanced_and_recover_effects_exactly(rows: int, seed: int, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, rows - 1))
    on = design.design(width, rows, random.Random(seed))
    assert on.shape == (rows, width) and (on.sum(0) == 0).all()
    assert (on.T @ on == rows * np.eye(width)).all()
    truth = np.random.default_rng(seed).normal(size=width)
    found = design.solve(on, list(5.0 - (on > 0) @ truth))
    assert found and np.allclose(found.gains, truth) and np.allclose(found.information, rows / 4)
    assert math.isclose(found.off, 5.0) and math.isclose(found.off_weight, rows / (width + 1))


def test_rows_that_are_lost_cost_information_or_leave_nothing() -> None:
    on = design.design(5, 8, random.Random(1))
    found = design.solve(on[1:], list(5.0 - (on[1:] > 0) @ np.arange(5.0)))
    assert found and np.allclose(found.gains, np.arange(5.0)) and max(found.information) < 2.0
    assert design.solve(on[4:], [5.0] * 4) is None


def test_a_design_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no design of 6 rows"):
        design.hadamard(6)
    with pytest.raises(ValueError, match="do not fit"):
        design.design(8, 8, random.Random(0))
    assert [design.rows_for(n, 16) for n in (3, 4, 8, 11, 12, 15, 20)] == [4, 8, 12, 12, 16, 16, 16]
