"""A second model's look at a proposal before anything is run: is it within the objective, or is the question changed?

Off unless an entry of [[models]] has the role ``review``. It sees the proposal and the objective, not the source, and
has no say in a merge: it can only turn a proposal away, with its reason. Where it does not answer, or in no form that
can be read, the proposal goes on unreviewed: the rules of scope.py, the box and the gate hold all the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.llm.answers import EndpointError
from agent.llm.endpoint import Endpoint
from agent.llm.messages import Prompts, answer_of
from agent.llm.quote import one_line
from agent.read import Briefing
from agent.records import Cost, Proposal

SCHEMA: dict[str, Any] = {
    "type": "object", "properties": {"in_scope": {"type": "boolean"}, "reason": {"type": "string"}},
    "required": ["in_scope", "reason"], "additionalProperties": False}
SECONDS = 120.0
"""Of one review at most, within the proposal's own deadline."""


class Reviewer:
    """A model behind an endpoint, asked about the proposals of others."""

    def __init__(self, endpoint: Endpoint, prompts: Path) -> None:
        self._endpoint, self._prompts = endpoint, Prompts(prompts)

    @property
    def name(self) -> str:
        return self._endpoint.name

    def complaint(self, briefing: Briefing, proposal: Proposal, end: float) -> tuple[str, Cost, str]:
        """(why it is turned away or an empty string, what was spent, why there was no review or an empty string).

        ``end``: by the endpoint's clock, no call goes on beyond it.
        """
        text = self._prompts.render(
            "review.j2", metric=briefing.metric, direction=briefing.direction, budget=briefing.budget,
            proposal=answer_of(proposal))
        until = min(end, self._endpoint.clock() + SECONDS)
        try:
            reply = self._endpoint.complete([{"role": "user", "content": text}], SCHEMA, until)
        except EndpointError as error:
            return "", error.cost, f"{error.kind} ({error})"
        found = _verdict(reply.text)
        if found is None:
            return "", reply.cost, "no verdict in its reply"
        in_scope, reason = found
        return "" if in_scope else one_line(reason, 200) or "no reason given", reply.cost, ""


def _verdict(text: str) -> tuple[bool, str] | None:
    """(in scope, reason) from the JSON object in a reply; None where there is none."""
    start, end = text.find("{"), text.rfind("}")
    try:
        answer = json.loads(text[start:end + 1], strict=False)  # models put raw line breaks into strings
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or not isinstance(answer.get("in_scope"), bool):
        return None
    return answer["in_scope"], str(answer.get("reason") or "")
