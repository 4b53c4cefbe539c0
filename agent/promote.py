"""``ratchet promote``: trains the tip of a campaign and its start again, at the campaign's budget and at a larger one.

Start and tip, and with ``each`` the tip without each of its merges, run on the same seeds at both ends, which nothing
used before, scored on the final split. What came of it is said by ``promotion.py`` and kept in the run's ledger. The
training is that of ``ground.py``, in the run's own folder: a job that was finished is found again by its whole
job file, so the command may be killed and repeated, with more pairs or another preset too.

Does not cover: audits, charging at the other size (the tip gets the same share of the start's steps), and targets that
cannot be told a budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import git, promotion, report, runs, site
from agent.bank import Bank
from agent.config import Config
from agent.errors import UserError
from agent.ground import STEPPED, Ground
from agent.judge import Rule
from agent.ledger import Ledger, State
from agent.measure import job_of
from agent.patch import rebuilt
from agent.records import Pair, Promotion, Run
from agent.site import Site
from sandbox.engine import LocalEngine
from sandbox.fingerprint import fingerprint
from sandbox.job import Job, Result, read_job, read_result

FIRST_SEED = 1_200_000_007
"""Seeds of promotions start here: no campaign comes near, nor its final seeds (1,000,000,007 and on)."""
LEAST_PAIRS = 2

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for. ``preset`` empty: the campaign's; ``steps`` 0: the preset's own budget, in its unit."""

    runs: Path
    name: str = ""
    preset: str = ""
    steps: int = 0
    pairs: int = 4
    each: bool = False
    slots: int | None = None
    level: int = 3


@dataclass(frozen=True, slots=True)
class End:
    """One of the two budgets: its ground, the steps of the start and of the tip there, and what it is called."""

    ground: Ground
    start_steps: int
    tip_steps: int
    text: str

    @property
    def config(self) -> Config:
        return self.ground.site.config

    @property
    def rule(self) -> Rule:
        """What ``promotion`` needs to know of this end: the split, the floor and the direction."""
        split = "final" if self.config.evaluate.tier == "sealed" else "val"
        judge = self.config.judge
        return Rule(judge.alpha, tuple(judge.looks), judge.floor, 0.0, self.config.metric.direction, split, None)


def promote(options: Options, say: Say) -> Promotion:
    """Train, judge, and write the ledger's ``promotion``. Raises UserError for what the owner must mend."""
    folder = runs.resolve(options.runs, options.name).resolve()
    with runs.lock(folder):
        ledger = Ledger(folder / runs.LEDGER)
        try:
            found = _promoted(options, folder, ledger.state, say)
            ledger.append("promotion", found)
            report.write(ledger.state, folder)
        finally:
            ledger.close()
    return found


def _promoted(options: Options, folder: Path, state: State, say: Say) -> Promotion:
    _check(options, folder, state)
    here, there = (_end(options, folder, state, large, say) for large in (False, True))
    if (here.config.preset, here.config.budget) == (there.config.preset, there.config.budget):
        raise UserError(f"That is the campaign's own budget ({here.text}).",
                        "Name another --preset of ratchet.toml, or a longer --steps.")
    arms, titles, stuck = _arms(here.ground.site, state, options.each)
    seeds = range(FIRST_SEED, FIRST_SEED + options.pairs)
    try:
        small, large = (_train(end, arms, seeds, say) for end in (here, there))
    finally:
        for end in (here, there):
            end.ground.engine.close()
    rules = here.rule, there.rule
    parts = [promotion.transfer("", "start to tip", _pairs(small, "start", "tip", seeds, rules[0].split),
                                _pairs(large, "start", "tip", seeds, rules[1].split), rules)]
    for of, title in titles.items():
        if of in stuck:
            parts.append(promotion.transfer(of, title, (), (), rules))
            parts[-1] = dataclasses.replace(parts[-1], reason="other merges changed lines next to it, so it cannot be "
                                                              "left out alone")
        else:
            parts.append(promotion.transfer(of, title, _pairs(small, of, "tip", seeds, rules[0].split),
                                            _pairs(large, of, "tip", seeds, rules[1].split), rules))
    return Promotion(here.text, there.text, there.config.preset, there.config.budget.amount, state.tip,
                     there.config.metric.name, there.config.metric.direction, rules[1].split, FIRST_SEED,
                     large["tip", seeds[0]].fingerprint.get("device", ""), tuple(parts))


def _check(options: Options, folder: Path, state: State) -> None:
    """Raises UserError where there is nothing to promote, or nothing was asked for."""
    if not state.kept:
        raise UserError(f"Run {folder.name} has merged nothing, so there is nothing to promote.",
                        "`ratchet log` says what was tried and why it was refused.")
    if not (options.preset or options.steps):
        raise UserError("Nothing says where to try the tip again.",
                        "Give --preset, one of ratchet.toml that is larger, or --steps N for a longer budget.")
    if options.pairs < LEAST_PAIRS:
        raise UserError(f"{options.pairs} pair has no interval.", f"Give --pairs {LEAST_PAIRS} or more; 4 is usual.")


def _end(options: Options, folder: Path, state: State, large: bool, say: Say) -> End:
    """The campaign's own budget, or the larger one. Raises UserError for a preset or budget that does not fit."""
    facts: dict[str, Any] = state.campaign
    start, prefix = str(facts["start"]), str(facts["prefix"])
    own = str(facts["preset"])
    config = site.read_config(folder / "repo.git", start, prefix, (options.preset if large else "") or own,
                              len(site.gpus()))
    budget = config.budget
    if large and options.steps:
        if not budget.amount:
            raise UserError("The target's command decides its own budget, so --steps says nothing.",
                            "Name a --preset, or give budget.amount and its placeholder in ratchet.toml.")
        if config.preset == own and options.steps <= budget.amount:
            raise UserError(f"--steps {options.steps} is not more than the {budget.amount:g} of the campaign.",
                            "Give a larger one.")
        budget = budget.model_copy(update={"amount": float(options.steps)})
        config = config.model_copy(update={"budget": budget})
    place = Site(folder, prefix, start, config, None, site.find_devices(config, options.slots), options.level, 0,
                 int(bool(facts.get("unread", True)) and not facts.get("unconfined")))
    data = site.prepare(config, place.source(start), folder.parent / ".data", say)
    steps = int(budget.amount) if budget.unit in STEPPED else 0
    granted = Bank(place, state).tip_steps / int(facts["steps"]) if steps and facts["steps"] else 1.0
    amount = f"{budget.amount:g} {budget.unit.replace('_', ' ')}" if budget.amount else "its own budget"
    # what an earlier promote of this run left running is ended by ``_known``
    taken = {path.name for path in (folder / "jobs").glob("*")}
    return End(Ground(dataclasses.replace(place, data=data), say, known=taken), steps, round(steps * granted),
               ", ".join(part for part in (config.preset, amount) if part))


def _arms(place: Site, state: State, each: bool) -> tuple[dict[str, str], dict[str, str], set[str]]:
    """(arm to tree, candidate to title, candidates that cannot be left out). The arm of a candidate is the tip without
    its merge."""
    arms = {"start": str(state.campaign["start"]), "tip": state.tip}
    titles: dict[str, str] = {}
    stuck = set()
    for merge in state.kept if each else ():
        titles[merge.candidate] = state.attempts[merge.candidate].proposal.title or merge.candidate
        tree = git.without(place.repo, state.tip, [merge.new_tip]) or rebuilt(
            place.repo, place.prefix, place.start, [state.attempts[other.candidate].proposal for other in state.kept
                                                    if other.candidate != merge.candidate], place.config.source)
        if tree is None:
            stuck.add(merge.candidate)
        else:
            arms[merge.candidate] = tree
    trees = {arm: git.resolve(place.repo, f"{name}^{{tree}}", "tree") or name for arm, name in arms.items()}
    return trees, titles, stuck


def _train(end: End, arms: dict[str, str], seeds: Sequence[int], say: Say) -> dict[tuple[str, int], Result]:
    """(arm, seed) to result, the runs of one seed next to each other. Equal trees train once.

    The start's first seed goes first: a target that does not train at this size costs one run. Raises UserError then.
    """
    jobs: dict[str, tuple[Run, Job]] = {}
    named: dict[tuple[str, int], str] = {}
    for seed in seeds:
        for arm, tree in arms.items():
            run, job = _job(end, tree, seed, end.start_steps if arm == "start" else end.tip_steps)
            jobs.setdefault(run.id, (run, job))
            named[arm, seed] = run.id
    found = {name: result for name, (run, job) in jobs.items() if (result := _known(end, run, job)) is not None}
    left = [name for name in jobs if name not in found]
    if left:
        say(f"{end.text}: {len(left)} runs to go" + (f", {len(found)} found again" if found else ""))
    for names in (left[:1], left[1:]):
        label = [next(arm for (arm, seed), other in named.items() if other == name) for name in names]
        label = [text if text in ("start", "tip") else f"tip without {text}" for text in label]
        found |= dict(zip(names, end.ground.finish([jobs[name] for name in names], label), strict=True))
        _check_start(end, found, named)
    if len({tuple(sorted(result.fingerprint.items())) for result in found.values()}) > 1:
        raise UserError("The machine changed meanwhile (device, driver, torch or Python).",
                        "Run the same command again.")
    return {key: found[name] for key, name in named.items()}


def _check_start(end: End, found: dict[str, Result], named: dict[tuple[str, int], str]) -> None:
    for (arm, seed), name in named.items():
        result = found.get(name)
        if arm == "start" and result is not None and result.fault:
            tail = " ".join([result.message, *result.log_tail.strip().splitlines()[-1:]])
            raise UserError(f"The start itself fails to train at {end.text}, seed {seed} ({result.fault}): {tail}.",
                            "Choose a --preset or --steps at which it trains (limits are in ratchet.toml).")


def _job(end: End, tree: str, seed: int, steps: int) -> tuple[Run, Job]:
    """A training run of ``tree``, scored on the final split where there is one. Its name says what it is."""
    place, budget = end.ground.site, end.config.budget
    amount = f"n{steps}" if steps else f"b{budget.amount:g}"
    name = f"promote-{end.config.preset or 'own'}-{tree[:12]}-s{seed}-{amount}"
    device = place.devices[seed % len(place.devices)]
    run = Run(name, "final", tree, seed, steps, device, f"jobs/{name}", None, (end.rule.split,))
    return run, dataclasses.replace(job_of(place, run, place.source(tree)), keep_weights=False)


def _known(end: End, run: Run, job: Job) -> Result | None:
    """The result of this very job on this machine, from an earlier promotion; one that still runs is ended first."""
    folder, engine = end.ground.site.folder / "jobs", LocalEngine()
    for place in sorted([*folder.glob(run.id), *folder.glob(f"{run.id}.*")]):
        engine.stop(place)
        result = read_result(place)
        if result is not None and result.fault != "infra" and result.fingerprint == fingerprint(run.device) and (
                dataclasses.replace(read_job(place), id=run.id) == job):
            return result
    return None


def _pairs(found: dict[tuple[str, int], Result], base: str, changed: str, seeds: Sequence[int],
           split: str) -> list[Pair]:
    """``changed`` against ``base`` on each seed. One whose base failed is left out: nothing can be compared there."""
    pairs = []
    for seed in seeds:
        old, new = found[base, seed], found[changed, seed]
        if old.fault:
            continue
        before = {split: old.scores[split].value}
        pairs.append(Pair(seed, before, {}, old.id, new.id, new.fault) if new.fault else
                     Pair(seed, before, {split: new.scores[split].value}, old.id, new.id))
    return pairs
