"""Preflight: what a tiny run says of a candidate before a full run is spent. Pure: Result -> Preflight.

A served target is run in lock step with the incumbent (sandbox job kind "twin"): a dozen steps of a schedule of that
length, so that every phase of it is crossed, with uninitialised memory filled with NaN. That one job shows crashes,
wrong shapes, parameters nobody set, a patch that changes nothing (identical final weights), and the step's cost
relative to the incumbent's, from which the full run's steps are charged. Does not cover: what only shows late in a
long run, memory that grows, or constants given in absolute steps beyond the tiny run's end.
"""

from __future__ import annotations

from agent.config import Budget
from agent.records import Preflight, Result

FASTEST, SLOWEST = 0.25, 4.0
"""Relative step costs outside this range are taken as a broken measurement or a patch to refuse."""


def charged_steps(budget: Budget, incumbent_steps: int, ratio: float) -> int:
    """Steps granted to a candidate whose step costs ``ratio`` times the incumbent's: equal cost, not equal steps.

    Within the dead band the count is left alone, so that the weather of a timing never moves it.
    """
    if budget.unit != "charged_steps" or abs(ratio - 1) <= budget.dead_band:
        return incumbent_steps
    return max(1, round(incumbent_steps / ratio))


def preflight(candidate: str, result: Result, budget: Budget, incumbent_steps: int) -> Preflight:
    """The verdict of a tiny run."""
    ratio = result.twin.ratio if result.twin else 1.0
    steps = charged_steps(budget, incumbent_steps, ratio)

    def outcome(ok: bool, reason: str) -> Preflight:
        return Preflight(candidate, ok, reason, result.fault, ratio, steps if ok else 0, result.seconds,
                         result.log_tail)

    if result.fault == "nan":
        names = ", ".join(result.nonfinite[:4])
        return outcome(False, f"not finite after {result.steps} steps{f' in {names}' if names else ''}: "
                              "diverged, or a parameter is never initialised")
    if result.fault:
        return outcome(False, f"{result.fault} in the tiny run: {result.message}")
    if result.twin and result.twin.identical:
        return outcome(False, f"changes nothing: weights are identical after {result.twin.steps} steps")
    if not FASTEST <= ratio <= SLOWEST:
        return outcome(False, f"a step costs {ratio:.2f} times the incumbent's")
    return outcome(True, f"a step costs {ratio:.2f} times the incumbent's" if result.twin else "ran")
