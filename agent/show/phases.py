"""Where the time of a campaign went, from its ledger alone. Pure.

Slot time is what there was to use: over the parts of the campaign in which a process ran it, slots times wall seconds.
A job holds its slot from the line that starts it to the line that takes its result. Its own seconds are the sandbox's
(``Result``): start-up, training, evaluation. What is left of the hold is counted as start-up, as it lies before and
after the job: the interpreter, the box, the look that found the result.

``busy`` of a device is the share of its slot time in which jobs ran on it, never more at a time than it has slots (tiny
runs and audits of a CPU target may run beside the slots). Runs that the machine spoilt (fault ``infra``) are idle time:
they informed nothing. ``gpu`` is another witness: the mean utilisation that the driver gave while jobs ran there, which
knows nothing of slots.

Does not cover: jobs after the campaign's end (closing audit, promotion), and what a job of another machine waited for
in that machine's queue, which counts as its start-up.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agent.ledger import State
from agent.records import Result, Run

JOB = ("preflight", "start-up", "train", "evaluate")
"""What a job does with its slot. Of a tiny run everything is preflight."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a device did, as shares of its slot time (0 to 1) and of the time that jobs ran on it."""

    name: str
    slots: int
    busy: float
    void: float
    """Share in which runs were made that the machine spoilt."""
    gpu: float | None
    """Mean utilisation by NVML while its jobs ran, weighted by their seconds; None: never seen."""


@dataclass(frozen=True, slots=True)
class Phases:
    """``seconds`` by phase: those of JOB, ``wait`` (slot time in which nothing useful ran) and ``propose`` (what the
    proposer's answers took, beside all that)."""

    wall: float
    """Seconds in which a process ran the campaign."""
    room: float
    """Slot seconds."""
    seconds: dict[str, float]
    devices: tuple[Device, ...]
    experiments: int
    """Attempts that were trained at full length and have a verdict."""

    @property
    def busy(self) -> float:
        """Over all devices."""
        slots = sum(device.slots for device in self.devices)
        return sum(device.busy * device.slots for device in self.devices) / slots if slots else 0.0

    @property
    def per_hour(self) -> float:
        """Experiments an hour."""
        return self.experiments / self.wall * 3600 if self.wall else 0.0


def moment(time: str) -> float:
    """Seconds since the epoch of a ledger's time stamp."""
    return datetime.datetime.fromisoformat(time).timestamp()


def of(state: State) -> Phases:
    """The phases of a campaign so far: up to its last event."""
    sessions = [(moment(one.start), moment(one.end), one.devices) for one in state.sessions]
    room: dict[str, float] = defaultdict(float)
    slots: dict[str, int] = {}
    for start, end, devices in sessions:
        counted = {name: devices.count(name) for name in devices}
        slots |= counted
        for name, number in counted.items():
            room[name] += number * (end - start)
    seconds = dict.fromkeys((*JOB, "wait", "propose"), 0.0)
    held: dict[str, list[tuple[float, float]]] = defaultdict(list)
    void: dict[str, list[tuple[float, float]]] = defaultdict(list)
    seen: dict[str, list[Result]] = defaultdict(list)
    for name, run in state.runs.items():
        start, end = _span(state, name)
        inside = [(max(start, a), min(end, b)) for a, b, _ in sessions if start < b and end > a]
        result = state.results.get(name)
        if result is not None and result.fault == "infra":
            void[run.device] += inside
            continue
        held[run.device] += inside
        if result is not None and inside:
            seen[run.device].append(result)
            for phase, took in split(run, result, sum(b - a for a, b in inside)).items():
                seconds[phase] += took
    made: list[Device] = []
    for name, number in slots.items():
        useful, all_of_it = covered(held[name], number), covered([*held[name], *void[name]], number)
        seconds["wait"] += max(0.0, room[name] - useful)
        whole = room[name] or 1.0
        made.append(Device(name, number, min(1.0, useful / whole), max(0.0, all_of_it - useful) / whole,
                           _utilisation(seen[name])))
    seconds["propose"] = sum(attempt.proposal.cost.seconds for attempt in state.attempts.values())
    return Phases(sum(end - start for start, end, _ in sessions), sum(room.values()), seconds, tuple(made),
                  sum(any(run.trains for run in attempt.runs) for attempt in state.judged))


def split(run: Run, result: Result, hold: float) -> dict[str, float]:
    """The seconds that a job held its slot, by phase of JOB; they add up to ``hold``."""
    if run.purpose == "preflight":
        return {"preflight": hold}
    train = min(hold, result.train_seconds)
    evaluate = min(hold - train, result.evaluate_seconds)
    return {"start-up": hold - train - evaluate, "train": train, "evaluate": evaluate}


def covered(spans: Iterable[tuple[float, float]], most: int) -> float:
    """Integral over time of the number of ``spans`` that hold it, counting at most ``most`` at a time."""
    edges = sorted(edge for a, b in spans for edge in ((a, 1), (b, -1)))
    total, now, count = 0.0, 0.0, 0
    for at, step in edges:
        total += (at - now) * min(count, most)
        now, count = at, count + step
    return total


def facts(state: State) -> dict[str, Any]:
    """For `ratchet status --json` and the ledger's last line. Shares and seconds, rounded to what they are good for."""
    found = of(state)
    return {
        "busy": round(found.busy, 4), "experiments": found.experiments,
        "experiments_per_hour": round(found.per_hour, 2), "wall_seconds": round(found.wall, 1),
        "slot_seconds": round(found.room, 1),
        "seconds": {name: round(value, 1) for name, value in found.seconds.items()},
        "devices": {device.name: {"slots": device.slots, "busy": round(device.busy, 4), "void": round(device.void, 4),
                                  "gpu": None if device.gpu is None else round(device.gpu, 4)}
                    for device in found.devices}}


def lines(state: State) -> list[str]:
    """For a person: two lines, and one more for each device where there are several. Empty before the first run."""
    found = of(state)
    if not state.runs or not found.room:
        return []
    shares = ", ".join(f"{name} {found.seconds[name] / found.room:.0%}" for name in (*JOB, "wait"))
    slots = len(state.sessions[-1].devices)
    told = [f"busy      {found.busy:.1%} of {slots} slot(s); {found.experiments} experiments, {found.per_hour:.1f} "
            "an hour",
            f"phases    {shares} of slot time; {found.seconds['propose']:.0f} s of proposing beside it"]
    return told + [f"device    {line(device)}" for device in found.devices if len(found.devices) > 1
                   or device.gpu is not None or device.void]


def line(device: Device) -> str:
    """``cuda:0: 96.1% busy, GPU 88% used while it was``."""
    seen = f", GPU {device.gpu:.0%} used while jobs ran" if device.gpu is not None else ""
    spoilt = f", {device.void:.1%} in void runs" if device.void else ""
    return f"{device.name}: {device.busy:.1%} busy{seen}{spoilt}"


def _span(state: State, name: str) -> tuple[float, float]:
    """Start and end of a run; one that still runs, or was lost, ends with the session that it began in."""
    start, end = state.spans[name]
    if end:
        return moment(start), moment(end)
    ends = [one.end for one in state.sessions if one.start <= start <= one.end]
    return moment(start), moment(ends[-1] if ends else start)


def _utilisation(results: list[Result]) -> float | None:
    known = [(result.gpu_busy, result.seconds) for result in results if result.gpu_busy is not None]
    whole = sum(seconds for _, seconds in known)
    return sum(share * seconds for share, seconds in known) / whole if whole else None
