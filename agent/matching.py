"""Find the one place that an edit means, and replace it there; or say where it nearly is.

Tiers, each tried only when the one before found nothing: the exact text; equal but for trailing white space; equal
but for one uniform shift of indentation (the replacement is shifted alike); equal but for spacing inside the lines,
comments and typographic quotes; scattered.py, for quotes that leave lines out; and mpatch's fuzzy search at 0.87 (at
0.7 an unrelated block scored 0.695), with its answer checked. In the last three what is taken out must still be there
but for comments and spacing: a line that the file does not have is no line to replace. Tabs quoted as spaces, or the
other way round, are put right first.
No place, or more than one, is a refusal with the nearest real lines, never a guess. Lines that an edit only quotes
keep the file's own text.

All texts here have ``\\n`` line ends; ``plain`` and ``with_endings`` carry a file there and back.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal

import mpatch

from agent import scattered
from agent.policy import PatchRefused
from agent.scattered import code

Tier = Literal["exact", "rstrip", "reindent", "spacing", "scattered", "fuzzy"]
FUZZ = 0.87
CLEAR = 0.03
"""A fuzzy place must be more like the search text than any other by this ratio."""


def plain(text: str) -> str:
    """The text with every CRLF as LF."""
    return text.replace("\r\n", "\n")


def with_endings(new: str, original: str) -> str:
    """``new`` (LF) with the line ends of ``original``: kept lines keep theirs, new ones get the commoner one."""
    windows, every = original.count("\r\n"), original.count("\n")
    if windows in (0, every):
        return new.replace("\n", "\r\n") if windows else new
    common = "\r\n" if windows * 2 > every else "\n"
    old, lines = original.split("\n"), new.split("\n")
    ends = [common] * len(lines)
    pairs = difflib.SequenceMatcher(None, plain(original).split("\n"), lines, autojunk=False).get_matching_blocks()
    for a, b, size in pairs:
        ends[b:b + size] = ["\r\n" if line.endswith("\r") else "\n" for line in old[a:a + size]]
    return "".join(line + end for line, end in zip(lines[:-1], ends, strict=False)) + lines[-1]


def replace(text: str, search: str, replacement: str, path: str) -> tuple[str, Tier]:
    """``text`` with the one place that reads ``search`` replaced, and the tier that found it. Raises PatchRefused."""
    found = [at for at in _occurrences(text, search) if _whole_words(text, at, at + len(search))]
    if len(found) == 1 and not _lost_indentation(text, found[0], search, replacement):
        return text[:found[0]] + replacement + text[found[0] + len(search):], "exact"
    if len(found) > 1:
        raise _ambiguous(text, path, [text.count("\n", 0, at) for at in found])
    try:
        return apply_hunk(text, hunk_of(search, replacement), path)
    except PatchRefused:
        parts = scattered.segments(search, replacement)
        if not parts:
            raise
    for old, new in parts:
        text = replace(text, old, new, path)[0]
    return text, "scattered"


def _lost_indentation(text: str, at: int, search: str, replacement: str) -> bool:
    """Whether one quoted line begins behind its indentation, and so do lines that are to follow it: then they want the
    same shift, which an exact replacement would not give them."""
    before = text[text.rfind("\n", 0, at) + 1:at]
    later = [line for line in replacement.strip("\n").split("\n")[1:] if line.strip()]
    return bool(before) and not before.strip() and len(search.strip().split("\n")) == 1 and any(
        not line.startswith(before) for line in later)


def places(text: str, search: str) -> int:
    """In how many places ``text`` has ``search``, by the first tier short of fuzzy that finds it."""
    found = sum(1 for at in _occurrences(text, search) if _whole_words(text, at, at + len(search))) if search else 0
    lines, block = text.split("\n"), _lines(search)
    for tier in ("exact", "rstrip", "reindent", "spacing"):
        if found or not block:
            return found
        found = sum(1 for start in range(len(lines) - len(block) + 1) if _fits(lines, start, block, tier))
    return found


def hunk_of(search: str, replacement: str) -> list[str]:
    """A search/replace pair as diff lines (`` ``, ``-``, ``+``), so that what both quote stays the file's own."""
    old, new = _lines(search), _lines(replacement)
    hunk: list[str] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            hunk += [f" {line}" for line in old[a:b]]
        else:
            hunk += [f"-{line}" for line in old[a:b]] + [f"+{line}" for line in new[c:d]]
    return hunk


def apply_hunk(text: str, hunk: list[str], path: str, hint: int | None = None) -> tuple[str, Tier]:
    """``text`` with diff lines applied. ``hint`` (line index from 0) settles a tie between exact places, no more.

    Raises PatchRefused when the old side of the hunk is nowhere, or in several places.
    """
    block = [line[1:] for line in hunk if line[:1] in (" ", "-")]
    if not any(line.strip() for line in block):
        raise PatchRefused("match", f"{path}: the edit quotes no line of the file, so its place is not known.")
    lines = text.split("\n")
    for tier in ("exact", "rstrip", "reindent", "spacing"):
        starts = [start for start in range(len(lines) - len(block) + 1) if _fits(lines, start, block, tier)]
        if len(starts) > 1 and tier == "exact" and hint in starts:
            starts = [start for start in starts if start == hint]
        if len(starts) > 1:
            raise _ambiguous(text, path, starts)
        if starts:
            rebuilt = _rebuilt(lines, starts[0], hunk, block, tier)
            if rebuilt is not None:
                return "\n".join(rebuilt), tier
    for other in scattered.retabbed(lines, hunk):
        try:
            return apply_hunk(text, other, path, hint)
        except PatchRefused:
            continue
    found = scattered.apply(lines, hunk)
    if found is not None:
        return "\n".join(found), "scattered"
    return _fuzzy(text, hunk, block, path), "fuzzy"


def nearest(text: str, block: list[str], places: int = 2) -> tuple[str, ...]:
    """The real lines most like ``block``, with line numbers, best place first."""
    wanted = [line for line in block if line.strip()][:30]
    lines = text.split("\n")
    shown: list[str] = []
    taken: list[int] = []
    for _, start in _ranked(lines, wanted):
        if all(abs(start - other) >= len(wanted) for other in taken):
            taken.append(start)
            shown += [f"{number:5d} | {line}"[:240]
                      for number, line in enumerate(lines[start:start + len(wanted)], start + 1)]
        if len(taken) == places:
            break
    return tuple(shown)


def _occurrences(text: str, search: str) -> list[int]:
    """Every index at which ``search`` starts, overlapping ones too."""
    found, at = [], text.find(search)
    while at >= 0:
        found.append(at)
        at = text.find(search, at + 1)
    return found


def _whole_words(text: str, start: int, end: int) -> bool:
    """Does the place begin and end between words? ``x = 1`` does not mean the start of ``x = 10`` or ``x = 1.5``."""
    def joined(at: int) -> bool:
        if not 0 < at < len(text):
            return False
        number = re.compile(r"\d\.\d")
        return bool(re.match(r"\w\w", text[at - 1:at + 1])) or any(
            number.match(text[max(0, at - back):at - back + 3]) for back in (1, 2))

    return not joined(start) and not joined(end)


def _lines(text: str) -> list[str]:
    """Lines of an edit without blank ones at its ends: a model adds and drops those freely."""
    lines = text.split("\n") if text.strip() else []
    while lines and not lines[0].strip():
        lines.pop(0)
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _indent(line: str) -> str:
    return line[:len(line) - len(line.lstrip(" \t"))]


def _fits(lines: list[str], start: int, block: list[str], tier: str) -> bool:
    here = lines[start:start + len(block)]
    if tier == "exact":
        return here == block
    if tier == "rstrip":
        return all(a.rstrip() == b.rstrip() for a, b in zip(here, block, strict=True))
    if tier == "spacing":
        pairs = [(code(a), code(b)) for a, b in zip(here, block, strict=True)]
        return any(b for _, b in pairs) and all(a == b for a, b in pairs)
    if any(a.strip() != b.strip() for a, b in zip(here, block, strict=True)):
        return False
    return _shift(here, block) is not None


def _shift(here: list[str], block: list[str]) -> tuple[str, str] | None:
    """(take away, put in front) that turns the block's indentation into the file's on every line, or None."""
    pairs = [(_indent(a), _indent(b)) for a, b in zip(here, block, strict=True) if a.strip()]
    real, quoted = pairs[0]
    if real.endswith(quoted):
        less, more = "", real[:len(real) - len(quoted)]
    elif quoted.endswith(real):
        less, more = quoted[:len(quoted) - len(real)], ""
    else:
        return None
    return (less, more) if all(a == _shifted(b, less, more) for a, b in pairs) else None


def _shifted(text: str, less: str, more: str) -> str | None:
    return more + text.removeprefix(less) if text.startswith(less) else None


def _rebuilt(lines: list[str], start: int, hunk: list[str], block: list[str], tier: str) -> list[str] | None:
    """The file's lines with the hunk applied at ``start``: context from the file, new lines shifted like the block.
    None when the block is not shifted alike, or a new line is too far left to be shifted."""
    here = lines[start:start + len(block)]
    shift = _shift(here, block) if tier in ("reindent", "spacing") else ("", "")
    if shift is None:
        return None
    less, more = shift
    if tier == "spacing":
        hunk = scattered.plain_quotes(hunk, block, here)
    new: list[str] = []
    at = 0
    for line in hunk:
        if line.startswith("+"):
            shifted = _shifted(line[1:], less, more) if line[1:].strip() else line[1:]
            if shifted is None:
                return None
            new.append(shifted)
            continue
        if line.startswith(" "):
            new.append(here[at])
        at += 1
    return [*lines[:start], *new, *lines[start + len(block):]]


def _fuzzy(text: str, hunk: list[str], block: list[str], path: str) -> str:
    """mpatch's answer, when it is clear. One line alone is too little to go by: ``beta1 = 0.9`` is like ``beta2``."""
    missing = PatchRefused("match", f"{path} has no such lines; the nearest are:", nearest(text, block))
    if sum(1 for line in block if line.strip()) < 2:
        raise missing
    result = mpatch.Patch("file", [mpatch.Hunk(hunk)]).apply_to_content(text, fuzz_factor=FUZZ)
    status = list(result.report)
    if not result.report.all_applied_cleanly or len(status) != 1 or status[0].location_start is None:
        raise missing
    start, length = status[0].location_start, status[0].location_length or len(block)
    there = {code(line) for line in text.split("\n")[max(start - 1, 0):start + length]}
    if any(line.startswith("-") and code(line[1:]) not in there for line in hunk if line[1:].strip()):
        raise missing
    if not scattered.settled(text.split("\n")[max(start - 1, 0):start + length], hunk) or not _as_said(
            text, result.new_content, hunk):  # mpatch may keep a line that was to go, or put a new one elsewhere
        raise missing
    wanted = [line for line in block if line.strip()][:30]
    ranked = _ranked(text.split("\n"), wanted)
    inside = max((score for score, at in ranked if start - 1 <= at <= start + length), default=0.0)
    rivals = [at for score, at in ranked if not start - len(wanted) < at < start + length and score > inside - CLEAR]
    if rivals:
        raise _ambiguous(text, path, sorted([start, rivals[0]]))
    return result.new_content


def _as_said(old: str, new: str, hunk: list[str]) -> bool:
    """Are the lines of ``new`` those of ``old`` less the hunk's old ones, plus its new ones, and does each new one have
    the neighbours that the hunk gives it, as far as the file has them?"""
    def counted(lines: Iterable[str]) -> Counter[str]:
        return Counter(code(line) for line in lines if line.strip())

    gone = counted(line[1:] for line in hunk if line.startswith("-"))
    come = counted(line[1:] for line in hunk if line.startswith("+"))
    made = [code(line) for line in new.split("\n") if line.strip()]
    side = [line for line in hunk if line[0] in " +" and line[1:].strip()]
    near = [(code(a[1:]), code(b[1:])) for a, b in itertools.pairwise(side) if "+" in (a[0], b[0])]
    return counted(new.split("\n")) + gone == counted(old.split("\n")) + come and all(
        pair in itertools.pairwise(made) for pair in near if set(pair) <= set(made))


def _ranked(lines: list[str], wanted: list[str], keep: int = 12) -> list[tuple[float, int]]:
    """(likeness 0..1, first line) of the windows most like ``wanted``, best first; indentation does not count."""
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2("\n".join(line.strip() for line in wanted))
    best: list[tuple[float, int]] = []
    stripped = [line.strip() for line in lines]
    for start in range(max(1, len(lines) - len(wanted) + 1)):
        if not stripped[start]:
            continue
        worst = best[-1][0] if len(best) == keep else 0.0
        matcher.set_seq1("\n".join(stripped[start:start + len(wanted)]))
        if matcher.real_quick_ratio() > worst and matcher.quick_ratio() > worst:
            best = sorted([*best, (matcher.ratio(), start)], key=lambda pair: (-pair[0], pair[1]))[:keep]
    return best


def _ambiguous(text: str, path: str, starts: list[int]) -> PatchRefused:
    lines = text.split("\n")
    shown = tuple(f"{start + 1:5d} | {lines[start]}"[:240] for start in starts[:5])
    return PatchRefused("match", f"{path} has these lines in {len(starts)} places; quote more lines about the one "
                                 "you mean:", shown)
