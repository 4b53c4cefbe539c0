"""A model's reply -> edits, or the diff in it. Parses what came, not what was asked for.

In order: a JSON object (bare, in a fence, or somewhere in the prose), search/replace blocks, a unified or ``*** Begin
Patch`` diff, whole files in fences. Measured: the best models answer in the format asked for in 92-100 % of cases, a
1.5B model answers a search/replace request with a whole file every time. A diff is only found here and handed on as it
is: the patch stage reads hunks, and believes neither their counts nor their line numbers.

Slips of form are read as what they can only mean (loose_json.py, homes.py). Nothing is guessed: what fits no format is
a Problem, whose text goes back to the model in a repair round. Paths are not judged here (the patch stage does that).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from agent import matching
from agent.briefing import predictions
from agent.llm.homes import home
from agent.llm.loose_json import values
from agent.llm.quote import one_line, plain
from agent.llm.reply_files import FENCE as _FENCE
from agent.llm.reply_files import PATH, leaves_out, meant, path_above, whole_files, with_headers
from agent.propose import tidy_title
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
    path: str = Field("", validation_alias=AliasChoices("path", "file", "filename", "file_path", "filepath"))
    search: str = Field(validation_alias=AliasChoices(
        "search", "old_str", "old_string", "old", "old_text", "old_code", "find", "original", "before"))
    replace: str = Field(validation_alias=AliasChoices(
        "replace", "new_str", "new_string", "new", "new_text", "new_code", "replacement", "updated", "after"))

    @field_validator("search", "replace", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """A list of lines is a text."""
        lines = isinstance(value, list) and value and all(isinstance(line, str) for line in value)
        return "\n".join(line.rstrip("\n") for line in value) if lines else value


class _JsonReply(BaseModel):
    model_config = ConfigDict(extra="ignore")
    title: str = ""
    hypothesis: str = ""
    direction: str = ""
    expected_effect: float | None = None
    edits: list[_JsonEdit] = Field(default_factory=list)
    diff: str = Field("", validation_alias=AliasChoices("diff", "patch"))

    @field_validator("edits", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

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
_BLOCK = re.compile(
    r"^[ \t]*<{4,9} ?(?P<head>(?:SEARCH|ORIGINAL|OLD|HEAD|BEFORE)\b[^\n]*)\n(?P<search>.*?)^[ \t]*={4,9}[ \t]*\n"
    r"(?P<replace>.*?)^[ \t]*>{4,9} ?(?:REPLACE|UPDATED|NEW|AFTER|[\w./-]+)\b[^\n]*$", re.DOTALL | re.MULTILINE)
_OPENED = re.compile(r"^[ \t]*<{4,9} ?(?:SEARCH|ORIGINAL)\b", re.MULTILINE)
_MARK = re.compile(r"^[ \t]*(?:<{5,9}|={5,9}|>{5,9})(?: ?\w+)?[ \t]*$", re.MULTILINE)
_TITLE = re.compile(r"^\W*title\b", re.IGNORECASE | re.MULTILINE)
_LINE_HEAD = re.compile(r"\A(?::(?:start|end)_line:[^\n]*\n)+(?:-{5,9}\n)?")
_TAGS = re.compile(
    r"<(?P<old>search|find|old|old_str|old_string|original)>\n?(?P<search>.*?)</(?P=old)>\s*"
    r"<(?P<new>replace|new|new_str|new_string|replacement|updated)>\n?(?P<replace>.*?)</(?P=new)>", re.DOTALL)
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


def parse_reply(
    text: str, files: Mapping[str, str], cut: bool = False, hidden: Collection[str] = (),
) -> Parsed | Problem:
    """Edits from a reply to a briefing that showed ``files``. ``cut``: the reply hit the token limit; ``hidden``: paths
    that exist beside the files, protected ones above all: an edit of one is left as it is, for the patch stage."""
    if len(text) > LONGEST_REPLY:
        return Problem("The reply is far too long. Answer with small search/replace edits.")
    text = _THOUGHT.sub("", text).replace("\r\n", "\n").strip()
    files = {path: matching.plain(content) for path, content in files.items()}
    found = _from_json(text, files, hidden, cut)
    if found is None:
        found = _from_prose(text if cut else _closed(text), files, hidden, cut)
        if cut and isinstance(found, Parsed) and not _TITLE.search(re.split(r"^(?:```|>{5,9})", text, flags=re.M)[-1]):
            found = Problem("The change may not be whole.")  # asked for, the title follows it
    if isinstance(found, Parsed):
        found = _checked(replace(found, prediction=predictions.read(text)), files, hidden)
    if isinstance(found, Problem) and cut:
        return Problem(f"Your reply was cut off at the token limit. Answer again, and be shorter. ({found.text})")
    return found


def _from_json(text: str, files: Mapping[str, str], hidden: Collection[str], cut: bool) -> Parsed | Problem | None:
    """From the first JSON object with edits; None where there is no such object."""
    problem: Problem | None = None
    for value, closed in _objects(text):
        inner = next((value[key] for key in _HOLDERS if isinstance(value.get(key), str)), "")
        if _BLOCK.search(inner) or (inner and "@@" in inner):  # another form inside the JSON
            within = _from_prose(inner, files, hidden, cut)
            if isinstance(within, Parsed):
                return replace(within, title=str(value.get("title") or within.title), form="json",
                               hypothesis=str(value.get("hypothesis") or within.hypothesis))
            continue
        try:
            reply = _JsonReply.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            problem = problem or Problem(f"The JSON does not fit: {place}: {first['msg']}.")
            continue
        if cut and not closed:
            return Problem("The JSON is not whole: an edit may be missing.")
        edits = tuple(Edit(edit.path, edit.search, edit.replace) for edit in reply.edits)
        diff = "" if edits else _diff(reply.diff, files, hidden)
        return Parsed(reply.title, reply.hypothesis, reply.direction, reply.expected_effect, edits, "json", diff)
    if problem is None and text.startswith("{") and not _BLOCK.search(text):
        return Problem("The reply starts as JSON, but is no valid JSON object with `edits`.")
    return problem


_HOLDERS = ("edits", "diff", "patch", "changes")
_EDIT = {"search", "old_str", "old_string", "find", "original"}


def _objects(text: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """(object that holds edits, whether it was closed). A list of edits, the arguments of a tool call, or a lone edit
    counts as one; the lone one only where nothing in the reply speaks of more."""
    lone: list[dict[str, Any]] = []
    for found in values(text, (match["body"] for match in _FENCE.finditer(text))):
        value = found.value
        for key in ("arguments", "parameters", "input", "tool_input", "proposal", "response"):
            if isinstance(value, dict) and isinstance(value.get(key), dict):
                value = value[key]
        if isinstance(value, list) and value and all(isinstance(one, dict) and _EDIT & one.keys() for one in value):
            value = {"edits": value}
        if not isinstance(value, dict):
            continue
        if isinstance(value.get("changes"), list) and "edits" not in value:
            value = {**value, "edits": value["changes"]}
        if isinstance(value.get("edits"), list) or {"diff", "patch", "edits"} & value.keys():
            yield value, found.closed
        elif _EDIT & value.keys() and found.closed and value not in lone:
            lone.append(value)
    if len(lone) == 1 and not re.search(r"[\"']?(?:edits|changes)[\"']?\s*:", text):
        yield {"edits": lone, "title": lone[0].get("title", ""), "hypothesis": lone[0].get("hypothesis", "")}, True


def _closed(text: str) -> str:
    """``text`` with its last fence closed, where the model forgot to."""
    rest = _FENCE.sub("", text)
    return f"{text}\n```" if re.search(r"^```[^\n`]*\n", rest, re.MULTILINE) else text


def _from_prose(text: str, files: Mapping[str, str], hidden: Collection[str], cut: bool) -> Parsed | Problem:
    """From blocks, a diff or whole files, with title and hypothesis from the words around them."""
    form: Form
    edits: tuple[Edit, ...] | str = ()
    diff = ""
    if _BLOCK.search(text) or _OPENED.search(text):
        form, edits = "blocks", _blocks(text, _BLOCK, files, hidden)
    elif _TAGS.search(text):
        form, edits = "blocks", _blocks(text, _TAGS, files, hidden)
    elif diff := _diff(text, files, hidden):
        form = "diff"
    else:
        form, edits = "files", whole_files(text, files, hidden, cut)
    if isinstance(edits, str):
        return Problem(edits)
    words = _LOOSE_DIFF.sub("", _BLOCK.sub("", _FENCE.sub("", text)) if form != "blocks" else _BLOCK.sub("", text))
    title = _labelled(words, "title") or next((line for line in words.splitlines() if re.search(r"[a-z]{3}", line)
                                               and not PATH.fullmatch(line.strip("`*# :"))), "")
    hypothesis = _labelled(words, "hypothesis") or one_line(words, 600)
    effect = re.match(r"[-+]?\d*\.?\d+", _labelled(words, "expected effect"))
    return Parsed(title.strip("*#` :"), hypothesis, _labelled(words, "direction"), float(effect[0]) if effect else None,
                  edits, form, diff)


def _blocks(text: str, form: re.Pattern[str], files: Mapping[str, str],
            hidden: Collection[str]) -> tuple[Edit, ...] | str:
    """Search/replace blocks: the path stands on one of the three lines above each, or is the block before's. A block
    that is not whole makes the reply unusable: what it was to hold is not known."""
    edits: list[Edit] = []
    path = ""
    end = 0
    found = list(form.finditer(text))
    if form is _BLOCK and len(_OPENED.findall(text)) > len(found):
        return "A search/replace block is not whole: it needs its lines <<<<<<< SEARCH, ======= and >>>>>>> REPLACE."
    for match in found:
        search, new = (_unfenced(match[part]) for part in ("search", "replace"))
        search = _LINE_HEAD.sub("", search)
        if form is _BLOCK and (_MARK.search(search) or _MARK.search(new)):
            return "A search/replace block holds a marker line of another one, so it is not known where it ends."
        head = match.groupdict().get("head") or ""
        path = path_above(head, files, hidden) or path_above(text[end:match.start()], files, hidden) or path
        named = path or home("", search, files, hidden)
        if not named:
            return "A search/replace block has no file path on the line above it."
        edits.append(Edit(named, search, new))
        end = match.end()
    return tuple(edits)


def _unfenced(part: str) -> str:
    """The lines of one side of a block without a fence of their own."""
    fenced = re.fullmatch(r"\s*```[^\n`]*\n(.*?)^```[ \t]*\n?\s*", part, re.DOTALL | re.MULTILINE)
    return fenced[1] if fenced else part


def _diff(text: str, files: Mapping[str, str], hidden: Collection[str]) -> str:
    """The unified diff in ``text``: the fences that hold one, else all from its first header on; empty without one.

    The headers of a ``*** Begin Patch`` are put into git's words; a hunk without a header, or with one that names no
    file, gets the file that has its lines.
    """
    text = text.replace("\r\n", "\n")
    parts = [match["body"] for match in _FENCE.finditer(text) if _LOOSE_DIFF.search(match["body"])]
    if not parts:
        parts = [match["body"] for match in _FENCE.finditer(text) if _is_hunk(match["info"], match["body"])]
    if not parts:
        found = _LOOSE_DIFF.search(text) or re.search(r"^@@ .*", text, re.DOTALL | re.MULTILINE)
        parts = [found[0]] if found else []
    diff = "".join(part if part.endswith("\n") else part + "\n" for part in parts)
    for header, words in _IN_GITS_WORDS:
        diff = header.sub(words, diff)
    return with_headers(diff, files, hidden) if diff else ""


def _is_hunk(info: str, body: str) -> bool:
    """Is a fence without a header a hunk all the same?"""
    marked = re.search(r"^@@", body, re.MULTILINE) or info.strip().split(" ")[0] in ("diff", "patch", "udiff")
    return bool(marked and re.search(r"^[-+]", body, re.MULTILINE))


def _labelled(text: str, label: str) -> str:
    found = re.search(rf"^[\s*#-]*{label}[\s*]*:[\s*]*(.+)$", text, re.IGNORECASE | re.MULTILINE)
    return found[1].strip() if found else ""


def _checked(parsed: Parsed, files: Mapping[str, str], hidden: Collection[str]) -> Parsed | Problem:
    """Tidied, or why the edits cannot be used."""
    if not parsed.edits and not parsed.diff:
        return Problem("`edits` is empty: at least one edit is needed.")
    edits: list[Edit] = []
    for number, edit in enumerate(parsed.edits, start=1):
        name = f"Edit {number} ({one_line(edit.path, 80)})"
        if edit.search == edit.replace:
            return Problem(f"{name} changes nothing: search equals replace.")
        if any("\0" in part or re.search(r"[\ud800-\udfff]", part) for part in (edit.path, edit.search, edit.replace)):
            return Problem(f"{name} holds characters that are no text.")
        edits.append(meant(edit, files, hidden))
        if leaves_out(edit.search, edit.replace):
            return Problem(f"{name} leaves parts out (\"...\"). Give the lines whole, or quote fewer of them.")
    if parsed.diff and leaves_out("", "\n".join(line[1:] for line in parsed.diff.split("\n") if line[:1] == "+")):
        return Problem("The diff leaves parts out (\"...\"). Give the new lines whole.")
    title = tidy_title(one_line(parsed.title, 200) or one_line(parsed.hypothesis, 200) or (
        f"Change {edits[0].path}" if edits else "Change by a diff"))
    return replace(parsed, title=title, hypothesis=plain(parsed.hypothesis).strip()[:2000],
                   direction=one_line(parsed.direction, 60), edits=tuple(edits))
