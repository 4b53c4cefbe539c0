"""Benches of training: what changes are worth (``effects``), and how much runs differ by themselves (``noise``)."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.bench.finding import Finding, show
from agent.errors import UserError
from agent.ground import Ground, Say, Wanted, count, open_ground
from agent.ideas import cards_of
from agent.power import deviation, paired
from sandbox.job import Result


def effects_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cards", required=True, help="ids of idea cards, with commas between")
    parser.add_argument("--ideas", type=Path, help="folder of the cards")
    parser.add_argument("--split", choices=["val", "confirm", "final"], default="final", help="split of the table")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--together", action="store_true", help="measure only the sum of the cards")
    which.add_argument("--apart", action="store_true", help="measure only each card alone")


def effects(options: argparse.Namespace, say: Say) -> Finding:
    """Each card alone and all together against the target's start, paired by seed, at the same number of steps."""
    cards = cards_of(options.cards.split(","), options.ideas)
    with open_ground(options, "effects", say) as ground:
        variants = {} if options.together else {card.id: ground.variant([card], ground.start) for card in cards}
        if options.together or (len(cards) > 1 and not options.apart):
            variants["together"] = ground.variant(cards, ground.start)
        steps, seeds = ground.steps(options.steps), _seeds(ground, options)
        arms = {"start": ground.start, **variants}
        wanted = [Wanted(commit, seed, steps, name) for seed in seeds for name, commit in arms.items()]
        found = ground.measure(wanted)
        runs = {name: found[number::len(arms)] for number, name in enumerate(arms)}
        split = _split(runs["start"], options.split)
        facts = _facts(ground, found, steps, seeds) | {
            "split": split, "cards": [card.id for card in cards], "start": _level(runs["start"], split, seeds),
            "variants": [_variant(name, runs["start"], runs[name], split, seeds) for name in variants]}
    return Finding(f"effect on {facts['metric']} of {split}, {len(seeds)} seeds, {steps} steps", facts,
                   ("variant", "effect", "SE", "paired sd", "corr.", "n", "step cost", "s a run"),
                   [_row(row) for row in facts["variants"]],
                   [f"start {show(facts['start']['mean'])}, seed sd {show(facts['start']['seed_sd'])}, "
                    f"{facts['start']['wall_seconds']:.1f} s a run; level {facts['level']} on {facts['device']}",
                    *(f"{name} {fault}" for name, row in (("start", facts["start"]), *(
                        (row["variant"], row) for row in facts["variants"])) for fault in row["faults"])])


def noise_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=count, default=3, help="runs of the first seed")
    parser.add_argument("--split", choices=["val", "confirm", "final"], default="val", help="split of the table")


def noise(options: argparse.Namespace, say: Say) -> Finding:
    """The target's start on several seeds, and one seed several times: what differs though the code does not.

    With equal weights the same-seed sd is not quite zero (1e-8 bpb): the scorer audits other prefixes each time.
    """
    with open_ground(options, "noise", say) as ground:
        steps, seeds = ground.steps(options.steps), _seeds(ground, options)
        asked = [*seeds, *[seeds[0]] * (options.repeats - 1)]
        found = ground.trained([Wanted(ground.start, seed, steps, "start") for seed in asked])
        facts = _facts(ground, found, steps, seeds)
    split = _split(found, options.split)
    same = [found[0], *found[len(seeds):]]
    again = deviation([run.scores[split].value for run in same])
    facts |= {
        "split": split, "start": _level(found[:len(seeds)], split, seeds), "repeats": len(same), "same_seed_sd": again,
        "same_weights": len({run.weights_sha256 for run in same}) == 1 if same[0].weights_sha256 else None,
        "startup_seconds": _median(found, "startup_seconds"), "train_seconds": _median(found, "train_seconds"),
        "evaluate_seconds": _median(found, "evaluate_seconds"), "wall_seconds": _median(found, "seconds")}
    rows = [("mean", show(facts["start"]["mean"])), ("seed sd", show(facts["start"]["seed_sd"])),
            ("same-seed sd", "-" if again is None else f"{again:.1e}"),
            ("same weights each time", {True: "yes", False: "no", None: "-"}[facts["same_weights"]]),
            *((name.replace("_", " "), f"{facts[name]:.2f}")
              for name in ("startup_seconds", "train_seconds", "evaluate_seconds", "wall_seconds")),
            ("isolation level", str(facts["level"]))]
    return Finding(f"noise of {facts['metric']} on {split}, {len(seeds)} seeds, seed {seeds[0]} {len(same)} times, "
                   f"{steps} steps", facts, ("what", "value"), rows, [f"{facts['slots']} side by side on "
                                                                     f"{facts['device']}; seconds are medians"])


def _seeds(ground: Ground, options: argparse.Namespace) -> list[int]:
    first = ground.site.config.seeds.first if options.first_seed is None else options.first_seed
    return list(range(first, first + options.seeds))


def _split(runs: Sequence[Result], wanted: str) -> str:
    """``wanted``, or ``val`` where the target gives no other. Raises UserError when the start did not train."""
    good = [run for run in runs if not run.fault]
    if not good:
        raise UserError(f"The target itself fails to train ({runs[0].fault}): {runs[0].message}.",
                        "Mend it and commit, then measure again.")
    return wanted if wanted in good[0].scores else "val"


def _facts(ground: Ground, found: Sequence[Result], steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """What every training bench says of its conditions. Raises UserError when they changed on the way."""
    site = ground.site
    if any(run.fingerprint != found[0].fingerprint or run.level != found[0].level for run in found):
        raise UserError("The machine changed during the bench (device, driver, torch or isolation level).",
                        "Measure on one kind of device.")
    return {"metric": site.config.metric.name, "preset": site.config.preset, "steps": steps, "seeds": list(seeds),
            "slots": len(site.devices), "level": found[0].level, **found[0].fingerprint}


def _level(runs: Sequence[Result], split: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Where the start stands: mean and seed sd of the good runs, and the values by seed (None: failed)."""
    values = [run.scores[split].value for run in runs if not run.fault]
    return {"mean": statistics.fmean(values), "seed_sd": deviation(values), "wall_seconds": _median(runs, "seconds"),
            "faults": _faults(runs, seeds), "values": _values(runs)}


def _variant(name: str, start: Sequence[Result], variant: Sequence[Result], split: str,
             seeds: Sequence[int]) -> dict[str, Any]:
    """One variant's row: seeds on which either side failed count as faults, not as pairs."""
    good = [(a, b) for a, b in zip(start, variant, strict=True) if not a.fault and not b.fault]
    found = paired([a.scores[split].value for a, _ in good], [b.scores[split].value for _, b in good])
    costs = [b.charge_seconds / a.charge_seconds * a.steps / b.steps for a, b in good if a.charge_seconds and b.steps]
    return {"variant": name, "effect": found.effect, "se": found.error, "sd": found.sd,
            "correlation": found.correlation, "n": found.n, "step_cost": statistics.median(costs) if costs else None,
            "wall_seconds": _median(variant, "seconds"), "faults": _faults(variant, seeds), "values": _values(variant)}


def _faults(runs: Sequence[Result], seeds: Sequence[int]) -> list[str]:
    return [f"failed on seed {seed} ({run.fault}): {run.message}"
            for run, seed in zip(runs, seeds, strict=True) if run.fault]


def _values(runs: Sequence[Result]) -> dict[str, list[float | None]]:
    """Split -> value on each seed, None where the run failed."""
    splits = dict.fromkeys(name for run in runs for name in run.scores)
    return {name: [None if run.fault else run.scores[name].value for run in runs] for name in splits}


def _median(runs: Sequence[Result], name: str) -> float:
    return float(statistics.median(getattr(run, name) for run in runs))


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["variant"], show(row["effect"], "+.4f"), show(row["se"]), show(row["sd"]), show(row["correlation"],
            ".2f"), str(row["n"]), show(row["step_cost"], ".2f"), f"{row['wall_seconds']:.1f}")
