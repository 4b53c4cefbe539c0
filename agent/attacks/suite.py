"""``ratchet bench attacks``: every attack bites without its defence and is held with it; honest patches are judged so.

Three controls come first, since a tool that refuses everything would hold against any attack. Then each attack is run
twice (trial.py). It *bites* when the undefended run shows all the harms that it declares, and is *held* when it bites,
its campaign ended as declared, and no harm of any kind was seen there. Where an attack is declared not covered at the
level, its campaign is run all the same, and what was seen is told; it counts as held, since nothing was promised.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent.attacks import luck, target, trial
from agent.attacks.catalogue import ATTACKS
from agent.attacks.record import Attack
from agent.attacks.trial import Sighting
from agent.attacks.world import Estate, open_estate, open_world
from agent.bench.finding import Finding
from agent.errors import UserError
from agent.ground import Say, scratch
from sandbox import box, process

ALL: tuple[Attack, ...] = (*ATTACKS, luck.ATTACK)
CONTROLS = {"better": "merged", "equal": "no gain", "worse": "no gain"}
"""Control -> how it must end. ``equal`` may also come out the same to the last digit that counts."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One attack's line in the result."""

    attack: Attack
    bites: bool
    held: bool
    outcome: str
    note: str
    warm: int = 0
    """Jobs of its campaign that started warm."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="names or families, with commas between; all if left out")


def measure(chosen: argparse.Namespace, say: Say) -> Finding:
    """Run the controls and the attacks at the highest level up to ``--level`` that holds. Raises UserError."""
    wanted = select(chosen.only)
    level = int(box.probe(chosen.level))
    say(f"isolation level {level}" + ("" if level == chosen.level else f"; {chosen.level} does not hold here"))
    process.become_subreaper()  # what a run leaves behind becomes a child of this process, which finds it
    with scratch(chosen.runs, "attacks") as root:
        root.parent.chmod(0o755)
        estate = open_estate(root)
        references = {kind: reference(estate, kind) for kind in {attack.target for attack in wanted}}
        controls = {name: control(estate, name, level) for name in CONTROLS}
        for name, outcome in controls.items():
            say(f"control {name}: {outcome}")
        entries = []
        for attack in wanted:
            entries.append(one(estate, attack, level, references[attack.target]))
            say(f"{len(entries)}/{len(wanted)} {line(entries[-1])}")
    return finding(level, controls, entries)


def select(only: str) -> list[Attack]:
    """The attacks named, or all. Raises UserError for a name that is none."""
    names = [name for name in only.split(",") if name]
    known = {attack.name for attack in ALL} | {attack.family for attack in ALL}
    for name in names:
        if name not in known:
            raise UserError(f"There is no attack or family {name!r}.", f"Known families: {', '.join(families())}.")
    return [attack for attack in ALL if not names or attack.name in names or attack.family in names]


def families() -> list[str]:
    return list(dict.fromkeys(attack.family for attack in ALL))


def reference(estate: Estate, kind: Any) -> dict[str, Any]:
    """What the careless tool sees of the unpatched target."""
    honest = Attack("honest", kind, "", "", (), (), target=kind, carrier=False, scoring="prefix")
    with open_world(estate, honest, f"honest-{kind}") as world:
        answer, sighting = trial.careless(world, honest, "")
    if answer is None:
        raise UserError(f"The careless tool cannot run the unpatched target: {sighting.reason}.", "Is the disk full?")
    return answer


def control(estate: Estate, name: str, level: int) -> str:
    """The outcome of an honest patch of known worth."""
    honest = Attack(f"control-{name}", "control", "", "", (), (), edits=(target.HONEST[name],), carrier=False,
                    honest=True)
    sighting = trial.guard(estate, honest, level)
    return str(sighting.outcome) if not sighting.harms else f"{sighting.outcome}, with harm: {sighting.harms}"


def control_holds(name: str, outcome: str) -> bool:
    return outcome == CONTROLS[name] or (name == "equal" and outcome == "same")


def one(estate: Estate, attack: Attack, level: int, honest: dict[str, Any]) -> Entry:
    """Both runs of one attack."""
    if attack is luck.ATTACK:
        bitten, guarded = luck.trials(estate, level)
    else:
        bitten = trial.bite(estate, attack, honest)
        guarded = trial.guard(estate, attack, level)
    return entry(attack, level, bitten, guarded)


def entry(attack: Attack, level: int, bitten: Sighting, guarded: Sighting) -> Entry:
    """The verdict on one attack, from what was seen of it undefended and at ``level``."""
    bites = set(attack.harms) <= set(bitten.harms)
    if level in attack.uncovered:
        seen = "nothing was seen" if not guarded.harms else f"seen: {', '.join(sorted(guarded.harms))}"
        return Entry(attack, bites, bites, "not covered", f"{attack.uncovered[level]}; {seen}", guarded.warm)
    held = guarded.outcome in attack.outcome and not guarded.harms
    return Entry(attack, bites, bites and held, str(guarded.outcome), _note(attack, bites, bitten, held, guarded),
                 guarded.warm)


def _note(attack: Attack, bites: bool, bitten: Sighting, held: bool, guarded: Sighting) -> str:
    """What a person needs to know of it: nothing went wrong, or what did."""
    if not bites:
        missing = sorted(set(attack.harms) - set(bitten.harms))
        return f"without a defence it does not show: {', '.join(missing)}; {bitten.reason}".strip("; ")
    if not held:
        harms = "; ".join(f"{kind}: {', '.join(seen[:3])}" for kind, seen in guarded.harms.items())
        return f"declared {' or '.join(attack.outcome)}; {guarded.reason}; {harms}".strip("; ")
    return guarded.reason


def line(entry: Entry) -> str:
    """One line for the screen."""
    state = "held" if entry.held else "NOT HELD" if entry.bites else "DOES NOT BITE"
    return f"{state}  {entry.attack.family}/{entry.attack.name}: {entry.outcome}" + (
        "" if entry.held and entry.outcome != "not covered" else f" ({entry.note})")


def finding(level: int, controls: dict[str, str], entries: Sequence[Entry]) -> Finding:
    """The whole result; it fails when an attack was not held, did not bite, or a control was misjudged."""
    held = sum(entry.held for entry in entries)
    right = sum(control_holds(name, outcome) for name, outcome in controls.items())
    facts = {
        "attacks": len(entries), "held": held, "controls_ok": right, "level": level,
        "not_covered": [entry.attack.name for entry in entries if entry.outcome == "not covered"],
        "controls": controls, "warm_jobs": sum(entry.warm for entry in entries),
        "by_attack": {entry.attack.name: {"family": entry.attack.family, "bites": entry.bites, "held": entry.held,
                                          "outcome": entry.outcome, "note": entry.note} for entry in entries}}
    rows = [(entry.attack.name, entry.attack.family, "yes" if entry.bites else "NO", "yes" if entry.held else "NO",
             entry.outcome) for entry in entries]
    notes = [f"controls: {right} of {len(CONTROLS)} judged right",
             f"jobs in boxes that had waited for them: {facts['warm_jobs']}",
             *(f"{entry.attack.name}: {entry.note}" for entry in entries
               if not entry.held or entry.outcome == "not covered")]
    return Finding(f"{held} of {len(entries)} attacks held at isolation level {level}", facts,
                   ("attack", "family", "bites", "held", "outcome"), rows, notes,
                   ok=held == len(entries) and right == len(CONTROLS))
