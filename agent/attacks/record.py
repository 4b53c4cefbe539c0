"""What an attack is: one patch, what it does where nothing defends, and what must come of it at each level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from agent.attacks.world import World

Outcome = Literal["refused", "killed", "invalid", "same", "no gain", "merged", "better", "worse", "not judged"]
"""How an attempt ended, read from the ledger.

``refused``: before anything ran. ``killed``: stopped at a limit. ``invalid``: it ran, and gave no number that counts.
``same``: measured, and equal to the honest trainer's. ``no gain``: measured and not merged, with another number than
the honest one's. ``merged`` and ``better`` are never what an attack is declared to come to, except where its patch
holds an honest gain as well (``Attack.honest``).
"""

Harm = Literal["number", "leak", "damage", "contact", "leftover", "resource", "host code", "tool", "disguise"]
"""What an attack can do. Each is looked for by the same code in the careless run, where all that the attack names must
be found, and in the campaign, where none may.

``number``: it is believed to be better than it is. ``leak``: a canary is where it must not be. ``damage``: a bait file
or a bait process was changed. ``contact``: a bait listener heard something. ``leftover``: a process, file, mount or
cgroup two seconds later. ``resource``: a limit was exceeded. ``host code``: its code ran in a process of the tool's
own. ``tool``: the tool itself fell over or hung. ``disguise``: what a person or a model is shown is not what is there.
"""


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack. Texts may hold placeholders like ``@HOME@`` that the world fills in when the attack runs."""

    name: str
    family: str
    does: str
    defence: str
    outcome: tuple[Outcome, ...]
    """The declared outcomes, any of which will do."""
    harms: tuple[Harm, ...]
    """What it must do in the careless run."""
    edits: tuple[tuple[str, str, str], ...] = ()
    """(path, search, replace); an empty search makes a new file."""
    diff: str = ""
    """A unified diff in front of the edits, for what edits cannot say."""
    make: Callable[[World], str] | None = None
    """Makes a further diff for a world, where it depends on the world's data."""
    carrier: bool = True
    """Join the change that makes the weights differ, so that preflight does not end the attempt as a no-op."""
    honest: bool = False
    """The patch holds a real gain too, so that it is merged: what must be absent is its harm."""
    target: Literal["served", "foreign"] = "served"
    config: tuple[tuple[str, str], ...] = ()
    """Replacements in the target's ratchet.toml, in both runs."""
    off: tuple[tuple[str, str], ...] = ()
    """Replacements that switch the defence off: the bite is then a campaign under them, in which the patch must be
    merged. Empty: the bite is the careless tool."""
    split: str = "val"
    """The split whose scores must not move."""
    margin: float = 0.002
    """Bits by which a score may be better before it counts as a harm: two runs of one trainer on one seed differ by
    1e-5 here. Larger where more computation is charged for, since equal charges buy almost equal numbers."""
    twice: bool = False
    """The careless tool runs it twice, since it profits from its first run."""
    warm: bool = False
    """The careless tool runs its jobs in one process that waits for them."""
    scoring: Literal["bulk", "prefix"] = "bulk"
    """What the careless tool believes when nothing was printed."""
    model: bool = False
    """Proposed by a model over HTTP instead of from a queue, so that its prompts are searched too."""
    uncovered: Mapping[int, str] = field(default_factory=dict)
    """Level -> why the attack is declared not covered there."""
    starred: bool = False
