"""The places that an edit means when what it quotes has gaps, stale context, or another kind of white space. Pure.

``apply`` takes a hunk as a list of lines, not as one block. Each run of lines to take out must stand in the file in one
place, in the hunk's order, equal but for spacing and comments; at least half of the lines that are only quoted must
stand between them in order; and new lines go where the lines they replace were, or after a quoted line whose successor
in the hunk is its successor in the file. Anything else is None: no place is guessed.
"""

from __future__ import annotations

import itertools
import re
import unicodedata

_TOKEN = re.compile(r"(\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*')|#.*|\s+")
_TYPOGRAPHIC = str.maketrans({
    "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u201f": '"', "\u2018": "'", "\u2019": "'", "\u201a": "'",
    "\u201b": "'", "\u2013": "-", "\u2014": "-", "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2026": "...",
    "\u2012": "-"} | dict.fromkeys("\u00a0\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200b))), " "))
_ELISION = re.compile(r"^\s*(?:#|//)?\s*\[?(?:\.\.\.|\u2026)[^\n]*$")
ENOUGH = 6
"""Characters of code that at least one line of a run to take out must have."""


def code(line: str) -> str:
    """A line without its comment and its spacing, with plain quotes and dashes; a ``#`` in a string is no comment.
    A line that is only a comment is the comment's words."""
    bare = ascii_quotes(line)
    kept = _TOKEN.sub(lambda found: found[1] or "", bare)
    return kept or "".join(bare.split())


def ascii_quotes(line: str) -> str:
    """Typographic quotes, dashes and spaces as a keyboard has them."""
    return unicodedata.normalize("NFC", line).translate(_TYPOGRAPHIC)


def plain_quotes(hunk: list[str], block: list[str], here: list[str]) -> list[str]:
    """``hunk`` with plain quotes in its new lines, where the old ones are plain in the file and were not as quoted."""
    odd = {letter for line in block for letter in line if letter != ascii_quotes(letter)}
    odd -= {letter for line in here for letter in line}
    if not odd:
        return hunk
    return ["".join(ascii_quotes(letter) if letter in odd else letter for letter in line)
            if line.startswith("+") else line for line in hunk]


def segments(search: str, replacement: str) -> list[tuple[str, str]]:
    """The pieces between lines of ``...`` in both texts, those that differ; empty unless both have as many."""
    old, new = _split(search), _split(replacement)
    if len(old) != len(new) or len(old) < 2:
        return []
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a.rstrip() != b.rstrip()]
    return pairs if all(a.strip() for a, _ in pairs) else []


def _split(text: str) -> list[str]:
    parts: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _ELISION.match(line):
            parts.append([])
        else:
            parts[-1].append(line)
    return ["\n".join(part) for part in parts]


def retabbed(lines: list[str], hunk: list[str]) -> list[list[str]]:
    """``hunk`` in the file's kind of indentation, for each width that a tab may have had; empty where it is the same
    kind already, or the file mixes them."""
    file_tabs = {line[0] == "\t" for line in lines if line[:1] in ("\t", " ") and line.strip()}
    hunk_tabs = {line[1] == "\t" for line in hunk if line[1:2] in ("\t", " ") and line[1:].strip()}
    if len(file_tabs) != 1 or len(hunk_tabs) != 1 or file_tabs == hunk_tabs:
        return []
    found = []
    for width in (4, 2, 8):
        made = [_with_tabs(line, width) if True in file_tabs else _with_spaces(line, width) for line in hunk]
        if None not in made:
            found.append([line for line in made if line is not None])
    return found


def _with_tabs(line: str, width: int) -> str | None:
    indent = len(line[1:]) - len(line[1:].lstrip(" "))
    if not line[1:].strip():
        return line
    return None if indent % width else f"{line[0]}{chr(9) * (indent // width)}{line[1 + indent:]}"


def _with_spaces(line: str, width: int) -> str:
    indent = len(line[1:]) - len(line[1:].lstrip("\t"))
    return f"{line[0]}{' ' * (indent * width)}{line[1 + indent:]}"


def settled(lines: list[str], hunk: list[str]) -> bool:
    """Whether every new line that replaces none has a certain place in ``lines``: the quoted lines before and after it,
    where the file has both, follow each other there."""
    keys = [key for line in lines if (key := code(line))]
    steps = [line for line in hunk if line[1:].strip()]
    for first, last in ((match.start(), match.end()) for match in re.finditer(r"\++", "".join(s[0] for s in steps))):
        if first > 0 and last < len(steps) and steps[first - 1][0] == steps[last][0] == " ":
            before, after = code(steps[first - 1][1:]), code(steps[last][1:])
            if before in keys and after in keys and (before, after) not in itertools.pairwise(keys):
                return False
    return True


def apply(lines: list[str], hunk: list[str]) -> list[str] | None:
    """The file's ``lines`` with the hunk's changes made, or None where their places are not certain."""
    keys = [code(line) for line in lines]
    steps = [line for line in hunk if line[1:].strip() or line.startswith("+")]
    if not any(line.startswith("-") and len(code(line[1:])) >= ENOUGH for line in steps) and any(
            line.startswith("-") for line in steps):
        return None
    where = _places(keys, steps)
    if where is None:
        return None
    context = [at for line, at in zip(steps, where, strict=True) if line.startswith(" ")]
    if 2 * sum(at is not None for at in context) < len(context):
        return None
    return _made(lines, steps, where)


def _places(keys: list[str], steps: list[str]) -> list[int | None] | None:
    """Line of the file for each step, None for new and for stale ones; or None where a run to take out is not in one
    place, or out of order."""
    where: list[int | None] = [None] * len(steps)
    at = 0
    for first, last in _runs(steps):
        run = [code(line[1:]) for line in steps[first:last]]
        starts = [start for start in range(len(keys)) if _run_at(keys, start, run)]
        if len(starts) > 1:
            near = _neighbours(steps, first, last)
            starts = [start for start in starts if near and all(
                key in (_next(keys, start - 1, -1), _next(keys, (_run_at(keys, start, run) or [start])[-1] + 1, 1))
                for key in near)]
        if len(starts) != 1 or starts[0] < at:
            return None
        found = _run_at(keys, starts[0], run)
        assert found is not None
        where[first:last] = found
        at = found[-1] + 1
    fixed = [place for place in where if place is not None]
    low = 0
    for number, line in enumerate(steps):
        if where[number] is not None:
            low = (where[number] or 0) + 1
        elif line.startswith(" "):
            high = next((place for place in fixed if place >= low), len(keys))
            spots = [place for place in range(low, high) if keys[place] == code(line[1:])]
            if len(spots) == 1 or (spots and number and where[number - 1] is not None and spots[0] == low):
                where[number] = spots[0]
                low = spots[0] + 1
    return where


def _runs(steps: list[str]) -> list[tuple[int, int]]:
    """(first, last + 1) of each run of lines to take out."""
    marks = "".join(line[0] for line in steps)
    return [match.span() for match in re.finditer(r"-+", marks)]


def _run_at(keys: list[str], start: int, run: list[str]) -> list[int] | None:
    """The lines from ``start`` that read ``run``, blank lines between them left out; None where they do not."""
    found: list[int] = []
    at = start
    for key in run:
        while found and at < len(keys) and not keys[at]:
            at += 1
        if at >= len(keys) or keys[at] != key:
            return None
        found.append(at)
        at += 1
    return found


def _neighbours(steps: list[str], first: int, last: int) -> list[str]:
    """Keys of the quoted lines just before and just after a run, as far as there are."""
    before = next((code(line[1:]) for line in reversed(steps[:first]) if line[0] != "+"), None)
    after = next((code(line[1:]) for line in steps[last:] if line[0] != "+"), None)
    return [key for key in (before, after) if key]


def _next(keys: list[str], at: int, step: int) -> str:
    """The key of the first line that is not blank from ``at`` on."""
    while 0 <= at < len(keys) and not keys[at]:
        at += step
    return keys[at] if 0 <= at < len(keys) else ""


def _made(lines: list[str], steps: list[str], where: list[int | None]) -> list[str] | None:
    """The lines with the steps made; None where a new line has no certain place or indentation."""
    gone = {at for line, at in zip(steps, where, strict=True) if line.startswith("-") and at is not None}
    added: dict[int, list[str]] = {}
    for number, line in enumerate(steps):
        if not line.startswith("+"):
            continue
        before = next((at for at in range(number - 1, -1, -1) if steps[at][0] != "+"), None)
        after = next((at for at in range(number + 1, len(steps)) if steps[at][0] != "+"), None)
        anchor = _anchor(lines, steps, where, before, after)
        if anchor is None:
            return None
        place, model = anchor
        real, quoted = _indent(lines[where[model] or 0]), _indent(steps[model][1:])
        text = _moved(line[1:], real, quoted)
        if text is None:
            return None
        added.setdefault(place, []).append(text)
    made: list[str] = list(added.get(0, []))
    for number, text in enumerate(lines):
        made += [] if number in gone else [text]
        made += added.get(number + 1, [])
    return made


def _anchor(lines: list[str], steps: list[str], where: list[int | None], before: int | None,
            after: int | None) -> tuple[int, int] | None:
    """(number of file lines above a new line, step whose indentation it shares), or None where that is not certain."""
    one = None if before is None else where[before]
    two = None if after is None else where[after]
    if one is not None and before is not None and steps[before][0] == "-":
        return one + 1, before
    if two is not None and after is not None and steps[after][0] == "-":
        return two, after
    if one is not None and two is not None:
        between = lines[one + 1:two]
        return (one + 1, before or 0) if not any(text.strip() for text in between) else None
    if one is not None and before is not None and after is None:
        return one + 1, before
    if two is not None and after is not None and before is None:
        return two, after
    return None


def _moved(text: str, real: str, quoted: str) -> str | None:
    """A new line with its indentation moved as its neighbour's was from ``quoted`` to ``real``."""
    if not text.strip() or real == quoted:
        return text
    if text.startswith(quoted):
        return real + text.removeprefix(quoted)
    return None


def _indent(line: str) -> str:
    return line[:len(line) - len(line.lstrip(" \t"))]
