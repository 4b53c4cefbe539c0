"""Bench ``bank``: many real runs of the start and of given patches, kept as data for replays of the gate.

Each arm is the start, an idea card, or a null card; each runs on every seed, unaudited and at one number of steps.
The file is written anew after each seed, so that a bench that is cut short leaves whole seeds behind:

    {"metric", "direction", "preset", "steps", "device", "torch", ..., "seeds": [...], "arms": {name: {"kind", "runs": [
        {"seed", "scores": {split: value}, "curve": [[step, loss], ...], "charge_seconds", "train_seconds"} or
        {"seed", "fault"}]}}}

``bench policy --bank FILE`` replays it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent import resources
from agent.bench.finding import Finding
from agent.errors import UserError
from agent.ground import Ground, Say, Wanted, open_ground
from agent.ideas import cards_of
from sandbox.job import Result, write_atomically

CURVE_POINTS = 50
"""Points of a training curve that are kept."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cards", required=True, help="ids of idea cards with an effect, with commas between")
    parser.add_argument("--ideas", type=Path, help="folder of the cards")
    parser.add_argument("--nulls", type=Path, help="folder of cards without an effect; all of it is taken")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")


def bank(options: argparse.Namespace, say: Say) -> Finding:
    """Run every arm on every seed."""
    names = [name.strip() for name in options.cards.split(",") if name.strip()]
    folder = options.ideas or resources.prompts() / "ideas"
    nulls = sorted(path.stem for path in options.nulls.glob("*.toml")) if options.nulls else []
    if options.nulls and not nulls:
        raise UserError(f"No cards in {options.nulls}.", "Give a folder of *.toml cards, or leave --nulls out.")
    with open_ground(options, "bank", say, options.slots) as ground:
        arms = {"start": ("start", ground.start)}
        for kind, place, chosen in (("effect", folder, names), ("null", options.nulls, nulls)):
            arms |= {name: (kind, ground.variant(cards_of([name], place), ground.start)) for name in chosen}
        steps = ground.steps(options.steps)
        first = ground.site.config.seeds.first if options.first_seed is None else options.first_seed
        seeds = range(first, first + options.seeds)
        kept: dict[str, Any] = {"metric": ground.site.config.metric.name,
                                "direction": ground.site.config.metric.direction,
                                "preset": ground.site.config.preset, "steps": steps, "seeds": [],
                                "arms": {name: {"kind": kind, "runs": []} for name, (kind, _) in arms.items()}}
        for seed in seeds:
            found = _on_seed(ground, arms, seed, steps)
            kept |= found[0].fingerprint
            kept["seeds"].append(seed)
            for name, result in zip(arms, found, strict=True):
                kept["arms"][name]["runs"].append(_row(seed, result))
            write_atomically(options.out, (json.dumps(kept) + "\n").encode())
    rows = [(name, arm["kind"], str(sum("fault" not in run for run in arm["runs"]))) for name, arm in
            kept["arms"].items()]
    return Finding(f"{len(arms)} arms on {len(seeds)} seeds, {steps} steps, in {options.out}",
                   {"file": str(options.out), "arms": len(arms), "seeds": len(seeds), "steps": steps},
                   ("arm", "kind", "good runs"), rows, [])


def _on_seed(ground: Ground, arms: dict[str, tuple[str, str]], seed: int, steps: int) -> list[Result]:
    """One run of each arm. The device is the seed's, or on a CPU whichever thread is free."""
    return ground.measure([Wanted(commit, seed, steps, name) for name, (_, commit) in arms.items()])


def _row(seed: int, result: Result) -> dict[str, Any]:
    if result.fault:
        return {"seed": seed, "fault": result.fault}
    return {"seed": seed, "scores": {name: round(score.value, 7) for name, score in result.scores.items()},
            "curve": [[step, round(loss, 5)] for step, loss in _thin(result.curve)],
            "charge_seconds": round(result.charge_seconds, 3), "train_seconds": round(result.train_seconds, 3)}


def _thin(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most CURVE_POINTS points, the last one among them."""
    every = max(1, -(-len(curve) // CURVE_POINTS))
    return [point for number, point in enumerate(curve) if (len(curve) - 1 - number) % every == 0]
