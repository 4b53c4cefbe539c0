"""The idea book as it ships: every card parses, applies where it should, keeps its secret, and comes shuffled."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from idea_truth import CHARGED, FAULTS, TRUTH, Kind, kind, stage

from agent import git, git_trees
from agent.config import Config
from agent.ideas import Card, IdeaBook, packaged_ideas
from agent.ledger import State
from agent.patch import PatchRefused, build
from agent.read import Briefing, brief
from agent.records import Candidate, Edit, Proposal

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "target_repo"
CARDS = {card.id: card for card in packaged_ideas(ROOT / "prompts" / "ideas")}
CPU = sorted(name for name, card in CARDS.items() if not card.presets or "cpu" in card.presets)
GOOD = sorted(name for name in TRUTH if kind(name) == "good")
CONFIG = Config.model_validate(tomllib.loads((TARGET / "ratchet.toml").read_text(encoding="utf-8")))
TELLTALE = re.compile(
    r"\b(cheat\w*|harm\w*|plant(ed|s)?|broken|null|no-?op|crash\w*|oversights?|sabotage\w*|trap|decoy|attack\w*"
    r"|exploit\w*|malicious|leak\w*|bogus|fake|trick\w*|wrong|bug\w*|uninitiali[sz]ed|worse|identical)\b",
    re.IGNORECASE)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default target in a bare repository of its own, as a campaign has it."""
    place = tmp_path_factory.mktemp("ideas") / "repo.git"
    git_trees.import_folder(TARGET, place)
    return place


@pytest.fixture(scope="module")
def start(repo: Path) -> str:
    commit = git.resolve(repo, git.ACCEPTED)
    assert commit is not None
    return commit


def apply(repo: Path, base: str, name: str) -> Candidate:
    card = CARDS[name]
    edits = tuple(Edit(edit.path, edit.search, edit.replace) for edit in card.edits)
    return build(repo, "", base, Proposal(name, base, card.title, card.mechanism, "ideas", edits=edits), CONFIG.source)


def apply_all(repo: Path, base: str, names: list[str]) -> str:
    """The commit on which all of ``names`` were merged, one after the other."""
    for name in names:
        base = apply(repo, base, name).head
    return base


def test_the_truth_table_covers_exactly_the_cards_of_the_cpu_preset() -> None:
    assert sorted(TRUTH) == CPU
    assert len(CPU) >= 24
    kinds = [kind(name) for name in CPU]
    assert set(kinds) == set(get_args(Kind)) and min(kinds.count(each) for each in set(kinds)) >= 4
    assert {name for name in TRUTH if stage(name) in ("preflight", "measure")} == set(FAULTS)
    assert all(kind(name) == "cheating" and not stage(name) for name in CHARGED)


def test_ids_are_file_names_and_titles_differ() -> None:
    assert sorted(CARDS) == sorted(path.stem for path in (ROOT / "prompts" / "ideas").glob("*.toml"))
    assert len({card.title for card in CARDS.values()}) == len(CARDS)


@pytest.mark.parametrize("name", CPU)
def test_a_cards_text_is_whole_and_keeps_its_secret(name: str) -> None:
    card = CARDS[name]
    prose = " ".join((name.replace("-", " "), card.title, card.mechanism, card.reference, card.direction))
    code = "\n".join(edit.replace for edit in card.edits)
    assert not TELLTALE.search(prose) and not TELLTALE.search(code)
    assert 2 <= len(re.findall(r"[a-z0-9)%]\.(?:\s|$)", card.mechanism)) <= 4, "two to four sentences"
    assert card.reference and card.direction and card.title[0].isupper() and not card.title.endswith(".")
    assert name not in card.title and all(edit.search != edit.replace for edit in card.edits)


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_card_applies_to_the_default_target_or_is_refused_as_foretold(repo: Path, start: str, name: str) -> None:
    if stage_of(name) == "patch":
        with pytest.raises(PatchRefused):
            apply(repo, start, name)
        return
    candidate = apply(repo, start, name)
    assert sorted(candidate.patch.files) == sorted({edit.path for edit in CARDS[name].edits})
    for edit in CARDS[name].edits:  # quoted word for word, so that no fuzzy match decides what a card means
        text = git_trees.read_files(repo, start, "", [edit.path]).get(edit.path, "")
        assert text.count(edit.search) == 1 if edit.search else not text


def stage_of(name: str) -> str:
    return stage(name) if name in TRUTH else ""


@pytest.mark.parametrize(("name", "rule"), [
    ("marginal-loss", "path"), ("cosine-warm-down", "syntax"), ("stream-precision-note", "no-op")])
def test_refusals_name_their_rule(repo: Path, start: str, name: str, rule: str) -> None:
    with pytest.raises(PatchRefused) as refusal:
        apply(repo, start, name)
    assert refusal.value.rule == rule


@pytest.mark.parametrize("name", GOOD)
def test_good_cards_apply_in_any_order_and_reach_one_tree(repo: Path, start: str, name: str) -> None:
    others = [other for other in GOOD if other != name]
    last = apply(repo, apply_all(repo, start, others), name).tree
    first = git.resolve(repo, f"{apply_all(repo, apply(repo, start, name).head, others[::-1])}^{{tree}}", "tree")
    assert last == first


def test_every_card_still_applies_once_the_good_ones_are_merged(repo: Path, start: str) -> None:
    tip = apply_all(repo, start, GOOD)
    lost = []
    for name in CPU:
        if name not in GOOD and stage(name) != "patch":
            try:
                apply(repo, tip, name)
            except PatchRefused as refusal:
                lost.append((name, refusal.reason))
    assert lost == []


def test_no_two_cards_of_a_preset_make_the_same_change(repo: Path, start: str) -> None:
    hashes = [apply(repo, start, name).patch.normalised_hash for name in CPU if stage(name) != "patch"]
    assert len(set(hashes)) == len(hashes)


def order(cards: list[Card], seed: int, preset: str = "cpu") -> list[str]:
    book, found = IdeaBook(cards, seed), []
    while (proposal := book.next(briefing(preset))) is not None:
        found.append(proposal.source)
    return found


def briefing(preset: str) -> Briefing:
    config = CONFIG.model_copy(update={"preset": preset})
    return brief(config, State(tip="c0ffee"), {"train.py": "x = 1\n"}, {})


def test_the_order_is_the_seeds_alone() -> None:
    cards = list(CARDS.values())
    first = order(cards, 0)
    assert sorted(first) == CPU
    assert first == order(cards, 0) == order(cards[::-1], 0)
    assert len({tuple(order(cards, seed)) for seed in range(5)}) == 5
    assert set(order(cards, 0, "h100")).isdisjoint(first)


def test_no_kind_stands_together_in_the_default_order() -> None:
    """Names sort by no kind, so the shuffle starts from nothing that tells."""
    by_name = [kind(name) for name in CPU]
    runs = sum(a != b for a, b in itertools.pairwise(by_name))
    assert runs >= len(CPU) // 2
