"""Knobs: numeric constants of Python source, found by their place in the syntax tree and changed in place.

A knob is a number (or a boolean) that is the value of a keyword argument, an assignment, a default or a dict entry, or
an item of a tuple or list there. Its key is the dotted path to it and no line number, so it names the same knob after
the file was edited elsewhere. Comments and layout stay as they are: only the bytes of the number are replaced.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from agent.records import Edit

NEAR_ONE = re.compile(r"beta|momentum|ema|second_moment")
FACTOR = {"log": 3.0, "share": 2.0, "near_one": 4.0, "count": 2.0}
"""One move of a knob, by its scale. Near one, 1 - value moves: 0.95 becomes 0.8 or 0.9875."""


@dataclass(frozen=True, slots=True)
class Knob:
    """One constant. ``start`` and ``end`` are byte offsets in the UTF-8 text of ``path``."""

    path: str
    name: str
    value: float | int | bool
    start: int
    end: int

    @property
    def key(self) -> str:
        return f"{self.path}:{self.name}"

    @property
    def scale(self) -> str:
        """``switch`` (booleans, 0), ``count`` (positive integers), ``near_one``, ``share`` (0 to 1) or ``log``."""
        if isinstance(self.value, bool) or self.value == 0:
            return "switch"
        if isinstance(self.value, int):
            return "count"
        leaf = self.name.rpartition(".")[2]
        if NEAR_ONE.search(leaf) and 0.5 < self.value < 1:
            return "near_one"
        return "share" if 0.1 < self.value <= 1 else "log"

    def moved(self, power: float) -> float | int | bool | None:
        """The value ``power`` moves up (down when negative); None where there is no such value."""
        scale, value = self.scale, self.value
        if isinstance(value, bool):
            return not value
        if scale == "switch":
            return None if power < 0 else 0.1 if isinstance(value, float) else 1
        factor = FACTOR[scale] ** power
        if scale == "near_one":
            new: float = 1 - (1 - value) / factor
            return float(f"{new:.5g}") if 0 < new < 1 else None
        if scale == "count":
            whole = round(value * factor)
            return whole if whole >= 1 and whole != value else None
        new = value * factor
        if scale == "share" and value < 1 < new:
            new = (1 + value) / 2
        return float(f"{new:.3g}")


def find(files: Mapping[str, str]) -> dict[str, Knob]:
    """The knobs of every ``.py`` file by key, in order of path and place. A file that does not parse has none."""
    found: dict[str, Knob] = {}
    for path in sorted(name for name in files if name.endswith(".py")):
        try:
            tree = ast.parse(files[path])
        except (SyntaxError, ValueError):
            continue
        starts = _line_starts(files[path])
        counts: dict[str, int] = {}
        for name, node, value in _constants(tree, ""):
            counts[name] = counts.get(name, 0) + 1
            unique = name if counts[name] == 1 else f"{name}#{counts[name]}"
            assert node.end_lineno is not None and node.end_col_offset is not None
            knob = Knob(path, unique, value, starts[node.lineno - 1] + node.col_offset,
                        starts[node.end_lineno - 1] + node.end_col_offset)
            found[knob.key] = knob
    return found


def skeleton(files: Mapping[str, str]) -> dict[str, str]:
    """The files with every knob blanked: equal skeletons differ in knobs alone."""
    knobs = find(files)
    return {path: _replaced(text, [(k, "?") for k in knobs.values() if k.path == path])
            for path, text in files.items()}


def edits(files: Mapping[str, str], values: Mapping[str, float | int | bool]) -> tuple[Edit, ...]:
    """One edit a file that sets the knobs of ``values`` (by key). Raises KeyError for a key that ``files`` lacks."""
    knobs = find(files)
    by_path: dict[str, list[tuple[Knob, str]]] = {}
    for key, value in values.items():
        by_path.setdefault(knobs[key].path, []).append((knobs[key], repr(value)))
    return tuple(_edit(path, files[path], _replaced(files[path], changes)) for path, changes in by_path.items())


def _edit(path: str, old: str, new: str) -> Edit:
    """The changed lines, with as many lines around them as make the place the only one."""
    before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    first, last = changed[0], changed[-1] + 1
    while old.count("".join(before[first:last])) > 1 and (first > 0 or last < len(before)):
        first, last = max(0, first - 1), min(len(before), last + 1)
    return Edit(path, "".join(before[first:last]), "".join(after[first:last]))


def _replaced(text: str, changes: list[tuple[Knob, str]]) -> str:
    raw = text.encode("utf-8")
    for knob, new in sorted(changes, key=lambda change: -change[0].start):
        raw = raw[:knob.start] + new.encode("utf-8") + raw[knob.end:]
    return raw.decode("utf-8")


def _line_starts(text: str) -> list[int]:
    """Byte offset of each line, as the parser counts lines: not at a form feed or U+2028."""
    starts = [0]
    for match in re.finditer(rb"\r\n|\r|\n", text.encode("utf-8")):
        starts.append(match.end())
    return starts


def _constants(node: ast.AST, path: str) -> Iterator[tuple[str, ast.expr, float | int | bool]]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        path = f"{path}{node.name}."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        positional = [*node.args.posonlyargs, *node.args.args]
        given = positional[len(positional) - len(node.args.defaults):]
        for arg, default in [*zip(given, node.args.defaults, strict=True),
                             *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]:
            if default is not None:
                yield from _value(default, path + arg.arg)
    for child in ast.iter_child_nodes(node):
        below = path
        if isinstance(child, (ast.Assign, ast.AnnAssign)) and child.value is not None:
            target = child.targets[0] if isinstance(child, ast.Assign) else child.target
            if isinstance(target, (ast.Name, ast.Attribute)):
                name = target.id if isinstance(target, ast.Name) else target.attr
                yield from _value(child.value, path + name)
                below = f"{path}{name}."
        elif isinstance(child, ast.keyword) and child.arg:
            yield from _value(child.value, path + child.arg)
        elif isinstance(child, ast.Dict):
            for key, value in zip(child.keys, child.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield from _value(value, path + key.value)
        yield from _constants(child, below)


def _value(node: ast.expr, name: str) -> Iterator[tuple[str, ast.expr, float | int | bool]]:
    if isinstance(node, (ast.Tuple, ast.List)):
        for i, item in enumerate(node.elts):
            yield from _value(item, f"{name}[{i}]")
        return
    sign = 1
    inner = node
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, inner = -1, node.operand
    if isinstance(inner, ast.Constant) and isinstance(inner.value, (bool, int, float)):
        value = inner.value if isinstance(inner.value, bool) else sign * inner.value
        if math.isfinite(value):
            yield name, node, value
