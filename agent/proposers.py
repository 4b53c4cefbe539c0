"""Which proposer a campaign gets, and the one line that tells the user so."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from agent import config
from agent.errors import UserError
from agent.ideas import IdeaBook, packaged_ideas
from agent.propose import Proposer
from agent.quote import shown_url

Wanted = Literal["auto", "llm", "ideas"]
_OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True, slots=True)
class Choice:
    """What ``choose`` found. ``note`` is for the user: what proposes, and how to change that."""

    kind: Literal["llm", "ideas"]
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
    if name and (key or base != _OPENAI):
        _check(base, key, model)
        return Choice("llm", f"Proposals come from {name} at {shown_url(base)}; the editable source is sent there.")
    if wanted == "llm":
        missing = "no model is named" if not name else f"{model.key_variable} is not set"
        raise UserError(f"No model can propose: {missing}.", how)
    reason = (f"No model is named, so {model.key_variable} is not used" if key else
              f"{model.key_variable} is not set, so the model {name} is not used" if name else "No model is set up")
    return Choice("ideas", f"{reason}: proposals come from the idea book. {how}")


def open_proposer(choice: Choice, model: config.Model, prompts: Path, seed: int, done: Collection[str] = (),
                  sleep: Callable[[float], None] = time.sleep, answered: bool = False) -> Proposer:
    """The proposer of ``choice``. ``prompts`` holds the templates and ``ideas/``; ``done``: cards already attempted.

    ``answered``: the endpoint has answered in this campaign before, so that a refused key now is no error to stop at.

    ``sleep`` waits between tries, up to ten minutes; give one that ends early when the user stops the campaign.
    """
    if choice.kind == "ideas":
        return IdeaBook(packaged_ideas(prompts / "ideas"), seed, done)
    from agent.endpoint import Endpoint  # the openai client takes a third of a second to import
    from agent.llm import LlmProposer

    base, name = config.endpoint(model)
    endpoint = Endpoint(model, config.key(model), base, name, sleep=sleep)
    endpoint.answered = answered
    return LlmProposer(endpoint, model, prompts, sleep=sleep)


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
