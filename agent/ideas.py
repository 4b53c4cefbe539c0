"""The idea book: cards with edits, proposed offline in an order that the campaign's seed fixes.

``prompts/README.md`` documents the card format. A card says nothing of whether it is good: the gate finds that out.
A card whose edits no longer fit the tip is proposed all the same; the patch stage refuses it, and the ledger says so.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent import resources
from agent.errors import UserError
from agent.propose import proposal_id, tidy_title
from agent.read import Briefing
from agent.records import Edit, Proposal


class CardEdit(BaseModel):
    """One search/replace edit. An empty ``search`` creates the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str = Field(min_length=1)
    search: str
    replace: str


class Card(BaseModel):
    """One idea: the text of ``NAME.toml``; NAME is its id."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str = Field(min_length=1, max_length=72)
    mechanism: str = Field(min_length=1)
    reference: str
    direction: str = ""
    presets: tuple[str, ...] = ()
    edits: tuple[CardEdit, ...] = Field(min_length=1)


class IdeaBook:
    """Proposes each card once, in the order of ``random.Random(seed)``.

    ``done`` holds the ids of cards already attempted (``proposal.source`` in the ledger), so a resumed campaign goes
    on where it stopped: the order depends on the seed and the set of cards alone. Cards of other presets are passed by.
    """

    name = "ideas"

    def __init__(self, cards: Sequence[Card], seed: int, done: Collection[str] = ()) -> None:
        self._order = sorted(cards, key=lambda card: card.id)
        random.Random(seed).shuffle(self._order)
        self._done = set(done)
        self.ended = ""

    def left(self, preset: str) -> int:
        """Cards still to propose under ``preset``."""
        return sum(self._open(card, preset) for card in self._order)

    def next(self, briefing: Briefing) -> Proposal | None:
        for card in self._order:
            if self._open(card, briefing.preset):
                self._done.add(card.id)
                return _proposal(card, briefing)
        self.ended = "every card of the idea book was attempted"
        return None

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        """None: a card cannot answer back."""
        return None

    def _open(self, card: Card, preset: str) -> bool:
        return card.id not in self._done and (not card.presets or preset in card.presets)


def packaged_ideas(folder: Path) -> list[Card]:
    """The cards of ``folder`` (``*.toml``), sorted by id. Raises UserError that names the file and the wrong key."""
    cards = [read_card(path) for path in sorted(folder.glob("*.toml"))]
    if not cards:
        raise UserError(f"No idea cards in {folder}.", "Add *.toml cards there; prompts/README.md shows one.")
    return cards


def read_card(path: Path) -> Card:
    """One card. Raises UserError that names the file and the wrong key."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        return Card.model_validate({**raw, "id": path.stem})
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the card {path}: {error}.", "It must be a readable UTF-8 file.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"The card {path} is not valid TOML: {error}.", "Correct that line.") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"The card {path}: {key}: {first['msg']}.", "prompts/README.md shows the format.") from error


def _proposal(card: Card, briefing: Briefing) -> Proposal:
    title = tidy_title(card.title)
    return Proposal(
        id=proposal_id(briefing.number, title), base=briefing.tip, title=title, hypothesis=card.mechanism.strip(),
        author="ideas", edits=tuple(Edit(edit.path, edit.search, edit.replace) for edit in card.edits),
        direction=card.direction, reference=card.reference, source=card.id)


def cards_of(names: Sequence[str], folder: Path | None) -> list[Card]:
    """The cards of ``folder``, or of the packaged book, by id. Raises UserError for one that is not there."""
    book = {card.id: card for card in packaged_ideas(folder or resources.prompts() / "ideas")}
    names = [name.strip() for name in names if name.strip()]
    unknown = [name for name in names if name not in book]
    if unknown or not names:
        raise UserError(f"There is no card {unknown[0]!r}." if unknown else "--cards names no card.",
                        f"Choose of: {', '.join(book)}.")
    return [book[name] for name in dict.fromkeys(names)]
