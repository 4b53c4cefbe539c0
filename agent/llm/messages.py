"""Briefing -> the messages and the JSON schema of one model call. Templates live in prompts/; nothing is sent here.

What stays the same comes first, so that an endpoint that keeps prompts need not read it again: the system message holds
for a campaign, the source for a tip, and what changes with every attempt stands at the end. The whole keeps to the
briefing's budget of tokens: the notebook has a fixed part of it, the source what is left (notebook.py, codemap.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from agent.briefing import codemap, notebook, predictions
from agent.briefing.codemap import Shown, tokens
from agent.briefing.directions import choose
from agent.llm.answers import Reply
from agent.llm.edit_modes import Mode, choose_mode, possible_modes
from agent.llm.endpoint import Message
from agent.llm.quote import fence, one_line, plain, quoted
from agent.read import Briefing
from agent.records import Proposal

SHRINKS = 5
"""Sizes of a prompt: all that the budget holds; then no protected files and half of the source and of the notebook, a
quarter, and so on. A model whose context overflows gets the next one."""
PROTECTED_SHARE = 0.2
"""Of the room for source, what protected files may take where not all fits: they are there for their interface only."""
GUIDANCE_CHARACTERS = 12_000
"""Of the owner's guidance."""
ENUM_VALUES, ENUM_CHARACTERS = 1000, 15_000
"""OpenAI's limits on an enum in a strict schema (the second holds over 250 values)."""


class Prompts:
    """The templates of a folder, with undefined variables as errors."""

    def __init__(self, folder: Path) -> None:
        self._loader = jinja2.FileSystemLoader(folder)
        self._templates = jinja2.Environment(
            loader=self._loader, undefined=jinja2.StrictUndefined, autoescape=False,
            trim_blocks=True, keep_trailing_newline=True)
        self._last = threading.local()
        """Of each thread: (briefing, room, what changes, attempts left out). One proposal asks for the same several
        times."""
        self._templates.filters |= {"fence": fence, "quoted": quoted, "one_line": one_line}

    def render(self, name: str, **variables: object) -> str:
        """The text of ``name``. Raises jinja2.UndefinedError when a variable is missing."""
        return self._templates.get_template(name).render(**variables)

    def opening(self, briefing: Briefing, size: int = 0, mode: Mode = "json") -> list[Message]:
        """System and user message of an attempt that asks for edits in ``mode``, at ``size`` of SHRINKS."""
        system, room = self._system(briefing, mode)
        changing, _ = self._changing(briefing, min(notebook.TOKENS, briefing.tokens // 4) >> size)
        shown = _source(briefing, room)
        if size:  # what was shown is halved, not what there was room for
            shown = _source(dataclasses.replace(briefing, protected={}), min(room, sum(
                tokens(text) for text in (*shown["files"].values(), *shown["outlined"].values()))) >> size)
        source = self.render("source.j2", editable=briefing.editable, **shown)
        return [{"role": "system", "content": system}, {"role": "user", "content": f"{source}\n{changing}"}]

    def hides(self, briefing: Briefing) -> bool:
        """Whether the briefing cannot show all source or all attempts, so that there is something to look up."""
        shown = _source(briefing, self._system(briefing, "json")[1])
        return bool(shown["outlined"] or shown["omitted"]
                    or self._changing(briefing, min(notebook.TOKENS, briefing.tokens // 4))[1])

    def _system(self, briefing: Briefing, mode: Mode) -> tuple[str, int]:
        """The system message, and the tokens that are left for source beside it and what changes."""
        system = self.render(
            "system.j2", metric=briefing.metric, direction=briefing.direction, tier=briefing.tier,
            mode=mode, path=next(iter(briefing.files), "train.py"), max_patch_lines=briefing.max_patch_lines,
            budget=briefing.budget, preset=briefing.preset,
            guidance=plain(briefing.guidance).strip()[:min(GUIDANCE_CHARACTERS, briefing.tokens // 2)])
        changing, _ = self._changing(briefing, min(notebook.TOKENS, briefing.tokens // 4))
        return system, max(0, briefing.tokens - tokens(system) - tokens(changing) - 100)

    @property
    def version(self) -> str:
        """A hash of all templates: the same for the same texts, whatever folder they lie in."""
        digest = hashlib.sha256()
        for name in sorted(self._templates.list_templates(extensions=["j2"])):
            text, _, _ = self._loader.get_source(self._templates, name)
            digest.update(f"{name}\0{text}\0".encode())
        return digest.hexdigest()[:12]

    def identity(self, briefing: Briefing) -> str:
        """Hash of the templates, and of the owner's guidance where there is any."""
        guided = hashlib.sha256(briefing.guidance.encode()).hexdigest()[:8] if briefing.guidance else ""
        return f"{self.version}+{guided}" if guided else self.version

    def _changing(self, briefing: Briefing, room: int) -> tuple[str, int]:
        """What changes with every attempt, the notebook in at most ``room`` tokens; and the attempts that are not in
        it."""
        known: tuple[Briefing, int, str, int] | None = getattr(self._last, "changing", None)
        if known is not None and known[0] is briefing and known[1] == room:
            return known[2:]
        pages = notebook.make(briefing.history, briefing.direction, room)
        text = self.render("propose.j2", briefing=briefing, notebook=pages, focus=focus(briefing),
                           rates=notebook.rates(briefing.tallies), question=question(briefing))
        self._last.changing = (briefing, room, text, pages.left_out)
        return text, pages.left_out

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
        "expected_effect": proposal.expected_effect, **_predicted(proposal),
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
        **predictions.FIELDS, "edits": {"type": "array", "items": edit}})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _anchors(files: Mapping[str, str]) -> list[str]:
    """Lines that occur once in all the editable source; empty when there are too many for an enum."""
    whole = "\n".join(text.replace("\r\n", "\n") for text in files.values())
    lines = dict.fromkeys(line for line in whole.split("\n") if line.strip())
    anchors = [line for line in lines if whole.count(line) == 1]
    fits = len(anchors) <= ENUM_VALUES and (len(anchors) <= 250 or sum(map(len, anchors)) <= ENUM_CHARACTERS)
    return anchors if fits else []


def focus(briefing: Briefing) -> str:
    """The direction that this attempt is asked for: what a plateau asks for, or the bandit's choice."""
    asked = {"undo": "ablation", "speed": "systems speed"}.get(question(briefing))
    return asked or choose(briefing.tallies or [], f"{briefing.seed} {briefing.number}") if briefing.tallies else ""


def question(briefing: Briefing) -> str:
    """What a plateau asks for instead of an ordinary proposal; empty without one, and every other time, so that the
    directions that gained keep their turn."""
    return briefing.plateau.question if briefing.plateau and briefing.number % 2 else ""


def _predicted(proposal: Proposal) -> dict[str, Any]:
    said = proposal.prediction
    return {} if said is None else {"expected_low": said.low, "expected_high": said.high, "step_cost": said.step_cost,
                                    "check": said.check, "different": said.different}


def _source(briefing: Briefing, room: int) -> dict[str, Any]:
    """Editable and protected files as far as they fit into ``room`` tokens: variables of source.j2."""
    def needed(files: Mapping[str, str]) -> int:
        return sum(tokens(text) + tokens(path) + 6 for path, text in files.items())

    for_protected = min(needed(briefing.protected), max(int(room * PROTECTED_SHARE), room - needed(briefing.files)))
    shown = codemap.fit(briefing.files, room - for_protected, briefing.command, briefing.touched)
    interface = codemap.fit(briefing.protected, for_protected, briefing.command) if briefing.protected else Shown()
    return {"files": shown.whole, "outlined": shown.outlined | interface.outlined, "protected": interface.whole,
            "omitted": [*shown.omitted, *interface.omitted]}
