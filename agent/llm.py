"""LlmProposer: asks a model for a patch, and shows it its error when the patch cannot be used.

Each call is made of the briefing and, in a repair round, the last answer: nothing but the ledger is remembered, so a
resumed campaign asks the same question. Several threads may ask at once: a number is given to a proposal when it comes,
so repair rounds are counted by its title. What the user must mend before a first answer is a UserError; once the
endpoint has answered, a night does not die of it: the attempt fails, and after enough failures the proposer ends.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from agent import config
from agent.answers import Auth, BadRequest, ContextOverflow, EndpointError, Garbage, Quota, Reply, Transient
from agent.endpoint import Endpoint, Message
from agent.errors import UserError
from agent.messages import SHRINKS, Prompts, answer_of, is_anchored, schema, shown_reply
from agent.parse_reply import Parsed, parse_reply
from agent.propose import ProposeFailed, add_costs, proposal_id
from agent.quote import shown_url
from agent.read import Briefing
from agent.records import Cost, Proposal

PATIENCE = 12
"""Failed attempts in a row after which the proposer ends."""
PAUSE, LONGEST_PAUSE = 5.0, 600.0
"""Seconds before the attempt after a failed one, doubled from failure to failure: twelve span an outage of 50 min."""


class LlmProposer:
    """A model behind an Endpoint. ``repairs`` rounds a proposal, shared by unusable replies and by ``repair``."""

    name = "llm"

    def __init__(self, endpoint: Endpoint, model: config.Model, prompts: Path, *,
                 sleep: Callable[[float], None] = time.sleep) -> None:
        self._endpoint, self._model, self._prompts, self._sleep = endpoint, model, Prompts(prompts), sleep
        self._rounds: dict[str, int] = {}
        self._failures = 0
        self._size = 0
        self.ended = ""

    def next(self, briefing: Briefing) -> Proposal | None:
        if self.ended:
            return None
        if self._failures:
            self._sleep(min(LONGEST_PAUSE, PAUSE * 2 ** (self._failures - 1)))
        parsed, cost, left = self._converse(briefing, [], self._model.repairs)
        proposal = Proposal(
            id=proposal_id(briefing.number, parsed.title), base=briefing.tip, title=parsed.title,
            hypothesis=parsed.hypothesis, author="llm", edits=parsed.edits, diff=parsed.diff,
            direction=parsed.direction, expected_effect=parsed.expected_effect, cost=cost, source=self._endpoint.name)
        self._rounds[proposal.title] = left
        return proposal

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        left = self._rounds.get(proposal.title, self._model.repairs)
        if self.ended or left == 0:
            return None
        self._rounds[proposal.title] = 0
        tail = self._prompts.repair(answer_of(proposal), problem, left - 1)
        parsed, cost, left = self._converse(briefing, tail, left - 1)
        self._rounds[proposal.title] = left
        return dataclasses.replace(
            proposal, base=briefing.tip, edits=parsed.edits, diff=parsed.diff,
            hypothesis=parsed.hypothesis or proposal.hypothesis, cost=add_costs(proposal.cost, cost))

    def _converse(self, briefing: Briefing, tail: list[Message], left: int) -> tuple[Parsed, Cost, int]:
        """(usable reply, cost, repair rounds left). Raises ProposeFailed when the rounds run out."""
        spent = Cost()
        while True:
            try:
                reply = self._ask(briefing, tail)
            except ProposeFailed as failed:
                raise ProposeFailed(failed.reason, add_costs(spent, failed.cost)) from None
            spent = add_costs(spent, reply.cost)
            parsed = parse_reply(reply.text, briefing.files, reply.cut)
            if isinstance(parsed, Parsed):
                return parsed, spent, left
            if left == 0:
                raise ProposeFailed(f"the model gave no usable patch: {parsed.text}", spent)
            left -= 1
            tail = self._prompts.repair(shown_reply(reply), parsed.text, left)

    def _ask(self, briefing: Briefing, tail: list[Message]) -> Reply:
        """One reply. A prompt that is too long is shrunk, and stays so for the rest of the campaign."""
        anchored = is_anchored(briefing)
        spent = Cost()
        while True:
            messages = self._prompts.opening(briefing, self._size, anchored) + tail
            try:
                reply = self._endpoint.complete(messages, schema(briefing, anchored))
            except ContextOverflow as error:
                spent = add_costs(spent, error.cost)
                if self._size == SHRINKS - 1:
                    raise self._failed("the source does not fit the model's context", spent) from None
                self._size += 1
            except EndpointError as error:
                if not self._endpoint.answered:
                    self._raise_if_mendable(error)
                if isinstance(error, (Auth, Quota)):
                    self.ended = f"the model endpoint refuses further calls ({error})"
                raise self._failed(str(error), add_costs(spent, error.cost)) from None
            else:
                self._failures = 0
                return Reply(reply.text, add_costs(spent, reply.cost), reply.cut)

    def _failed(self, reason: str, cost: Cost) -> ProposeFailed:
        """Count a failure; enough of them in a row end the proposer."""
        self._failures += 1
        if self._failures >= PATIENCE:
            self.ended = self.ended or f"the model failed {self._failures} times in a row (last: {reason})"
        return ProposeFailed(f"no answer from {shown_url(self._endpoint.base_url)}: {reason}", cost)

    def _raise_if_mendable(self, error: EndpointError) -> None:
        """UserError for what a person set wrong before the first answer: address, key, account, or model name."""
        where, variable = shown_url(self._endpoint.base_url), self._model.key_variable
        if isinstance(error, Auth) and not config.key(self._model):
            raise UserError(f"The endpoint {where} wants a key ({error.status}).",
                            f"Set {variable}, or use the idea book with --proposer ideas.") from None
        if isinstance(error, Auth):
            raise UserError(f"The endpoint {where} refused the key in {variable} ({error.status}).",
                            "Set a valid key, or unset it to use the idea book.") from None
        if isinstance(error, Quota):
            raise UserError(f"The account at {where} has no quota left ({error}).",
                            f"Top it up, or unset {variable} to use the idea book.") from None
        if isinstance(error, BadRequest) and error.status == 404:
            raise UserError(f"The endpoint {where} does not serve the model {self._endpoint.name!r} ({error}).",
                            "Correct model.name (or RATCHET_MODEL) and model.base_url (or OPENAI_BASE_URL).") from None
        if isinstance(error, Transient) and not isinstance(error, Garbage):
            raise UserError(f"The endpoint {where} does not answer: {error}.",
                            "Start it, or correct model.base_url (or OPENAI_BASE_URL), and run the same command again; "
                            "--proposer ideas needs no model.") from None
