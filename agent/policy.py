"""What a patch may be: paths, modes, sizes and literals, checked on the tree that it came to.

The tree is the judge, not the patch text: whatever trick made it, ``git diff-tree --raw`` between base and candidate
shows every file and mode that differs. A patch that passes is still untrusted code; the box holds it. This keeps it
small, readable, and away from the files that make the number.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import math
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from agent import git, git_trees
from agent.config import FILE, Source
from agent.records import Stage

Rule = Literal["match", "path", "mode", "size", "binary", "literal", "syntax", "no-op"]

PROTECTED = (
    f"**/{FILE}", "**/.git*", "**/.git*/**", "**/conftest.py", "**/sitecustomize.py", "**/usercustomize.py", "**/*.pth",
    "**/pyproject.toml", "**/setup.py", "**/setup.cfg", "**/__pycache__/**", "**/*.pyc",
)
"""Never editable, whatever the config says: they run before the code under test or decide what is measured."""

LITERAL_BYTES = 4096
BLOB_RUN = re.compile(r"\S{200,}")
BLOB_BITS = 3.5
"""Bits a character above which a run of 200 without a space reads as encoded data (hex 4, base64 6, rules of = 0)."""
_SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")


class PatchRefused(Exception):
    """A proposal that does not become a candidate. ``nearest`` are real lines of the file, for a repair round."""

    stage: ClassVar[Stage] = "patch"

    def __init__(self, rule: Rule, reason: str, nearest: tuple[str, ...] = ()) -> None:
        super().__init__("\n".join((reason, *nearest)))
        self.rule, self.reason, self.nearest = rule, reason, nearest


@dataclass(frozen=True, slots=True)
class Changed:
    """One changed file as text, path relative to the target. ``old`` is None for a new file, ``new`` for a deleted."""

    path: str
    old: str | None
    new: str | None


def check_path(path: str, source: Source) -> None:
    """May a patch touch ``path`` (relative to the target)? Raises PatchRefused; protected wins over editable."""
    parts = path.split("/")
    shown = ascii(path)
    if not path.isprintable() or unicodedata.normalize("NFKC", path) != path:
        raise PatchRefused("path", f"the path {shown} has characters that do not show as they are.")
    if "\\" in path or ":" in path or any(part in ("", ".", "..") for part in parts):
        raise PatchRefused("path", f"the path {shown} is not a plain path inside the target.")
    if any(part != part.strip(" ") or part.endswith(".") or part.casefold().startswith("git~") for part in parts):
        raise PatchRefused("path", f"the path {shown} means another file on some systems.")
    if git.matches(path, PROTECTED, fold=True) or git.matches(path, source.protected, fold=True):
        raise PatchRefused("path", f"{path} is protected.", _editable(source))
    if not git.matches(path, source.editable):
        raise PatchRefused("path", f"{path} is not an editable file.", _editable(source))


def check(repo: Path, base: str, tree: str, prefix: str, source: Source) -> tuple[Changed, ...]:
    """All rules on what ``tree`` changes of ``base``. Returns the changed files. Raises PatchRefused."""
    changes = git_trees.diff_raw(repo, base, tree)
    if not changes:
        raise PatchRefused("no-op", "the patch changes nothing.")
    known = {path.casefold(): path for path in (entry.path for entry in git_trees.entries(repo, base, prefix))}
    for change in changes:
        path = _relative(change.path, prefix)
        check_path(path, source)
        _check_mode(change, path)
        if known.get(path.casefold(), path) != path:
            raise PatchRefused("path", f"{path} differs from {known[path.casefold()]} only by case.")
    _check_namesakes(repo, base, prefix, source, [_relative(change.path, prefix) for change in changes
                                                  if change.status == "A"])
    shas = {sha for change in changes for sha in (change.old_sha, change.new_sha) if sha.strip("0")}
    content = git_trees.blobs(repo, shas)
    files = tuple(Changed(_relative(change.path, prefix), _text(content.get(change.old_sha), change.path),
                          _text(content.get(change.new_sha), change.path)) for change in changes)
    for file in files:
        if file.new is not None:
            _check_text(file.path, file.old or "", file.new)
    return files


def check_size(added: int, removed: int, diff: str, source: Source) -> None:
    """Raises PatchRefused when the diff is larger than the config allows."""
    if added + removed > source.max_patch_lines:
        raise PatchRefused("size", f"the patch changes {added + removed} lines; the limit is {source.max_patch_lines}.")
    if len(diff.encode()) > source.max_patch_kb * 1024:
        size = math.ceil(len(diff.encode()) / 1024)
        raise PatchRefused("size", f"the patch is {size} KiB; the limit is {source.max_patch_kb} KiB.")


def check_effect(changed: Collection[Changed]) -> None:
    """Raises PatchRefused when nothing that Python would run differs: comments, docstrings, formatting."""
    if all(_normal(file.path, file.old) == _normal(file.path, file.new) for file in changed):
        raise PatchRefused("no-op", "the patch changes only comments, docstrings or formatting.")


def normalised_hash(changed: Iterable[Changed]) -> str:
    """sha256 of what the patch really changes; equal means that two patches are one idea, also on different bases.

    Each Python file is unparsed from its syntax tree, without docstrings, and every line is headed by the class and
    function it stands in; other files lose blank lines and trailing space. Only the lines that differ are hashed,
    without their numbers. Two patches that make the same change at two places of one function count as equal.
    """
    digest = hashlib.sha256()
    for file in sorted(changed, key=lambda file: file.path):
        digest.update(f"\0{file.path}\0{file.old is None}{file.new is None}\n".encode())
        old, new = _normal(file.path, file.old), _normal(file.path, file.new)
        for line in difflib.unified_diff(old, new, n=0, lineterm=""):
            if not line.startswith(("--- ", "+++ ", "@@")):
                digest.update(f"{line}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _normal(path: str, text: str | None) -> list[str]:
    """The lines of a file that matter."""
    if text is None:
        return []
    if path.endswith(".py"):
        try:
            return _scoped(parse(path, text))
        except PatchRefused:  # the base's own file may be for another Python
            pass
    return [line.rstrip() for line in text.split("\n") if line.strip()]


def _scoped(tree: ast.Module) -> list[str]:
    """``Class.function: statement`` for each line of the unparsed tree."""
    for node in ast.walk(tree):
        if isinstance(node, _SCOPES) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    text = ast.unparse(tree)
    lines = text.split("\n")
    scope = [""] * len(lines)

    def visit(parent: ast.AST, name: str) -> None:
        for node in ast.iter_child_nodes(parent):
            inner = name
            if isinstance(node, _SCOPES) and not isinstance(node, ast.Module):
                inner = f"{name}{node.name}."
                last = node.end_lineno or node.lineno
                scope[node.lineno - 1:last] = [inner] * (last - node.lineno + 1)
            visit(node, inner)

    visit(ast.parse(text), "")
    return [f"{where}: {line}" for where, line in zip(scope, lines, strict=True)]


def parse(path: str, text: str) -> ast.Module:
    """Syntax tree of a Python file. Raises PatchRefused with the line when Python cannot read it."""
    try:
        with warnings.catch_warnings():  # "invalid escape sequence" is the patch's affair, not the screen's
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except SyntaxError as error:
        line = error.lineno or 1
        raise PatchRefused("syntax", f"{path} line {line}: {error.msg}.", around(text, line)) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise PatchRefused("syntax", f"{path}: Python cannot parse it: {error or type(error).__name__}.") from error


def around(text: str, line: int, context: int = 2) -> tuple[str, ...]:
    """The lines about ``line`` (from 1) with their numbers."""
    lines = text.split("\n")
    first = max(0, line - 1 - context)
    return tuple(f"{number:5d} | {content.rstrip()}"[:240]
                 for number, content in enumerate(lines[first:line + context], first + 1))


def _relative(path: str, prefix: str) -> str:
    if prefix and not path.startswith(f"{prefix}/"):
        raise PatchRefused("path", f"{path!a} is outside the target folder {prefix}.")
    return path.removeprefix(f"{prefix}/") if prefix else path


def _editable(source: Source) -> tuple[str, ...]:
    return (f"Editable: {', '.join(source.editable) or 'nothing'}.",)


def _check_mode(change: git_trees.Change, path: str) -> None:
    """Plain files only. An executable bit may stay as it was, never come or go."""
    names = {"120000": "a symlink", "160000": "a submodule"}
    for mode in (change.old_mode, change.new_mode):
        if mode in names:
            raise PatchRefused("mode", f"{path} is {names[mode]}; only plain files may change.")
    fresh = change.old_mode.strip("0") == ""
    allowed = "100644" if fresh else change.old_mode
    if change.status not in ("A", "M", "D") or (change.status != "D" and change.new_mode != allowed):
        raise PatchRefused("mode", f"{path} changes its mode ({change.old_mode} to {change.new_mode}).")


def _check_namesakes(repo: Path, base: str, prefix: str, source: Source, added: list[str]) -> None:
    """A new module may not bear the name of one that Python has or that a protected file imports.

    Where its folder is on the path of the evaluation (``PYTHONPATH = "src"``), that would import the patch's file
    instead: ``src/json.py`` made a protected evaluation print what the patch liked. A file that lies in a package
    (its folder has an ``__init__.py`` at the base) is imported under the package's name and takes nobody's place.
    """
    if not any(path.endswith(".py") for path in added):
        return
    packages = {path.rpartition("/")[0] for entry in git_trees.entries(repo, base, prefix)
                if (path := entry.path).endswith("/__init__.py")}
    taken = sys.stdlib_module_names | _imported(git_trees.read_files(repo, base, prefix, source.protected)
                                                if source.protected else {})
    for path in added:
        parts = path.removesuffix(".py").split("/")
        for depth, name in enumerate(parts if path.endswith(".py") else ()):
            if name in taken and "/".join(parts[:depth]) not in packages:
                raise PatchRefused("path", f"{path} would take the place of the module {name} that others import; "
                                           "give it another name.")


def _imported(files: Mapping[str, str]) -> set[str]:
    """First names of the absolute imports in these Python files."""
    found: set[str] = set()
    for text in (text for path, text in files.items() if path.endswith(".py")):
        for node in ast.walk(_parse_quietly(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found


def _text(content: bytes | None, path: str) -> str | None:
    if content is None:
        return None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PatchRefused("binary", f"{path} is not UTF-8 text.") from error
    if "\0" in text:
        raise PatchRefused("binary", f"{path} is binary.")
    return text


def _check_text(path: str, old: str, new: str) -> None:
    """Syntax, hidden direction marks, and literals that are data rather than code."""
    if _BIDI.search(new) and not _BIDI.search(old):
        raise PatchRefused("literal", f"{path} has characters that reverse the order of the text shown.")
    if not path.endswith(".py"):
        known = set(old.split("\n"))
        for number, line in enumerate(new.split("\n"), start=1):
            if line not in known:
                _check_literal(path, number, line)
        return
    seen = {value for _, value in _literals(_parse_quietly(old))}
    for number, value in _literals(parse(path, new)):
        if value not in seen:
            _check_literal(path, number, value)


def _parse_quietly(text: str) -> ast.Module:
    try:
        return parse("", text)
    except PatchRefused:  # the base may hold files for another Python
        return ast.Module([], [])


def _literals(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, value) of each string and bytes literal; adjacent ones are already joined by the parser."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            value = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            found.append((node.lineno, value))
    return found


def _check_literal(path: str, line: int, value: str) -> None:
    if len(value.encode("utf-8", "surrogatepass")) > LITERAL_BYTES:
        raise PatchRefused("literal", f"{path} line {line}: a literal of more than {LITERAL_BYTES} bytes.")
    for run in BLOB_RUN.findall(value):
        if _bits(run) > BLOB_BITS:
            raise PatchRefused("literal", f"{path} line {line}: a literal that looks like encoded data.")


def _bits(run: Collection[str]) -> float:
    """Shannon entropy in bits a character."""
    counts = Counter(run)
    return -sum(n / len(run) * math.log2(n / len(run)) for n in counts.values())
