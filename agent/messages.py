"""Briefing -> the messages and the JSON schema of one model call. Templates live in prompts/; nothing is sent here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from agent.answers import Reply
from agent.edit_modes import Mode, choose_mode, possible_modes
from agent.endpoint import Message
from agent.quote import fence, one_line, plain, quoted
from agent.read import Briefing, HistoryLine
from agent.records import Proposal

SHRINKS = 4
"""Sizes of a prompt: everything; no protected files and 12 attempts of history; then half, then a quarter of the
source with 4 attempts. A model whose context overflows gets the next one."""
ENUM_VALUES, ENUM_CHARACTERS = 1000, 15_000
"""OpenAI's limits on an enum in a strict schema (the second holds over 250 values)."""


class Prompts:
    """The templates of a folder, with undefined variables as errors."""

    def __init__(self, folder: Path) -> None:
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined, autoescape=False,
            trim_blocks=True, keep_trailing_newline=True)
        self._templates.filters |= {"fence": fence, "quoted": quoted, "one_line": one_line}

    def render(self, name: str, **variables: object) -> str:
        """The text of ``name``. Raises jinja2.UndefinedError when a variable is missing."""
        return self._templates.get_template(name).render(**variables)

    def opening(self, briefing: Briefing, size: int = 0, mode: Mode = "json") -> list[Message]:
        """System and user message of an attempt that asks for edits in ``mode``, at ``size`` of SHRINKS."""
        files = _largest_first_out(briefing.files, {2: 2, 3: 4}.get(size, 1))
        protected = briefing.protected if size == 0 else {}
        omitted = [*briefing.omitted, *(path for path in (*briefing.files, *briefing.protected)
                                        if path not in files and path not in protected)]
        system = self.render(
            "system.j2", metric=briefing.metric, direction=briefing.direction, tier=briefing.tier,
            mode=mode, path=next(iter(files), "train.py"), max_patch_lines=briefing.max_patch_lines)
        user = self.render(
            "propose.j2", briefing=briefing, files=files, protected=protected, omitted=omitted,
            history=_recent(briefing.history, {0: 40, 1: 12}.get(size, 4)))
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    def repair(self, answer: str, problem: str, rounds_left: int) -> list[Message]:
        """What follows the opening in a repair round: the model's own answer, and what was wrong with it."""
        asked = self.render("repair.j2", problem=problem, rounds_left=rounds_left)
        return [{"role": "assistant", "content": answer}, {"role": "user", "content": asked}]


def answer_of(proposal: Proposal) -> str:
    """``proposal`` as a model would have answered: JSON, or its diff in a fence."""
    if proposal.diff:
        return f"Title: {proposal.title}\nHypothesis: {proposal.hypothesis}\n\n{fence(proposal.diff, 'diff')}"
    return json.dumps({
        "title": proposal.title, "hypothesis": proposal.hypothesis, "direction": proposal.direction,
        "expected_effect": proposal.expected_effect,
        "edits": [{"path": edit.path, "search": edit.search, "replace": edit.replace} for edit in proposal.edits]})


def shown_reply(reply: Reply) -> str:
    """An unusable reply as it goes back to the model: plain, and at most 8,000 characters of it."""
    return plain(reply.text)[:8000]


def mode_for(briefing: Briefing, model: str) -> Mode:
    """The form of edits to ask ``model`` for, by what became of its replies so far."""
    return choose_mode(briefing.tried, model, possible_modes(briefing.files, bool(_anchors(briefing.files))))


def schema(briefing: Briefing, mode: Mode) -> dict[str, Any]:
    """JSON schema of a reply, in the subset that strict endpoints share: all keys required, no limits. Empty for a mode
    that is plain text."""
    if mode not in ("json", "anchored"):
        return {}
    path: dict[str, Any] = {"type": "string"}
    search: dict[str, Any] = {"type": "string"}
    if mode == "anchored":
        path["enum"], search["enum"] = list(briefing.files), _anchors(briefing.files)
    edit = _object({"path": path, "search": search, "replace": {"type": "string"}})
    text = {"type": "string"}
    return _object({
        "title": text, "hypothesis": text, "direction": text, "expected_effect": {"type": ["number", "null"]},
        "edits": {"type": "array", "items": edit}})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _anchors(files: Mapping[str, str]) -> list[str]:
    """Lines that occur once in all the editable source; empty when there are too many for an enum."""
    whole = "\n".join(text.replace("\r\n", "\n") for text in files.values())
    lines = dict.fromkeys(line for line in whole.split("\n") if line.strip())
    anchors = [line for line in lines if whole.count(line) == 1]
    fits = len(anchors) <= ENUM_VALUES and (len(anchors) <= 250 or sum(map(len, anchors)) <= ENUM_CHARACTERS)
    return anchors if fits else []


def _recent(history: Sequence[HistoryLine], most: int) -> list[HistoryLine]:
    """All that was merged, and the last ``most`` of the rest, oldest first."""
    recent = set(range(len(history) - most, len(history)))
    return [line for index, line in enumerate(history) if index in recent or line.outcome == "accepted"]


def _largest_first_out(files: Mapping[str, str], divisor: int) -> dict[str, str]:
    """The files that fit into 1/``divisor`` of their total; the first is always kept."""
    room = sum(map(len, files.values())) // divisor
    kept: dict[str, str] = {}
    for path, text in files.items():
        if len(text) <= room or not kept:
            kept[path] = text
            room -= len(text)
    return kept
