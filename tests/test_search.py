"""Knobs and the search over them. The world below is made up: a smooth loss over the real source's constants, with
paired noise. It shows that the search works as designed, and says nothing about training."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import knobs
from agent.ideas import Card, CardEdit, IdeaBook
from agent.ledger import Attempt, State
from agent.read import Briefing, HistoryLine
from agent.records import Candidate, Patch, Proposal, Verdict
from agent.search import Hybrid, KnobSearch, ThenSearch

ROOT = Path(__file__).resolve().parents[1] / "target_repo"
TARGET = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
          for name in ("model.py", "optim.py", "schedule.py", "train.py", "settings/*.py") for path in ROOT.glob(name)}
CPU = "settings/cpu.py:SETTINGS."
SOURCE = '''# é rate=1
LR = 0.1  # keep
BETAS = (0.9, 0.95)
x: int = -3
opts = {"decay": 1e-3, "on": True}
class C:
    width: int = 8
def f(a, b=0.5, *, c=2):
    return g(a, lr=0.1, é=4)  # lr=0.1
'''


def apply(files: dict[str, str], proposal: Proposal) -> dict[str, str]:
    files = dict(files)
    for edit in proposal.edits:
        assert files[edit.path].count(edit.search) == 1
        files[edit.path] = files[edit.path].replace(edit.search, edit.replace)
    return files


def test_knobs_are_found_by_their_place() -> None:
    found = {knob.name: knob.value for knob in knobs.find({"a.py": SOURCE}).values()}
    assert found == {"LR": 0.1, "BETAS[0]": 0.9, "BETAS[1]": 0.95, "x": -3, "opts.decay": 1e-3, "opts.on": True,
                     "C.width": 8, "f.b": 0.5, "f.c": 2, "f.lr": 0.1, "f.é": 4}


def test_a_change_leaves_all_else_byte_for_byte() -> None:
    changed = knobs.edits({"a.py": SOURCE}, {"a.py:BETAS[0]": 0.8, "a.py:f.lr": 0.3})
    new = apply({"a.py": SOURCE}, Proposal("1-x", "t", "x", "x", "search", changed))["a.py"]
    assert new == SOURCE.replace("(0.9,", "(0.8,").replace("g(a, lr=0.1,", "g(a, lr=0.3,")
    assert knobs.skeleton({"a.py": new}) == knobs.skeleton({"a.py": SOURCE})


def test_moves_fit_the_constant() -> None:
    found = knobs.find({"a.py": SOURCE + "adam_beta2 = 0.95\nzero = 0.0\n"})
    assert found["a.py:adam_beta2"].moved(-1) == 0.8 and found["a.py:adam_beta2"].moved(1) == 0.9875
    assert found["a.py:C.width"].moved(1) == 16 and isinstance(found["a.py:C.width"].moved(-1), int)
    assert found["a.py:zero"].moved(-1) is None and found["a.py:zero"].moved(1) == 0.1
    assert [k.moved(1) for k in found.values() if k.name.endswith("on")] == [False]


def test_a_file_that_does_not_parse_has_no_knobs() -> None:
    assert knobs.find({"a.py": "lr = = 1", "b.txt": "lr = 1"}) == {}


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(sorted(knobs.find(TARGET))), st.floats(-2, 2))
def test_any_knob_of_the_target_can_be_moved_alone(key: str, power: float) -> None:
    value = knobs.find(TARGET)[key].moved(power)
    if value is None or value == knobs.find(TARGET)[key].value:
        return
    after = knobs.find(apply(TARGET, Proposal("1-x", "t", "x", "x", "search", knobs.edits(TARGET, {key: value}))))
    assert {k for k, v in after.items() if v.value != knobs.find(TARGET)[k].value} == {key}


def loss(files: dict[str, str]) -> float:
    v = {key: knob.value for key, knob in knobs.find(files).items()}
    return (0.022 * math.log(v[CPU + "unembedding_lr"] / 0.012) ** 2
            + 0.015 * math.log(v[CPU + "matrix_lr"] / 0.03) ** 2
            + 0.006 * math.log((1 - v[CPU + "adam_betas[0]"]) / 0.2) ** 2
            + 0.006 * math.log((1 - v[CPU + "adam_betas[1]"]) / 0.01) ** 2
            + 0.08 * math.log(v[CPU + "warmdown"] / 0.4) ** 2 + 0.004 * math.log(v[CPU + "fc_init_scale"]) ** 2)


class World:
    """A campaign without training: 1 run screens a candidate, 6 more certify one that looks good."""

    def __init__(self, mode: str, seed: int) -> None:
        self.state, self.commits, self.seed = State(tip="c0"), {"c0": dict(TARGET)}, seed
        self.history: list[HistoryLine] = []
        self.noise, self.runs, self.mode = random.Random(seed), 1, mode
        self.search = KnobSearch(self.state, self.commits.__getitem__, seed, mode)  # type: ignore[arg-type]

    def briefing(self) -> Briefing:
        return Briefing(
            tip=self.state.tip, number=len(self.state.attempts) + 1, files=self.commits[self.state.tip], protected={},
            editable=(), max_patch_lines=100, metric="val_bpb", direction="min", budget="", tier="sealed",
            calibration="", history=tuple(self.history), preset="cpu", attempts_left=None)

    def step(self) -> Proposal | None:
        proposal = self.search.next(self.briefing())
        if proposal is not None:
            self.take(proposal)
        return proposal

    def take(self, proposal: Proposal) -> None:
        number, tip = len(self.state.attempts) + 1, self.state.tip
        head = f"c{number}"
        self.commits[head] = apply(self.commits[tip], proposal)
        true = loss(self.commits[head]) - loss(self.commits[tip])
        effect = true + self.noise.gauss(0, 0.002) if true else 0.0
        self.runs += 1 if effect > -0.004 else 7
        merged = effect < -0.004 and true < -0.003
        patch = Patch("", (), 1, 1, head, head)
        verdict = Verdict(proposal.id, "accepted" if merged else "rejected", "judge", "made up")
        candidate = Candidate(proposal.id, head, tip, head, head, patch)
        self.state.attempts[proposal.id] = Attempt(proposal, number, candidate, verdict=verdict)
        self.history.append(HistoryLine(proposal.id, proposal.title, verdict.outcome, "judge", "", round(effect, 3)))
        if merged:
            self.state.tip = head

    def planted(self) -> int:
        now, start = knobs.find(self.commits[self.state.tip]), knobs.find(TARGET)
        better = {"unembedding_lr": 1, "matrix_lr": -1, "fc_init_scale": -1, "warmdown": -1}
        found = sum(sign * (now[CPU + k].value - start[CPU + k].value) > 0 for k, sign in better.items())
        return found + (now[CPU + "adam_betas[0]"].value < 0.95 or now[CPU + "adam_betas[1]"].value > 0.95)


@functools.cache
def played(mode: str, seed: int, runs: int = 120) -> World:
    world = World(mode, seed)
    while world.runs < runs and world.step():
        pass
    return world


def test_the_search_finds_what_a_made_up_world_hides() -> None:
    world = played("search", 1)
    assert world.planted() >= 3 and loss(world.commits[world.state.tip]) < 0.6 * loss(TARGET)


def test_nothing_is_proposed_twice_and_a_resumed_search_goes_on_alike() -> None:
    world = played("search", 1)
    values = [attempt.proposal.source for attempt in world.state.attempts.values()]
    assert len(values) == len(set(values)) > 20
    again = KnobSearch(world.state, world.commits.__getitem__, 1)
    assert again.next(world.briefing()) == world.search.next(world.briefing())


def test_a_model_s_move_of_a_knob_is_told_to_the_search() -> None:
    world = World("search", 1)
    key = CPU + "matrix_lr"
    world.take(Proposal("001-m", "c0", "m", "m", "llm", knobs.edits(TARGET, {key: 0.08}), source="model"))
    trial = world.search.trials(world.briefing())[0]
    assert trial.changes == ((key, 0.16, 0.08),) and trial.effect is not None and trial.effect < 0
    assert key in world.search.report(world.briefing())


def test_a_first_move_that_was_stopped_early_is_tried_the_other_way() -> None:
    world = World("search", 1)
    first = world.step()
    assert first is not None
    attempt = world.state.attempts[first.id]
    assert attempt.verdict is not None
    attempt.verdict = Verdict(first.id, "rejected", "measure", "stopped early", fault="behind")
    world.history = []
    key, second = first.source.rpartition("=")[0], world.search.next(world.briefing())
    assert second is not None and second.source.startswith(f"{key}=") and second.source != first.source


class Model:
    """A model in the test's own process that records what it was told."""

    name, ended = "llm", ""

    def __init__(self) -> None:
        self.told: list[str] = []

    def next(self, briefing: Briefing) -> Proposal | None:
        self.told.append(briefing.calibration)
        return None

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        return proposal


def test_hybrid_goes_on_with_the_search_when_the_model_ended_and_shows_it_the_optimiser() -> None:
    world, model = World("search", 1), Model()
    hybrid = Hybrid(model, world.search)
    for _ in range(3):
        proposal = hybrid.next(world.briefing())
        assert proposal is not None and proposal.author == "search"
        assert hybrid.repair(world.briefing(), proposal, "crash") is None
        world.take(proposal)
    assert len(model.told) == 2 and "An optimiser tunes" in model.told[-1]


def test_the_search_goes_on_where_the_idea_book_ends() -> None:
    world = World("search", 1)
    card = Card(id="c", title="Slower", mechanism="m", reference="", edits=(
        CardEdit(path="settings/cpu.py", search="matrix_lr=0.16", replace="matrix_lr=0.1"),))
    both = ThenSearch(IdeaBook([card], 1), world.search)
    authors = []
    for _ in range(3):
        proposal = both.next(world.briefing())
        assert proposal is not None
        authors.append(proposal.author)
        world.take(proposal)
    assert authors == ["ideas", "search", "search"] and not both.ended
    world.commits[world.state.tip] = {"a.py": "x = y\n"}
    assert both.next(world.briefing()) is None and "every card" in both.ended and "no numeric" in both.ended


@pytest.mark.parametrize("mode", ["search", "random"])
def test_source_without_constants_ends_it(mode: str) -> None:
    world = World(mode, 1)
    world.commits["c0"] = {"a.py": "x = y\n"}
    assert world.search.next(world.briefing()) is None and "no numeric constants" in world.search.ended
