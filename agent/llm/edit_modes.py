"""Which form of edits to ask a model for, by what it did with the forms before. Pure: history in, mode out.

    json       JSON edits, each with the text to find: what strong models do in 92-100 % of replies
    anchored   JSON edits whose text to find is one of the file's own lines, pinned by the schema: for small models
    blocks     search/replace blocks in plain text: for models that do worse in JSON
    files      whole files: what a small model falls back to by itself; only where the source is short
    diff       a unified diff: the last, since counts and context are what models get wrong

Each mode starts with what is known of it in general (``EXPECTED``, counted as ``WEIGHT`` replies), and moves with the
model's own replies. The best is taken, so a mode is left as soon as the next one promises more: two bad replies in
``json`` from the start, more of them after good ones. What was measured elsewhere only sets the order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from agent.records import Proposal, Said

Mode = Literal["json", "anchored", "blocks", "files", "diff"]
EXPECTED: dict[Mode, float] = {"json": 0.95, "anchored": 0.8, "blocks": 0.7, "files": 0.55, "diff": 0.5}
"""Share of replies whose edits apply, before anything is known of the model; the order is docs/LOG.md's table."""
WEIGHT = 2.0
"""Replies that ``EXPECTED`` counts for."""
RECENT = 30
"""Replies of a mode that count: a prompt or a source that has grown since makes older ones misleading."""
LONGEST_FILES = 400
"""Lines of editable source up to which whole files are asked for."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One reply: the model that gave it, the mode it was asked in, and whether its edits applied."""

    model: str
    mode: Mode
    applied: bool


def choose_mode(tried: Iterable[Tried], model: str, possible: Sequence[Mode]) -> Mode:
    """The mode to ask ``model`` in: of ``possible`` (not empty) the one with the best rate, ties in its order."""
    rates = apply_rates(tried, model)
    return max(possible, key=lambda mode: rates[mode])


def apply_rates(tried: Iterable[Tried], model: str) -> dict[Mode, float]:
    """Expected share of replies that apply, 0..1, by mode."""
    known: dict[Mode, list[bool]] = {mode: [] for mode in EXPECTED}
    for one in tried:
        if one.model == model:
            known[one.mode].append(one.applied)
    return {mode: (sum(recent := known[mode][-RECENT:]) + WEIGHT * EXPECTED[mode]) / (len(recent) + WEIGHT)
            for mode in EXPECTED}


def possible_modes(files: Mapping[str, str], pinned: bool) -> tuple[Mode, ...]:
    """The modes that a source allows, in the order of preference. ``pinned``: its lines fit into a schema."""
    short = sum(text.count("\n") + 1 for text in files.values()) <= LONGEST_FILES
    return tuple(mode for mode in EXPECTED if (mode != "anchored" or pinned) and (mode != "files" or short))


def tried(proposals: Sequence[Proposal], most: int = 500) -> tuple[Tried, ...]:
    """The last ``most`` replies among ``proposals``, oldest first."""
    found: list[Tried] = []
    for proposal in reversed(proposals):
        if len(found) >= most:
            break
        found += [Tried(reply.model, mode, reply.placed)
                  for reply in reversed(proposal.replies) for mode in EXPECTED if mode == reply.mode]
    return tuple(found[:most][::-1])


def noted(proposal: Proposal, stage: Literal["patch", "preflight"], problem: str, placed: bool = True) -> Proposal:
    """``proposal`` with the fate of its last reply: refused at ``stage`` because of ``problem``; ``placed``: its edits
    had their place. What was written of that reply before is kept."""
    if not proposal.replies or proposal.replies[-1].stage:
        return proposal
    last = dataclasses.replace(proposal.replies[-1], stage=stage, problem=problem, placed=placed)
    return dataclasses.replace(proposal, replies=(*proposal.replies[:-1], last))


def accounts(proposal: Proposal) -> list[tuple[Said, Literal["applied", "repaired", "refused"]]]:
    """Each reply of a proposal with what became of it: applied, refused but mended by a later one, or refused."""
    last = len(proposal.replies) - 1
    return [(reply, "applied" if not reply.stage else "refused" if number == last else "repaired")
            for number, reply in enumerate(proposal.replies)]
