"""JSON as models write it -> Python values. Strict JSON first; what that refuses is read here, or refused as well.

Read: trailing and missing commas, comments, Python's True, False and None, strings in single, typographic or triple
quotes or backticks, backslashes that escape nothing, newlines in strings, quotes in strings that nobody escaped, and
brackets that are never closed (``closed`` says so: after a cut reply, what is missing may be an edit). A quote inside
a string is taken to end it only where what follows can only be the JSON that goes on. The library json_repair is not
used: it always returns something, also a string that ends where the reply was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u201d": "\u201d", "\u2018": "\u2019"}
_FIELD = r"[\"'\u201c\u201d]?[A-Za-z_]\w*[\"'\u201c\u201d]?\s*:"
_AFTER_FIELD = re.compile(rf"\s*(?:,\s*{_FIELD}|,?\s*\}}\s*(?:[,\]}}{{]|//|/\*|```|$)|\n\s*{_FIELD}|,?\s*$|,\s*(?://|#)|/\*)")
_AFTER_ITEM = re.compile(r"\s*(?:,\s*[\"'`\]\u201c]|\]|$)")
_BLANK = re.compile(r"(?:\s|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_]\w*|[-+]?\d[\w.+-]*|[-+]?\.\d[\w.+-]*")
_ESCAPES = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "`": "`"}
_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
DEEPEST = 20
"""Nesting that is followed."""
STARTS = 50
"""Opening brackets in prose that are tried."""


@dataclass(frozen=True, slots=True)
class Found:
    """A value, and whether all its brackets were closed."""

    value: Any
    closed: bool = True


def values(text: str, fences: Iterator[str]) -> Iterator[Found]:
    """Objects and lists in ``text``: strictly read ones first (the whole, each fence, wherever a bracket opens one),
    then loosely read ones in the same order."""
    starts = [text.strip(), *(fence.strip() for fence in fences)]
    starts += [text[match.start():] for match in list(re.finditer(r"\{\s*[\"'\u201c`]", text))[:STARTS]]
    decoder = json.JSONDecoder(strict=False)
    broken: list[str] = []
    for start in starts:
        if start[:1] not in ("{", "["):
            continue
        try:
            value, _ = decoder.raw_decode(start)
        except RecursionError:
            continue
        except ValueError:
            broken.append(start)
            continue
        yield Found(value)
    for start in broken:
        try:
            reader = _Reader(start)
            yield Found(reader.value(DEEPEST), reader.closed)
        except ValueError:
            continue


class _Reader:
    """Reads one value from the start of ``text``. Raises ValueError where it cannot be told what is meant."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.closed = text, 0, True

    def value(self, depth: int, in_list: bool = False) -> Any:
        here = self._next()
        if depth == 0:
            raise ValueError("nested too deeply")
        if here == "{":
            return self._object(depth)
        if here == "[":
            return self._list(depth)
        if here in _QUOTES:
            return self._string(_AFTER_ITEM if in_list else _AFTER_FIELD)
        word = _WORD.match(self.text, self.at)
        if not word:
            raise ValueError(f"no value at {self.at}")
        self.at = word.end()
        if word[0] in _CONSTANTS:
            return _CONSTANTS[word[0]]
        return float(word[0])

    def _next(self) -> str:
        """The next letter that is neither blank nor comment; empty at the end."""
        blank = _BLANK.match(self.text, self.at)
        self.at = blank.end() if blank else self.at
        return self.text[self.at:self.at + 1]

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.at += 1
        while (here := self._next()) != "}":
            if not here:
                self.closed = False
                return found
            if here == ",":
                self.at += 1
                continue
            key = self._key()
            if self._next() != ":" or key in found:
                raise ValueError(f"no colon after {key!r}, or it comes twice")
            self.at += 1
            found[key] = self.value(depth - 1)
        self.at += 1
        return found

    def _list(self, depth: int) -> list[Any]:
        found: list[Any] = []
        self.at += 1
        while (here := self._next()) != "]":
            if not here or here == "}":  # a list that the object around it ends
                self.closed = self.closed and bool(here)
                return found
            if here == ",":
                self.at += 1
                continue
            found.append(self.value(depth - 1, in_list=True))
        self.at += 1
        return found

    def _key(self) -> str:
        here = self.text[self.at]
        if here in _QUOTES:
            end = self.text.find(_QUOTES[here], self.at + 1)
            end = end if end > 0 else self.text.find('"', self.at + 1)
            key, self.at = self.text[self.at + 1:end], end + 1
        else:
            word = _WORD.match(self.text, self.at)
            key, self.at = (word[0], word.end()) if word else ("", self.at)
        if not re.fullmatch(r"[\w ]{1,40}", key):
            raise ValueError(f"no key at {self.at}")
        return key

    def _string(self, after: re.Pattern[str]) -> str:
        opened = self.text[self.at]
        if self.text.startswith(opened * 3, self.at):
            end = self.text.find(opened * 3, self.at + 3)
            if end < 0:
                raise ValueError("a string is never closed")
            body, self.at = self.text[self.at + 3:end], end + 3
            return _unescaped(body.removeprefix("\n"), keep=True)
        closing = {_QUOTES[opened], '"'} if opened in "\u201c\u201d" else {_QUOTES[opened]}
        at = self.at + 1
        while at < len(self.text):
            letter = self.text[at]
            if letter == "\\":
                at += 2
            elif letter in closing and after.match(self.text, at + 1):
                body, self.at = self.text[self.at + 1:at], at + 1
                return _unescaped(body, keep=False)
            else:
                at += 1
        raise ValueError("a string is never closed")


def _unescaped(body: str, keep: bool) -> str:
    """Escapes that JSON knows as what they mean; others are text. ``keep``: the string was raw, with real newlines."""
    if keep and "\n" in body:
        return body

    def meant(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] == "u":
            return chr(int(code[1:], 16))
        return _ESCAPES.get(code, match[0])

    return re.sub(r"\\(u[0-9a-fA-F]{4}|.)", meant, body, flags=re.DOTALL)
