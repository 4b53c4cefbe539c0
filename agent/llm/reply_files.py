"""Parts of a reply that name files: whole files in fences, headers of a diff, the path above an edit, the edit's text.

Pure. What a text means is settled by the files that it must fit, never by what is likely; what is not settled is left
to be refused.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Collection, Mapping

from agent import matching
from agent.llm.homes import definitions, home, home_of_lines, is_program, tidy, version_of
from agent.records import Edit

FENCE = re.compile(
    r"^[ \t]*(?P<ticks>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^[ \t]*(?P=ticks)[ \t]*$", re.DOTALL | re.MULTILINE)
PATH = re.compile(r"[\w./\\-]+\.\w+")
OTHER = {"bash", "sh", "shell", "console", "json", "diff", "patch", "text", "txt", "toml", "yaml", "output", "markdown"}
"""Marks of fences that hold no file."""
_ELISION = re.compile(
    r"^[ \t]*(?:#|//)[ \t]*(?:\.\.\.|\u2026)|^[ \t]*(?:#|//|\.\.\.).*(?:existing code|rest of|unchanged|"
    r"remains? the same|same as before|omitted)|^[ \t]*(?:#|//)?[ \t]*\((?:rest of|existing|unchanged|other)[^\n]*\)$",
    re.IGNORECASE | re.MULTILINE)
_HEADER = re.compile(
    r"^--- +(?P<old>\S+)[^\n]*\n\+\+\+ +(?P<new>\S+)[^\n]*\n|^\+\+\+ +(?P<only>\S+)[^\n]*\n", re.MULTILINE)


def leaves_out(search: str, new: str) -> bool:
    """Does ``new`` have a line that stands for others, and that was not quoted?"""
    quoted = {line.strip() for line in search.split("\n")}
    return any(_ELISION.match(line) and line.strip() not in quoted for line in new.split("\n"))


def whole_files(
    text: str, files: Mapping[str, str], hidden: Collection[str], cut: bool = False,
) -> tuple[Edit, ...] | str:
    """Whole files in fences, as edits that replace all of the old text; also functions and classes whose names say
    what they replace. Or why there are none. A reply that is nothing but a program is a fence; not so when it was cut.
    """
    versions: dict[str, list[str]] = {}
    pieces: list[Edit] = []
    added: list[Edit] = []
    short: dict[str, str] = {}
    end = 0
    fences = [(match["info"], match["body"], match.start(), match.end()) for match in FENCE.finditer(text)]
    if not fences and not cut and "```" not in text and is_program(text):
        fences = [("", f"{text}\n", 0, 0)]
    for info, body, start, stop in fences:
        path = _named(info, text[end:start], body, files, hidden)
        end = stop
        if info.strip().split(" ")[0].lower() in OTHER:
            continue
        if path in hidden:
            pieces.append(Edit(path, "", body))
            continue
        named = path
        if path not in files:
            path = version_of(body, files) or (next(iter(files)) if len(files) == 1 and not path else "")
        old = files.get(path, "")
        part = not old or 2 * body.count("\n") < old.count("\n")
        found = definitions(body, files, path if old else "") if part else []
        if not old and not found:
            if named:
                added.append(Edit(named, "", _without_name(body, "")))
            continue
        if _ELISION.search(body) and leaves_out(old, body):
            short[path] = (f"The new text of {path} leaves parts out. Use search/replace edits for the changed lines "
                           "only.")
        elif found:
            pieces += [Edit(name, before, after) for name, before, after in found]
        elif part:
            short[path] = f"The fence for {path} holds less than half of the file. Use search/replace edits instead."
        else:
            versions.setdefault(path, []).append(_without_name(body, old))
    return _settled(versions, pieces, added, short, files)


def _settled(versions: Mapping[str, list[str]], pieces: list[Edit], added: list[Edit], short: Mapping[str, str],
             files: Mapping[str, str]) -> tuple[Edit, ...] | str:
    """One version a file, and nothing that was only shown in part; new files only beside a change of an old one, since
    nothing would read them."""
    edits: list[Edit] = []
    for path, bodies in versions.items():
        changed = list(dict.fromkeys(body for body in bodies if body.rstrip() != files[path].rstrip())) or bodies[:1]
        if len(changed) > 1:
            return f"There are {len(changed)} versions of {path}: give one."
        edits.append(Edit(path, files[path], changed[0]))
    missing = [said for path, said in short.items() if path not in versions]
    if missing:
        return missing[0]
    edits += [piece for piece in dict.fromkeys(pieces) if piece.path not in versions]
    edits += added if edits else []
    return tuple(edits) or "The reply holds no edits. Answer in the form that was asked for."


def _without_name(body: str, old: str) -> str:
    """``body`` without a first line that only names the file."""
    first, _, rest = body.partition("\n")
    named = re.fullmatch(r"[#/\s]*[\w./-]+\.\w+\s*", first)
    return rest if named and first.strip() != old.partition("\n")[0].strip() else body


def _named(info: str, above: str, body: str, files: Mapping[str, str], hidden: Collection[str]) -> str:
    """The path that a fence is headed by: on its own line, above it, or in its first line."""
    return (path_above(info, files, hidden) or path_above(above, files, hidden)
            or path_above(body.split("\n", 1)[0].lstrip("#/ "), files, hidden))


def path_above(text: str, files: Mapping[str, str], hidden: Collection[str] = ()) -> str:
    """The known path (or, on a line of its own, any path) in the last three lines of ``text``."""
    for line in reversed(text.rstrip().splitlines()[-3:]):
        line = line.strip().strip("*#`: ")
        for word in PATH.findall(line):
            if tidy(word) in files or tidy(word) in hidden:
                return tidy(word)
        if PATH.fullmatch(line):
            return line
    return ""


def with_headers(diff: str, files: Mapping[str, str], hidden: Collection[str]) -> str:
    """``diff`` with headers that name files there are, as far as its lines say which. Empty where a hunk has none."""
    found = list(_HEADER.finditer(diff))
    if not found:
        path = home_of_lines("", _old_lines(diff), files, hidden)
        return f"--- a/{path}\n+++ b/{path}\n{_marked(diff)}" if path else ""
    parts = [diff[:found[0].start()]]
    for match, following in zip(found, [*found[1:], None], strict=True):
        body = diff[match.end():following.start() if following else len(diff)]
        old, new = match["old"] or match["only"], match["new"] or match["only"]
        if "/dev/null" not in (old, new):
            path = _bare(new, files)
            known = home_of_lines(path, _old_lines(body), files, hidden)
            if known != path or not match["old"] or _bare(old, files) == path:
                old, new = f"a/{known}", f"b/{known}"
            body = _marked(body)
        parts.append(f"--- {old}\n+++ {new}\n{body}")
    return "".join(parts)


def _bare(name: str, files: Mapping[str, str]) -> str:
    """A name without git's ``a/`` and ``b/``."""
    name = tidy(name)
    return name if name in files else re.sub(r"^[abciow]/", "", name)


def _marked(body: str) -> str:
    """The hunks of one file with an ``@@`` above them, where the model left it out, and without the words below."""
    lines = body.rstrip().split("\n")
    while lines and lines[-1][:1] not in ("+", "-", " ", "@", "\\"):
        lines.pop()
    body = "\n".join(lines) + "\n"
    headed = re.search(r"^@@", body, re.MULTILINE)
    return body if headed else f"@@\n{body}"


def _old_lines(body: str) -> list[str]:
    """The lines that a diff takes out; those that it keeps where it takes none out."""
    lines = [line for line in body.split("\n") if not line.startswith(("---", "+++", "@@"))]
    taken = [line[1:] for line in lines if line[:1] == "-" and line[1:].strip()]
    return taken or [line for line in lines if line.strip() and line[:1] != "+"]


def meant(edit: Edit, files: Mapping[str, str], hidden: Collection[str]) -> Edit:
    """``edit`` with the path and the text that it can only mean, given the files; else as it is."""
    search, new = (part.replace("\r\n", "\n").replace("\r", "") for part in (edit.search, edit.replace))
    for mend in (_same, _unnumbered, _unescaped, html.unescape):
        quoted = mend(search)
        if mend is not _same and quoted == search:
            continue
        path = home(edit.path, quoted, files, hidden)
        if path in files and matching.places(files[path], quoted) == 1:
            return Edit(path, quoted, mend(new))
    return Edit(home(edit.path, search, files, hidden), search, new)


def _same(text: str) -> str:
    return text


def _unnumbered(text: str) -> str:
    """Without the line numbers that nearest lines are shown with."""
    lines = text.split("\n")
    numbered: Callable[[str], re.Match[str] | None] = re.compile(r"\s*\d+ ?[|:] ?").match
    if not all(numbered(line) for line in lines if line.strip()):
        return text
    return "\n".join(re.sub(r"^\s*\d+ ?(?:\| ?|: ?)", "", line) for line in lines)


def _unescaped(text: str) -> str:
    """With escapes that were escaped once too often."""
    return text.replace("\\n", "\n").replace("\\t", "\t").replace('\\"', '"') if "\n" not in text else text
