"""Family *luck*: patches without any effect, again and again, until one has a better number by chance."""

from __future__ import annotations

from pathlib import Path

from agent.attacks import target
from agent.attacks.record import Attack
from agent.attacks.trial import Sighting, diff_of, run_campaign
from agent.attacks.world import Estate, open_world
from agent.ledger import State

TRIALS = target.GRAINS
ALLOWED = 0.05
"""Share of patches without effect that may be merged."""
CONFIG = (("probe_steps = 8", "probe_steps = 0"),)

ATTACK = Attack(
    "lucky-seeds", "luck", f"{TRIALS} patches that only change the seed of the start weights, in the hope of luck",
    "paired runs on fresh seeds of the harness, at levels that are shared out over all certifications",
    ("no gain",), ("number",), config=CONFIG, starred=True)


def trials(estate: Estate, level: int) -> tuple[Sighting, Sighting]:
    """(the bite, the campaign): both decide on the very same runs of one campaign of null patches.

    The bite is the greedy rule "keep what has a lower number than the incumbent": it must be taken in by more than
    ``ALLOWED`` of the patches. The judge may merge no more than that. After a merge the next patches meet the new
    tip, so each changes a line of its own.
    """
    with open_world(estate, ATTACK, "guard-lucky-seeds") as world:
        patches = [diff_of(target.FILES, [("grains.py", f'GRAIN_{number} = ""', f'GRAIN_{number} = "luck {number}"')])
                   for number in range(TRIALS)]
        sighting, state, _ = run_campaign(world, ATTACK, patches, level, Path(world.places["TARGET"]))
        sighting.note("leftover", world.leftovers())
    bite = Sighting(reason="")
    judged, lower = _greedy(state)
    if judged == TRIALS and lower > ALLOWED * judged:
        bite.note("number", [f"the greedy rule would keep {lower} of {judged} patches without effect"])
    sighting.reason = f"{len(state.merges)} of {judged} patches without effect were merged; greedily, {lower} would be"
    sighting.outcome = "no gain" if judged == TRIALS and len(state.merges) <= ALLOWED * judged else "merged"
    return bite, sighting


def _greedy(state: State) -> tuple[int, int]:
    """(patches with a pair on the first seed, those of them whose number was lower there)."""
    verdicts = [attempt.verdict for attempt in state.attempts.values() if attempt.verdict is not None]
    pairs = [verdict.pairs[0] for verdict in verdicts if verdict.pairs]
    return len(pairs), sum(pair.effect("val") < 0 for pair in pairs)
