"""What a tiny run says of a candidate."""

from __future__ import annotations

import pytest

from agent.config import Budget
from agent.preflight import charged_steps, preflight
from sandbox.job import Fault, Result, Twin

CHARGED = Budget(unit="charged_steps", amount=200, dead_band=0.1)


def result(fault: Fault | None = None, ratio: float = 1.0, identical: bool = False, **more: object) -> Result:
    return Result("x", fault, twin=None if fault else Twin(ratio, 12, identical), steps=12, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ratio", "steps"), [
    (1.0, 200), (1.09, 200), (0.91, 200), (1.25, 160), (0.5, 400), (2.0, 100), (4.0, 50)])
def test_steps_are_charged_outside_the_dead_band(ratio: float, steps: int) -> None:
    assert charged_steps(CHARGED, 200, ratio) == steps
    assert charged_steps(Budget(unit="steps", amount=200), 200, ratio) == 200


def test_a_step_that_costs_nearly_all_still_gets_one() -> None:
    assert charged_steps(CHARGED, 2, 4.0) == 1


def test_what_ran_passes_with_its_steps() -> None:
    found = preflight("001-a", result(ratio=1.25), CHARGED, 200)
    assert (found.ok, found.steps, found.ratio, found.candidate) == (True, 160, 1.25, "001-a")
    assert "1.25 times" in found.reason


@pytest.mark.parametrize(("told", "reason", "fault"), [
    (result("crash", message="NameError: x"), "crash in the tiny run: NameError: x", "crash"),
    (result("oom", message="out of memory"), "oom in the tiny run: out of memory", "oom"),
    (result("nan", nonfinite=("a", "b")), "not finite after 12 steps in a, b", "nan"),
    (result(identical=True), "changes nothing: weights are identical after 12 steps", None),
    (result(ratio=4.01), "a step costs 4.01 times", None),
    (result(ratio=0.2), "a step costs 0.20 times", None),
])
def test_what_is_refused_says_why(told: Result, reason: str, fault: str | None) -> None:
    found = preflight("001-a", told, CHARGED, 200)
    assert not found.ok and found.steps == 0 and found.fault == fault and found.reason.startswith(reason)


def test_a_target_that_is_not_served_needs_only_to_run() -> None:
    found = preflight("001-a", Result("x", None), Budget(unit="steps", amount=30), 30)
    assert found.ok and found.steps == 30 and found.reason == "ran"
