"""The charge of a run, checked from outside once it is over. Pure.

A candidate's steps were granted by what a step cost in its tiny run. Cheap first steps and dear later ones, several
updates a batch or a growing batch would be free if that were all. So the whole run is charged (CPU seconds of its
process tree on a CPU, wall seconds on a GPU) and compared with the incumbent's runs; what it does before its second
batch, and in the evaluation's box, is charged where it goes beyond the start commit's slowest.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from agent.records import Result
from sandbox import gpu

SLACK = {"cpu": (1.2, 0.5), "cuda": (1.5, 10.0)}
"""(factor, seconds) on the incumbent's slowest start-up and evaluation that cost nothing: the spread of imports on a
CPU; on a GPU also compiling another graph than the incumbent's."""


def cost(results: Sequence[Result], start: float, evaluation: float, device: str) -> float:
    """Median charged seconds of a candidate's runs, with what goes beyond the incumbent's slowest ``start`` and
    ``evaluation`` (charged seconds)."""
    factor, seconds = SLACK["cpu" if gpu.index(device) is None else "cuda"]
    return statistics.median(
        r.charge_seconds + max(0.0, r.startup_charge - start * factor - seconds)
        + max(0.0, r.evaluate_charge - evaluation * factor - seconds) for r in results)


def allowed(incumbents: Sequence[Result], dead_band: float) -> float:
    """Charged seconds over which a candidate's run is void: twice the dead band above the incumbent's median."""
    return statistics.median(r.charge_seconds for r in incumbents) * (1 + 2 * dead_band)


def fewer_steps(steps: int, spent: float, limit: float, dead_band: float) -> int:
    """Steps for the repeat of a void run: those that cost what the incumbent's runs cost."""
    return max(1, int(steps * limit / (1 + 2 * dead_band) / spent))
