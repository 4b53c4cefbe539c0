"""A campaign as a trace for chrome://tracing or ui.perfetto.dev, from its ledger alone. Pure.

Trace Event Format, JSON object form. Process 1 is the devices, a thread a slot: each job with its start-up, training
and evaluation inside. Process 2 is the proposer, a thread a question that was asked at the same time. Process 3 is the
campaign: verdicts, merges and notes as instants. Times are microseconds since the campaign's first event.

Where inside a job its phases lie is told by its own seconds: start-up first, evaluation last. A question's start is
the moment of its answer less the seconds that it took; of one that was repaired, the repairs are in its last span.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from agent.records import Proposal, Result, Run, from_json
from agent.show.phases import moment, split

DEVICES, PROPOSER, CAMPAIGN = 1, 2, 3
Line = tuple[str, dict[str, Any], str]
"""(event, data, time), as the ledger's ``events`` gives them."""
Span = tuple[float, float, str, dict[str, Any]]
"""(start, end, name, arguments), in seconds since the epoch."""
LANES = 1000
"""Threads of one device at most, so that no two devices share a number."""


def trace(lines: Iterable[Line]) -> dict[str, Any]:
    """The whole trace, ready for json.dumps. ``lines``: the ledger's events in order."""
    runs: dict[str, tuple[float, Run]] = {}
    done: list[tuple[float, float, Run, Result | None]] = []
    asked: list[Span] = []
    told: dict[str, float] = {}
    instants: list[tuple[float, str, str, dict[str, Any]]] = []
    first = last = 0.0
    for event, data, time in lines:
        last = moment(time)
        first = first or last
        if event == "run_started":
            run = from_json(Run, data)
            runs[run.id] = last, run
        elif event == "run_finished":
            result = from_json(Result, data)
            if result.id in runs:
                start, run = runs.pop(result.id)
                done.append((start, last, run, result))
        elif event == "proposal":
            proposal = from_json(Proposal, data)
            took = max(0.0, proposal.cost.seconds - told.get(proposal.id, 0.0))
            told[proposal.id] = proposal.cost.seconds
            if took:
                asked.append((max(first, last - took), last, proposal.title or proposal.id,
                              {"id": proposal.id, "author": proposal.author, "usd": proposal.cost.usd}))
        elif event in ("verdict", "merge", "note", "started", "stopped", "finished", "gain"):
            instants.append((last, _said(event, data), event, {key: data[key] for key in ("candidate", "outcome",
                             "stage", "reason") if key in data}))
    done += [(start, last, run, None) for start, run in runs.values()]  # still running, or lost
    events = [_named("process_name", number, 0, name) for number, name in (
        (DEVICES, "devices"), (PROPOSER, "proposer"), (CAMPAIGN, "campaign"))]
    devices = list(dict.fromkeys(run.device for _, _, run, _ in done))
    for number, device in enumerate(sorted(devices)):
        here = sorted((one for one in done if one[2].device == device), key=lambda one: one[:2])
        for lane, (start, end, run, result) in _lanes(here):
            thread = number * LANES + lane
            events += [_named("thread_name", DEVICES, thread, f"{device} / {lane + 1}")] if lane >= 0 else []
            events += _job(start - first, end - first, run, result, thread)
    for lane, (start, end, name, about) in _lanes(sorted(asked, key=lambda one: one[:2])):
        events.append(_complete(name, "propose", start - first, end - first, PROPOSER, lane, about))
    events += [{"name": name, "cat": kind, "ph": "i", "s": "g" if kind == "merge" else "p", "ts": _micro(at - first),
                "pid": CAMPAIGN, "tid": 0, "args": about} for at, name, kind, about in instants]
    unique = {(e["name"], e["pid"], e["tid"]): e for e in events if e["ph"] == "M"}
    return {"displayTimeUnit": "ms", "traceEvents": [*unique.values(), *(e for e in events if e["ph"] != "M")]}


def _job(start: float, end: float, run: Run, result: Result | None, thread: int) -> list[dict[str, Any]]:
    """A job's span and those of its phases, which lie in it one after the other."""
    fault = result.fault if result is not None else "unfinished"
    about = {"run": run.id, "purpose": run.purpose, "seed": run.seed, "steps": run.steps,
             "candidate": run.candidate or "", "fault": fault or ""}
    spans = [_complete(f"{run.purpose} {run.candidate or 'incumbent'} seed {run.seed}", run.purpose, start, end,
                       DEVICES, thread, about)]
    if result is None:
        return spans
    at = start
    for phase, took in split(run, result, end - start).items():
        if took > 0 and phase != "preflight":
            spans.append(_complete(phase, phase, at, min(end, at + took), DEVICES, thread, {}))
            at += took
    return spans


def _lanes(spans: Iterable[Any]) -> Iterable[tuple[int, Any]]:
    """Each span (start, end, ...) with the lowest thread that is free then; ``spans`` in order of their starts."""
    free: list[float] = []
    for span in spans:
        lane = next((number for number in itertools.count() if number == len(free) or free[number] <= span[0]), 0)
        if lane == len(free):
            free.append(0.0)
        free[lane] = span[1]
        yield lane, span


def _complete(name: str, kind: str, start: float, end: float, process: int, thread: int,
              about: dict[str, Any]) -> dict[str, Any]:
    begun = _micro(start)
    return {"name": name, "cat": kind, "ph": "X", "ts": begun, "dur": _micro(end) - begun, "pid": process,
            "tid": thread, "args": about}


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _micro(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


def _said(event: str, data: dict[str, Any]) -> str:
    if event == "verdict":
        return f"{data['outcome']} {data['candidate']}"
    return {"merge": f"merge: {data.get('subject', '')}", "note": str(data.get("text", ""))}.get(event, event)
