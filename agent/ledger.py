"""The ledger: one JSON line an event, appended and fsynced, replayed into a State. The only memory of decisions.

A line is ``{"n": 7, "t": "2026-03-01T02:03:04+00:00", "event": "verdict", "data": {...}}``. A torn last line (the
machine died while writing: no line end, or zeros where a block never reached the disk) is cut off when the ledger is
opened; any other unreadable line is an error, since skipping it would change history. Intent lines come before an
effect, outcome lines after it.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agent.errors import UserError
from agent.records import (
    Ablation,
    Candidate,
    Certification,
    Closing,
    Cost,
    Gain,
    Merge,
    Order,
    Plan,
    Preflight,
    Promotion,
    Proposal,
    Removal,
    Result,
    Revert,
    Run,
    Verdict,
    from_json,
    to_json,
)

Event = Literal[
    "started", "baseline", "proposal", "candidate", "preflight", "run_started", "run_finished", "certify", "verdict",
    "merge_intent", "merge", "gain", "note", "stopped", "finished", "promotion",
    "order", "waiting", "revert_intent", "revert", "forecast", "lost",
    "audit", "ablation", "removal_intent", "removal", "audited", "gate",
]
Clock = Callable[[], datetime.datetime]


def seconds_between(before: str, after: str) -> float:
    """Seconds between two times of a ledger; never less than 0, whatever the clock did."""
    first, last = datetime.datetime.fromisoformat(before), datetime.datetime.fromisoformat(after)
    return max(0.0, (last - first).total_seconds())


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(slots=True)
class Attempt:
    """Everything known of one proposal."""

    proposal: Proposal
    number: int
    candidate: Candidate | None = None
    preflight: Preflight | None = None
    runs: list[Run] = field(default_factory=list)
    verdict: Verdict | None = None
    merge: Merge | None = None
    started: str = ""
    ended: str = ""


@dataclass(slots=True)
class Session:
    """One process's part of a campaign, from its ``started`` to its ``stopped`` or ``finished``, or to its last event
    if it died."""

    start: str
    end: str
    devices: tuple[str, ...]
    """One a slot."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a campaign had spent by the time of a verdict."""

    experiments: int
    held: float
    """Seconds that jobs held a slot."""
    usd: float
    """Of the model."""
    tokens: int
    worked: float
    """Wall seconds of its processes."""


@dataclass(slots=True)
class State:
    """What the ledger says. A view: rebuilt by replay, never stored."""

    campaign: dict[str, Any] = field(default_factory=dict)
    """Data of the ``started`` event."""
    phase: Literal["new", "running", "stopped", "finished"] = "new"
    tip: str = ""
    attempts: dict[str, Attempt] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    certifications: list[Certification] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)
    pending_merge: Merge | None = None
    gain: Gain | None = None
    promotions: list[Promotion] = field(default_factory=list)
    """Made after the campaign, by `ratchet promote`; one for each preset and budget, the newest."""
    plans: list[Plan] = field(default_factory=list)
    """Closing audits that were begun."""
    ablations: list[Ablation] = field(default_factory=list)
    removals: list[Removal] = field(default_factory=list)
    pending_removal: Removal | None = None
    closings: list[Closing] = field(default_factory=list)
    """Closing audits that came to their end."""
    notes: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    """What the gate was told and asked, in order (bundles.py): done again, they give the same gate."""
    builds: dict[tuple[str, str], Candidate] = field(default_factory=dict)
    """Candidates by attempt and by the tip that they were built on."""
    checks: dict[tuple[str, str], Preflight] = field(default_factory=dict)
    """Their preflights, by the same."""
    orders: list[Order] = field(default_factory=list)
    """What a person told the campaign while it ran, in the order in which it was taken."""
    paused: bool = False
    stopping: bool = False
    """No further job is to be started, and the campaign ends when the running ones have."""
    waiting: dict[str, str] = field(default_factory=dict)
    """Candidates that wait for a person's approval, with the tree that was measured."""
    reverts: list[Revert] = field(default_factory=list)
    pending_revert: Revert | None = None
    reverted: Revert | None = None
    """The last move of the tip, where that was a revert."""
    forecasts: list[dict[str, Any]] = field(default_factory=list)
    """What the campaign was expected to spend (agent/forecast.py), the newest last."""
    broke: list[str] = field(default_factory=list)
    """Runs that the machine failed."""
    held: float = 0.0
    """Seconds that jobs held a slot, those of tiny runs and audits included."""
    light: float = 0.0
    """Those of tiny runs and audits alone."""
    longest_light: float = 0.0
    """Seconds of the longest tiny run or audit."""
    paid: Cost = field(default_factory=Cost)
    """What the model has cost."""
    dearest: Cost = field(default_factory=Cost)
    """Field by field the most that one question to the model has cost."""
    lost: int = 0
    """Questions whose reply nobody took: each counts as the dearest one. After a kill: as many as may be asked at a
    time."""
    worked: float = 0.0
    """Wall seconds of the processes before the present one."""
    session: str = ""
    """When the present process began."""
    baselines: list[str] = field(default_factory=list)
    """Runs of the start, in their order."""
    alike: dict[tuple[str, int], list[Run]] = field(default_factory=dict)
    """Runs by tree and steps: how the bank finds them among ten thousand candidates."""
    audited: dict[str, Result] = field(default_factory=dict)
    """Result of the audit by id of the audited run; machine faults do not count."""
    changes: dict[str, list[str]] = field(default_factory=dict)
    """Ids of the attempts that made a change, by its normalised hash."""
    judged: list[Attempt] = field(default_factory=list)
    """Attempts with a verdict, in the order of their verdicts."""
    marks: list[Mark] = field(default_factory=list)
    """What had been spent when a first candidate began to train, and at each verdict since."""
    upfront: int | None = None
    """Training runs of full length before the first one of a candidate; None until there is one."""
    trained: int = 0
    """Training runs of full length that were started."""
    longest: float = 0.0
    """Seconds of the longest run that gave a score."""
    first_time: str = ""
    last_time: str = ""
    spans: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of each run: when it was started, and when its result was taken; empty: it still runs."""
    sessions: list[Session] = field(default_factory=list)
    _open: dict[str, Run] = field(default_factory=dict)
    """Runs without a result, by id."""

    @property
    def open_runs(self) -> list[Run]:
        """Runs that were started and never finished: lost, or still alive. In the order of their starts."""
        return list(self._open.values())

    @property
    def device_seconds(self) -> float:
        """Seconds that jobs held a device slot."""
        return sum(result.seconds for result in self.results.values())

    @property
    def usd(self) -> float:
        return sum(attempt.proposal.cost.usd for attempt in self.attempts.values())

    @property
    def kept(self) -> list[Merge]:
        """Merges that no person took back."""
        back = {one.candidate for one in self.reverts}
        return [one for one in self.merges if one.candidate not in back]

    @property
    def refused(self) -> list[Attempt]:
        return [a for a in self.attempts.values() if a.verdict and a.verdict.outcome != "accepted"]

    def apply(self, event: str, data: dict[str, Any], time: str) -> None:
        """Advance by one event. Pure: no clock, no disk."""
        self.first_time = self.first_time or time
        if event == "started":
            if self.session:
                self.worked += seconds_between(self.session, self.last_time)
                if self.phase == "running" and self.paid.calls:
                    self.lost += int(self.campaign["config"].get("model", {}).get("parallel", 0))
            self.session, self.stopping = time, False
        if event != "promotion":  # not of the night
            self.last_time = time
        if self.phase == "running" and event != "started":
            self.sessions[-1].end = time
        if event == "started":
            self.campaign, self.phase = data, "running"
            devices = data.get("devices") or [data.get("device", "cpu")] * int(data.get("slots") or 1)
            self.sessions.append(Session(time, time, tuple(devices)))
            self.tip = self.tip or str(data["start"])
        elif event == "proposal":
            proposal = from_json(Proposal, data)
            known = self.attempts.get(proposal.id)
            self._pay(proposal.cost, known.proposal.cost if known else Cost())
            if known:  # repaired
                known.proposal = proposal
            else:
                self.attempts[proposal.id] = Attempt(proposal, len(self.attempts) + 1, started=time)
        elif event == "candidate":
            candidate = from_json(Candidate, data)
            attempt = self.attempts[candidate.id]
            attempt.candidate, attempt.preflight = candidate, None
            self.builds[candidate.id, candidate.base] = candidate
            self.checks.pop((candidate.id, candidate.base), None)
            self.waiting.pop(candidate.id, None)
            made = self.changes.setdefault(candidate.patch.normalised_hash, [])
            if candidate.id not in made:
                made.append(candidate.id)
        elif event == "preflight":
            preflight = from_json(Preflight, data)
            self.attempts[preflight.candidate].preflight = preflight
            built = self.attempts[preflight.candidate].candidate
            if built is not None:
                self.checks[built.id, built.base] = preflight
        elif event == "run_started":
            run = from_json(Run, data)
            if run.id not in self.runs:
                self.alike.setdefault((run.tree, run.steps), []).append(run)
                if run.purpose == "baseline":
                    self.baselines.append(run.id)
                if run.trains and run.candidate and self.upfront is None:
                    self.upfront = self.trained
                    self.marks = [self._mark(time)]  # verdicts before it cost no run
                self.trained += run.trains
            self.runs[run.id] = run
            self.results.pop(run.id, None)
            self._open[run.id] = run
            self.spans[run.id] = time, ""
            if run.candidate in self.attempts:
                runs = self.attempts[run.candidate].runs
                if all(known.id != run.id for known in runs):
                    runs.append(run)
        elif event == "run_finished":
            result = from_json(Result, data)
            self.results[result.id] = result
            self._open.pop(result.id, None)
            self._hold(result)
            self.spans[result.id] = self.spans.get(result.id, (time,))[0], time
            ended = self.runs.get(result.id)
            if ended is not None and ended.purpose == "audit" and result.fault != "infra":
                self.audited[ended.audits] = result
            if result.scores:
                self.longest = max(self.longest, result.seconds)
        elif event == "certify":
            self.certifications.append(from_json(Certification, data))
        elif event == "verdict":
            verdict = from_json(Verdict, data)
            judged = self.attempts[verdict.candidate]
            judged.verdict, judged.ended = verdict, time
            self.waiting.pop(verdict.candidate, None)
            self.judged.append(judged)
            self.marks.append(self._mark(time))
        elif event == "merge_intent":
            self.pending_merge = from_json(Merge, data)
        elif event == "merge":
            merge = from_json(Merge, data)
            self.merges.append(merge)
            self.attempts[merge.candidate].merge = merge
            self.tip, self.pending_merge, self.reverted = merge.new_tip, None, None
        elif event == "gain":
            self.gain = from_json(Gain, data)
        elif event == "promotion":
            promotion = from_json(Promotion, data)
            kept = [known for known in self.promotions if (known.there, known.tip) != (promotion.there, promotion.tip)]
            self.promotions = [*kept, promotion]
        elif event in ("audit", "ablation", "removal_intent", "removal", "audited"):
            self._audit(event, data)
        elif event == "gate":
            self.calls.append(data)
        elif event in ("order", "waiting", "revert_intent", "revert"):
            self._steer(event, data)
        elif event == "forecast":
            self.forecasts.append(data)
        elif event == "lost":
            self.lost += int(data["replies"])
        elif event == "note":
            self.notes.append(str(data["text"]))
        elif event in ("stopped", "finished"):
            self.phase = "stopped" if event == "stopped" else "finished"

    def _steer(self, event: str, data: dict[str, Any]) -> None:
        """Events of what a person told the campaign."""
        if event == "order":
            order = from_json(Order, data)
            self.orders.append(order)
            if order.kind in ("pause", "resume"):
                self.paused = order.kind == "pause"
            elif order.kind in ("stop", "stop-after-current") and not order.refused:
                self.stopping = True
        elif event == "waiting":
            self.waiting[str(data["candidate"])] = str(data["tree"])
        elif event == "revert_intent":
            self.pending_revert = from_json(Revert, data)
        else:
            self.reverted = from_json(Revert, data)
            self.reverts.append(self.reverted)
            self.tip, self.pending_revert = self.reverted.new_tip, None

    def _mark(self, time: str) -> Mark:
        return Mark(self.trained, self.held, self.paid.usd, self.paid.prompt_tokens + self.paid.completion_tokens,
                    self.worked + (seconds_between(self.session, time) if self.session else 0.0))

    def _hold(self, result: Result) -> None:
        """Count what a job held a slot for."""
        run = self.runs.get(result.id)
        self.held += result.seconds
        if run is not None and not run.trains:
            self.light += result.seconds
            self.longest_light = max(self.longest_light, result.seconds)
        if result.fault == "infra" and result.message != "stopped":
            self.broke.append(result.id)

    def _pay(self, cost: Cost, before: Cost) -> None:
        """Count a proposal's cost, of which ``before`` is known."""
        def more(name: str) -> Any:
            return getattr(cost, name) - getattr(before, name)

        names = ("usd", "prompt_tokens", "completion_tokens", "calls", "seconds")
        self.paid = Cost(*(getattr(self.paid, name) + more(name) for name in names))
        self.dearest = Cost(*(max(getattr(self.dearest, name), more(name)) for name in names))

    def _audit(self, event: str, data: dict[str, Any]) -> None:
        """Events of a closing audit. From its plan on, the tip is what the accepted branch really holds."""
        if event == "audit":
            self.plans.append(from_json(Plan, data))
            self.tip = self.plans[-1].tip
        elif event == "ablation":
            self.ablations.append(from_json(Ablation, data))
        elif event == "removal_intent":
            self.pending_removal = from_json(Removal, data)
        elif event == "removal":
            removal = from_json(Removal, data)
            self.removals.append(removal)
            self.tip, self.pending_removal, self.reverted = removal.new_tip, None, None
        else:
            self.closings.append(from_json(Closing, data))


class Ledger:
    """Append-only journal on disk with its replayed State. One writer; any number of readers may replay the file."""

    def __init__(self, path: Path, clock: Clock = utc_now) -> None:
        """Open or create ``path``; cut a torn last line. Raises UserError when a line before it is unreadable."""
        self.path, self._clock = path, clock
        path.parent.mkdir(parents=True, exist_ok=True)
        torn, new = torn_bytes(path), not path.exists()
        self._file = path.open("ab", buffering=0)  # a buffer would write what a full disk refused a second time
        if new:
            sync_folder(path.parent)  # else a power cut may take the whole file, though its lines were synced
        if torn:
            self._file.truncate(path.stat().st_size - torn)
        self.state, self._count = replay(path)

    def append(self, event: Event, data: Any) -> None:
        """Write one event to disk (fsync), then apply it. ``data`` is a record or a JSON object.

        Raises UserError when the disk is full (the ledger then still ends in a whole line) or the file is gone.
        """
        plain = data if isinstance(data, dict) else to_json(data)
        time = self._clock().isoformat(timespec="milliseconds")
        line = json.dumps({"n": self._count, "t": time, "event": event, "data": plain}, allow_nan=True)
        rest = memoryview(line.encode() + b"\n")
        try:
            size = self.path.stat().st_size
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is gone: somebody removed or moved the run's folder.", "Put it back and run "
                            "the same command again, or start a new run with --name.") from error
        try:
            while rest:
                rest = rest[self._file.write(rest):]
            os.fsync(self._file.fileno())
        except OSError as error:
            os.truncate(self.path, size)
            raise UserError(f"Cannot write {self.path}: {error.strerror}.",
                            "Free some disk (`ratchet gc` removes old runs), then run the same command again."
                            ) from error
        self._count += 1
        self.state.apply(event, plain, time)

    def close(self) -> None:
        self._file.close()


def replay(path: Path) -> tuple[State, int]:
    """(state, number of events) of a ledger that another process may be writing."""
    state, count = State(), 0
    for event, data, time in events(path):
        count += 1
        try:
            state.apply(event, data, time)
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, count, f"{type(error).__name__} in a {event} event") from error
    return state, count


def events(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(event, data, time) of each whole line. Raises UserError on a damaged line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            if b"\0" in line and not file.peek(1):
                return
            try:
                entry = json.loads(line)
                yield str(entry["event"]), entry["data"], str(entry["t"])
            except (ValueError, KeyError, TypeError) as error:
                raise _damaged(path, number, str(error)) from error


def _damaged(path: Path, number: int, what: str) -> UserError:
    return UserError(f"{path} line {number} is damaged ({what}).",
                     "Restore the file from a backup, or start a new run with --name.")


def torn_bytes(path: Path) -> int:
    """Bytes of a torn last line, 0 where there is none. JSON holds no zero byte: a line with one never reached the disk
    whole, so nobody has acted on it."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    last = data.rfind(b"\n", 0, max(whole - 1, 0)) + 1
    return len(data) - (last if b"\0" in data[last:whole] else whole)


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` survive a power cut."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
