"""Where a night's time went, and its trace: exact on a ledger of known times, and of a real campaign."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent import tiny
from agent.ledger import Ledger, State, events, replay
from agent.records import Cost, Pair, Proposal, Result, Run, Verdict
from agent.show import phases, trace
from sandbox.job import Fault
from tests.night import started

ROOT = Path(__file__).resolve().parents[1]


class Known:
    """A ledger whose every time is given, in seconds from 22:00."""

    def __init__(self, folder: Path, *devices: str) -> None:
        self.path, self.now, self.devices = folder / "ledger.jsonl", 0.0, devices
        self.ledger = Ledger(self.path, self._clock)

    def _clock(self) -> datetime.datetime:
        return datetime.datetime(2026, 3, 1, 22, tzinfo=datetime.UTC) + datetime.timedelta(seconds=self.now)

    def at(self, now: float, event: Any, data: Any) -> None:
        self.now = now
        self.ledger.append(event, data)

    def start(self, now: float) -> None:
        self.at(now, "started", started("known", devices=list(self.devices), slots=len(self.devices)))

    def propose(self, now: float, name: str, seconds: float) -> None:
        self.at(now, "proposal", Proposal(name, "a" * 40, name, "why", "llm", cost=Cost(seconds=seconds, calls=1)))

    def run(self, start: float, name: str, device: str, purpose: Any = "pair", candidate: str | None = None) -> None:
        self.at(start, "run_started", Run(name, purpose, "t", 1, 100, device, f"jobs/{name}", candidate))

    def end(self, now: float, name: str, train: float = 0, evaluate: float = 0, fault: Fault | None = None,
            gpu: float | None = None) -> None:
        self.at(now, "run_finished", Result(name, fault, train_seconds=train, evaluate_seconds=evaluate,
                                            seconds=train + evaluate, gpu_busy=gpu))

    @property
    def state(self) -> State:
        return replay(self.path)[0]


def night(folder: Path) -> Known:
    """Two slots of GPUs, 0 to 100 s, then stopped for 1000 s, then 20 s more."""
    known = Known(folder, "cuda:0", "cuda:1")
    known.start(0)
    known.propose(10, "001-a", 8)
    known.run(10, "tiny", "cuda:0", "preflight", "001-a")
    known.end(20, "tiny", train=6)
    known.run(20, "a", "cuda:0", "pair", "001-a")
    known.run(20, "i", "cuda:1")
    known.end(60, "a", train=25, evaluate=5, gpu=0.9)
    known.end(90, "i", train=60, evaluate=5, fault="infra")
    known.at(95, "verdict", Verdict("001-a", "rejected", "judge", "no", pairs=(Pair(1, {}, {}, "i", "a"),)))
    known.at(100, "stopped", {"reason": "interrupted"})
    known.start(1100)
    known.run(1100, "i2", "cuda:1")
    known.end(1120, "i2", train=20, gpu=0.5)
    known.at(1120, "finished", {})
    return known


def test_every_second_is_in_one_phase(tmp_path: Path) -> None:
    found = phases.of(night(tmp_path).state)
    assert found.wall == pytest.approx(120) and found.room == pytest.approx(240)
    want = {"preflight": 10, "start-up": 10, "train": 45, "evaluate": 5, "wait": 170, "propose": 8}
    assert found.seconds == pytest.approx(want)
    assert sum(found.seconds[name] for name in (*phases.JOB, "wait")) == pytest.approx(found.room)


def test_busy_shares_leave_out_what_the_machine_spoilt_and_the_time_between_two_processes(tmp_path: Path) -> None:
    found = {device.name: device for device in phases.of(night(tmp_path).state).devices}
    assert found["cuda:0"].busy == pytest.approx(50 / 120) and found["cuda:0"].void == 0
    assert found["cuda:1"].busy == pytest.approx(20 / 120) and found["cuda:1"].void == pytest.approx(70 / 120)
    assert (found["cuda:0"].gpu, found["cuda:1"].gpu) == (pytest.approx(0.9), pytest.approx(0.5))


def test_experiments_an_hour(tmp_path: Path) -> None:
    found = phases.of(night(tmp_path).state)
    assert found.experiments == 1 and found.per_hour == pytest.approx(30)


def test_jobs_beside_the_slots_make_none_busier_than_it_is(tmp_path: Path) -> None:
    known = Known(tmp_path, "cpu")
    known.start(0)
    known.run(0, "a", "cpu")
    known.run(2, "tiny", "cpu", "preflight")
    known.end(5, "tiny")
    known.end(10, "a", train=10)
    known.at(20, "finished", {})
    found = phases.of(known.state)
    assert found.busy == pytest.approx(0.5) and found.seconds["wait"] == pytest.approx(10)


def test_a_night_that_runs_or_died_counts_up_to_its_last_event(tmp_path: Path) -> None:
    known = Known(tmp_path, "cpu")
    known.start(0)
    assert phases.lines(known.state) == [] and phases.of(known.state).busy == 0
    known.run(0, "a", "cpu")
    known.at(8, "note", {"text": "here it died"})
    known.start(100)
    known.at(104, "note", {"text": "still going"})
    found = phases.of(known.state)
    assert found.wall == pytest.approx(12) and found.busy == pytest.approx(8 / 12)


@pytest.mark.parametrize(("spans", "most", "want"), [
    ([], 1, 0), ([(0, 2), (1, 3)], 1, 3), ([(0, 2), (1, 3)], 2, 4), ([(0, 1), (5, 6)], 1, 2),
    ([(0, 9), (0, 9), (0, 9)], 2, 18)])
def test_covered(spans: list[tuple[float, float]], most: int, want: float) -> None:
    assert phases.covered(spans, most) == want


# --------------------------------------------------------------------------------------------------------- the trace


def check_format(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rules of the Trace Event Format that viewers need. Returns the complete events."""
    assert set(found) == {"traceEvents", "displayTimeUnit"} and found["displayTimeUnit"] == "ms"
    for event in json.loads(json.dumps(found))["traceEvents"]:
        assert isinstance(event["name"], str) and isinstance(event["args"], dict)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert isinstance(event["ts"], int) and event["ts"] >= 0 and isinstance(event["dur"], int)
            assert event["dur"] >= 0
        elif event["ph"] == "i":
            assert event["ts"] >= 0 and event["s"] in ("g", "p", "t")
        else:
            assert event["ph"] == "M" and event["name"] in ("process_name", "thread_name")
    complete = [event for event in found["traceEvents"] if event["ph"] == "X"]
    threads: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in complete:
        threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for spans in threads.values():  # on one thread two spans are nested or apart
        for one, other in itertools.combinations(spans, 2):
            a, b, c, d = one["ts"], one["ts"] + one["dur"], other["ts"], other["ts"] + other["dur"]
            assert b <= c or d <= a or (a <= c and d <= b) or (c <= a and b <= d), (one, other)
    named = {(e["pid"], e["tid"]) for e in found["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
    assert {key for key in threads if key[0] == trace.DEVICES} <= named
    return complete


def test_the_trace_of_a_known_night(tmp_path: Path) -> None:
    spans = check_format(trace.trace(events(night(tmp_path).path)))
    at = {(span["name"], span["ts"]): span["dur"] for span in spans if span["tid"] != trace.LANES}
    assert at["pair 001-a seed 1", 20_000_000] == 40_000_000
    assert at["start-up", 20_000_000] == 10_000_000 and at["train", 30_000_000] == 25_000_000
    assert at["evaluate", 55_000_000] == 5_000_000 and at["001-a", 2_000_000] == 8_000_000
    assert [span["pid"] for span in spans if span["name"] == "001-a"] == [trace.PROPOSER]


def test_questions_at_the_same_time_have_threads_of_their_own(tmp_path: Path) -> None:
    known = Known(tmp_path, "cpu")
    known.start(0)
    known.propose(10, "001-a", 9)
    known.propose(12, "002-b", 9)
    known.propose(30, "003-c", 9)
    known.run(30, "lost", "cpu")
    known.at(40, "note", {"text": "x"})
    spans = check_format(trace.trace(events(known.path)))
    threads = {span["name"]: span["tid"] for span in spans if span["pid"] == trace.PROPOSER}
    assert threads["001-a"] != threads["002-b"] and threads["001-a"] == threads["003-c"]
    lost = next(span for span in spans if span["pid"] == trace.DEVICES)
    assert lost["args"]["fault"] == "unfinished" and lost["dur"] == 10_000_000


def test_a_real_campaign_is_measured_and_traced(tmp_path: Path) -> None:
    tiny.write_foreign_target(tmp_path / "target")
    title, known = next(iter(tiny.KNOWN_FOREIGN.items()))
    place = tmp_path / "target" / known.edit.path
    before = place.read_text(encoding="utf-8")
    place.write_text(before.replace(known.edit.search, known.edit.replace), encoding="utf-8")
    diff = subprocess.run(["git", "diff"], cwd=tmp_path / "target", capture_output=True, text=True, check=True).stdout
    place.write_text(before, encoding="utf-8")
    (tmp_path / "one.patch").write_text(diff, encoding="utf-8")

    def ratchet(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "agent.cli", *words], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ratchet("try", "one.patch", "--repo", "target", "--name", "night", "--unconfined", "--slots", "2")
    told = json.loads(ratchet("status", "--json"))["time"]
    assert 0 < told["busy"] <= 1 and told["experiments"] == 1, title
    inside = sum(told["seconds"][name] for name in (*phases.JOB, "wait"))
    assert inside >= told["slot_seconds"] - 0.5  # more where tiny runs were made beside the slots
    assert "busy " in ratchet("status") and "experiments" in (
        tmp_path / "runs/night/report/report.md").read_text(encoding="utf-8")
    last = list(events(tmp_path / "runs/night/ledger.jsonl"))[-1]
    assert last[0] == "finished" and last[1]["phases"]["experiments"] == 1
    ratchet("trace", "night", "-o", "trace.json")
    spans = check_format(json.loads((tmp_path / "trace.json").read_text(encoding="utf-8")))
    state = replay(tmp_path / "runs/night/ledger.jsonl")[0]
    assert {span["args"].get("run") for span in spans} - {None} == set(state.runs)
