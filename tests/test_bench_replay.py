"""The shipped judge on the bank of real runs: what it merges, what it reports, and what a greedy loop would have."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from agent.bench import command, replay
from agent.config import Judge
from agent.errors import UserError
from agent.judge import rule_of

BANK = Path(__file__).parent / "data/bank.json"
VISIBLE = ("larger-unembedding-rate", "gentler-matrix-rate", "longer-adam-memory", "later-warm-down")
"""The planted oversights that show by themselves at the start; the fifth needs the others (docs/LOG.md)."""


@pytest.fixture(scope="module")
def found() -> Any:
    parser = command.parser("replay", command.BENCHES["replay"])
    options = parser.parse_args(["--bank", str(BANK), "--campaigns", "200"])
    return replay.replay(options, lambda line: None).facts


def test_the_bank_is_whole() -> None:
    kept = replay.read(BANK)
    assert len(kept.start) == 24 and list(kept.kinds.values()).count("null") == 8 and set(VISIBLE) < set(kept.kinds)


def test_every_visible_oversight_is_found_and_nothing_false_is_merged(found: Any) -> None:
    assert all(found["arms"][name]["merged"] >= 0.95 for name in VISIBLE)
    assert found["false_merges"] <= 0.05
    assert all(found["arms"][name]["merged"] <= 0.02 for name, arm in found["arms"].items() if arm["kind"] == "null")


def test_early_stop_spares_what_shows_and_ends_what_changes_nothing(found: Any) -> None:
    """The warm-down reshapes the schedule, so its patch would be exempt."""
    assert all(found["arms"][name]["stopped"] == 0 for name in VISIBLE[:3])
    assert found["arms"]["null-renamed-local"]["stopped"] == 1


def test_what_is_reported_is_what_other_seeds_show(found: Any) -> None:
    assert found["reported_over_remeasured"] == pytest.approx(1.0, abs=0.05)


def test_a_greedy_loop_on_the_same_runs_keeps_nulls_and_claims_too_much(found: Any) -> None:
    for loop in found["greedy"].values():
        assert loop["false_merges"] > 1 and loop["reported_over_true"] > 1.05


def test_the_order_of_arms_in_the_file_does_not_matter() -> None:
    kept = replay.read(BANK)
    rule = rule_of(Judge(looks=[3, 5, 8]), "min", True)
    first = replay.campaign(kept, rule, random.Random(5))
    assert first == replay.campaign(kept, rule, random.Random(5)) and set(first) == set(kept.kinds)
    assert all(arm["runs"] <= 2 + 2 * 8 for arm in first.values())


def test_a_file_that_is_no_bank_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "bank.json"
    for text in ("[]", "{", '{"arms": {}}', json.dumps({"arms": {"start": {"kind": "start", "runs": []}}})):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError):
            replay.read(file)
