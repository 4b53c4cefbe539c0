"""The attack suite: a sample at this machine's best level, all of it among the slow tests, and the page about it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.attacks import suite, target, trial
from agent.attacks.record import Attack
from agent.attacks.table import markdown
from agent.attacks.trial import Sighting
from agent.errors import UserError
from sandbox import box

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ("printed-score", "keys", "daemon", "symlink", "pickled-weights", "peek")
"""Invalid, same and refused; metric, theft, processes, form, handover and causality."""
LEVEL_1_GAPS = 5


def attacks(runs: Path, *options: str, timeout: float) -> tuple[int, dict[str, Any]]:
    """A real `ratchet bench attacks`: exit code and JSON."""
    command = [sys.executable, "-m", "agent.cli", "bench", "attacks", "--json", "--runs", str(runs), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.stdout.startswith("{"), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_sample_bites_undefended_and_is_held_and_an_honest_gain_is_merged(tmp_path: Path) -> None:
    code, found = attacks(tmp_path / "runs", "--only", ",".join(SAMPLE), timeout=110)
    assert found["controls"]["better"] == "merged"
    assert found["level"] == int(box.probe()), found
    if found["level"]:
        assert {name: entry for name, entry in found["by_attack"].items() if not entry["held"]} == {}
        assert (code, found["attacks"], found["held"], found["controls_ok"]) == (0, 6, 6, 3)
    assert not (tmp_path / "runs" / ".bench").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("level", [3, 2, 1])
def test_every_attack_is_held(tmp_path: Path, level: int) -> None:
    if box.probe(level) != level:
        pytest.skip(f"level {level} does not hold here")
    code, found = attacks(tmp_path / "runs", "--level", str(level), timeout=1700)
    assert {name: entry for name, entry in found["by_attack"].items() if not entry["held"]} == {}
    assert (code, found["held"], found["controls_ok"]) == (0, found["attacks"], 3)


def test_the_catalogue_is_large_and_honest_about_its_gaps() -> None:
    names = [attack.name for attack in suite.ALL]
    assert len(set(names)) == len(names) >= 45 and len(suite.families()) >= 14
    assert all(attack.harms and attack.outcome and attack.does and attack.defence for attack in suite.ALL)
    assert not [attack.name for attack in suite.ALL if 3 in attack.uncovered]
    assert sum(1 in attack.uncovered for attack in suite.ALL) <= LEVEL_1_GAPS
    assert all("merged" not in attack.outcome or attack.honest for attack in suite.ALL)


def test_the_page_tells_what_the_code_tries() -> None:
    page = (ROOT / "docs" / "SECURITY.md").read_text(encoding="utf-8")
    told = page.partition("<!-- attacks: begin -->\n")[2].partition("<!-- attacks: end -->")[0]
    assert told == markdown()


def test_what_does_not_bite_or_is_not_held_fails_the_bench() -> None:
    """The suite's own verdict: an attack without teeth, a harm, another outcome and a wrong control each fail it."""
    attack = Attack("x", "metric", "does", "defence", ("same",), ("number",))
    right = dict(suite.CONTROLS)

    def ok(bites: bool, held: bool, controls: dict[str, str]) -> bool:
        return suite.finding(3, controls, [suite.Entry(attack, bites, held, "same", "")]).ok

    assert ok(True, True, right)
    assert not ok(True, False, right) and not ok(False, False, right)
    assert not ok(True, True, right | {"better": "no gain"}) and not ok(True, True, right | {"worse": "merged"})


@pytest.mark.parametrize(("bitten", "guarded", "expected"), [
    (Sighting(harms={"number": ["0.1"]}), Sighting("same"), (True, True)),
    (Sighting(), Sighting("same"), (False, False)),
    (Sighting(harms={"leak": ["key"]}), Sighting("same"), (False, False)),
    (Sighting(harms={"number": ["0.1"]}), Sighting("merged"), (True, False)),
    (Sighting(harms={"number": ["0.1"]}), Sighting("same", {"leftover": ["process 1"]}), (True, False)),
])
def test_an_attack_is_held_only_if_it_bit_and_nothing_at_all_was_seen(
        bitten: Sighting, guarded: Sighting, expected: tuple[bool, bool]) -> None:
    attack = Attack("x", "metric", "does", "defence", ("same",), ("number",))
    entry = suite.entry(attack, 3, bitten, guarded)
    assert (entry.bites, entry.held) == expected


def test_unknown_names_are_told() -> None:
    with pytest.raises(UserError, match="no attack or family 'nonsense'"):
        suite.select("peek,nonsense")
    assert [attack.name for attack in suite.select("peek")] == ["peek"]
    assert {attack.family for attack in suite.select("server")} == {"server"}


def test_a_patch_that_does_not_fit_the_target_is_an_error_and_no_attack() -> None:
    with pytest.raises(ValueError, match="0 times"):
        trial.diff_of(target.FILES, [("train.py", "no such line", "x")])
