"""The attempt that decides on a level: it gets through where nothing stops it, and each claim can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox import box as boxes
from sandbox import confine, escape
from sandbox.box import Level, explain
from sandbox.escape import CLAIMS, PLACES, SCRIPT, judge

ATTEMPTS = {attempt for claim in CLAIMS for attempt in claim.attempts}


def test_the_documents_show_the_claims() -> None:
    text = Path(__file__).resolve().parent.parent.joinpath("docs/isolation.md").read_text(encoding="utf-8")
    for claim in CLAIMS:
        row = " | ".join("yes" if level in claim.levels else "no" for level in (3, 2, 1, 0))
        assert f"| {claim.text} | {row} |" in text, claim.text


def test_every_attempt_of_a_claim_is_made() -> None:
    for attempt in ATTEMPTS - set(PLACES) - {"udp", "signal"}:
        assert f'"{attempt}"' in SCRIPT, attempt


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_level_is_refused_for_any_attempt_that_it_claims_to_stop(level: int) -> None:
    nothing = dict.fromkeys(ATTEMPTS, 0) | {"uid": 7}
    assert judge(nothing, level, 7) == "" and "user id" in judge(nothing, level, 8)
    for claim in CLAIMS:
        for attempt in claim.attempts:
            assert (attempt in judge(nothing | {attempt: 1}, level, 7)) == (level in claim.levels)
    assert "signal" in judge({"uid": 7}, level, 7)  # no answer is no proof


def test_the_attempt_gets_through_without_a_box() -> None:
    """What it cannot do here for other reasons (an ordinary user, no /dev/vsock) is left out of the comparison."""
    with escape.bait() as bait:
        argv = [sys.executable, *bait.command(0)[1:]]
        done = subprocess.run(argv, cwd=bait.source, env={"TMPDIR": str(bait.box)}, capture_output=True, text=True,
                              timeout=30)
        assert done.returncode == 0, done.stderr
        found = bait.outcome(done.stdout)
    through = {name for name in ATTEMPTS if found[name]}
    everyone = {"secret", "hidden", "hidden by symlink", "hidden by hard link", "write source", "write secret", "tcp",
                "udp", "abstract socket", "pathname socket",
                "datagram to a path", "left in /tmp", "left in /var/tmp", "left in /dev/shm",
                "process", "signal", "environment", "disk", "shared memory", "new privileges", "keyctl call",
                "ptrace call"}
    root = {"shadow", "left in /etc", "left in /usr", "left in the interpreter", "trace", "capabilities",
            "mount", "user namespace"}
    assert through >= everyone | (root if os.geteuid() == 0 else set())
    assert not any(Path(folder, bait.name).exists() for folder in PLACES.values())


def test_a_level_without_its_filter_or_its_rules_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe believes nothing: take one layer away and the level is gone."""
    allow = bytes.fromhex("06000000") + (0x7FFF0000).to_bytes(4, "little")
    levels = [level for level in (Level.ROOT, Level.USER, Level.LANDLOCK) if explain(int(level)).level is level]
    if not levels:
        pytest.skip("this machine holds no level above 0")
    monkeypatch.setattr(boxes.seccomp, "program", lambda **kinds: allow)
    for level in levels:
        assert "call" in boxes._escapes(level)
    monkeypatch.undo()
    if Level.LANDLOCK in levels:
        monkeypatch.setattr(boxes.grants, "rules", lambda *given: [("/", (1 << 16) - 1)])
        assert "secret" in boxes._escapes(Level.LANDLOCK)


def test_the_answer_is_whole() -> None:
    """Every attempt has an answer at every level that holds, so none is refused for silence."""
    for level in (Level.ROOT, Level.USER, Level.LANDLOCK):
        found = explain(int(level))
        assert found.level is level or found.refused[level], found
    assert json.dumps(confine.abi()).isdigit()
