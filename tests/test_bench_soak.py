"""The bench of long nights: its figures, and (slow) a short one for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.bench import command
from agent.bench.soak import FAULTS, MOODS, _quarters
from agent.llm.scripted import Say


def test_a_leak_shows_between_the_quarters() -> None:
    leaking = [(float(second), 50.0 + second) for second in range(0, 101, 5)]
    assert _quarters(leaking) == (87.5, 137.5) and _quarters([(0.0, 1.0), (100.0, 1.0)]) == (0.0, 1.0)


def test_every_fault_is_one_of_the_worlds_or_a_mood_of_the_model() -> None:
    assert {kind for kind in FAULTS if kind not in MOODS} == {"supervisor", "job", "git"}
    assert len({type(answer(Say("x"))) for answer in MOODS.values()}) == len(MOODS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_short_night_with_faults_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = command.run("soak", True, ["--minutes", "3", "--every", "6", "--runs", str(tmp_path / "runs")])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, found
    assert sum(found["faults"].values()) >= 10 and found["runs"] > 5 and found["audit"] == 0
