"""``ratchet bench NAME``: every measurement that the documents quote, to be repeated by anyone.

    effects    training.py          what idea cards are worth, alone and together
    noise      training.py          how much runs differ by themselves
    startup    machine.py           what a run spends before its first step
    mfu        machine.py           how much of a GPU's arithmetic the training uses
    box        machine.py           what a box costs
    attacks    ../attacks/suite.py  hostile patches: does each bite undefended, and is each held at this level
    audit      audit.py             whether cheating models are found and honest ones are not
    bank       bank.py              many real runs, kept for replays of the gate
    replay     replay.py            whole campaigns of the judge on those runs
    habit      habit.py             greedy loops on a wall clock, over patches that do nothing
    pipeline   pipeline.py          whether a slot ever waits for a model
    caps       caps.py              whether caps hold in random campaigns, and forecasts come true
    llm-faults llm.py               nights whose model breaks, in one way each
    proposers  proposers.py         random, search, ideas and hybrid at equal runs
    soak       soak.py              a long campaign with a fault every few seconds
    weigh      weigh.py             cards one at a time, and in a weighing design: do effects add?
    chaos      chaos.py             campaigns that are killed anywhere end like one that nobody touched
    policy     policy.py            the gate against what others merge by, in simulated campaigns
    memory     memory.py            duplicates, directions and a plateau over hundreds of attempts, simulated

Each prints a table, or with ``--json`` one object, and leaves nothing behind but prepared data. Progress goes to
standard error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent.attacks import suite
from agent.bench import (
    audit,
    bank,
    caps,
    chaos,
    habit,
    llm,
    machine,
    memory,
    pipeline,
    policy,
    proposers,
    replay,
    soak,
    training,
    weigh,
)
from agent.bench.finding import Finding
from agent.errors import UserError
from agent.ground import Say, count

PIPED_WIDTH = 120
"""Columns of the table where there is no terminal to ask."""


@dataclass(frozen=True, slots=True)
class Bench:
    """A measurement: what it tells, its own options, and how it is made."""

    about: str
    options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace, Say], Finding]
    trains: bool = True
    """Trains a target, and so takes the options that say which and how."""
    seeded: bool = False
    """Runs over several seeds."""
    simulated: bool = False
    """Needs neither a folder nor boxes."""


BENCHES = {
    "effects": Bench("paired effect of idea cards, alone and together, against the target's start (--cards A,B)",
                     training.effects_options, training.effects, seeded=True),
    "noise": Bench("seed sd, same-seed sd and seconds of the target's start",
                   training.noise_options, training.noise, seeded=True),
    "startup": Bench("what a run spends before its first step: box, interpreter, import, first request",
                     machine.startup_options, machine.startup),
    "mfu": Bench("step time, tokens a second and model FLOPs utilisation on one GPU",
                 machine.mfu_options, machine.mfu),
    "audit": Bench("models that cheat the scorer, and honest ones, before the audit", audit.audit_options,
                   audit.audit, seeded=True),
    "bank": Bench("many real runs of the start and of given cards, written to a file (--cards A,B --out FILE)",
                  bank.options, bank.bank, seeded=True),
    "replay": Bench("whole campaigns of the shipped judge on the kept runs (--bank FILE), and greedy loops beside it",
                    replay.options, replay.replay, trains=False),
    "habit": Bench("greedy loops on a wall clock over patches that do nothing (--nulls DIR): what they merge and claim",
                   habit.options, habit.habit),
    "pipeline": Bench("do slots wait for a model: campaigns of sleeping trainers and a stub model over HTTP",
                      pipeline.options, pipeline.pipeline, trains=False),
    "caps": Bench("random campaigns against their caps: what goes beyond, and what a calibrated forecast is worth",
                  caps.options, caps.caps, trains=False),
    "llm-faults": Bench("campaigns whose model breaks, in one way each: do they go on, and say what happened",
                        llm.options, llm.llm_faults, trains=False),
    "proposers": Bench("random, search, ideas and hybrid at equal runs: loss on fresh seeds, planted oversights found",
                       proposers.options, proposers.measure),
    "weigh": Bench("do effects add: cards alone, in a weighing design, and A/A (--cards A,B)",
                   weigh.options, weigh.weigh, seeded=True),
    "box": Bench("milliseconds of an empty box at each isolation level of this machine",
                 machine.box_options, machine.box, trains=False),
    "attacks": Bench("hostile patches against the isolation level: does each bite undefended, and is each held",
                     suite.options, suite.measure, trains=False),
    "chaos": Bench("campaigns killed at every event and at random instants: is the morning that of a quiet night?",
                   chaos.options, chaos.chaos, trains=False),
    "soak": Bench("a long campaign with a fault every few seconds: memory, open files, ledger and audit",
                  soak.options, soak.soak, trains=False),
    "policy": Bench("the gate against what others merge by, in simulated campaigns of known truth",
                    policy.options, policy.policy, trains=False, simulated=True),
    "memory": Bench("does a campaign repeat itself, look where it gains, and notice a plateau; simulated",
                    memory.options, memory.memory, trains=False, simulated=True),
}


class Parser(argparse.ArgumentParser):
    """Wrong options are the user's to mend, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}.", " ".join(self.format_usage().split()))


def run(name: str, as_json: bool, options: list[str]) -> int:
    """Measure ``name`` with the command line's further ``options``, and print what was found. Returns the exit code.

    Raises UserError for an unknown name (listing the known ones) and for options that are wrong.
    """
    bench = BENCHES.get(name)
    if bench is None:
        known = "; ".join(f"{name}: {bench.about}" for name, bench in BENCHES.items())
        raise UserError(f"There is no bench {name!r}.", f"Known ones: {known}.")
    chosen = parser(name, bench).parse_args(options)
    errors = Console(stderr=True, highlight=False)
    finding = bench.measure(chosen, lambda line: errors.print(line, markup=False, soft_wrap=True))
    if as_json:
        print(json.dumps({"bench": name, **finding.facts}, allow_nan=False))
    else:
        show(finding)
    return 0 if finding.ok else 1


def parser(name: str, bench: Bench) -> argparse.ArgumentParser:
    """The options of one bench."""
    made = Parser(prog=f"ratchet bench {name}", description=bench.about, allow_abbrev=False)
    if not bench.simulated:
        made.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs; works in its .bench")
        made.add_argument("--level", type=int, choices=range(4), default=3, help="highest isolation level to use")
    if bench.trains:
        made.add_argument("--repo", type=Path, help="target; the one that comes with ratchet if left out")
        made.add_argument("--preset", default="", help="preset of ratchet.toml")
        made.set_defaults(slots=None, steps=0)
    if bench.seeded:
        made.add_argument("--seeds", type=count, default=8, help="number of seeds")
        made.add_argument("--first-seed", type=int, help="first seed; that of ratchet.toml if left out")
        made.add_argument("--steps", type=count, default=0, help="steps of a run; the preset's if left out")
        made.add_argument("--slots", type=count, help="runs side by side; as many as fit if left out")
    bench.options(made)
    return made


def show(finding: Finding) -> None:
    """A table for a person; piped output is not squeezed to the width of a terminal that is not there."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    console.print(finding.title, markup=False, soft_wrap=True)
    table = Table()
    for number, column in enumerate(finding.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in finding.rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for note in finding.notes:
        console.print(note, markup=False, soft_wrap=True)
