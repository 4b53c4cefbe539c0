"""Bench ``habit``: the loop that most tools run, on patches that do nothing, so that all it merges is false.

Greedy, on a wall clock, as the field does it: one fixed seed, each run trains for so many seconds (its schedules follow
the clock, as in autoresearch), and a patch is kept when its run prints less than the lowest number so far. What the
loop claims is the first number less the last one kept. What that is worth is measured again: start against the loop's
tip on fresh seeds, at the number of steps that the runs reached.

The patches are the cards of ``--nulls`` (another formula for the same thing, other random streams, other names) and
edits that add a constant which nothing reads, until there are enough. Several loops, each in an order of its own, run
side by side and share the machine, as a user's jobs do.

Covers: the noise of the clock, of the machine and of the seed. Does not cover: a loop whose patches have effects; the
replay of the bank does (``replay``).
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.bench.finding import Finding, show
from agent.errors import UserError
from agent.ground import Ground, Say, Wanted, count, open_ground
from agent.ideas import Card, CardEdit, cards_of
from agent.power import paired
from sandbox.job import Result

SEED = 42
"""Of every run of a loop: the one that upstream fixes."""
AGAIN = 2_000_000_011
"""First seed of the runs that measure again."""
ENDLESS = 1_000_000
"""Steps that the harness allows a run which the clock ends."""
PARTS = 1000
"""Steps of the schedules, which the clock drives."""

CLOCK = Card(id="clock", title="Train by the clock", mechanism="Progress is the share of the seconds that are over.",
             reference="", edits=(
                 CardEdit(path="train.py", search="import torch\n\nimport harness",
                          replace="import time\n\nimport torch\n\nimport harness"),
                 CardEdit(path="train.py", search="    step = 0\n", replace="    step, begun, served = 0, 0.0, 0\n"),
                 CardEdit(path="train.py", search="        ids, targets = batch\n",
                          replace="        ids, targets = batch\n        begun = begun or time.monotonic()\n"),
                 CardEdit(path="train.py", search="schedule.learning_rate(step, run.steps, s), "
                                                  "schedule.weight_decay(step, run.steps, s)",
                          replace=f"schedule.learning_rate(step, {PARTS}, s), schedule.weight_decay(step, {PARTS}, s)"),
                 CardEdit(path="train.py", search="schedule.momentum(step, run.steps, s)",
                          replace=f"schedule.momentum(step, {PARTS}, s)"),
                 CardEdit(path="train.py", search="        step += 1\n        run.report(step, loss)\n",
                          replace="        served += 1\n        run.report(served, loss)\n"
                                  f"        step = int({PARTS} * (time.monotonic() - begun) / SECONDS)\n"
                                  f"        if step >= {PARTS}:\n            break\n")))
"""Turns the shipped trainer into one that a clock ends. SECONDS is filled in."""


@dataclass(slots=True)
class Loop:
    """One greedy campaign."""

    order: list[Card]
    kept: list[Card] = field(default_factory=list)
    first: float = 0.0
    best: float = 0.0
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nulls", type=Path, required=True, help="folder of cards without an effect")
    parser.add_argument("--count", type=count, default=20, help="patches of a loop")
    parser.add_argument("--loops", type=count, default=3, help="loops, each in an order of its own")
    parser.add_argument("--seconds", type=count, default=25, help="seconds of training of a run")
    parser.add_argument("--again", type=count, default=3, help="fresh seeds that measure again")


def habit(options: argparse.Namespace, say: Say) -> Finding:
    """All loops in lock step, then what they claim, measured again."""
    cards = _patches(options.nulls, options.count)
    loops = [Loop(random.Random(number).sample(cards, len(cards))) for number in range(options.loops)]
    with open_ground(options, "habit", say, options.slots or options.loops) as ground:
        clock = _clock(options.seconds)
        for loop, result in zip(loops, _run(ground, [[] for _ in loops], clock, "start"), strict=True):
            loop.first = loop.best = _value(result)
        for number in range(options.count):
            tried = [[*loop.kept, loop.order[number]] for loop in loops]
            for loop, result in zip(loops, _run(ground, tried, clock, f"patch {number + 1}"), strict=True):
                if result.fault:
                    continue
                loop.values.append(_value(result))
                loop.steps.append(result.steps)
                if loop.values[-1] < loop.best:
                    loop.best = loop.values[-1]
                    loop.kept.append(loop.order[number])
            say(f"kept so far: {', '.join(str(len(loop.kept)) for loop in loops)}")
        again = [_again(ground, loop, options.again) for loop in loops]
        device = ground.runs_on()
    rows = [_row(number, loop, effects) for number, (loop, effects) in enumerate(zip(loops, again, strict=True))]
    return Finding(f"{options.loops} greedy loops over {options.count} patches that do nothing, {options.seconds} s a "
                   f"run on seed {SEED}, {device}",
                   {"device": device, "count": options.count, "seconds": options.seconds, "seed": SEED, "loops": rows},
                   ("loop", "merged", "claimed", "measured again", "+-", "sd of its runs", "steps"),
                   [(str(row["loop"]), str(len(row["merged"])), show(row["claimed"]), show(row["measured"]),
                     show(row["error"]), show(row["sd"]), f"{row['least_steps']} to {row['most_steps']}")
                    for row in rows], ["effects are candidate minus start: less than 0 is better"])


def _patches(folder: Path, wanted: int) -> list[Card]:
    """The cards of ``folder``, then comments. Raises UserError without a card."""
    names = sorted(path.stem for path in folder.glob("*.toml"))
    if not names:
        raise UserError(f"No cards in {folder}.", "Give a folder of *.toml cards.")
    last = "import math\n"
    unused = [Card(id=f"unused-{number}", title=f"Name an unused constant {number}", mechanism="Nothing reads it.",
                   reference="", edits=(CardEdit(path="schedule.py", search=last,
                                                 replace=f"{last}\nUNUSED_{number} = {number}\n"),))
              for number in range(wanted - len(names))]
    return [*cards_of(names, folder), *unused][:wanted]


def _clock(seconds: int) -> Card:
    return CLOCK.model_copy(update={"edits": tuple(
        edit.model_copy(update={"replace": edit.replace.replace("SECONDS", str(seconds))}) for edit in CLOCK.edits)})


def _run(ground: Ground, arms: Sequence[Sequence[Card]], clock: Card, label: str) -> list[Result]:
    wanted = [Wanted(ground.variant([clock, *arm], ground.start), SEED, ENDLESS, f"loop {number}: {label}")
              for number, arm in enumerate(arms)]
    return ground.measure(wanted)


def _again(ground: Ground, loop: Loop, seeds: int) -> list[float]:
    """Effects of what the loop kept, on fresh seeds at the middle number of steps of its runs."""
    if not loop.kept:
        return []
    steps = int(statistics.median(loop.steps))
    tip = ground.variant(loop.kept, ground.start)
    wanted = [Wanted(commit, AGAIN + number, steps, name) for number in range(seeds)
              for name, commit in (("start again", ground.start), ("tip again", tip))]
    values = [_value(result) for result in ground.trained(wanted)]
    return [after - before for before, after in zip(values[::2], values[1::2], strict=True)]


def _value(result: Result) -> float:
    """Raises UserError for a run that has none: the start and no-ops must train."""
    if result.fault:
        raise UserError(f"A run failed ({result.fault}): {result.message}.", "Look at the target.")
    return result.scores["val"].value


def _row(number: int, loop: Loop, effects: Sequence[float]) -> dict[str, Any]:
    found = paired([0.0] * len(effects), effects)
    return {"loop": number, "merged": [card.id for card in loop.kept], "claimed": loop.best - loop.first,
            "measured": found.effect if loop.kept else 0.0, "error": found.error, "pairs": found.n,
            "sd": statistics.stdev(loop.values) if len(loop.values) > 1 else None, "values": loop.values,
            "first": loop.first, "least_steps": min(loop.steps, default=0), "most_steps": max(loop.steps, default=0)}
