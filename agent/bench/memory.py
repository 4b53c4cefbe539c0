"""Bench ``memory``: does a campaign of hundreds of attempts repeat itself, look where it gains, and notice a plateau?

The parts that remember are the real ones: the ledger's state, the briefing with its bandit over directions and its
plateau (read.py), novelty.py and the judge. Simulated are the model and the runs, in a world of known truth
(worlds.py) that says for each direction how many of its proposals are good, and that has a stretch in which none
is. The simulated model follows the direction that it is asked for, and forgets: a known share of its proposals are
earlier ones again, to the letter or in other words, or an earlier one with another number.

* A *duplicate run* is a training run of full length that another attempt has made before: the same behaviour on the
  same tip, seed and steps. On a newer tip an old idea in other words is a new measurement; it is counted apart.
* The plateau is *noticed* when a briefing says so; attempts are counted from the first one of the barren stretch.
* The spread is the rank correlation, over directions, of the share of attempts with the share of good proposals, before
  that stretch and over all campaigns; and the share of the three best. Beside it the same campaigns with directions
  drawn evenly say what the bandit gains.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import multiprocessing
import os
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from agent.bench.finding import Finding
from agent.bench.worlds import Regime, World
from agent.briefing.directions import DIRECTIONS
from agent.config import Config
from agent.evidence import Pooled
from agent.ground import Say, count
from agent.judge import SCREENS, Ask, Standing, estimate, judge, rule_of
from agent.ledger import State
from agent.llm.messages import focus
from agent.novelty import Novelty
from agent.power import order
from agent.read import Lines, brief
from agent.records import (
    Candidate,
    Merge,
    Pair,
    Patch,
    Prediction,
    Preflight,
    Proposal,
    Result,
    Run,
    Stage,
    Verdict,
    to_json,
)
from sandbox.job import Score

GOOD = dict(zip(DIRECTIONS, (0.20, 0.35, 0.25, 0.12, 0.08, 0.04, 0.06, 0.02, 0.02), strict=True))
"""Share of a direction's proposals that are good."""
REGIME = Regime(sd=50.0, good=0.13, median=2.0, paired=0.8, badly=3.0)
"""Steps are charged and runs repeat to the bit, so that behaviour can be compared. Quiet, and gains small against the
world's scale, so that a campaign goes on merging until the barren stretch."""
UNIT = 1e-4
"""Of the worlds, in the metric's."""
SAME, REWORDED, RENUMBERED = 0.10, 0.10, 0.05
"""Shares of the simulated model's proposals that are an earlier one: to the letter, in other words, with another
number."""
NOTICED = 25
"""Attempts within which a plateau must be noticed."""
SPREAD, BEST_SHARE = 0.6, 0.45
"""Least rank correlation, and least share of the three best directions (a third, if drawn evenly)."""
EARLY = 0.25
"""Largest share of the attempts before the barren stretch that may be asked another question."""
STEPS = 200

CONFIG = Config.model_validate({
    "train": {"command": "python train.py --seed {seed} --steps {steps}"}, "evaluate": {"pattern": "loss: (.+)"},
    "metric": {"name": "loss"}, "judge": {"floor": 0.4 * UNIT, "looks": [3, 5, 8]}})
FILES = {"train.py": "import model\n", "model.py": "width = 64\n"}


@dataclass(frozen=True, slots=True)
class Task:
    """One campaign to simulate. The barren stretch: attempts ``barren[0]`` to ``barren[1]`` - 1."""

    seed: int
    attempts: int
    barren: tuple[int, int]
    even: bool = False
    """Directions are drawn evenly, whatever was gained."""


@dataclass(slots=True)
class Record:
    """What came of one campaign."""

    gain: float = 0.0
    """True gain in the worlds' unit."""
    merged: int = 0
    runs: int = 0
    planted: Counter[str] = field(default_factory=Counter)
    """Repeats that the model proposed, by kind."""
    closed: Counter[str] = field(default_factory=Counter)
    """Attempts that were closed as old, by how that was found."""
    duplicate_runs: int = 0
    repeated_runs: int = 0
    """Runs of a change that was trained before to the letter."""
    on_newer_tip: int = 0
    """Old ideas in other words that were trained again on a newer tip."""
    asked: Counter[str] = field(default_factory=Counter)
    """Attempts before the barren stretch, by direction asked for."""
    early: int = 0
    """Of those, how many were asked on a plateau."""
    noticed: int | None = None
    """Attempts from the first barren one to the first briefing that says plateau; None: never."""


@dataclass(slots=True)
class Idea:
    """What the simulated model proposed once."""

    arm: int
    direction: str
    change: str
    line: str
    wordings: int = 1


class Campaign:
    """One simulated campaign over a real ledger state."""

    def __init__(self, task: Task) -> None:
        self.task, self.found = task, Record()
        self.world = World(REGIME, task.seed)
        self.rng = random.Random(f"memory {task.seed}")
        self.state = State(campaign={"seed": task.seed, "steps": STEPS}, tip="tip0")
        self.novelty = Novelty(self.state)
        self.lines: Lines = {}
        self.rule = rule_of(CONFIG.judge, "min", sealed=False)
        self.noise = Pooled(2 * self.rule.floor**2, 2)
        self.ideas: list[Idea] = []
        self.trained: dict[tuple[int, int, int], str] = {}
        self.letters: dict[str, str] = {}
        self.hypotheses = 0

    def play(self) -> Record:
        for number in range(1, self.task.attempts + 1):
            self.attempt(number)
        self.found.gain, self.found.merged = self.world.tips[-1][0], len(self.state.merges)
        self.found.runs = self.state.trained
        return self.found

    def attempt(self, number: int) -> None:
        """Brief, propose, and go as far as the attempt gets."""
        first, last = self.task.barren
        briefing = brief(CONFIG, self.state, FILES, {}, lines=self.lines)
        asked = self.rng.choice(DIRECTIONS) if self.task.even else focus(briefing)
        if number < first:
            self.found.asked[asked] += 1
            self.found.early += briefing.plateau is not None
        elif number < last and self.found.noticed is None and briefing.plateau is not None:
            self.found.noticed = number - first
        idea, kind = self.propose(asked, first <= number < last)
        name = f"{number:03d}-idea"
        self.apply("proposal", Proposal(name, self.state.tip, f"Idea {idea.arm}", "h", "llm",
                                        direction=idea.direction, prediction=Prediction()))
        changes = f"--- a/train.py\n+++ b/train.py\n@@ -1 +1 @@\n-old {idea.line}\n+new {idea.line}\n"
        candidate = Candidate(name, name, self.state.tip, f"head-{name}", f"tree-{name}", Patch(
            changes, ("train.py",), 1, 1, idea.change, idea.change))
        attempt = self.state.attempts[name]
        twin = self.novelty.same_change(candidate, attempt)
        objection = "" if twin else self.novelty.objection(attempt, candidate)
        if twin or objection:
            self.found.closed["change" if twin else "retry"] += 1
            if twin:
                self.apply("candidate", candidate)
            self.close(name, "patch", twin or objection)
            return
        self.apply("candidate", candidate)
        tiny = self.run(name, idea.arm, 1, 12, "preflight")
        twin = self.novelty.same_as(*tiny)
        if twin:
            self.found.closed["behaviour"] += 1
            self.close(name, "preflight", f"behaves exactly as {twin}")
            return
        self.apply("preflight", Preflight(name, True, "ran", steps=STEPS))
        self.found.on_newer_tip += kind == "reworded"
        self.certify(candidate, idea)

    def propose(self, direction: str, barren: bool) -> tuple[Idea, str]:
        """(idea, kind): a new one, or one that the model has forgotten."""
        draw = self.rng.random()
        # what was refused although it is good may be merged when it comes again: not in a stretch without gains
        known = [idea for idea in self.ideas if not barren or self.world.proposals[idea.arm].gain <= 0]
        if known and draw < SAME + REWORDED + RENUMBERED:
            old = self.rng.choice(known)
            kind = "same" if draw < SAME else "reworded" if draw < SAME + REWORDED else "renumbered"
            self.found.planted[kind] += 1
            if kind == "same":
                return old, kind
            if kind == "reworded":
                old.wordings += 1
                words = f"wording {_letters(old.wordings)} of {_letters(old.arm)}"
                return Idea(old.arm, old.direction, f"{old.arm}/{old.wordings}", words), kind
            arm = self.draw(old.direction, barren)
            return Idea(arm, old.direction, str(arm), old.line.rsplit(" ", 1)[0] + f" {arm}"), kind
        arm = self.draw(direction, barren)
        idea = Idea(arm, direction, str(arm), f"line {_letters(arm)} = {arm}")
        self.ideas.append(idea)
        return idea, "new"

    def draw(self, direction: str, barren: bool) -> int:
        """A new proposal of the world, as good as its direction is now."""
        self.world.regime = dataclasses.replace(REGIME, good=0.0 if barren else GOOD[direction])
        return self.world.draw()

    def certify(self, candidate: Candidate, idea: Idea) -> None:
        """The judge's own loop: pairs until it rules."""
        pairs: list[Pair] = []
        standing, fresh = Standing(), 0
        while True:
            ruling = judge(pairs, self.rule, standing, self.noise.sd)
            if not isinstance(ruling, Ask):
                break
            if ruling.fresh and not fresh:
                self.hypotheses += 1
                standing = Standing(self.hypotheses, len(self.state.merges))
            for _ in range(ruling.pairs):
                seed = 1000 * self.hypotheses + fresh if ruling.fresh else 1 + len(pairs) % SCREENS
                fresh += ruling.fresh
                pairs.append(self.pair(candidate.id, idea, seed, ruling.fresh))
        self.noise = self.noise.plus([pair.effect("val") for pair in pairs])
        self.apply("verdict", Verdict(candidate.id, ruling.outcome, "judge", ruling.reason, None,
                                      estimate(pairs, self.rule) or ruling.estimate, tuple(pairs)))
        if ruling.outcome == "accepted":
            self.world.merge([idea.arm])
            tip = f"tip{len(self.world.tips) - 1}"
            self.apply("merge", Merge(candidate.id, self.state.tip, tip, candidate.tree, "Merge"))

    def pair(self, name: str, idea: Idea, seed: int, fresh: bool) -> Pair:
        """One pair; the candidate's run is held against every run before it."""
        place = len(self.world.tips) - 1, idea.arm, seed
        self.found.duplicate_runs += self.trained.setdefault(place, name) != name
        self.found.repeated_runs += self.letters.setdefault(idea.change, name) != name
        _, result = self.run(name, idea.arm, seed, STEPS, "pair")
        start = 1 + UNIT * self.world.run([], seed)
        return Pair(seed, {"val": start}, {"val": result.scores["val"].value}, "tip", result.id, fresh=fresh)

    def run(self, name: str, arm: int, seed: int, steps: int, purpose: str) -> tuple[Run, Result]:
        """A run in the world, through the ledger. What it hands over follows from tip, change, seed and steps alone."""
        tip = len(self.world.tips) - 1
        weights = hashlib.sha256(f"{self.task.seed} {tip} {arm} {seed} {steps}".encode()).hexdigest()
        full = purpose == "pair"
        run = Run(f"{name}-{purpose}-{seed}", "pair" if full else "preflight", f"tree-{name}", seed, steps, "cpu",
                  "jobs", name)
        scores = {"val": Score(1 + UNIT * self.world.run([arm], seed))} if full else {}
        result = Result(run.id, None, scores=scores, weights_sha256=weights)
        self.apply("run_started", run)
        self.apply("run_finished", result)
        return run, result

    def close(self, name: str, stage: Stage, reason: str) -> None:
        self.apply("verdict", Verdict(name, "rejected", stage, reason))

    def apply(self, event: str, record: object) -> None:
        self.state.apply(event, to_json(record), "")


def play(task: Task) -> Record:
    """Simulate one campaign."""
    return Campaign(task).play()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attempts", type=count, default=700, help="attempts of a campaign")
    parser.add_argument("--campaigns", type=count, default=8, help="simulated campaigns, of each kind")
    parser.add_argument("--seed", type=int, default=70_000, help="of the first campaign")
    parser.add_argument("--jobs", type=count, default=os.cpu_count() or 1, help="processes that simulate")


def memory(options: argparse.Namespace, say: Say) -> Finding:
    """Simulate the campaigns, and hold them against the targets."""
    barren = options.attempts * 4 // 7, options.attempts * 4 // 7 + max(NOTICED + 5, options.attempts // 7)
    seeds = range(options.seed, options.seed + options.campaigns)
    tasks = [Task(seed, options.attempts, barren, even) for even in (False, True) for seed in seeds]
    records = []
    for task, record in zip(tasks, _played(tasks, options.jobs), strict=True):
        records.append(record)
        say(f"seed {task.seed}{', directions drawn evenly' if task.even else ''}: {record.merged} merged, "
            f"{record.runs} runs")
    mine, even = records[:options.campaigns], records[options.campaigns:]
    facts = summary(mine, even) | {"attempts": options.attempts, "campaigns": options.campaigns, "barren": list(barren)}
    missed = misses(mine, facts)
    rows = [
        ("duplicate runs", str(facts["duplicate_runs"])),
        ("runs of a change to the letter", str(facts["repeated_runs"])),
        ("rank correlation of asked and good", f"{facts['spread']:.2f}"),
        ("the same in one campaign, mean", f"{facts['spread_of_one']:.2f}"),
        ("asked for the three best, share", f"{facts['best_share']:.3f}"),
        ("plateau noticed after, longest", str(facts["noticed_longest"])),
        ("asked on a plateau before, share", f"{facts['early_share']:.3f}"),
        ("true gain, bandit / even, u", f"{facts['gain']:.1f} / {facts['gain_even']:.1f}")]
    rows += [(f"asked: {name} ({GOOD[name]:.0%} good)", f"{share:.1%}") for name, share in facts["asked"].items()]
    return Finding(f"{options.campaigns} campaigns of {options.attempts} attempts", facts | {"missed": missed},
                   ("what", "found"), rows, [f"missed: {line}" for line in missed] or ["no target was missed"],
                   ok=not missed)


def summary(mine: Sequence[Record], even: Sequence[Record]) -> dict[str, Any]:
    """Sums and means over campaigns."""
    asked = sum((record.asked for record in mine), Counter[str]())
    orders = [order([GOOD[name] for name in DIRECTIONS], [record.asked[name] for name in DIRECTIONS])
              for record in mine]
    noticed = [record.noticed for record in mine]
    return {
        "planted": dict(sum((record.planted for record in mine), Counter[str]())),
        "closed": dict(sum((record.closed for record in mine), Counter[str]())),
        "duplicate_runs": sum(record.duplicate_runs for record in mine),
        "repeated_runs": sum(record.repeated_runs for record in mine),
        "on_newer_tip": sum(record.on_newer_tip for record in mine),
        "asked": {name: asked[name] / max(asked.total(), 1) for name in DIRECTIONS},
        "spread": pooled.rho if (pooled := order([GOOD[name] for name in DIRECTIONS],
                                                 [asked[name] for name in DIRECTIONS])) else 0.0,
        "best_share": sum(asked[name] for name in sorted(GOOD, key=lambda name: -GOOD[name])[:3]) / max(
            asked.total(), 1),
        "spread_of_one": statistics.fmean(one.rho if one else 0.0 for one in orders),
        "noticed": noticed, "noticed_longest": None if None in noticed else max(n for n in noticed if n is not None),
        "early_share": sum(record.early for record in mine) / max(asked.total(), 1),
        "merged": statistics.fmean(record.merged for record in mine),
        "runs": statistics.fmean(record.runs for record in mine),
        "gain": statistics.fmean(record.gain for record in mine),
        "gain_even": statistics.fmean(record.gain for record in even) if even else None,
    }


def misses(mine: Sequence[Record], facts: dict[str, Any]) -> list[str]:
    """Targets that were not met, in words."""
    found = []
    for record in mine:
        if record.duplicate_runs or record.repeated_runs:
            found.append(f"{record.duplicate_runs + record.repeated_runs} runs were made before")
        if record.noticed is None or record.noticed > NOTICED:
            found.append(f"a plateau was noticed after {record.noticed} attempts")
        if not (record.planted["same"] and record.planted["reworded"] and record.merged):
            found.append("a campaign without repeats or merges shows nothing")
    if facts["spread"] < SPREAD:
        found.append(f"attempts follow gain with a rank correlation of {facts['spread']:.2f} only")
    if facts["best_share"] < BEST_SHARE:
        found.append(f"the three best directions had {facts['best_share']:.0%} of the attempts only")
    if facts["early_share"] > EARLY:
        found.append(f"{facts['early_share']:.0%} of the attempts before the barren stretch were asked on a plateau")
    return found


def _played(tasks: Sequence[Task], jobs: int) -> Iterable[Record]:
    """Records in the order of the tasks."""
    if jobs == 1:
        yield from map(play, tasks)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(play, tasks)


def _letters(number: int) -> str:
    """``number`` in letters, which masking numbers leaves alone."""
    return "".join(chr(97 + int(digit)) for digit in str(number))
