"""Notebook: what a campaign has learnt so far, in the words and the room of a briefing. Pure: history in, lines out.

Four pages: what was merged, near misses (looked better, not shown to be), what was refused with its effect, and what
failed with its cause. Each has a share of the room, and takes over what the pages before it leave. Where a page is
full, merges keep their largest and their newest, near misses their best, the others their newest.

More room would not help: what stands in the middle of some ten thousand tokens of history is read past.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from agent.briefing.codemap import tokens
from agent.briefing.directions import Tally
from agent.llm.quote import one_line
from agent.read import HistoryLine, is_near

TOKENS = 6000
"""What a notebook may come to."""
SHARES = (0.4, 0.2, 0.25, 0.15)
"""Of the room, for the pages in their order."""
NEAR_MISSES = 15


@dataclass(frozen=True, slots=True)
class Notebook:
    """Lines of each page, oldest first (near misses: best first), and how many attempts are on none."""

    merged: tuple[str, ...]
    near: tuple[str, ...]
    refused: tuple[str, ...]
    failed: tuple[str, ...]
    left_out: int


def make(history: Sequence[HistoryLine], direction: str, room: int) -> Notebook:
    """The notebook of ``history`` (oldest first) in at most ``room`` tokens. ``direction``: min or max."""
    sign = 1.0 if direction == "min" else -1.0
    merged: list[HistoryLine] = []
    failed: list[HistoryLine] = []
    passed: list[HistoryLine] = []
    near: list[tuple[int, HistoryLine]] = []
    """With their places in ``passed``."""
    for line in history:
        if line.outcome == "accepted":
            merged.append(line)
        elif line.fault and line.fault != "behind":
            failed.append(line)
        else:
            if is_near(line, sign):
                near.append((len(passed), line))
            passed.append(line)
    best = dict(heapq.nsmallest(NEAR_MISSES, near, key=lambda one: sign * (one[1].effect or 0.0)))
    # the room goes to the first in these orders; ten thousand refused ones are not looked through for a page of them
    newest = (passed[place] for place in reversed(range(len(passed))) if place not in best)
    preferred = (_largest_and_newest(merged, sign), best.values(), newest, reversed(failed))
    pages: list[list[HistoryLine]] = []
    over = 0.0
    for lines, share in zip(preferred, SHARES, strict=True):
        left = room * share + over
        kept = []
        for line in lines:
            text = told(line)
            left -= tokens(text) + 2
            if left < 0:
                break
            kept.append(line)
        over = max(left, 0.0)
        pages.append(kept)
    shown, kept_merges = sum(map(len, pages)), {line.id for line in pages[0]}
    return Notebook(
        merged=tuple(told(line) for line in merged if line.id in kept_merges), near=tuple(map(told, pages[1])),
        refused=tuple(map(told, reversed(pages[2]))), failed=tuple(map(told, reversed(pages[3]))),
        left_out=len(history) - shown)


def told(line: HistoryLine) -> str:
    """One attempt in one line: id, title, outcome and stage, effect with interval, reason."""
    effect = ""
    if line.effect is not None:
        interval = "" if line.low is None or line.high is None else f" [{line.low:+.3f}, {line.high:+.3f}]"
        effect = f", effect {line.effect:+.3f}{interval}"
    reason = f" ({one_line(line.reason, 160)})" if line.reason else ""
    where = f" [{one_line(line.direction, 40)}]" if line.direction else ""
    return f"{line.id} {one_line(line.title, 100)}{where}: {line.outcome} at {line.stage}{effect}{reason}"


def rates(tallies: Sequence[Tally]) -> list[str]:
    """A line for each direction that was tried, the best first. Gains stand as multiples of the mean: to more decimals
    than a briefing shows of effects, they could be climbed on."""
    tried = sorted((one for one in tallies if one.tried > 0.5), key=lambda one: (-one.rate, one.direction))
    runs = sum(one.runs for one in tried)
    mean = sum(one.gain for one in tried) / runs if runs else 0.0
    return [f"{one.direction}: {one.tried:.0f} tried, {one.kept:.0f} merged or nearly"
            + (f", {one.rate / mean:.1f} times the mean gain of a training run" if mean > 0 else "") for one in tried]


def _largest_and_newest(lines: Sequence[HistoryLine], sign: float) -> list[HistoryLine]:
    """By turns the newest and the one of the largest gain."""
    newest = list(reversed(lines))
    largest = sorted(lines, key=lambda line: sign * (line.effect or 0.0))
    return list({line.id: line for pair in zip(newest, largest, strict=True) for line in pair}.values())
