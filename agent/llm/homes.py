"""Which file an edit means, where its path is missing or wrong. Pure: texts in, a path out; nothing is guessed.

A path that is known stays. One that is not is taken for the editable file whose path ends alike (``/repo/train.py``,
``fit.py``), or for the only one that has the quoted lines, as they stand, in exactly one place. A path that is known,
but whose file has nothing like the quoted lines, gives way to that only other one as well. Paths that may not be
touched are never turned into others: an edit of a protected file must be refused.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Collection, Mapping

from agent import matching
from agent.scattered import code

ENOUGH = 8
"""Characters, without white space, that a quoted text must have to say which file is meant."""
UNLIKE = 0.75
"""A file whose nearest line is less like the quoted one than this ratio has nothing like it."""
SAME_FILE = 0.6
"""Share of lines in common from which a whole text is a new version of a file."""


def home(path: str, search: str, files: Mapping[str, str], hidden: Collection[str] = ()) -> str:
    """The path of the file that an edit of ``search`` means; ``path`` itself where that is known, or not to be told.

    ``files``: editable texts by path; ``hidden``: other paths that exist.
    """
    path = tidy(path)
    if path in hidden or not search.strip():
        return path
    if path in files:
        if _enough(search) and not _has_anything_like(files[path], search):
            others = [name for name in files if name != path and matching.places(files[name], search) == 1]
            return others[0] if len(others) == 1 else path
        return path
    alike = [name for name in files if name.endswith(f"/{path}") or path.endswith(f"/{name}")]
    if path and len(alike) == 1 and not any(name.endswith(f"/{path}") for name in hidden):
        return alike[0]
    placed = [name for name in files if matching.places(files[name], search) > 0]
    if len(placed) == 1 and _enough(search) and matching.places(files[placed[0]], search) == 1:
        return placed[0]
    if not path and len(files) == 1:
        return next(iter(files))
    return path


def tidy(path: str) -> str:
    """A path without what is often written around it: quotes, ``./``, backslashes."""
    path = path.strip().strip("`'\"*").strip()
    if re.fullmatch(r"[\w.\\-]+", path):
        path = path.replace("\\", "/")
    return path.removeprefix("./")


def version_of(text: str, files: Mapping[str, str]) -> str:
    """The path of the only file that ``text`` is a new version of, or an empty string."""
    wanted = [line.strip() for line in text.split("\n") if line.strip()]
    alike = []
    for path, old in files.items():
        lines = [line.strip() for line in old.split("\n") if line.strip()]
        if difflib.SequenceMatcher(None, lines, wanted, autojunk=False).ratio() >= SAME_FILE:
            alike.append(path)
    return alike[0] if len(alike) == 1 else ""


def is_program(text: str) -> bool:
    """Is ``text`` Python of more than one statement?"""
    try:
        return len(ast.parse(text).body) > 1
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def definitions(text: str, files: Mapping[str, str], path: str = "") -> list[tuple[str, str, str]]:
    """(path, old source, new source) of each function or class in ``text``, where it is made of nothing but new
    versions of ones that stand at the top of a file; empty otherwise. ``path``: the file, where that is known."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found: list[tuple[str, str, str]] = []
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return []
        homes = [(name, old) for name in ([path] if path else files)
                 if (old := _definition(files[name].replace("\r\n", "\n"), node.name, type(node)))]
        if len(homes) != 1 or not homes[0][1]:
            return []
        found.append((*homes[0], _source(text, node)))
    return found if len({(name, old) for name, old, _ in found}) == len(found) else []


def _definition(text: str, name: str, kind: type[ast.AST]) -> str:
    """Source of the only definition of ``name`` at the top of a file; empty where there is none or more."""
    try:
        nodes = [node for node in ast.parse(text).body if isinstance(node, kind) and getattr(node, "name", "") == name]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    source = _source(text, nodes[0]) if len(nodes) == 1 else ""
    return source if source and text.count(source) == 1 else ""


def _source(text: str, node: ast.AST) -> str:
    """Lines of a definition with its decorators."""
    decorators = getattr(node, "decorator_list", [])
    first = min([getattr(node, "lineno", 1), *(one.lineno for one in decorators)])
    return "\n".join(text.split("\n")[first - 1:getattr(node, "end_lineno", first)])


def _enough(search: str) -> bool:
    return len("".join(search.split())) >= ENOUGH


def _has_anything_like(text: str, search: str) -> bool:
    """Does the text hold a line like the longest one of ``search``?"""
    wanted = max((line.strip() for line in search.split("\n")), key=len)
    if wanted in text:
        return True
    lines = {line.strip() for line in text.split("\n")}
    return bool(difflib.get_close_matches(wanted, lines, n=1, cutoff=UNLIKE))


def home_of_lines(path: str, lines: list[str], files: Mapping[str, str], hidden: Collection[str] = ()) -> str:
    """The path of the file that a diff means, which has all the ``lines`` that it takes out; ``path`` where that is
    known or not to be told."""
    if path in files or path in hidden:
        return path
    alike = [name for name in files if path and (name.endswith(f"/{path}") or path.endswith(f"/{name}"))]
    if len(alike) == 1 and not any(name.endswith(f"/{path}") for name in hidden):
        return alike[0]
    wanted = {code(line) for line in lines if code(line)}
    having = [name for name, text in files.items() if wanted <= {code(line) for line in text.split("\n")}]
    enough = sum(map(len, wanted)) >= ENOUGH
    return having[0] if len(having) == 1 and enough else path
