"""Slots that rest: a device on which runs were spoilt gets no job for a while, is then asked again, and given up when
that happens too often.

A result whose ``device_fault`` is set says that the device was unfit (sandbox/gpu_watch.py): lost, shared with a
stranger, or slowed down. Its run is void and is made again; the device rests, first for half a minute, then twice as
long each time. When a rest is over, a device of this machine is looked at before it works; what is still wrong there
lengthens the rest. A good run ends the matter. After ``TRIES`` void runs in a row it gets no more jobs.

Does not cover: looking at a device of another machine, which simply gets a job again after its rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from agent.records import Result, Run

FIRST, MOST = 30.0, 600.0
"""Seconds of the first rest and of the longest."""
TRIES = 6
"""Void runs in a row after which a device is given up."""


@dataclass(slots=True)
class Rest:
    """One device that is out of work, or was when it last worked."""

    why: str
    since: float
    until: float
    seconds: float
    """Length of the present rest."""
    void: int = 1
    """Void runs in a row."""
    working: bool = False
    """It was let work again, and no good run has shown yet that it may."""


class Rests:
    """Which devices rest. ``ask``: what is wrong with an idle one now, empty if nothing is."""

    def __init__(self, ask: Callable[[str], str], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask, self._clock = ask, clock
        self._known: dict[str, Rest] = {}
        self.notes: list[str] = []
        """What a person should hear, taken away by whoever tells it: one line when a device begins to rest, one when
        it works again or is given up."""

    def heard(self, run: Run, result: Result) -> None:
        """A run ended on a device."""
        device, now, known = run.device, self._clock(), self._known.get(run.device)
        if not result.device_fault:
            if known is not None and known.working and result.fault != "infra":
                del self._known[device]
                self.notes.append(f"{device} works again after {now - known.since:.0f} s: {run.id} went well")
            return
        if known is None:
            self._known[device] = Rest(result.device_fault, now, now + FIRST, FIRST)
            self.notes.append(f"{device} rests: {result.device_fault}. Its run {run.id} is void and is made again; the "
                              f"device is looked at again in {FIRST:.0f} s, then less and less often")
            return
        if not known.working:  # of several jobs that were on it together
            return
        known.why, known.working, known.void = result.device_fault, False, known.void + 1
        self._lengthen(known, now)
        if known.void == TRIES:
            self.notes.append(f"{device} is given up after {TRIES} void runs in a row: {known.why}")

    def rests(self, device: str) -> bool:
        """Whether the device may get no job now. Asks it when its time is over."""
        known = self._known.get(device)
        if known is None or known.working:
            return False
        if known.void >= TRIES or self._clock() < known.until:
            return True
        why = self._ask(device)
        if why:
            known.why = why
            self._lengthen(known, self._clock())
            return True
        known.working = True
        return False

    def given_up(self, device: str) -> str:
        """Why the device gets no more jobs in this process; empty: it does."""
        known = self._known.get(device)
        return known.why if known is not None and known.void >= TRIES else ""

    @property
    def any(self) -> bool:
        """Whether a device rests and may work again."""
        return any(not known.working and known.void < TRIES for known in self._known.values())

    def _lengthen(self, known: Rest, now: float) -> None:
        known.seconds = min(MOST, 2 * known.seconds)
        known.until = now + known.seconds
