"""Bench ``weigh``: do effects add? Cards one at a time against the same cards in a weighing design, with A/A beside.

The design is the gate's (gate/design.py), of N rows: each but the first trains the start with a half of the cards on,
and the effect of card i is

    (2 / N) * (sum of the rows with i on - sum of the rows with i off)

All rows and all single runs share their seeds, so that the seed's own level cancels and what differs between the two
estimates is interaction and interplay with the seed. A/A is the start run twice on every seed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.bench.finding import Finding, show
from agent.errors import UserError
from agent.gate.design import ORDERS, hadamard, rows_for
from agent.ground import Ground, Say, Wanted, count, open_ground
from agent.ideas import cards_of
from agent.power import deviation, paired


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cards", required=True, help="ids of idea cards that fit together, with commas between")
    parser.add_argument("--ideas", type=Path, help="folder of the cards")
    parser.add_argument("--weighed", type=count, default=2, help="seeds of the design; the first ones")
    parser.add_argument("--split", choices=["val", "confirm", "final"], default="val", help="split of the table")


def weigh(options: argparse.Namespace, say: Say) -> Finding:
    """A/A, every card alone, and the design."""
    names = [name.strip() for name in options.cards.split(",") if name.strip()]
    if options.weighed > options.seeds:
        raise UserError(f"--weighed {options.weighed} is more than --seeds {options.seeds}.", "Give fewer.")
    with open_ground(options, "weigh", say, options.slots) as ground:
        rows = design(len(names))
        cards = cards_of(names, options.ideas)
        alone = {card.id: ground.variant([card], ground.start) for card in cards}
        mixed = [ground.variant([card for card, on in zip(cards, row, strict=True) if on], ground.start)
                 for row in rows]
        steps = ground.steps(options.steps)
        first = ground.site.config.seeds.first if options.first_seed is None else options.first_seed
        found = [_on_seed(ground, alone, mixed if number < options.weighed else [], first + number, steps,
                          options.split) for number in range(options.seeds)]
        device = ground.runs_on()
    again = [one["again"] - one["start"] for one in found]
    table = [_card(name, number, found, rows) for number, name in enumerate(names)]
    gaps = [row["weighed"] - row["alone_same_seeds"] for row in table if row["weighed"] is not None]
    facts = {"steps": steps, "seeds": len(found), "weighed": options.weighed, "device": device, "split": options.split,
             "same_seed_sd": (statistics.fmean(d * d for d in again) / 2) ** 0.5,
             "seed_sd": deviation([one["start"] for one in found]), "cards": table,
             "rms_gap": statistics.fmean(g * g for g in gaps) ** 0.5, "by_seed": found}
    return Finding(f"{len(names)} cards alone on {len(found)} seeds, and in {len(rows)} runs on each of "
                   f"{options.weighed}, {steps} steps, {device}", facts,
                   ("card", "alone", "paired sd", "n", "alone, same seeds", "weighed"),
                   [(row["card"], show(row["alone"]), show(row["sd"]), str(len(found)),
                     show(row["alone_same_seeds"]), show(row["weighed"])) for row in table],
                   [f"same code, same seed: sd of a run {facts['same_seed_sd']:.5f}; seed sd "
                    f"{show(facts['seed_sd'])}; weighed against alone on the same seeds: RMS {facts['rms_gap']:.5f}"])


def design(cards: int) -> list[tuple[bool, ...]]:
    """Rows of the smallest design for so many cards: which are on. The first row has none, and is the start itself.
    Raises UserError for more than 15."""
    if cards >= ORDERS[-1]:
        raise UserError(f"{cards} cards do not fit into a design of {ORDERS[-1]} rows.", "Weigh fewer at once.")
    matrix = hadamard(rows_for(cards, ORDERS[-1]))[:, 1:cards + 1]
    return [tuple(bool(on) for on in row) for row in matrix != matrix[0]]


def _on_seed(ground: Ground, alone: dict[str, str], mixed: Sequence[str], seed: int, steps: int,
             split: str) -> dict[str, Any]:
    """Values of ``split`` on one seed. The design's first row is the start itself. Raises UserError."""
    wanted = [Wanted(ground.start, seed, steps, "start"), Wanted(ground.start, seed, steps, "start again"),
              *(Wanted(commit, seed, steps, name) for name, commit in alone.items()),
              *(Wanted(commit, seed, steps, f"row {number}") for number, commit in enumerate(mixed[1:], 1))]
    values = [result.scores[split].value for result in ground.trained(wanted)]
    singles = dict(zip(alone, values[2:], strict=False))
    ground.say(f"seed {seed}: " + ", ".join(f"{value:.5f}" for value in values))
    return {"seed": seed, "start": values[0], "again": values[1], "alone": singles,
            "rows": [statistics.fmean(values[:2]), *values[2 + len(alone):]] if mixed else []}


def _card(name: str, column: int, found: Sequence[dict[str, Any]], rows: Sequence[tuple[bool, ...]]) -> dict[str, Any]:
    seen = paired([one["start"] for one in found], [one["alone"][name] for one in found])
    weighed = [one for one in found if one["rows"]]
    each = [2 / len(rows) * sum(value if row[column] else -value
                                for value, row in zip(one["rows"], rows, strict=True)) for one in weighed]
    same = [one["alone"][name] - statistics.fmean((one["start"], one["again"])) for one in weighed]
    return {"card": name, "alone": seen.effect, "sd": seen.sd, "alone_same_seeds": statistics.fmean(same),
            "weighed": statistics.fmean(each)}
