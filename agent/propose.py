"""What every proposer promises. They are models (llm/proposer.py, several as one in llm/relay.py), an
optimiser of constants (search.py), both by turns, the idea book (ideas.py), and the user's patch files
(queue_patches.py).

A proposer only proposes. It never sees a box, never decides a merge and never parses a metric.
"""

from __future__ import annotations

import re
from typing import Protocol, runtime_checkable

from agent.llm.quote import one_line
from agent.read import Briefing
from agent.records import Cost, Proposal, Said

MODELS = ("llm", "hybrid")
"""Names of the proposers that ask a model."""


class Proposer(Protocol):
    """Where ideas come from."""

    name: str
    """Shown on screens, and recorded as the origin of each proposal."""
    ended: str
    """Why ``next`` returned None: one line for the user. Empty while there is more to propose."""

    def next(self, briefing: Briefing) -> Proposal | None:
        """The next proposal against ``briefing.tip``, or None when nothing is left (see ``ended``).

        Raises ProposeFailed when this attempt gave nothing usable; the campaign records it and calls again.
        Raises UserError when the user must mend something first (a refused key, say).
        """
        ...

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        """``proposal`` mended after ``problem`` (why the patch was refused, or the tail of the crash).

        None: this proposer cannot, or has no repair round left; nothing was spent. The mended proposal keeps the
        id, and its cost contains the cost of ``proposal``. Raises ProposeFailed when a round was spent in vain;
        its cost is the round's alone.
        """
        ...


@runtime_checkable
class Finite(Protocol):
    """A proposer whose list has an end that is known."""

    def left(self, preset: str) -> int:
        """Proposals still to come under ``preset``."""
        ...


class ProposeFailed(Exception):
    """An attempt that gave no usable proposal. It is recorded as an attempt that ended at stage ``propose``."""

    def __init__(self, reason: str, cost: Cost | None = None, replies: tuple[Said, ...] = ()) -> None:
        super().__init__(reason)
        self.reason, self.cost, self.replies = reason, cost or Cost(), replies


def proposal_id(number: int, title: str) -> str:
    """``007-warm-up-longer``: unique by the attempt's number, and fit for a branch, a folder and a command line."""
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:40].strip("-")
    return f"{number:03d}-{slug or 'untitled'}"


def tidy_title(text: str) -> str:
    """A title as one line of at most 72 characters, as a commit's subject wants it."""
    line = one_line(text, 72)
    return (line if line.endswith("...") else line.rstrip(".")) or "Untitled change"


def add_costs(first: Cost, second: Cost) -> Cost:
    """The sum of two costs, field by field."""
    return Cost(first.usd + second.usd, first.prompt_tokens + second.prompt_tokens,
                first.completion_tokens + second.completion_tokens, first.calls + second.calls,
                first.seconds + second.seconds)
