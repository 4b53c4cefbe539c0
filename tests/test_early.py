"""Early stop: which runs, where, and a real job that is stopped half-way."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import early as policy
from agent.config import Judge
from agent.records import Patch, Result
from sandbox.early import POINTS, behind
from tests.sandbox_world import GOOD, World

RIVAL = tuple((step, 5.0 - step / 100) for step in range(10, 210, 10))


def moved(by: float, until: int = 200) -> list[tuple[int, float]]:
    return [(step, loss + (by if step <= until else -by)) for step, loss in RIVAL]


def patch(diff: str, *files: str) -> Patch:
    return Patch(diff, files or ("model.py",), 1, 1, "a", "b")


def test_one_point_ahead_keeps_a_run_alive() -> None:
    assert behind(moved(0.01), RIVAL, 100) and behind(RIVAL, RIVAL, 100) and not behind(moved(-0.01), RIVAL, 100)
    mixed = [(step, loss - 1e-6 if step == 80 else loss + 0.5) for step, loss in RIVAL]
    assert not behind(mixed, RIVAL, 80 + 10 * (POINTS - 1)) and behind(mixed, RIVAL, 80 + 10 * POINTS)


def test_what_comes_later_and_what_is_not_shared_does_not_count() -> None:
    assert behind(moved(0.01, until=100), RIVAL, 100) and not behind(moved(0.01, until=60), RIVAL, 100)
    assert not behind(moved(0.01)[:POINTS - 1], RIVAL, 200) and not behind([], RIVAL, 100)
    assert not behind([(step + 1, loss) for step, loss in moved(0.01)], RIVAL, 200)


@given(st.lists(st.sampled_from([-0.5, 0.0, 0.5]), min_size=20, max_size=20), st.integers(0, 200))
def test_behind_is_never_ahead_at_a_point_that_counts(moves: list[float], step: int) -> None:
    own = [(at, loss + move) for (at, loss), move in zip(RIVAL, moves, strict=True)]
    count = step // 10
    last = moves[max(count - POINTS, 0):count]
    assert behind(own, RIVAL, step) == (len(last) == POINTS and min(last) >= 0)


@pytest.mark.parametrize(("diff", "files", "free"), [
    ("--- a/model.py\n+++ b/model.py\n-    y = x\n+    y = 2 * x\n", ("model.py",), False),
    ("-    warmdown=0.75,\n+    warmdown=0.4,\n", ("settings/cpu.py",), True),
    ("-    y = x\n+    y = 2 * x\n", ("schedule.py",), True),
    ("     steps = 3\n-    matrix_lr=0.16,\n+    matrix_lr=0.02,\n", ("settings/cpu.py",), False),
    ("+    rate = min(1.0, step / total_steps)\n", ("train.py",), True),
])
def test_a_patch_that_may_reshape_the_schedule_is_exempt(diff: str, files: tuple[str, ...], free: bool) -> None:
    assert policy.exempt(patch(diff, *files)) == free


def test_a_rival_is_asked_for_only_where_it_can_be_compared() -> None:
    judge, plain = Judge(early_stop=0.4), patch("-    y = x\n+    y = 2 * x\n")
    good = Result("r", None, curve=RIVAL, steps=200)
    assert policy.rival(judge, plain, good, 200) == RIVAL
    assert policy.rival(Judge(), plain, good, 200) == () and policy.rival(judge, plain, None, 200) == ()
    assert policy.rival(judge, plain, good, 150) == ()
    assert policy.rival(judge, plain, Result("r", "nan", curve=RIVAL, steps=200), 200) == ()
    assert policy.rival(judge, patch("-    warmdown=0.75,\n+    warmdown=0.4,\n"), good, 200) == ()


def test_a_job_that_is_behind_is_stopped_at_its_step(tmp_path: Path) -> None:
    world = World(tmp_path)
    free = world.run(world.job(world.source(), steps=20, evaluation=world.sealed()))
    assert free.fault is None and free.steps == 20 and len(free.curve) > 2 * POINTS
    level = world.run(world.job(world.source(), steps=20, evaluation=world.sealed(), rival=free.curve, stop_at=8))
    assert level.fault == "behind" and level.steps == 8 and "after 8 of 20 steps" in level.message and not level.scores
    better = world.source(GOOD.replace("train()", "train(loss=2.4)"))
    ahead = world.run(world.job(better, steps=20, evaluation=world.sealed(), rival=free.curve, stop_at=8))
    assert ahead.fault is None and ahead.steps == 20
