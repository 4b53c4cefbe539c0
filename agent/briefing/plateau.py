"""Plateau: whether a campaign has stopped gaining, and which other question to ask then. Pure.

The attempts since the last gain that matters are held against the campaign's own keep rate: when so long a row without
one would happen in fewer than one in twenty cases if nothing had changed, it is a plateau; after 24 attempts it is one
in any case. A false alarm costs little: the next few proposals are asked for something else.

Then the question changes, and changes again while nothing is gained: combine near misses, undo an old choice, look for
speed, take a larger step, and a free choice before it starts over. The answers are judged as any other proposal is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Question = Literal["", "combine", "undo", "speed", "larger"]
QUESTIONS: tuple[Question, ...] = ("combine", "undo", "speed", "larger", "")
EACH = 8
"""Attempts that a question is asked for."""
BY_CHANCE = 0.05
SHORTEST, LONGEST = 8, 24
"""Attempts without a gain: fewer are never a plateau, this many always."""
KEEP_RATE, STRENGTH = 0.15, 7.0
"""Keep rate of a campaign that has shown none yet, counted as this many attempts."""
MATTERS = 0.1
"""Share of the mean gain of a merge below which one does not end a plateau."""

WORDS: dict[Question, str] = {
    "combine": "combine near misses",
    "undo": "undo an old choice",
    "speed": "look for speed",
    "larger": "take a larger step",
    "": "choose freely",
}


@dataclass(frozen=True, slots=True)
class Plateau:
    """A row of attempts without a gain that matters."""

    since: int
    """Attempts that had been decided when the last such gain came; 0: there was none."""
    length: int
    """Decided attempts since."""
    patience: int
    """Length from which it is a plateau."""
    question: Question

    @property
    def text(self) -> str:
        """For the log: the same as long as the question is."""
        came = f"after {self.since} attempts" if self.since else "yet"
        first = self.patience + (self.length - self.patience) // EACH * EACH
        return (f"plateau: {first} attempts without a gain that matters (the last came {came}; {self.patience} are "
                f"patience enough); the next proposals are asked to {WORDS[self.question]}")


def watch(gains: Sequence[float], near_misses: int = 2) -> Plateau | None:
    """The plateau that a campaign is on, or None. ``gains``: one a decided attempt, the oldest first; 0: not merged.

    With fewer than two near misses there is nothing to combine, and that question is passed over.
    """
    kept, total, last, kept_then = 0, 0.0, 0, 0
    for number, gain in enumerate(gains, start=1):
        if gain <= 0:
            continue
        kept, total = kept + 1, total + gain
        if gain >= MATTERS * total / kept:
            last, kept_then = number, kept
    rate = (kept_then + STRENGTH * KEEP_RATE) / (last + STRENGTH)
    patience = min(LONGEST, max(SHORTEST, math.ceil(math.log(BY_CHANCE) / math.log1p(-min(rate, 0.99)))))
    length = len(gains) - last
    if length < patience:
        return None
    asked = [one for one in QUESTIONS if one != "combine" or near_misses > 1]
    return Plateau(last, length, patience, asked[(length - patience) // EACH % len(asked)])
