"""Bench ``policy``: the gate of real campaigns against what others merge by, in simulated worlds of known truth.

The policy ``default`` is ``agent.gate.Gate`` itself with its shipped settings; only the runs are simulated
(worlds.py). Campaign c of every policy sees the same proposals. ``--aa`` lets no proposal have an effect, and
tells how many campaigns merge anything. ``--quick`` is for a build: few campaigns, wide tolerances, and exit code 1
where the default misses a target by more than chance explains.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from agent.bench.finding import Finding
from agent.bench.peers import PEERS, Night, Unit
from agent.bench.worlds import REGIMES, World
from agent.gate import Ask, Draw, Gate, Outcome, Ruling, Settings
from agent.ground import Say, count

POLICIES = ("default", *PEERS)
QUICK = 40
"""Campaigns of ``--quick``."""
TOLERANCES = {True: 4.0, False: 2.0}
"""Standard errors by which a target may be missed, quick or not."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the default must reach in a regime, at 700 runs or more, without drift."""

    greedy: float
    """True gain over that of the better greedy."""
    rigor3: float
    seq: float
    false: float
    """Largest share of merged patches that are null or harmful when alone."""
    reported: float
    """Largest reported over true gain; the smallest is 0.97."""
    coverage: float
    """Of the 95 % intervals."""


TARGETS = {
    "easy": Target(0.90, 1.01, 1.08, 0.05, 1.04, 0.93), "h100": Target(0.87, 0.99, 1.06, 0.06, 1.04, 0.93),
    "real": Target(0.98, 1.07, 1.20, 0.11, 1.05, 0.92), "hard": Target(1.00, 0.95, 1.50, 0.25, 1.20, 0.90),
    "charged-h100": Target(1.15, 1.15, 1.15, 0.05, 1.04, 0.92),
    "charged-cpu": Target(1.15, 1.15, 1.15, 0.05, 1.04, 0.92),
}
FALSE_UNITS, ANY_MERGE = 0.02, 0.01
"""Targets: harmful or null units a campaign, and share of A/A campaigns with a merge (the guarantee is alpha, 0.1)."""


@dataclass(frozen=True, slots=True)
class Task:
    """One campaign to simulate."""

    policy: str
    regime: str
    seed: int
    runs: int
    drift: float
    null: bool
    slots: int = 1


@dataclass(frozen=True, slots=True)
class Record:
    """What came of it; gains in u."""

    gain: float
    reported: float
    runs: int
    proposals: int
    units: int
    false_units: int
    patches: int
    false_patches: int
    intervals: int
    covered: int


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--campaigns", type=count, default=300, help="simulated campaigns a policy and regime")
    parser.add_argument("--runs", type=count, default=700, help="training runs of a campaign")
    parser.add_argument("--regime", type=_names(REGIMES), default=tuple(REGIMES), help=f"of {','.join(REGIMES)}")
    parser.add_argument("--policies", type=_names(POLICIES), default=POLICIES, help=f"of {','.join(POLICIES)}")
    parser.add_argument("--drift", type=float, default=0.0, help="sd of the machine's drift, in seed sds")
    parser.add_argument("--aa", action="store_true", help="no proposal has an effect: what is merged all the same")
    parser.add_argument("--seed", type=int, default=900_000, help="of the first campaign")
    parser.add_argument("--slots", type=count, default=1, help="runs side by side, for the default policy")
    parser.add_argument("--jobs", type=count, default=os.cpu_count() or 1, help="processes that simulate")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} campaigns and wide tolerances")


def _names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Type of an option that takes known names, with commas between."""
    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; choose of {','.join(known)}")
        return names
    return read


def policy(options: argparse.Namespace, say: Say) -> Finding:
    """Simulate all policies in all regimes, and hold the default against its targets."""
    campaigns = min(options.campaigns, QUICK) if options.quick else options.campaigns
    cells = [(regime, name) for regime in options.regime for name in options.policies]
    tasks = [Task(name, regime, options.seed + number, options.runs, options.drift, options.aa, options.slots)
             for regime, name in cells for number in range(campaigns)]
    found: dict[tuple[str, str], list[Record]] = {cell: [] for cell in cells}
    for task, record in zip(tasks, _played(tasks, options.jobs), strict=True):
        found[task.regime, task.policy].append(record)
        if len(found[task.regime, task.policy]) == campaigns:
            say(f"{task.regime} {task.policy}: {campaigns} campaigns")
    missed = _aa_missed(found, options) if options.aa else _missed(found, options)
    facts = {"campaigns": campaigns, "budget": options.runs, "drift": options.drift, "seed": options.seed,
             "slots": options.slots, **_tables(found, options), "missed": missed}
    title = f"{campaigns} campaigns of {options.runs} runs from seed {options.seed}, drift {options.drift:g}"
    return Finding(f"{title}, no proposal has an effect" if options.aa else title, facts, COLUMNS,
                   [_row(regime, name, records) for (regime, name), records in found.items()],
                   [f"missed: {line}" for line in missed] or ["no target was missed"], ok=not missed)


def _played(tasks: Sequence[Task], jobs: int) -> Iterable[Record]:
    """Records in the order of the tasks."""
    if jobs == 1:
        yield from map(play, tasks)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        # Ctrl-C, and the end of a time limit, are told to the whole group. Workers that died of it would leave the
        # pool's own thread dead and this process waiting for it, so they are born deaf: here the tasks that wait are
        # given up, and those in work take a second or so.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            records = pool.map(play, tasks)  # starts the workers
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        yield from records


def play(task: Task) -> Record:
    """Simulate one campaign."""
    world = World(REGIMES[task.regime], task.seed, task.drift, task.null)
    if task.policy == "default":
        night = drive(world, task.runs, Settings(seed=task.seed), task.slots)
    else:
        night = PEERS[task.policy](world, task.runs)
    units = night.units
    base = [world.proposals[patch].gain for unit in units for patch in unit.patches]
    inside = [unit.interval[0] <= unit.true <= unit.interval[1] for unit in units if unit.interval]
    told = math.fsum(unit.reported or 0.0 for unit in units) if night.reported is None else night.reported
    return Record(world.tips[-1][0], told, world.runs, night.proposals, len(units),
                  sum(unit.true <= 0 for unit in units), len(base), sum(gain <= 0 for gain in base), len(inside),
                  sum(inside))


def drive(world: World, runs: int, settings: Settings, slots: int = 1) -> Night:
    """A campaign of the real gate, ``slots`` runs at a time, in a simulated world."""
    gate, night = Gate(settings), Night()
    numbers: dict[str, int] = {}
    while steps := gate.next(slots, True, runs - world.runs):
        for step in steps:
            if isinstance(step, Draw):
                number = world.draw()
                night.proposals += 1
                numbers[str(number)] = number
                gate.admit(str(number), [name for name in gate.live if world.clash(numbers[name], number)])
            elif isinstance(step, Ask):
                loss = world.run([numbers[name] for name in step.arm], step.seed, step.tip)
                gate.told(step.id, Outcome(loss))
            elif isinstance(step, Ruling) and step.outcome == "accepted":
                unit = tuple(numbers[name] for name in step.unit)
                effect, low, high = (-float(step.evidence[key]) for key in ("effect", "low", "high"))
                night.units.append(Unit(unit, world.merge(unit), effect, (high, low)))
                gate.moved(gate.live)
    return night


# ------------------------------------------------------------------------------------------------------------ summaries


def _tables(found: dict[tuple[str, str], list[Record]], options: argparse.Namespace) -> dict[str, Any]:
    """``regimes`` and ``aa`` of the facts."""
    if options.aa:
        return {"regimes": {}, "aa": {name: {"p_any": _share(
            record.units > 0 for regime in options.regime for record in found[regime, name])}
            for name in options.policies}}
    return {"regimes": {regime: {name: summary(found[regime, name]) for name in options.policies}
                        for regime in options.regime}, "aa": {}}


def summary(records: Sequence[Record]) -> dict[str, float | None]:
    """Means over campaigns of one policy in one regime; None where there is nothing to divide by."""
    n = len(records)
    gain = math.fsum(record.gain for record in records)
    return {
        "true_gain": gain / n,
        "se": statistics.stdev(record.gain for record in records) / math.sqrt(n) if n > 1 else None,
        "false_patch_share": _over(sum(record.false_patches for record in records),
                                   sum(record.patches for record in records)),
        "false_units": sum(record.false_units for record in records) / n,
        "reported_over_true": _over(math.fsum(record.reported for record in records), gain),
        "ci_coverage": _over(sum(record.covered for record in records), sum(record.intervals for record in records)),
        "runs": sum(record.runs for record in records) / n}


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _share(flags: Iterable[bool]) -> float:
    return statistics.fmean(flags)


COLUMNS = ("regime, policy", "true gain, u", "units", "patches", "false", "false units", "told/true", "CI", "runs",
           "any")
"""Shares of merged patches, false units a campaign, reported over true gain, intervals that cover, campaigns with any
merge."""


def _row(regime: str, name: str, records: Sequence[Record]) -> tuple[str, ...]:
    told = summary(records)

    def show(key: str, form: str = ".2f") -> str:
        value = told[key]
        return "-" if value is None else format(value, form)

    def mean(values: Iterable[float]) -> str:
        return f"{statistics.fmean(values):.1f}"

    return (f"{regime} {name}", f"{show('true_gain', '.1f')} +- {show('se', '.1f')}", mean(r.units for r in records),
            mean(r.patches for r in records), show("false_patch_share", ".0%"), show("false_units", ".3f"),
            show("reported_over_true"), show("ci_coverage", ".1%"), show("runs", ".0f"),
            f"{_share(r.units > 0 for r in records):.3f}")


# -------------------------------------------------------------------------------------------------------------- targets


def _aa_missed(found: dict[tuple[str, str], list[Record]], options: argparse.Namespace) -> list[str]:
    """Regimes in which too many campaigns without an effect merge something."""
    allowed = ANY_MERGE if not options.drift else 0.02 if options.drift <= 1 else 0.05
    lines = []
    for regime in options.regime:
        records = found.get((regime, "default"), [])
        if _exceeds([float(r.units > 0) for r in records], [1.0] * len(records), allowed, options.quick):
            lines.append(f"{regime}: {_share(r.units > 0 for r in records):.3f} of the campaigns merge, at most "
                         f"{allowed} should")
    return lines


def _missed(found: dict[tuple[str, str], list[Record]], options: argparse.Namespace) -> list[str]:
    """Targets that the default misses by more than chance explains. None are set below 700 runs, or under drift."""
    if options.runs < 700 or options.drift:
        return []
    lines = []
    for regime in options.regime:
        ours, target = found.get((regime, "default"), []), TARGETS[regime]
        gains = [r.gain for r in ours]
        checks: list[tuple[str, Sequence[float], Sequence[float], float, bool]] = [
            ("false patches", [r.false_patches for r in ours], [r.patches for r in ours], target.false, True),
            ("false units", [r.false_units for r in ours], [1.0] * len(ours), FALSE_UNITS, True),
            ("reported / true", [r.reported for r in ours], gains, target.reported, True),
            ("reported / true", [r.reported for r in ours], gains, 0.97, False),
            ("covered intervals", [r.covered for r in ours], [r.intervals for r in ours], target.coverage, False)]
        for peer, wanted in (("greedy", target.greedy), ("rigor3", target.rigor3), ("seq", target.seq)):
            theirs = [found[regime, name] for name in (peer, f"{peer}-one-seed") if (regime, name) in found]
            if ours and theirs:
                best = max(theirs, key=lambda records: math.fsum(r.gain for r in records))
                checks.append((f"true gain / {peer}", gains, [r.gain for r in best], wanted, False))
        lines += [f"{regime}: {what} {_show(part, whole)}, {'at most' if most else 'at least'} {bound} wanted"
                  for what, part, whole, bound, most in checks
                  if _exceeds(part if most else [-p for p in part], whole if most else [-w for w in whole], bound,
                              options.quick)]
    return lines


def _exceeds(part: Sequence[float], whole: Sequence[float], bound: float, quick: bool) -> bool:
    """Whether sum(part) / sum(whole) is above the bound by more than the tolerance: by the mean of part - bound * whole
    over campaigns and its standard error, which needs no division."""
    over = [p - bound * w for p, w in zip(part, whole, strict=True)]
    if len(over) < 2:
        return False
    return statistics.fmean(over) > TOLERANCES[quick] * statistics.stdev(over) / math.sqrt(len(over))


def _show(part: Sequence[float], whole: Sequence[float]) -> str:
    ratio = _over(math.fsum(part), math.fsum(whole))
    return "of nothing" if ratio is None else f"{ratio:.3f}"
