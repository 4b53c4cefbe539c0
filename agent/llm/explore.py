"""Explore: before it proposes, a model may look at what its briefing cannot show: source, and earlier attempts.

A short loop of tool calls, where the endpoint has tools and there is something to look up. It is bounded thrice: by
the number of calls, by what they may bring back, and by the endpoint's own time limit. What was found goes into the
briefing as text, and the proposal is asked for as always: tools and a schema for the reply are never asked of one
call, which many servers cannot do. An endpoint without tools, or a model that never uses them, proposes from the
briefing alone.

The tools read the briefing and nothing else: no disk, no net. What they bring back is source, fenced as source, or text
that programs printed, fenced and escaped as such.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.briefing import codemap
from agent.briefing.codemap import tokens
from agent.git import matches
from agent.llm.answers import Auth, BadRequest, Call, EndpointError, Quota
from agent.llm.endpoint import Endpoint, Message
from agent.llm.quote import fence, one_line
from agent.propose import add_costs
from agent.read import Briefing
from agent.records import Cost

if TYPE_CHECKING:
    from agent.llm.messages import Prompts

FINDINGS_TOKENS = 12_000
"""What all look-ups of a proposal may bring back, and at most:"""
FINDINGS_SHARE = 0.2
"""of the briefing's budget."""
LINES = 200
"""Lines of one reading."""
HITS = 40
"""Lines of one search."""
LINE_CHARACTERS, SEARCH_SECONDS = 300, 2.0
"""Characters of a line that are searched, and how long a search may take."""
IDLE = 2
"""Explorations in a row without a call after which none is offered any more."""


def _tool(name: str, about: str, **parameters: str) -> dict[str, Any]:
    kinds = {key: {"type": "integer" if key in ("first", "last") else "string", "description": text}
             for key, text in parameters.items()}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": {
        "type": "object", "properties": kinds, "required": [key for key in kinds if key not in ("first", "last")]}}}


TOOLS = (
    _tool("list_files", "Paths of the source with their lengths.", pattern="a glob, such as src/**/*.py"),
    _tool("read_file", f"Lines of one source file, at most {LINES}.", path="its path",
          first="first line, from 1", last="last line"),
    _tool("search", f"Lines of the source that match, at most {HITS}.", pattern="a regular expression or plain text"),
    _tool("read_attempt", "An earlier attempt in full: hypothesis, outcome, patch, crash.",
          attempt="its id or number"),
)


@dataclass(frozen=True, slots=True)
class Found:
    """What a model looked up, ready to show, and what that cost."""

    text: str
    cost: Cost
    calls: int


class Explorer:
    """Offers tools to one endpoint, and remembers whether that is of any use. Several threads may explore at once."""

    def __init__(self, endpoint: Endpoint, prompts: Prompts, most: int) -> None:
        self._endpoint, self._prompts, self._most = endpoint, prompts, most
        self._idle = 0
        self.refused = ""
        """Why tools are not offered any more; empty: they are."""

    def explore(self, briefing: Briefing, opening: Sequence[Message], until: float | None = None) -> Found:
        """Let the model look around, not beyond ``until`` by the endpoint's clock. Never raises for an
        endpoint's fault: the proposal that follows will meet it."""
        spent, parts, calls = Cost(), list[str](), 0
        if self.refused:
            return Found("", spent, 0)
        room = min(FINDINGS_TOKENS, int(briefing.tokens * FINDINGS_SHARE))
        asked = self._prompts.render("explore.j2", most=self._most)
        messages: list[dict[str, Any]] = [dict(one) for one in opening]
        messages[-1]["content"] += f"\n{asked}"
        while calls < self._most and room > 0:
            try:
                wish = self._endpoint.look_up(messages, TOOLS, until)
            except EndpointError as error:
                spent = add_costs(spent, error.cost)
                if isinstance(error, BadRequest) and not calls:
                    self.refused = f"the endpoint has no tools ({error})"
                elif isinstance(error, (Auth, Quota)):
                    self.refused = str(error)
                break
            spent = add_costs(spent, wish.cost)
            if not wish.calls:
                break
            messages.append({"role": "assistant", "content": wish.text, "tool_calls": [
                {"id": one.id or f"call-{calls + number}", "type": "function",
                 "function": {"name": one.name, "arguments": one.raw}} for number, one in enumerate(wish.calls)]})
            for number, one in enumerate(wish.calls):
                answer = "No look-ups are left." if calls + number >= self._most else use(one, briefing)
                if tokens(answer) > room:
                    answer = "That is more than there is room for. Ask for less."
                room -= tokens(answer)
                if calls + number < self._most:
                    parts.append(f"## {_heading(one)}\n{answer}")
                messages.append({"role": "tool", "tool_call_id": one.id or f"call-{calls + number}",
                                 "content": answer})
            calls += len(wish.calls)
        self._idle = 0 if calls or spent == Cost() else self._idle + 1
        if self._idle >= IDLE and not self.refused:
            self.refused = "the model does not use its tools"
        return Found("\n".join(parts), spent, min(calls, self._most))


def use(call: Call, briefing: Briefing) -> str:
    """What one call brings back, ready to show; a mistake is told in words."""
    given = call.arguments
    if call.name == "list_files":
        return list_files(briefing, _text(given, "pattern") or "**")
    if call.name == "read_file":
        return read_file(briefing, _text(given, "path"), _number(given, "first", 1), _number(given, "last", 0))
    if call.name == "search":
        return search(briefing, _text(given, "pattern"))
    if call.name == "read_attempt":
        return briefing.past(_text(given, "attempt")) or "There is no such attempt."
    return f"There is no tool {one_line(call.name, 40)}."


def list_files(briefing: Briefing, pattern: str) -> str:
    """Paths that match, with their numbers of lines; protected ones are marked."""
    files = _files(briefing)
    found = [path for path in files if matches(path, [pattern]) or pattern in path]
    lines = [f"{path}: {files[path].count(chr(10))} lines{' (protected)' if path in briefing.protected else ''}"
             for path in sorted(found)[:100]]
    more = [f"and {len(found) - 100} more"] if len(found) > 100 else []
    return fence("\n".join([*lines, *more])) if lines else "No file matches."


def read_file(briefing: Briefing, path: str, first: int = 1, last: int = 0) -> str:
    """Lines ``first`` to ``last`` of a file, numbered, LINES of them at most; of a longer one that was not narrowed
    down, its outline too."""
    text = _files(briefing).get(path.strip().removeprefix("./"))
    if text is None:
        return f"There is no source file {one_line(path, 80)}."
    lines = text.splitlines()
    begin = min(max(first, 1), max(len(lines), 1))
    end = min(last if last >= begin else len(lines), begin + LINES - 1, len(lines))
    body = fence("\n".join(f"{number}: {lines[number - 1]}" for number in range(begin, end + 1)))
    rest = f"\nLines {begin} to {end} of {len(lines)}." if end - begin + 1 < len(lines) else ""
    outline = f"\nOutline:\n{fence(codemap.outline(text))}" if rest and not last and begin == 1 else ""
    return body + rest + outline


def search(briefing: Briefing, pattern: str) -> str:
    """``path:line: text`` of the first HITS matching lines. A pattern that is no regular expression, or one that could
    take for ever, is plain text."""
    if not pattern:
        return "The pattern is empty."
    wanted = _pieces(pattern)
    hits: list[str] = []
    stop = time.monotonic() + SEARCH_SECONDS
    for path, text in _files(briefing).items():
        for number, line in enumerate(text.splitlines(), start=1):
            if not _in_order(wanted, line[:LINE_CHARACTERS]):
                continue
            hits.append(f"{path}:{number}: {line.strip()[:160]}")
            if len(hits) >= HITS:
                return fence("\n".join([*hits, "(there may be more)"]))
        if time.monotonic() > stop:
            return fence("\n".join([*hits, "(the search took too long and was ended)"]))
    return fence("\n".join(hits)) if hits else "Nothing matches."


def _pieces(pattern: str) -> list[re.Pattern[str]]:
    """What must be found one after the other in a line. ``.*`` parts the pieces; with two repeats at most in all, none
    of a group, no line of LINE_CHARACTERS takes long."""
    plain = [re.compile(re.escape(pattern))]
    if len(pattern) > 200 or re.search(r"\)[*+?{]|\\\d|\(\?", pattern):
        return plain
    parts = [part for part in re.split(r"\.[*+]\??", pattern) if part]
    if sum(len(re.findall(r"(?<!\\)[*+{]", part)) for part in parts) > 2:
        return plain
    try:
        return [re.compile(part) for part in parts] or plain
    except (re.error, RecursionError, OverflowError):
        return plain


def _in_order(wanted: Sequence[re.Pattern[str]], line: str) -> bool:
    at = 0
    for one in wanted:
        found = one.search(line, at)
        if found is None:
            return False
        at = found.end()
    return True


def _files(briefing: Briefing) -> Mapping[str, str]:
    return {**briefing.protected, **briefing.files}


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else ""


def _number(given: Mapping[str, Any], name: str, default: int) -> int:
    try:
        return int(given.get(name, default))
    except (TypeError, ValueError):
        return default


def _heading(call: Call) -> str:
    return one_line(f"{call.name} {' '.join(str(value) for value in call.arguments.values())}", 120)
