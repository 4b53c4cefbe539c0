"""A model's reply -> edits, or the diff in it. Parses what came, not what was asked for.

In order: a JSON object (bare, in a fence, or somewhere in the prose), search/replace blocks, a unified or ``*** Begin
Patch`` diff, whole files in fences. Measured: the best models answer in the format asked for in 92-100 % of cases, a
1.5B model answers a search/replace request with a whole file every time. A diff is only found here and handed on as it
is: the patch stage reads hunks, and believes neither their counts nor their line numbers.

Nothing is guessed: what fits no format is a Problem, whose text goes back to the model in a repair round. Paths are not
judged here (the patch stage does that).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from agent import predictions
from agent.propose import tidy_title
from agent.quote import one_line, plain
from agent.records import Edit, Prediction

Form = Literal["json", "blocks", "diff", "files"]


@dataclass(frozen=True, slots=True)
class Parsed:
    """A usable reply, and the format that it came in."""

    title: str
    hypothesis: str
    direction: str
    expected_effect: float | None
    edits: tuple[Edit, ...]
    form: Form
    diff: str = ""
    """In place of edits: a unified diff, counts and line numbers as the model wrote them."""
    prediction: Prediction = field(default_factory=Prediction)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the reply is unusable, worded for the model."""

    text: str


class _JsonEdit(BaseModel):
    model_config = ConfigDict(extra="ignore")
    path: str = Field(validation_alias=AliasChoices("path", "file", "filename", "file_path"))
    search: str = Field(validation_alias=AliasChoices("search", "old_str", "old", "find", "original"))
    replace: str = Field(validation_alias=AliasChoices("replace", "new_str", "new", "replacement", "updated"))


class _JsonReply(BaseModel):
    model_config = ConfigDict(extra="ignore")
    title: str = ""
    hypothesis: str = ""
    direction: str = ""
    expected_effect: float | None = None
    edits: list[_JsonEdit] = Field(default_factory=list)
    diff: str = Field("", validation_alias=AliasChoices("diff", "patch"))

    @field_validator("title", "hypothesis", "direction", "diff", mode="before")
    @classmethod
    def _text(cls, value: Any) -> str:
        return "" if value is None else value if isinstance(value, str) else json.dumps(value)

    @field_validator("expected_effect", mode="before")
    @classmethod
    def _number(cls, value: Any) -> float | None:
        """A number, or None for prose such as "about -0.01": it is a remark, never decided on."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None
        return number if math.isfinite(number) else None


LONGEST_REPLY = 400_000
"""Characters; what is longer is not searched for edits."""

_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(
    r"^(?P<ticks>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=ticks)[ \t]*$", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(
    r"^<{5,9} ?SEARCH[^\n]*\n(?P<search>.*?)^={5,9}[ \t]*\n(?P<replace>.*?)^>{5,9} ?REPLACE[^\n]*$",
    re.DOTALL | re.MULTILINE)
_LOOSE_DIFF = re.compile(
    r"^(?:diff --git |--- [^\n]*\n\+\+\+ |\*\*\* (?:Begin Patch|(?:Update|Add|Delete) File: )).*",
    re.DOTALL | re.MULTILINE)
_IN_GITS_WORDS = tuple((re.compile(header, re.MULTILINE), words) for header, words in (
    (r"^\*\*\* (?:Begin Patch|End Patch|End of File)[ \t]*\n", ""),
    (r"^\*\*\* Delete File: (.+)\n", r"--- a/\1\n+++ /dev/null\n"),
    (r"^\*\*\* Add File: (.+)\n", r"--- /dev/null\n+++ b/\1\n@@\n"),
    (r"^\*\*\* Update File: (.+)\n(?=@@)", r"--- a/\1\n+++ b/\1\n"),
    (r"^\*\*\* Update File: (.+)\n", r"--- a/\1\n+++ b/\1\n@@\n"),
))
_PATH = re.compile(r"[\w./\\-]+\.\w+")
_ELISION = re.compile(
    r"^\s*(?:#|//|\.\.\.).*(?:existing code|rest of|unchanged|remains the same|same as before|omitted)",
    re.IGNORECASE | re.MULTILINE)


def parse_reply(text: str, files: Mapping[str, str], cut: bool = False) -> Parsed | Problem:
    """Edits from a reply to a briefing that showed ``files``. ``cut``: the reply hit the token limit."""
    if len(text) > LONGEST_REPLY:
        return Problem("The reply is far too long. Answer with small search/replace edits.")
    text = _THOUGHT.sub("", text).replace("\r\n", "\n").strip()
    found = _from_json(text, files)
    if found is None:
        found = _from_prose(text, files)
    if isinstance(found, Parsed):
        found = _checked(dataclasses.replace(found, prediction=predictions.read(text)), files)
    if isinstance(found, Problem) and cut:
        return Problem(f"Your reply was cut off at the token limit. Answer again, and be shorter. ({found.text})")
    return found


def _from_json(text: str, files: Mapping[str, str]) -> Parsed | Problem | None:
    """From the first JSON object with edits; None where there is no such object."""
    problem: Problem | None = None
    for value in _objects(text):
        if not {"edits", "diff", "patch"} & value.keys():
            continue
        try:
            reply = _JsonReply.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            problem = problem or Problem(f"The JSON does not fit: {place}: {first['msg']}.")
            continue
        edits = tuple(Edit(edit.path, edit.search, edit.replace) for edit in reply.edits)
        diff = "" if edits else _diff(reply.diff)
        return Parsed(reply.title, reply.hypothesis, reply.direction, reply.expected_effect, edits, "json", diff)
    if problem is None and text.startswith("{"):
        return Problem("The reply starts as JSON, but is no valid JSON object with `edits`.")
    return problem


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects in ``text``: the whole, then each fence, then wherever a brace opens one. Newlines may stand
    unescaped in strings, a common slip."""
    decoder = json.JSONDecoder(strict=False)
    starts = [text, *(match["body"].strip() for match in _FENCE.finditer(text))]
    starts += [text[match.start():] for match in list(re.finditer(r"\{\s*\"", text))[:50]]
    for start in starts:
        try:
            value, _ = decoder.raw_decode(start)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _from_prose(text: str, files: Mapping[str, str]) -> Parsed | Problem:
    """From blocks, a diff or whole files, with title and hypothesis from the words around them."""
    form: Form
    edits: tuple[Edit, ...] | str = ()
    diff = ""
    if _BLOCK.search(text):
        form, edits = "blocks", _blocks(text, files)
    elif diff := _diff(text):
        form = "diff"
    else:
        form, edits = "files", _whole_files(text, files)
    if isinstance(edits, str):
        return Problem(edits)
    words = _LOOSE_DIFF.sub("", _BLOCK.sub("", _FENCE.sub("", text)))
    title = _labelled(words, "title") or next((line for line in words.splitlines() if re.search(r"[a-z]{3}", line)
                                               and not _PATH.fullmatch(line.strip("`*# :"))), "")
    hypothesis = _labelled(words, "hypothesis") or one_line(words, 600)
    return Parsed(title.strip("*#` :"), hypothesis, _labelled(words, "direction"), None, edits, form, diff)


def _blocks(text: str, files: Mapping[str, str]) -> tuple[Edit, ...] | str:
    """Aider's search/replace blocks: the path stands on one of the three lines above each, or is the block before's."""
    edits: list[Edit] = []
    path = ""
    end = 0
    for match in _BLOCK.finditer(text):
        path = _path_above(text[end:match.start()], files) or path
        if not path:
            return "A search/replace block has no file path on the line above it."
        edits.append(Edit(path, match["search"], match["replace"]))
        end = match.end()
    return tuple(edits)


def _whole_files(text: str, files: Mapping[str, str]) -> tuple[Edit, ...] | str:
    """Whole files in fences, as edits that replace all of the old text."""
    edits: list[Edit] = []
    end = 0
    for match in _FENCE.finditer(text):
        body = match["body"]
        path = _path_above(match["info"], files) or _path_above(text[end:match.start()], files) or _path_above(
            body.split("\n", 1)[0].lstrip("#/ "), files)
        end = match.end()
        if not path and len(files) == 1:
            path = next(iter(files))
        old = files.get(path)
        if old is None:
            continue
        if _ELISION.search(body):
            return f"The new text of {path} leaves parts out. Use search/replace edits for the changed lines only."
        if body.count("\n") < 0.5 * old.count("\n"):
            return f"The fence for {path} holds less than half of the file. Use search/replace edits instead."
        edits.append(Edit(path, old, body))
    return tuple(edits) or "The reply holds no edits. Answer with one JSON object with `edits`, as asked."


def _diff(text: str) -> str:
    """The unified diff in ``text``: the fences that hold one, else all from its first header on; empty without one.

    The headers of a ``*** Begin Patch`` are put into git's words.
    """
    parts = [match["body"] for match in _FENCE.finditer(text) if _LOOSE_DIFF.search(match["body"])]
    if not parts:
        found = _LOOSE_DIFF.search(text)
        parts = [found[0]] if found else []
    diff = "".join(part if part.endswith("\n") else part + "\n" for part in parts)
    for header, words in _IN_GITS_WORDS:
        diff = header.sub(words, diff)
    return diff


def _path_above(text: str, files: Mapping[str, str]) -> str:
    """The known path (or, on a line of its own, any path) in the last three lines of ``text``."""
    for line in reversed(text.rstrip().splitlines()[-3:]):
        line = line.strip().strip("*#`: ")
        for word in _PATH.findall(line):
            if word.removeprefix("./") in files:
                return str(word.removeprefix("./"))
        if _PATH.fullmatch(line):
            return line
    return ""


def _labelled(text: str, label: str) -> str:
    found = re.search(rf"^[\s*#-]*{label}[\s*]*:[\s*]*(.+)$", text, re.IGNORECASE | re.MULTILINE)
    return found[1].strip() if found else ""


def _checked(parsed: Parsed, files: Mapping[str, str]) -> Parsed | Problem:
    """Tidied, or why the edits cannot be used."""
    if not parsed.edits and not parsed.diff:
        return Problem("`edits` is empty: at least one edit is needed.")
    for number, edit in enumerate(parsed.edits, start=1):
        if edit.search == edit.replace:
            return Problem(f"Edit {number} ({one_line(edit.path, 80)}) changes nothing: search equals replace.")
        if any("\0" in part or re.search(r"[\ud800-\udfff]", part) for part in (edit.path, edit.search, edit.replace)):
            return Problem(f"Edit {number} ({one_line(edit.path, 80)}) holds characters that are no text.")
    edits = tuple(Edit(_known(edit.path, files), edit.search, edit.replace) for edit in parsed.edits)
    title = tidy_title(one_line(parsed.title, 200) or one_line(parsed.hypothesis, 200) or (
        f"Change {edits[0].path}" if edits else "Change by a diff"))
    return Parsed(title, plain(parsed.hypothesis).strip()[:2000], one_line(parsed.direction, 60),
                  parsed.expected_effect, edits, parsed.form, parsed.diff, parsed.prediction)


def _known(path: str, files: Mapping[str, str]) -> str:
    """``./train.py`` is ``train.py`` where that file exists; any other path is left as it is."""
    path = path.strip()
    bare = path.removeprefix("./")
    return bare if bare in files else path
