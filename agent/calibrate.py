"""``ratchet calibrate``: trains what ``calibration.py`` needs to say what a night on this target could see.

The target's start on several seeds, once more on the first of them and once for half the budget; a few real patches
(idea cards) on the same seeds; with ``--long`` all of them at a second budget too. The training is that of
``ground.py``: it leaves nothing behind but prepared data.

Does not cover: charging (a patch gets the same number of steps as the start, whatever a step of it costs) and audits.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.calibration import Kind, Reading, Setting, assess, duration
from agent.config import Config
from agent.errors import UserError
from agent.ground import STEPPED, Ground, Say, Wanted, open_ground
from agent.ideas import Card, cards_of
from agent.resources import default_target
from sandbox.job import Result

CARDS = {"cpu": ("longer-adam-memory", "slightly-sharper-attention", "quarter-warm-up")} | dict.fromkeys(
    ("small", "h100", "d12"), ("longer-second-moment", "sharper-attention", "long-warm-up"))
"""Preset of the default target -> patches that stand for what a night proposes: small changes of the optimizer, of the
model and of the schedule, taken for being unlike each other and not for their worth."""
LEAST_SEEDS, PAIRED_SEEDS, LONG_SEEDS, LEAST_ARMS = 3, 4, 2, 4
"""Fewest seeds; most seeds that a patch is trained on; seeds at the second budget; fewest arms whose order is told."""
STEP = re.compile(r"(?i)(?<![a-z])(?:steps?|iter(?:ation)?s?)\s*[:=#]?\s*(\d+)")
"""How far a run says that it got, where the harness does not count: the last match in what it printed."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for. ``steps`` and ``long`` are in the unit of the target's budget; 0: the target's own, and none.
    ``cards`` None: CARDS on the default target, and no patch on any other."""

    repo: Path | None
    preset: str
    runs: Path
    seeds: int = 6
    steps: int = 0
    long: int = 0
    cards: str | None = None
    ideas: Path | None = None
    slots: int | None = None
    level: int = 3


def calibrate(options: Options, say: Say) -> dict[str, Any]:
    """Train, and what it says (the keys of docs/calibrate.md). Raises UserError for what the owner must mend."""
    if options.seeds < LEAST_SEEDS:
        raise UserError(f"{options.seeds} seeds say next to nothing of how far runs differ.",
                        f"Give --seeds {LEAST_SEEDS} or more; 6 is the default.")
    if options.ideas is not None and options.cards is None:
        raise UserError(f"--ideas {options.ideas} gives a folder of cards, and nothing says which of them to measure.",
                        "Name some with --cards.")
    chosen = None if options.cards is None else cards_of(options.cards.split(","), options.ideas)
    with open_ground(argparse.Namespace(repo=options.repo, preset=options.preset, runs=options.runs,
                                        level=options.level, slots=options.slots), "calibrate", say) as ground:
        config = ground.site.config
        if chosen is None and options.repo is None and config.preset in CARDS:
            chosen = cards_of(CARDS[config.preset], options.ideas)
        arms = {"start": ground.start} | {card.id: _variant(ground, card) for card in chosen or ()}
        budget = _budget(config, options.steps, options.long, len(arms))
        seeds = tuple(range(config.seeds.first, config.seeds.first + options.seeds))
        results, readings = _train(ground, arms, budget, options.long, seeds, say)
    setting = Setting(
        config.name or (options.repo or default_target()).resolve().name, config.metric.name, config.metric.direction,
        config.budget.unit, budget, options.long, seeds, tuple(arms), len(ground.site.devices),
        config.train.served or "{seed}" in config.train.command, config.judge,
        {"preset": config.preset, "tier": config.evaluate.tier, "level": results[0].level, **results[0].fingerprint})
    return assess(setting, readings)


def _variant(ground: Ground, card: Card) -> str:
    """The commit of one card. Raises UserError for one of another preset or that does not apply."""
    preset = ground.site.config.preset
    if card.presets and preset not in card.presets:
        raise UserError(f"Card {card.id} is for preset {' or '.join(card.presets)}, not for {preset or 'none'}.",
                        "Leave it out of --cards, or name its --preset.")
    try:
        return ground.variant([card], ground.start)
    except UserError as error:
        raise UserError(error.problem, "Leave it out of --cards.") from error


def _budget(config: Config, asked: int, long: int, arms: int) -> float:
    """Budget of a run in the unit of the config; 0 where the command decides. Raises UserError."""
    budget = float(asked or config.budget.amount)
    placeholder = "{seconds}" if config.budget.unit == "seconds" else "{steps}"
    if not config.train.served and placeholder not in config.train.command:
        if asked or long:
            raise UserError(f"The target's command decides how long a run takes, so --{'steps' if asked else 'long'} "
                            "says nothing.", f"Leave it out, or let train.command take {placeholder}.")
        budget = 0.0
    elif not budget and long:
        raise UserError("budget.amount is 0, so there is no first budget beside --long.", "Give --steps too.")
    if long and long <= budget:
        raise UserError(f"--long {long} is not more than the {budget:g} of a run.", "Give a larger one.")
    if long and arms < LEAST_ARMS:
        raise UserError(f"--long compares the order of {LEAST_ARMS} arms or more at two budgets, and the start with "
                        f"its patches makes {arms}.", f"Name {LEAST_ARMS - 1} cards or more with --cards.")
    return budget


def _train(ground: Ground, arms: dict[str, str], budget: float, long: int, seeds: Sequence[int],
           say: Say) -> tuple[list[Result], list[Reading]]:
    """All runs, those of one seed next to each other so that a drift does not look like an effect.

    The first seed of the start comes first: a target that does not train costs three runs. Raises UserError for it.
    """
    results: list[Result] = []
    readings: list[Reading] = []

    def run(asked: Sequence[tuple[str, int, Kind]], amount: float) -> None:
        place = _with_budget(ground, amount)
        steps = int(amount) if ground.site.config.budget.unit in STEPPED else 0
        found = place.measure([Wanted(arms[arm], seed, steps, arm if kind == "full" else f"{arm} ({kind})")
                               for arm, seed, kind in asked])
        for (arm, seed, kind), result in zip(asked, found, strict=True):
            if arm == "start" and result.fault and kind != "half":  # a number may come only every so many steps
                tail = " ".join([result.message, *result.log_tail.strip().splitlines()[-1:]])
                raise UserError(f"The target itself fails to train on seed {seed} ({result.fault}): {tail}.",
                                "Mend it and commit, then calibrate again.")
            results.append(result)
            readings.append(_reading(ground, result, arm, seed, kind, len(readings)))

    half = math.floor(budget / 2) if ground.site.config.budget.unit in STEPPED else budget / 2
    run([("start", seeds[0], "full"), ("start", seeds[0], "again")], budget)
    if half:
        run([("start", seeds[0], "half")], half)
    rest: list[tuple[str, int, Kind]] = [
        (arm, seed, "full") for number, seed in enumerate(seeds) for arm in arms
        if (number or arm != "start") and (arm == "start" or number < PAIRED_SEEDS)]
    later: list[tuple[str, int, Kind]] = [(arm, seed, "long") for seed in seeds[:LONG_SEEDS] for arm in arms]
    if not long:
        later = []
    runs = len(rest) + (len(later) * long / budget if later else 0)
    say(f"{len(rest) + len(later)} runs to go, about "
        f"{duration(runs * results[0].seconds / len(ground.site.devices))}")
    run(rest, budget)
    run(later, long)
    if any(result.fingerprint != results[0].fingerprint or result.level != results[0].level for result in results):
        raise UserError("The machine changed meanwhile (device, driver, torch or isolation level).",
                        "Calibrate on one kind of device.")
    return results, readings


def _with_budget(ground: Ground, amount: float) -> Ground:
    """The same ground under a config of ``amount``, which is where a run finds its seconds."""
    config = ground.site.config
    changed = config.model_copy(update={"budget": config.budget.model_copy(update={"amount": amount})})
    return dataclasses.replace(ground, site=dataclasses.replace(ground.site, config=changed))


def _reading(ground: Ground, result: Result, arm: str, seed: int, kind: Kind, place: int) -> Reading:
    steps: int | None = result.steps or ground.run(result).steps
    if not steps:
        found = STEP.findall((ground.folder(result) / "log.txt").read_text(encoding="utf-8", errors="replace"))
        steps = int(found[-1]) if found else None
    fault = f"{result.fault}: {result.message}" if result.fault else ""
    # The final split is kept for the end of a night.
    scores = {name: score.value for name, score in result.scores.items() if name != "final"}
    return Reading(arm, seed, kind, place, fault, scores, steps, result.tokens, result.seconds, result.train_seconds,
                   result.startup_seconds, result.evaluate_seconds, result.weights_sha256)
