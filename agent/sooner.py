"""Time to target: how much sooner the tip reaches the loss at which the start ends. Pure.

From the training curves that the runs kept: what the job itself reported of its loss, at most 200 points a run. There
is no curve on held-out text, so this is the training loss, a trailing mean over WINDOW of the run's length. The two
runs of a pair are on one seed and so on the same batches. Shown, never decided on: a patch that changes what it calls
its loss moves this number, and so does one that reshapes the schedule.

Seconds are on the charging clock (CPU seconds on a CPU, wall seconds on a GPU), spread evenly over a run's steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from agent.evidence import sample
from agent.records import Result, Sooner

WINDOW = 0.1


def sooner(pairs: Sequence[tuple[Result, Result]]) -> Sooner | None:
    """Over pairs of (start's, tip's) run on one seed: share of the start's steps and seconds that the tip saves.

    None where no pair has two curves. A tip that never gets there counts as missed and is left out of the means.
    """
    curves = [(a, b) for a, b in pairs if a.curve and b.curve and not a.fault and not b.fault]
    if not curves:
        return None
    found = [one for a, b in curves if (one := _saved(a, b)) is not None]
    steps, seconds = [one[0] for one in found], [one[1] for one in found]
    return Sooner(len(curves), len(found), tuple(steps), tuple(seconds), _mean(steps), _mean(seconds), _sd(steps),
                  _sd(seconds), _mean([float(a.curve[-1][0]) for a, _ in curves]),
                  _mean([a.charge_seconds for a, _ in curves]))


def smoothed(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Trailing mean of the loss over WINDOW of the curve's last step."""
    width = WINDOW * curve[-1][0]
    means = []
    for step, _ in curve:
        near = [loss for at, loss in curve if step - width < at <= step]
        means.append((step, math.fsum(near) / len(near)))
    return means


def reached(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """First step (between points: on a straight line) at which the smoothed curve is at ``target`` or below, from the
    first whole window on."""
    mean = smoothed(curve)
    whole = [(step, loss) for step, loss in mean if step >= WINDOW * curve[-1][0]]
    before: tuple[int, float] | None = None
    for step, loss in whole:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return None


def _saved(start: Result, tip: Result) -> tuple[float, float] | None:
    """(steps, charged seconds) saved by the tip on one seed."""
    target = smoothed(start.curve)[-1][1]
    at = reached(tip.curve, target)
    if at is None:
        return None
    spent = tip.charge_seconds * at / tip.curve[-1][0]
    return start.curve[-1][0] - at, start.charge_seconds - spent


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _sd(values: Sequence[float]) -> float:
    """The observed standard deviation over the seeds; 0 below two."""
    return sample(values, 0.0).sd if len(values) > 1 else 0.0
