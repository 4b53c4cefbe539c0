"""Bench ``soak``: a long night of one process with a fault every few seconds, and what the process grows by.

A campaign on the default target's cpu preset, with an optimiser and a scripted model in turns, capped at ``--minutes``.
Every ``--every`` seconds the next fault in turn: the supervisor of a run is killed, a process of a run, a git command;
the model fails for a while, stalls, answers nonsense, drops the connection. Meanwhile the controller's memory and open
files are looked at. Afterwards the ledger is checked (doctor/run_folder.py) and the closing audit is run.

    memory, files   medians of the controller's resident MiB and open file descriptors in the second and the last
                    quarter of the night; flat: no more than ``GROWTH`` and ``FILES`` between the two
    problems        contradictions in the ledger
    audit           exit code of `ratchet audit`

Does not cover: kills of the controller (bench chaos), and nights longer than it is told.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from agent import resources
from agent.bench.blows import add_shim, ask_git, strike_run
from agent.bench.finding import Finding
from agent.doctor import run_folder
from agent.errors import UserError
from agent.ground import Say, count, scratch
from agent.ideas import Card, packaged_ideas
from agent.ledger import replay
from agent.llm.scripted import Delay, Disconnect, Fixed, ScriptedModel, Stall, Status, Truncate
from agent.llm.scripted import Say as Reply

NAME = "soak"
GROWTH = (1.15, 12.0)
"""(factor, MiB): the ledger's state is kept in memory, some kilobytes a run."""
FILES = 4
SAMPLE_SECONDS = 5.0
GRACE = 1800.0
"""Seconds beyond the night in which the final number must be there."""


@dataclass(slots=True)
class Model:
    """The scripted model's mood: what it answers, and until when it fails."""

    cards: tuple[Card, ...]
    asked: int = 0
    mood: str = ""
    until: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sulk(self, mood: str, seconds: float) -> None:
        with self._lock:
            self.mood, self.until = mood, time.monotonic() + seconds

    def answer(self, body: dict[str, Any]) -> Fixed:
        with self._lock:
            number, mood = self.asked, self.mood if time.monotonic() < self.until else ""
            self.asked += 1
        card = self.cards[number % len(self.cards)]
        good = Reply({"title": card.title, "hypothesis": card.mechanism, "direction": card.direction,
                      "expected_effect": None, "edits": [
                          {"path": edit.path, "search": edit.search, "replace": edit.replace} for edit in card.edits]})
        return MOODS[mood](good)


MOODS: dict[str, Callable[[Reply], Fixed]] = {
    "": lambda good: Delay(0.5, good),
    "model overloaded": lambda good: Status(503, {"error": {"message": "overloaded"}}),
    "model stalls": lambda good: Stall(good, 600.0),
    "model answers nonsense": lambda good: Truncate(good),
    "model drops the line": lambda good: Disconnect(good, 40),
}
FAULTS = ("supervisor", "model overloaded", "job", "model stalls", "git", "model answers nonsense",
          "supervisor", "model drops the line", "job")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the night (30)")
    parser.add_argument("--every", type=float, default=15.0, help="seconds between faults (15)")
    parser.add_argument("--slots", type=count, default=2, help="runs side by side (2)")
    parser.add_argument("--seed", type=int, default=0, help="of what is struck")
    parser.add_argument("--repo", type=Path, help="target; the one that comes with ratchet if left out")
    parser.add_argument("--preset", default="cpu", help="its preset")
    parser.add_argument("--keep", type=Path, help="copy the run folder here")


def soak(options: argparse.Namespace, say: Say) -> Finding:
    """The night, its check and its audit. Raises UserError when it does not start."""
    model = Model(tuple(packaged_ideas(resources.prompts() / "ideas")))
    with scratch(options.runs, "soak") as folder, ScriptedModel([], then=model.answer) as server:
        shims = add_shim(folder / "bin")
        environment = dict(os.environ) | {
            "OPENAI_API_KEY": "none", "OPENAI_BASE_URL": server.base_url, "RATCHET_MODEL": "scripted",
            "PATH": f"{shims}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
        command = [sys.executable, "-m", "agent.cli", "run", str(options.repo or resources.default_target()),
                   "--preset", options.preset, "--slots", str(options.slots), "--name", NAME, "--runs",
                   str(folder / "runs"), "--level", str(options.level), "--cap", f"hours={options.minutes / 60:.4f}"]
        with (folder / "said.txt").open("wb") as said:
            controller = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                          env=environment)
        run = folder / "runs" / NAME
        try:
            samples, faults, code = _watch(controller, run, model, shims, options, say)
        finally:
            controller.kill()
            controller.wait()
        tail = (folder / "said.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        if not (run / "ledger.jsonl").exists():
            raise UserError(f"The campaign did not start: {' '.join(tail)}.", "`ratchet doctor` looks why.")
        closing = [sys.executable, "-m", "agent.cli", "audit", NAME, "--runs", str(run.parent),
                   "--slots", str(options.slots), "--level", str(options.level)]
        audit = subprocess.run(closing, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace")
        problems = list(run_folder.tally(run).problems)
        state, _ = replay(run / "ledger.jsonl")
        if options.keep is not None:
            shutil.copytree(run, options.keep, dirs_exist_ok=True, symlinks=True)
    memory, files = _quarters([(at, mib) for at, mib, _ in samples]), _quarters([(at, n) for at, _, n in samples])
    flat = memory[1] <= memory[0] * GROWTH[0] + GROWTH[1] and files[1] <= files[0] + FILES
    facts = {"minutes": options.minutes, "faults": dict(faults), "memory_mib": memory, "files": files, "flat": flat,
             "runs": len(state.results), "attempts": len(state.attempts), "merges": len(state.merges),
             "phase": state.phase, "exit": code, "problems": problems, "audit": audit.returncode,
             "audit_says": audit.stdout.strip().splitlines()[-3:], "samples": len(samples)}
    facts["ok"] = flat and not problems and code == 0 and audit.returncode == 0 and state.phase == "finished"
    rows = [("memory, MiB", f"{memory[0]:.1f}", f"{memory[1]:.1f}"), ("open files", f"{files[0]:g}", f"{files[1]:g}")]
    return Finding(f"a night of {options.minutes:g} min with {sum(faults.values())} faults: {len(state.attempts)} "
                   f"attempts, {len(state.results)} results, {len(state.merges)} merges", facts,
                   ("of the controller", "second quarter", "last quarter"), rows,
                   [*problems, f"the campaign ended with {code} ({state.phase}), the audit with {audit.returncode}"],
                   ok=bool(facts["ok"]))


def _watch(controller: subprocess.Popen[bytes], run: Path, model: Model, shims: Path, options: argparse.Namespace,
           say: Say) -> tuple[list[tuple[float, float, int]], Counter[str], int | None]:
    """((seconds, MiB, files) a sample, faults by kind, exit code); faults end with the night, before the final runs."""
    began, chance = time.monotonic(), random.Random(options.seed)
    samples: list[tuple[float, float, int]] = []
    faults: Counter[str] = Counter()
    struck: set[str] = set()
    seen, turn = psutil.Process(controller.pid), 0
    due, look = began + options.every, began
    while controller.poll() is None:
        now = time.monotonic()
        if now > began + 60 * options.minutes + GRACE:
            return samples, faults, None
        if now >= look:
            look = now + SAMPLE_SECONDS
            try:
                samples.append((now - began, seen.memory_info().rss / 2**20, seen.num_fds()))
            except psutil.Error:
                continue
        if (shims / "killed").exists():
            (shims / "killed").unlink()
            faults["git"] += 1
        if now >= due and now < began + 60 * options.minutes * 0.9:
            kind = FAULTS[turn % len(FAULTS)]
            if kind in MOODS:
                model.sulk(kind, options.every * 0.6)
            elif kind == "git":
                ask_git(shims, chance)  # counted when it happened
            elif not strike_run(kind, run / "jobs", struck, chance):
                time.sleep(0.05)
                continue
            faults[kind] += kind != "git"
            turn, due = turn + 1, due + options.every
            if sum(faults.values()) % 20 == 0:
                say(f"{(now - began) / 60:.1f} min: {sum(faults.values())} faults, {samples[-1][1]:.0f} MiB, "
                    f"{samples[-1][2]} files open")
        time.sleep(0.05)
    return samples, faults, controller.returncode


def _quarters(samples: list[tuple[float, float]]) -> tuple[float, float]:
    """Medians in the second and in the last quarter of the time."""
    end = samples[-1][0] if samples else 0.0
    parts = [[value for at, value in samples if low * end <= at <= high * end]
             for low, high in ((0.25, 0.5), (0.75, 1.0))]
    return statistics.median(parts[0] or [0.0]), statistics.median(parts[1] or [0.0])
