"""LlmProposer: asks a model for a patch, and shows it its error when the patch cannot be used.

Each call is made of the briefing and, in a repair round, the last answer: nothing but the ledger is remembered, so a
resumed campaign asks the same question. Several threads may ask at once: a number is given to a proposal when it comes,
so repair rounds are counted by its title. A question that the endpoint does not answer is a NoAnswer, which says what
the user could mend where it never answered; what follows of that is for the caller (relay.py) to say.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from agent import config
from agent.briefing.codemap import tokens
from agent.errors import UserError
from agent.llm.answers import Auth, BadRequest, ContextOverflow, EndpointError, Garbage, Quota, Reply, Transient
from agent.llm.edit_modes import Mode
from agent.llm.endpoint import Endpoint, Message
from agent.llm.explore import Explorer
from agent.llm.messages import SHRINKS, Prompts, answer_of, mode_for, schema, shown_reply
from agent.llm.parse_reply import Parsed, parse_reply
from agent.llm.quote import shown_url
from agent.propose import ProposeFailed, add_costs, proposal_id
from agent.read import Briefing
from agent.records import Cost, Prediction, Proposal, Said


class NoAnswer(ProposeFailed):
    """The endpoint gave no reply. ``mend``: what the user must do, where it has never answered and somebody can."""

    def __init__(self, reason: str, cost: Cost, error: EndpointError, mend: UserError | None = None) -> None:
        super().__init__(reason, cost)
        self.error, self.mend = error, mend


class LlmProposer:
    """A model behind an Endpoint. ``repairs`` rounds a proposal, shared by unusable replies and by ``repair``."""

    name = "llm"

    def __init__(self, endpoint: Endpoint, model: config.Model, prompts: Path) -> None:
        self._endpoint, self._model, self._prompts = endpoint, model, Prompts(prompts)
        self._explorer = Explorer(endpoint, self._prompts, model.explore)
        self._rounds: dict[str, int] = {}
        self._size = 0
        self.ended = ""
        self.answered_as = ""
        """Name of the model that the last reply said it came from."""

    def next(self, briefing: Briefing, until: float | None = None) -> Proposal | None:
        """As promised by every proposer; no call goes on beyond ``until``, by the endpoint's clock."""
        briefing, looked = self._look(briefing, until)
        try:
            parsed, cost, left, replies = self._converse(briefing, [], self._model.repairs, until)
        except ProposeFailed as failed:
            failed.cost = add_costs(looked, failed.cost)
            raise
        cost = add_costs(looked, cost)
        proposal = Proposal(
            id=proposal_id(briefing.number, parsed.title), base=briefing.tip, title=parsed.title,
            hypothesis=parsed.hypothesis, author="llm", edits=parsed.edits, diff=parsed.diff,
            direction=parsed.direction, expected_effect=parsed.expected_effect, cost=cost, source=self._endpoint.name,
            replies=replies, prediction=parsed.prediction, prompt=self._prompts.identity(briefing),
            briefing=self._cost_of(briefing))
        self._rounds[proposal.title] = left
        return proposal

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str,
               until: float | None = None) -> Proposal | None:
        left = self._rounds.get(proposal.title, self._model.repairs)
        if left == 0:
            return None
        self._rounds[proposal.title] = 0
        tail = self._prompts.repair(answer_of(proposal), problem, left - 1)
        parsed, cost, left, replies = self._converse(briefing, tail, left - 1, until)
        self._rounds[proposal.title] = left
        return dataclasses.replace(
            proposal, base=briefing.tip, edits=parsed.edits, diff=parsed.diff,
            hypothesis=parsed.hypothesis or proposal.hypothesis, cost=add_costs(proposal.cost, cost),
            replies=(*proposal.replies, *replies),
            prediction=parsed.prediction if parsed.prediction != Prediction() else proposal.prediction)

    def request(self, briefing: Briefing) -> dict[str, Any]:
        """The body of the call that would ask for a proposal."""
        mode = mode_for(briefing, self._endpoint.name)
        return self._endpoint.request(self._prompts.opening(briefing, self._size, mode), schema(briefing, mode))

    def _look(self, briefing: Briefing, until: float | None) -> tuple[Briefing, Cost]:
        """The briefing with what the model wanted to look up first, and what that cost."""
        if self._size or not self._model.explore or not self._prompts.hides(briefing):
            return briefing, Cost()
        found = self._explorer.explore(briefing, self._prompts.opening(briefing), until)
        return dataclasses.replace(briefing, findings=found.text), found.cost

    def _cost_of(self, briefing: Briefing) -> Cost:
        """What the briefing alone comes to, at the endpoint's price."""
        sent = sum(tokens(one["content"]) for one in self._prompts.opening(briefing, self._size))
        return self._endpoint.priced(Cost(prompt_tokens=sent))

    def _converse(
        self, briefing: Briefing, tail: list[Message], left: int, until: float | None,
    ) -> tuple[Parsed, Cost, int, tuple[Said, ...]]:
        """(usable reply, cost, repair rounds left, every reply). Raises ProposeFailed when the rounds run out."""
        spent, said = Cost(), tuple[Said, ...]()
        mode = mode_for(briefing, self._endpoint.name)
        while True:
            try:
                reply = self._ask(briefing, tail, mode, until)
            except ProposeFailed as failed:
                failed.cost, failed.replies = add_costs(spent, failed.cost), said
                raise
            spent = add_costs(spent, reply.cost)
            parsed = parse_reply(reply.text, briefing.files, reply.cut, briefing.protected)
            if isinstance(parsed, Parsed):
                return parsed, spent, left, (*said, Said(self._endpoint.name, mode, parsed.form))
            said += (Said(self._endpoint.name, mode, "", "propose", parsed.text, placed=False),)
            if left == 0:
                raise ProposeFailed(f"the model gave no usable patch: {parsed.text}", spent, said)
            left -= 1
            tail = self._prompts.repair(shown_reply(reply), parsed.text, left)

    def _ask(self, briefing: Briefing, tail: list[Message], mode: Mode, until: float | None) -> Reply:
        """One reply in ``mode``. A prompt that is too long is shrunk, and stays so for the rest of the campaign."""
        spent = Cost()
        while True:
            messages = self._prompts.opening(briefing, self._size, mode) + tail
            try:
                reply = self._endpoint.complete(messages, schema(briefing, mode), until)
            except ContextOverflow as error:
                spent = add_costs(spent, error.cost)
                if self._size == SHRINKS - 1:
                    raise self._no_answer("the source does not fit the model's context", error, spent) from None
                self._size += 1
            except EndpointError as error:
                raise self._no_answer(str(error), error, add_costs(spent, error.cost)) from None
            else:
                self.answered_as = reply.model
                return dataclasses.replace(reply, cost=add_costs(spent, reply.cost))

    def _no_answer(self, reason: str, error: EndpointError, cost: Cost) -> NoAnswer:
        told = f"no answer from {self._endpoint.name} at {shown_url(self._endpoint.base_url)}: {error.kind} ({reason})"
        return NoAnswer(told, cost, error, None if self._endpoint.answered else self._mendable(error))

    def _mendable(self, error: EndpointError) -> UserError | None:
        """What a person set wrong before the first answer: address, key, account, or model name."""
        where, variable = shown_url(self._endpoint.base_url), self._model.key_variable
        if isinstance(error, Auth) and not config.key(self._model):
            return UserError(f"The endpoint {where} wants a key ({error.status}).",
                             f"Set {variable}, or use the idea book with --proposer ideas.")
        if isinstance(error, Auth):
            return UserError(f"The endpoint {where} refused the key in {variable} ({error.status}).",
                             "Set a valid key, or unset it to use the idea book.")
        if isinstance(error, Quota):
            return UserError(f"The account at {where} has no quota left ({error}).",
                             f"Top it up, or unset {variable} to use the idea book.")
        if isinstance(error, BadRequest) and error.status == 404:
            return UserError(f"The endpoint {where} does not serve the model {self._endpoint.name!r} ({error}).",
                             "Correct model.name (or RATCHET_MODEL) and model.base_url (or OPENAI_BASE_URL).")
        if isinstance(error, Transient) and not isinstance(error, Garbage):
            return UserError(f"The endpoint {where} does not answer: {error}.",
                             "Start it, or correct model.base_url (or OPENAI_BASE_URL), and run the same command "
                             "again; --proposer ideas needs no model.")
        return None
