"""Which proposer a campaign gets, and the one line that tells the user so."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from agent import config
from agent.errors import UserError
from agent.ideas import IdeaBook, packaged_ideas
from agent.llm import minds
from agent.llm.breaker import Breaker
from agent.llm.endpoint import Endpoint
from agent.llm.news import News
from agent.llm.proposer import LlmProposer
from agent.llm.quote import shown_url
from agent.llm.relay import Mind, Relay
from agent.llm.review import Reviewer
from agent.propose import Proposer

Wanted = Literal["auto", "hybrid", "llm", "search", "random", "ideas"]
_OPENAI = "https://api.openai.com/v1"
PATIENCE_SECONDS = 10.0
"""Longest wait between two tries of one call: beyond it the model rests, and others are asked."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What ``choose`` found. ``note`` is for the user: what proposes, and how to change that."""

    kind: Literal["hybrid", "llm", "search", "random", "ideas"]
    note: str


def choose(wanted: Wanted, model: config.Model) -> Choice:
    """``auto`` takes the model when one is named and has a key (or an own endpoint, which may need none).

    Source text leaves the machine only after a model was named: a key that happens to be in the environment is not
    enough. Raises UserError when ``llm`` is asked for and cannot be had.
    """
    base, name = config.endpoint(model)
    key = config.key(model)
    how = (f"To use a model: set {model.key_variable} and RATCHET_MODEL (and OPENAI_BASE_URL for another "
           "OpenAI-compatible endpoint).")
    if wanted == "ideas":
        return Choice("ideas", "Proposals come from the idea book.")
    if wanted == "search" or wanted == "random":
        how = "an optimiser" if wanted == "search" else "random moves"
        return Choice(wanted, f"Proposals come from {how} over the numeric constants of the editable source.")
    if name and (key or base != _OPENAI):
        _check(base, key, model)
        source = f"{name} at {shown_url(base)}; the editable source is sent there."
        if wanted == "llm" or (wanted == "auto" and not model.search):
            return Choice("llm", f"Proposals come from {source}")
        return Choice("hybrid", f"Proposals come by turns from an optimiser over numeric constants and from {source}")
    if wanted in ("llm", "hybrid"):
        missing = "no model is named" if not name else f"{model.key_variable} is not set"
        raise UserError(f"No model can propose: {missing}.", how)
    reason = (f"No model is named, so {model.key_variable} is not used" if key else
              f"{model.key_variable} is not set, so the model {name} is not used" if name else "No model is set up")
    return Choice("ideas", f"{reason}: proposals come from the idea book. {how}")


def open_proposer(choice: Choice, model: config.Model, prompts: Path, seed: int, done: Collection[str] = (),
                  sleep: Callable[[float], None] = time.sleep, answered: bool = False, *,
                  others: Sequence[config.OtherModel] = (), stand_ins: Sequence[Proposer] = (),
                  news: News | None = None,
                  record: Callable[[], Mapping[str, minds.Account]] = dict) -> Proposer:
    """The proposer of ``choice``. ``prompts`` holds the templates and ``ideas/``; ``done``: cards already attempted.

    A model comes with what goes on without it (llm/relay.py): ``others``, the models of [[models]]; then the idea book
    and ``stand_ins``. ``answered``: the endpoint has answered in this campaign before, so that a refused key now is no
    error to stop at. ``news``: where it is told who is down and who is back; ``record``: what each model has gained.

    ``sleep`` waits between tries; give one that ends early when the user stops the campaign.
    """
    if choice.kind == "ideas":
        return IdeaBook(packaged_ideas(prompts / "ideas"), seed, done)
    asked = [(model, False), *((other, other.role == "fallback") for other in others if other.role != "review")]
    secrets = tuple(config.key(one) for one in (model, *others))
    models = []
    for one, fallback in asked:
        endpoint = open_endpoint(one, secrets, sleep)
        endpoint.answered = answered
        models.append(Mind(endpoint, LlmProposer(endpoint, one, prompts), Breaker(), fallback))
    ideas = [IdeaBook(packaged_ideas(prompts / "ideas"), seed, done)] if any((prompts / "ideas").glob("*.toml")) else []
    reviewers = [Reviewer(open_endpoint(one, secrets, sleep), prompts) for one in others if one.role == "review"]
    return Relay(models, [*ideas, *stand_ins], parallel=model.parallel, deadline=model.deadline_seconds,
                 outage_seconds=3600 * model.outage_hours, seed=seed, news=news, record=record,
                 reviewer=reviewers[0] if reviewers else None)


def notes(others: Sequence[config.OtherModel]) -> list[str]:
    """For the user: who else is asked, and what is sent there."""
    how = {"fallback": "asked while the others cannot be", "peer": "asked in turn", "review": "reviews proposals"}
    return [f"{name} at {shown_url(base)}: {how[other.role]}; "
            + ("proposals are sent there." if other.role == "review" else "the editable source is sent there too.")
            for other in others for base, name in (config.endpoint(other),)]


def open_endpoint(model: config.Model, secrets: Sequence[str] = (),
                  sleep: Callable[[float], None] = time.sleep) -> Endpoint:
    """The endpoint of ``model``, which sends none of ``secrets`` in a message. Raises UserError for one that cannot be.

    It does not wait long for a busy server: whoever asks has others to ask.
    """
    base, name = config.endpoint(model)
    key = config.key(model)
    _check(base, key, model)
    endpoint = Endpoint(model, key, base, name, sleep=sleep, secrets=secrets)
    endpoint.patience = PATIENCE_SECONDS
    return endpoint


def _check(base: str, key: str, model: config.Model) -> None:
    """Raises UserError for a URL or a key that no request can carry."""
    try:
        parts = urlsplit(base)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UserError("The model's base URL is no http or https address.",
                        "Correct model.base_url, or OPENAI_BASE_URL; it looks like https://host/v1.")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"The key in {model.key_variable} holds a character that no key has.", "Copy the key again.")
