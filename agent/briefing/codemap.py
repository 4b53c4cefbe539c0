"""Codemap: which source a briefing shows whole, which as an outline, under a budget of tokens. Pure.

Files are ranked by how near they are to the training command: those that it names, then what they import, step by
step, then the shallow ones. The nearest are shown whole while they fit; of the rest an outline tells what is where
(classes, functions, constants, with line numbers), so that a model with tools can read on and one without knows what it
does not see. Read by regular expressions, not by the parser: a file for another Python has an outline too, and thirty
thousand lines take a few hundredths of a second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

BYTES_A_TOKEN = 3.0
"""Of source and of English: tokenizers in use make 3.2 to 4.2. The estimate is to err on the high side."""
OUTLINE_LINES = 80
"""Lines of one file's outline at most."""
WHOLE_SHARE = 0.75
"""Share of the room that whole files may take where not all of them fit; the rest is for outlines."""
CONSTANT_CHARACTERS = 60

_ENTRY = re.compile(
    r"^(?P<indent>[ \t]*)(?P<kind>(?:async )?def|class) (?P<rest>\w+[^\n]*)"
    r"|^(?P<name>[A-Za-z_]\w*)(?P<value>(?:: *[\w\[\], .|]+)? *= *[^=\s][^\n]*)", re.MULTILINE)
_IMPORT = re.compile(r"^[ \t]*(?:from +(?P<base>[.\w]+) +import +(?P<names>[^\n#]+)|import +(?P<plain>[^\n#]+))",
                     re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a briefing shows of a set of files."""

    whole: dict[str, str] = field(default_factory=dict)
    """Path -> text."""
    outlined: dict[str, str] = field(default_factory=dict)
    """Path -> outline."""
    omitted: tuple[str, ...] = ()
    """Paths only, for want of room."""


def tokens(text: str) -> int:
    """Tokens of ``text``, estimated from its UTF-8 bytes: no vocabulary of an endpoint's model is at hand."""
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_A_TOKEN)


def fit(files: Mapping[str, str], room: int, command: str = "", first: Collection[str] = ()) -> Shown:
    """What to show of ``files`` (path -> text) in ``room`` tokens. ``first``: paths of special interest, after those
    that ``command`` names."""
    sizes = {path: tokens(text) + tokens(path) + 6 for path, text in files.items()}  # with heading and fence
    near = distances(files, command, first)
    order = rank(files, command, first, near)
    if sum(sizes.values()) <= room:
        return Shown({path: files[path] for path in order})
    left = int(room * WHOLE_SHARE)
    shown, rest = Shown(), list[str]()
    for path in order:
        if sizes[path] <= left and (path in near or not rest):  # no far file in the place of a near one
            left -= sizes[path]
            shown.whole[path] = files[path]
        else:
            rest.append(path)
    left = room - sum(sizes[path] for path in shown.whole)
    left = max(0, left - sum(tokens(path) + 10 for path in rest))  # their names and fences
    omitted, half = [], left // 2
    for path in rest:
        text = outline(files[path])
        if tokens(text) > left - half:
            text = names(files[path])
        if tokens(text) <= left:
            left -= tokens(text)
            shown.outlined[path] = text
        else:
            omitted.append(path)
    return Shown(shown.whole, shown.outlined, tuple(omitted))


def outline(text: str) -> str:
    """Classes, functions and constants of a source file with their line numbers; of another file, its first lines."""
    count = text.count("\n") + (not text.endswith("\n"))
    lines, at, line = [f"{count} lines"], 0, 1
    for match in _ENTRY.finditer(text):
        line += text.count("\n", at, match.start())
        at = match.start()
        if match["kind"]:
            if len(match["indent"].expandtabs(4)) > 4:
                continue
            head = match["rest"].split(":")[0] if ")" not in match["rest"] else match["rest"].rpartition(")")[0] + ")"
            lines.append(f"{line}: {match['indent']}{match['kind']} {head}"[:160])
        elif len(match[0]) <= CONSTANT_CHARACTERS:
            lines.append(f"{line}: {match[0].rstrip()}")
    if len(lines) == 1:
        lines += [part[:120] for part in text.splitlines()[:3]]
    if len(lines) > OUTLINE_LINES:
        lines = [*lines[:OUTLINE_LINES], f"({len(lines) - OUTLINE_LINES} more)"]
    return "\n".join(lines)


def names(text: str) -> str:
    """The least outline: how long a file is, and its first classes and functions."""
    found = [match["rest"].split("(")[0].split(":")[0] for match in _ENTRY.finditer(text)
             if match["kind"] and not match["indent"]]
    return f"{text.count(chr(10))} lines: {', '.join(found[:12])}{', ...' if len(found) > 12 else ''}"


def rank(files: Mapping[str, str], command: str = "", first: Collection[str] = (),
         near: Mapping[str, int] | None = None) -> list[str]:
    """Paths, the nearest to ``command`` first. ``near``: their ``distances``, where they are known."""
    known = distances(files, command, first) if near is None else near
    return sorted(files, key=lambda path: (known.get(path, len(files) + 1), path.count("/"), path))


def distances(files: Mapping[str, str], command: str = "", first: Collection[str] = ()) -> dict[str, int]:
    """Imports between a file that ``command`` names and each that it leads to; those of ``first`` count as 1."""
    words = command.split()
    named = [path for path in files if path in words or path.removesuffix(".py").replace("/", ".") in words]
    distance = dict.fromkeys(named, 0) | {path: 1 for path in first if path in files and path not in named}
    modules = _modules(files)
    wave = list(distance)
    while wave:
        found = []
        for path in wave:
            for module in imports(files[path]):
                nearer = modules.get(module)
                if nearer is not None and nearer not in distance:
                    distance[nearer] = distance[path] + 1
                    found.append(nearer)
        wave = found
    return distance


def imports(text: str) -> list[str]:
    """Dotted names that a Python source imports; those of ``from a import b`` are ``a`` and ``a.b``."""
    found = []
    for match in _IMPORT.finditer(text):
        if match["plain"]:
            found += [part.split()[0] for part in match["plain"].split(",") if part.split()]
            continue
        base = match["base"].lstrip(".")
        names = [part.split()[0].strip("()") for part in match["names"].split(",") if part.split()]
        found += [base] if base else []
        found += [f"{base}.{name}" if base else name for name in names if name]
    return found


def _modules(files: Mapping[str, str]) -> dict[str, str]:
    """Dotted name -> path, for every tail of a path: ``src/line/fit.py`` is line.fit and fit too; the shallow win."""
    found: dict[str, str] = {}
    for path in sorted(files, key=lambda path: (path.count("/"), path)):
        if not path.endswith(".py"):
            continue
        parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
        for start in range(len(parts)):
            found.setdefault(".".join(parts[start:]), path)
    return found
