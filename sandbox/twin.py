"""Two jobs in lock step: what does a step of one cost in steps of the other, on this device, in this weather?

Both are served one batch in turn, so a machine that slows down slows both. Neither runs while the other is served.
Does not cover: work that a step pushes onto the GPU and does not wait for, which the other side then meets. The charge
over a whole training run, timed from outside, has the last word.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sandbox.faults import JobFault
from sandbox.job import Twin
from sandbox.serve_batches import Trainee
from sandbox.wire import WireError

LEFT_OUT = 2
"""First steps that do not count: lazy initialisation."""


@dataclass(slots=True)
class Walker:
    """One of the two. A step is charged

    - on the CPU clock from its batch to the side's next one, so that work done after an early request counts too;
    - on the wall clock (a GPU) from its batch to the next request, since the other side's turn comes in between.
    """

    side: Trainee
    clock: Callable[[], float]
    cpu: bool
    finish: Callable[[], None]
    """Ends the job once its weights are here."""
    lost: Callable[[WireError], JobFault]
    charges: list[float] = field(default_factory=list)
    weights: bytearray | None = None
    charge_seconds: float = 0.0
    train_seconds: float = 0.0
    _rows: int = 0
    _mark: float | None = None
    began: float = 0.0
    """When the first request was in (monotonic)."""
    _walking: tuple[float, float] | None = None
    """Wall and charging clock at the first step."""

    def begin(self) -> None:
        """Settings out, first request in. Raises JobFault."""
        self._exchange(self.side.begin)
        self.began = time.monotonic()

    def step(self) -> None:
        """Serve what was asked for and wait for the next request or the weights. Raises JobFault."""
        now = self.clock()
        if self._walking is None:
            self._walking = (time.monotonic(), now)
        if self.cpu and self._mark is not None:
            self.charges.append(now - self._mark)
        more = self.side.served < self.side.job.steps
        self._mark = now if more else None
        self._exchange(lambda: self.side.answer(self._rows))
        if not self.cpu and more:
            self.charges.append(self.clock() - now)

    def _exchange(self, speak: Callable[[], object]) -> None:
        try:
            speak()
            event = self.side.listen()
        except WireError as error:
            raise self.lost(error) from error
        if isinstance(event, int):
            self._rows = event
            return
        if self.side.served == 0:
            raise JobFault("no_metric", "weights were handed over without a single batch")
        self.weights = event
        if self._walking is not None:
            self.train_seconds = time.monotonic() - self._walking[0]
            self.charge_seconds = self.clock() - self._walking[1]
        self.finish()


def lock_step(ours: Walker, theirs: Walker) -> Twin:
    """Walk both to their weights and compare. A fault of ``theirs`` alone is ``infra``: ours is the one on trial."""
    for walker, move in ((ours, Walker.begin), (theirs, Walker.begin)):
        _move(walker, move, walker is theirs)
    while ours.weights is None or theirs.weights is None:
        for walker in (ours, theirs):
            if walker.weights is None:
                _move(walker, Walker.step, walker is theirs)
    return Twin(ratio(ours.charges, theirs.charges), ours.side.served, ours.weights == theirs.weights)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over steps of (our charge / theirs). Raises JobFault when no step was timed.

    Neighbours in time are divided by each other: on two busy cores, 14 steps of equal trees gave an sd of 0.03 over
    six tries, against 0.06 for the ratio of the medians, and 0.11 when the two were not kept on one core.
    """
    pairs = [(one, other) for one, other in zip(ours, theirs, strict=False) if other > 0]
    if not pairs:
        raise JobFault("infra", "the twin job served no step that could be timed")
    return statistics.median(one / other for one, other in pairs[LEFT_OUT:] or pairs)


def _move(walker: Walker, move: Callable[[Walker], None], other: bool) -> None:
    try:
        move(walker)
    except JobFault as fault:
        if other and fault.fault != "infra":
            raise JobFault("infra", f"the twin failed ({fault.fault}): {fault.message}") from fault
        raise
