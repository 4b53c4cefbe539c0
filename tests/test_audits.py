"""Which runs are audited, and what an honest one may differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from night import Night

from agent import audits
from agent.config import parse
from agent.judge import Ask, Ruling
from agent.records import Pair, Result, Run
from sandbox.job import Score

ACCEPT = Ruling("accepted", "better", None, {})
REJECT = Ruling("rejected", "no better", None, {})


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path, "n")


def pairs(*names: str, **more: Any) -> list[Pair]:
    return [Pair(seed, {"val": 2.0}, {"val": 1.9}, f"i{seed}", name, **more) for seed, name in enumerate(names)]


def ended(night: Night, name: str, audited: str, candidate: str | None = None, fault: Any = None,
          **score: float) -> None:
    night.ledger.append("run_started", Run(name, "audit", "t", 1, 30, "cpu", f"jobs/{name}", candidate, (), audited))
    night.ledger.append("run_finished", Result(name, fault, scores={"val": Score(1.9, **score)}))


def test_the_first_run_before_it_advances_and_the_last_before_it_is_merged(night: Night) -> None:
    assert audits.due(pairs("a"), Ask(1), night.state) == ["a"]
    ended(night, "a-audit", "a", "001")
    assert audits.due(pairs("a", "b"), Ask(1), night.state) == []
    assert audits.due(pairs("a", "b", "c"), ACCEPT, night.state) == ["c"]
    ended(night, "c-audit", "c", "001", fault="infra")  # the machine's: asked again
    assert audits.due(pairs("a", "b", "c"), ACCEPT, night.state) == ["c"]
    ended(night, "c-audit.2", "c", "001")
    assert audits.due(pairs("a", "b", "c"), ACCEPT, night.state) == []
    assert audits.due([], Ask(1), night.state) == []
    assert audits.due(pairs("a", fault="crash"), REJECT, night.state) == []  # there is nothing to ask


def test_one_in_twenty_of_the_refused_is_audited(night: Night) -> None:
    drawn = [name for name in map(str, range(4000)) if audits.due(pairs(name), REJECT, night.state)]
    assert 150 < len(drawn) < 250  # 200 +- 14
    assert drawn == [name for name in map(str, range(4000)) if audits.due(pairs(name), REJECT, night.state)]


def test_the_tolerance_follows_the_incumbent_alone(night: Night) -> None:
    assert audits.tolerance(night.state) == (0.0, 0.0)
    ended(night, "i-audit", "i", audit_max=0.3, audit_mean=-0.002)
    ended(night, "c-audit", "c", "001", audit_max=9.0, audit_mean=9.0)
    assert audits.tolerance(night.state) == pytest.approx((1.2, 0.008))


def test_the_verdict_says_what_was_audited(night: Night) -> None:
    assert audits.evidence(pairs("a", "b"), night.state) == {}
    ended(night, "a-audit", "a", "001", audit_max=1e-6, targeted_max=2e-6)
    assert audits.evidence(pairs("a", "b"), night.state) == {"audits": 1.0, "audit_max": 2e-6}


@pytest.mark.parametrize(("text", "wanted"), [
    ('tier = "sealed"\ncommand = "python serve.py"', True), ('tier = "sealed"\ncommand = "x"\naudit = 0', False),
    ('pattern = "loss: (.*)"', False)])
def test_only_the_sealed_tier_has_answers_to_compare(text: str, wanted: bool) -> None:
    sealed = 'served = true\n[data]\nprepare = "python p {out}"\n[budget]\namount = 30\n' if "sealed" in text else ""
    config = parse(f'[train]\ncommand = "python train.py"\n{sealed}[evaluate]\n{text}\n', "ratchet.toml")
    assert audits.wanted(config) is wanted
