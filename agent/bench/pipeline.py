"""Bench ``pipeline``: does a device ever wait for a model? Whole campaigns over real HTTP and real jobs whose trainer
only sleeps, with a stub model of known delay.

The share that counts is of the slots' time, from the first candidate's first training run to the last verdict:

    busy = sum of the seconds that training runs held a slot, of those alone that informed a verdict
           / (slots x wall seconds)

A run's seconds begin when its supervisor starts and end with its result, so starting an interpreter counts as busy and
whatever the campaign does between two jobs does not. ``per_candidate_s`` is slots x wall seconds / candidates: of it
the trainer's sleep is of use, the rest is ``overhead_s``. A run that informed no verdict counts as idle.

Every proposal is a new constant that makes the loss a little worse, so a candidate costs a tiny run and one training
run. Does not cover: GPUs, evaluation, merges.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from agent import git, merge, tiny
from agent.bench.finding import Finding, own_environment
from agent.errors import UserError
from agent.ground import Say, count, scratch
from agent.ledger import Ledger, replay
from agent.llm.scripted import Delay, Fixed, ScriptedModel, Status
from agent.llm.scripted import Say as Reply
from agent.patch import BRANCH

BUSY, ALSO_BUSY, STILL_BUSY = 0.97, 0.95, 0.9
PER_CANDIDATE = 0.3
"""Seconds of a candidate beyond its training that are allowed."""


@dataclass(frozen=True, slots=True)
class Case:
    """One campaign."""

    name: str
    reply: float
    """Seconds of the model."""
    train: float
    """Seconds that a trainer sleeps."""
    slots: int
    candidates: int
    least_busy: float
    history: int = 0
    """Finished candidates that the ledger holds already."""
    outage: float = 0.0
    """Seconds for which the model fails once it has answered ``BEFORE`` times; a fallback of the same speed goes on."""


FIRST = Case("replies of 10 s", 10, 10, 1, 12, BUSY)
BEFORE = 4
OTHERS = (Case("replies of 1 s", 1, 10, 1, 12, BUSY),
          Case("replies of 30 s, four in flight", 30, 10, 1, 16, ALSO_BUSY),
          Case("a model that fails for five minutes", 10, 10, 1, 44, STILL_BUSY, outage=300))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="replies of 1 and 30 s too, and an outage of five minutes")
    parser.add_argument("--reply", type=float, help="seconds of a reply; with it one case of your own")
    parser.add_argument("--train", type=float, default=10.0, help="seconds of a training run of your own case")
    parser.add_argument("--slots", type=count, default=1, help="slots of your own case")
    parser.add_argument("--candidates", type=count, default=12, help="candidates of your own case")
    parser.add_argument("--outage", type=float, default=0.0, help="seconds for which the model of your own case fails")
    parser.add_argument("--history", type=int, default=0, help="finished candidates in the ledger of your own case")


def pipeline(options: argparse.Namespace, say: Callable[[str], None]) -> Finding:
    """The cases one after the other, on an otherwise idle machine."""
    own = options.reply is not None and Case(
        f"replies of {options.reply:g} s", options.reply, options.train, options.slots, options.candidates,
        STILL_BUSY if options.outage else 0.0, options.history, options.outage)
    cases = [own] if own else [FIRST, *(OTHERS if options.all else ())]
    found = {}
    for case in cases:
        with scratch(options.runs, "pipeline") as folder:
            found[case.name] = measure(case, folder, options.level, say)
    rows = [(name, f"{case['busy']:.3f}", f"{case['per_candidate_s']:.2f}", f"{case['overhead_s']:.2f}",
             str(case["candidates"]), f"{case['controller_cores']:.3f}", str(case["orphans"])) for name, case in
            found.items()]
    first = found[cases[0].name]
    return Finding(f"{cases[0].slots} slot(s), {os.cpu_count()} cores", {**first, "cases": found},
                   ("case", "busy", "s a candidate", "overhead", "candidates", "cores of the controller", "orphans"),
                   rows, [], ok=all(case["ok"] for case in found.values()))


def measure(case: Case, folder: Path, level: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one campaign in ``folder`` and weigh its time."""
    stub = Stub(case)
    with ScriptedModel([], then=stub.answer) as model, ScriptedModel([], then=stub.go_on) as other:
        parallel = max(4, min(64, math.ceil(case.slots * case.reply / case.train) + 1))
        write_sleeper(folder / "target", case.train, f"""[model]
base_url = "{model.base_url}"
name = "stub"
repairs = 0
parallel = {parallel}
""" + (f"""
[[models]]
name = "fallback"
base_url = "{other.base_url}"
""" if case.outage else ""))
        ledger = folder / "runs" / "sleep" / "ledger.jsonl"
        if case.history:
            _campaign(folder, case, level, say, stop=True)
            lengthen(ledger, case.history)
        used = _campaign(folder, case, level, say)
    orphans = sum(str(folder) in " ".join(process.info["cmdline"] or ()) for process in
                  psutil.process_iter(["cmdline"]))
    found = account(ledger, case) | stub.outage(ledger)
    during = _between(used, found["first"], found["first"] + found["wall_s"])
    return found | {"controller_cores": during / found["wall_s"],
                    "controller_s": during / max(1, found["candidates"]), "controller_rest_s": used[-1][1] - during,
                    "history": case.history, "orphans": orphans,
                    "ok": found["busy"] >= case.least_busy and not orphans and found.get("returned", True) and (
                        found.get("outage_busy", 1.0) >= case.least_busy) and (
                        not case.least_busy or case.outage or case.train < case.reply / 2
                        or found["overhead_s"] <= PER_CANDIDATE)}


class Stub:
    """The model of a case: a new constant with each reply; and, where there is to be an outage, a 503 or silence by
    turns for so long, while a fallback goes on."""

    def __init__(self, case: Case) -> None:
        self.case, self._numbers, self._lock = case, itertools.count(1), threading.Lock()
        self._asked, self._failing = 0, itertools.count()
        self.down: float | None = None
        """When the outage began, in seconds since the epoch."""
        self.returned = False

    def answer(self, _: dict[str, Any]) -> Fixed:
        with self._lock:
            self._asked += 1
            if self.case.outage and self._asked > BEFORE:
                self.down = self.down or time.time()
                left = self.down + self.case.outage - time.time()
                if left > 0:
                    return Status(503, "down") if next(self._failing) % 2 else Delay(left, Status(503, "down"))
                self.returned = True
        return self.go_on(_)

    def go_on(self, body: dict[str, Any]) -> Fixed:
        if "This is attempt" not in str(body["messages"]):  # a question whether it is back
            return Reply({"ok": True})
        with self._lock:
            number = next(self._numbers)
        if number > self.case.candidates:
            return Status(401, {"error": {"message": "that was all"}})
        edit = {"path": "settings.py", "search": "WORSE = 0", "replace": f"WORSE = {number}"}
        return Delay(self.case.reply, Reply({"title": f"Worse by {number}", "hypothesis": "It sleeps as long.",
                                             "direction": "constants", "expected_effect": None,
                                             "different": "another value", "edits": [edit]},
                                            model=str(body["model"])))

    def outage(self, ledger: Path) -> dict[str, Any]:
        """Share of the outage for which runs held the slots, and whether the model was asked again afterwards."""
        if self.down is None:
            return {}
        state, _ = replay(ledger)
        started, _, _ = _times(ledger)
        end = self.down + self.case.outage
        held = sum(max(0.0, min(end, started[r.id] + state.results[r.id].seconds) - max(self.down, started[r.id]))
                   for r in state.runs.values() if r.purpose == "pair" and r.id in state.results)
        by = [a.proposal.source for a in state.attempts.values()]
        return {"outage_s": self.case.outage, "outage_busy": held / (self.case.slots * self.case.outage),
                "returned": self.returned and by.count("stub") > BEFORE, "fallback_candidates": by.count("fallback")}


def account(ledger: Path, case: Case) -> dict[str, Any]:
    """Where the slots' time went since the campaign went on, from the ledger alone."""
    state, _ = replay(ledger)
    started, ended, begun = _times(ledger)
    judged = [a for a in state.attempts.values() if a.verdict and a.verdict.pairs and _moment(a.ended) >= begun]
    told = {name for a in judged if a.verdict for pair in a.verdict.pairs
            for name in (pair.candidate_run, pair.incumbent_run)}
    trained = [r for r in state.runs.values() if r.purpose in ("pair", "baseline") and started[r.id] >= begun]
    first = min(started[r.id] for r in trained if r.purpose == "pair")
    last = max(_moment(a.ended) for a in judged)
    counted = [r for r in trained if started[r.id] >= first - 0.001 and ended.get(r.id, math.inf) <= last + 0.001]
    held = sum(state.results[r.id].seconds for r in counted if r.id in told)
    slept = sum(case.train for r in counted if r.id in told)
    room = case.slots * (last - first)
    return {"busy": held / room, "per_candidate_s": room / len(judged), "overhead_s": (room - slept) / len(judged),
            "candidates": len(judged), "runs": len(counted), "wasted_runs": sum(r.id not in told for r in counted),
            "first": first, "wall_s": last - first, "slots": case.slots, "reply_s": case.reply, "train_s": case.train}


def lengthen(ledger: Path, wanted: int) -> None:
    """Add ``wanted`` copies of the first judged candidate, each with a change, a tiny run and a run of its own."""
    state, _ = replay(ledger)
    attempt = next(a for a in state.attempts.values() if a.verdict and a.candidate and a.preflight and a.verdict.pairs)
    candidate, verdict = attempt.candidate, attempt.verdict
    assert candidate is not None and verdict is not None and attempt.preflight is not None
    with contextlib.closing(Ledger(ledger)) as written:
        for number in range(wanted):
            name = f"old-{number:06d}"
            patch = dataclasses.replace(candidate.patch, normalised_hash=name)
            written.append("proposal", dataclasses.replace(attempt.proposal, id=name, title=name))
            written.append("candidate", dataclasses.replace(
                candidate, id=name, branch=f"{BRANCH}{name}", tree=name, patch=patch))
            written.append("preflight", dataclasses.replace(attempt.preflight, candidate=name))
            for run in attempt.runs:
                written.append("run_started", dataclasses.replace(run, id=f"{name}-{run.id}", tree=name,
                                                                  candidate=name))
                written.append("run_finished", dataclasses.replace(state.results[run.id], id=f"{name}-{run.id}"))
            written.append("verdict", dataclasses.replace(verdict, candidate=name))
    repo, kept = ledger.parent / "repo.git", candidate.head  # each old one has a refused ref, as if it had been run
    git.run(repo, "update-ref", "--stdin", stdin="".join(
        f"create {merge.REFUSED}old-{number:06d} {kept}\n" for number in range(wanted)).encode())


def write_sleeper(folder: Path, seconds: float, model: str) -> None:
    """A target whose run of 100 steps sleeps for ``seconds``. ``model``: its tables [model] and [[models]]."""
    tiny.write_timed_target(folder, "WORSE = 0\n", f"""time.sleep({seconds} * steps / 100)
loss = 1 + 0.001 * settings.WORSE + 0.01 * (seed % 7)
""", f"""[judge]
policy = "single"
floor = 0.0001
final_pairs = 2

{model}""")


def _campaign(folder: Path, case: Case, level: int, say: Say, stop: bool = False) -> list[tuple[float, float]]:
    """A campaign in a process of its own; ``stop``: until its first verdict.

    Returns (seconds since the epoch, CPU seconds that it had used, its jobs not counted) at each of its lines.
    Raises UserError.
    """
    command = [sys.executable, "-m", "agent.cli", "run", str(folder / "target"), "--name", "sleep", "--slots",
               str(case.slots), "--level", str(level), "--unconfined", "--proposer", "llm", "--runs",
               str(folder / "runs")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=own_environment(OPENAI_API_KEY="none"))
    watched, used = psutil.Process(process.pid), [(time.time(), 0.0)]
    lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            say(f"{case.name}: {lines[-1]}")
            with contextlib.suppress(psutil.Error):
                used.append((time.time(), sum(watched.cpu_times()[:2])))
            if stop and "  rejected  " in line:
                process.send_signal(signal.SIGINT)
        if process.wait() not in ((0, 130) if stop else (0,)):
            raise UserError(f"The campaign ended with exit code {process.returncode}.", " ".join(lines[-3:]))
    finally:
        process.kill()
        process.wait()
    return used


def _between(used: list[tuple[float, float]], begin: float, end: float) -> float:
    """CPU seconds used from ``begin`` to ``end``, as far as the readings of ``_campaign`` tell."""
    moments, seconds = zip(*used, strict=True)
    return float(np.interp(end, moments, seconds) - np.interp(begin, moments, seconds))


def _times(ledger: Path) -> tuple[dict[str, float], dict[str, float], float]:
    """(start of each run by its id, end of each, start of the last process), in seconds since the epoch."""
    started: dict[str, float] = {}
    ended: dict[str, float] = {}
    begun = 0.0
    for line in ledger.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "run_started":
            started[event["data"]["id"]] = _moment(event["t"])
        elif event["event"] == "run_finished":
            ended[event["data"]["id"]] = _moment(event["t"])
        elif event["event"] == "started":
            begun = _moment(event["t"])
    return started, ended, begun


def _moment(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()
