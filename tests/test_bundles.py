"""Whole campaigns under the gate: bundles, weighing designs, kills and what is computed again, on real trees."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agent import calls, git, tiny
from agent.errors import UserError
from agent.export import export_series
from agent.judge import Rule
from agent.ledger import State, events, replay
from agent.recompute import recompute
from agent.records import Edit
from tests.test_campaign import (
    END,
    REFUSAL,
    Script,
    by_name,
    edge,
    environment,
    known,
    load,
    only_run,
    patch_file,
    reply,
    serving,
)

__all__ = ["edge"]

TWOS = {"ratio": 1e6, "most": 2, "seeds": 3, "soundings": (1, 2), "calibrate": 3}
"""Settings of a gate that never certifies one patch alone while another may come."""
GOOD = ("less smoothing", "less back-off")


def target(folder: Path, judge: str = 'gear = "paired"') -> None:
    """The tiny target with bundles, and a third constant that is far off."""
    tiny.write_tiny_target(folder)
    config = folder / "ratchet.toml"
    config.write_text(config.read_text().replace('policy = "single"', f'policy = "bundles"\n{judge}'))
    tiny.commit(folder, "Bundles")


def sound(folder: Path) -> State:
    """One verdict an attempt; what was merged is what was measured; parts of a bundle point to it."""
    state, count = replay(folder / "ledger.jsonl")
    assert replay(folder / "ledger.jsonl") == (state, count)
    judged = [data["candidate"] for event, data, _ in events(folder / "ledger.jsonl") if event == "verdict"]
    assert sorted(judged) == sorted(state.attempts)
    tip = str(state.campaign["start"])
    for merge in state.merges:
        done = state.attempts[merge.candidate]
        assert done.candidate is not None and done.verdict is not None and done.verdict.outcome == "accepted"
        assert merge.old_tip == done.candidate.base == tip
        assert git.resolve(folder / "repo.git", merge.new_tip, "tree") == merge.tree == done.candidate.tree
        assert all(state.runs[pair.candidate_run].tree == merge.tree for pair in done.verdict.pairs)
        for name in done.proposal.parts:
            part = state.attempts[name].verdict
            assert part is not None and part.outcome == "accepted" and part.unit == merge.candidate
        tip = merge.new_tip
    assert git.resolve(folder / "repo.git", git.ACCEPTED) == tip == state.tip
    paid = [(r.tree, r.seed, r.steps, r.audits) for r in state.runs.values() if r.purpose != "preflight"
            and r.id in state.results and state.results[r.id].fault != "infra"]
    assert len(paid) == len(set(paid))
    for attempt in state.attempts.values():
        if attempt.verdict is not None and attempt.verdict.pairs and not attempt.verdict.unit:
            again = recompute(state, attempt, folder / "repo.git")
            assert all(figure.same for figure in again), [figure for figure in again if not figure.same]
    return state


def script() -> Script:
    return Script([known("less smoothing"), known("another salt"), known("less back-off"), known("more uniform"),
                   known("late crash"), REFUSAL])


@pytest.fixture
def in_twos(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = calls.settings_of
    monkeypatch.setattr(calls, "settings_of", lambda campaign: dataclasses.replace(
        plain(campaign), **TWOS))


def test_two_good_patches_are_certified_and_merged_as_one(tmp_path: Path, edge: Any, in_twos: None) -> None:
    target(tmp_path / "target")
    with serving(script()) as (_, model):
        code, out, err = edge("run", "target", "--proposer", "llm", model=model)
    assert code == 0 and not err, out + err
    folder = only_run(tmp_path / "runs")
    state = sound(folder)
    (merge,) = state.merges
    unit = state.attempts[merge.candidate]
    ends = by_name(state)
    assert unit.proposal.author == "gate" and {state.attempts[p].proposal.title for p in unit.proposal.parts} == {*GOOD}
    assert unit.verdict is not None and unit.verdict.estimate is not None
    assert unit.verdict.estimate.effect == pytest.approx(-1.55, abs=0.1)  # both at once; alone -1.10 and -0.45
    for title in ("another salt", "more uniform", "late crash"):
        verdict = ends[title].verdict
        assert verdict is not None and verdict.outcome != "accepted" and not verdict.unit
    # the merge commit: its own line, and beside it one commit a part
    repo = folder / "repo.git"
    start, beside = git.run(repo, "log", "-1", "--format=%P", merge.new_tip).decode().split()
    assert start == state.campaign["start"]
    chain = git.run(repo, "log", "--format=%s", f"{start}..{beside}").decode().splitlines()
    assert sorted(chain) == sorted(GOOD)
    said = git.run(repo, "log", "-1", "--format=%B", merge.new_tip).decode()
    assert f"Parts: {' '.join(unit.proposal.parts)}" in said and "gear=paired" in said
    # it can be handed over, taken out again and shown
    series = export_series(repo, start, tmp_path / "out")
    assert len(series.patches) == 1 and all(title in series.patches[0].read_text() for title in GOOD)
    assert git.without(repo, merge.new_tip, [merge.new_tip]) == git.resolve(repo, start, "tree")
    for command in (("log",), ("show", unit.proposal.id), ("status",), ("recompute", unit.proposal.id)):
        code, out, err = edge(*command)
        assert code == 0 and not err, err
    assert "1 merged" in edge("status")[1]


def test_a_bundle_that_is_not_shown_is_halved(tmp_path: Path, edge: Any, in_twos: None,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Every certification fails here: the bundle ends, then the better half alone, and nothing is merged."""
    monkeypatch.setattr("agent.gate.proof.Proof._shown", lambda *_: False)
    target(tmp_path / "target")
    with serving(script()) as (_, model):
        code, out, err = edge("run", "target", "--proposer", "llm", model=model)
    assert code == 0 and not err, out + err
    state = sound(only_run(tmp_path / "runs"))
    units = [known.candidate for known in state.certifications]
    bundle, half = (state.attempts[name] for name in units)
    assert bundle.proposal.author == "gate" and half.proposal.id in bundle.proposal.parts and not state.merges
    assert half.proposal.title == "less smoothing"  # the better one
    assert all(a.verdict and a.verdict.outcome != "accepted" for a in state.attempts.values())


def test_noisy_runs_are_weighed_in_designs(tmp_path: Path, edge: Any) -> None:
    """Rows are trees with a random half of the patches on; their effects come out of the fit."""
    target(tmp_path / "target", 'gear = "weighing"')
    salt = Edit("settings.py", 'SALT = "first"', 'SALT = "third"')
    with serving(Script([known("less smoothing"), known("another salt"), known("less back-off"),
                         reply("third salt", salt)])) as (_, model):
        code, out, err = edge("run", "target", "--proposer", "llm", model=model)
    assert code == 0 and not err, out + err
    state = sound(only_run(tmp_path / "runs"))
    assert {a.proposal.title for a in state.attempts.values() if a.verdict and a.verdict.outcome == "accepted"
            and a.proposal.author != "gate"} == {*GOOD}
    gear = {str(a.verdict.evidence.get("gear")) for a in state.attempts.values() if a.merge and a.verdict}
    assert gear == {"weighing"}


DRIVER = f"""import sys
from agent import calls
import dataclasses
plain = calls.settings_of
calls.settings_of = lambda campaign: dataclasses.replace(
    plain(campaign), **{TWOS})
from agent.cli import main
sys.argv = ["ratchet", *sys.argv[1:]]
sys.exit(main())
"""


PATCHES = ("less smoothing", "another salt", "less back-off", "more uniform", "late crash")


def campaign(place: Path, kill_at: int = 0) -> int:
    """A campaign on patch files in its own process, killed once its ledger has ``kill_at`` lines. Its exit code."""
    files = [str(patch_file(place, place / "target", title)) for title in PATCHES]
    process = subprocess.Popen([sys.executable, "-c", DRIVER, "try", *files, "--repo", "target", "--slots", "1"],
                               cwd=place, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while kill_at and process.poll() is None:
        books = list((place / "runs").glob("*/ledger.jsonl"))
        if books and books[0].read_bytes().count(b"\n") >= kill_at:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.002)
    error = process.communicate(timeout=100)[1]
    assert process.returncode in (0, -signal.SIGKILL), error.decode()
    return process.returncode


def outcomes(state: State) -> dict[str, tuple[str, str]]:
    return {a.proposal.title: (a.verdict.outcome, a.verdict.reason) for a in state.attempts.values() if a.verdict}


def test_a_killed_campaign_ends_as_the_whole_one(tmp_path: Path, in_twos: None) -> None:
    """The gate is made again from its calls: same bundles, same levels, same verdicts, no run paid for twice."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    target(whole / "target")
    target(broken / "target")
    assert campaign(whole) == 0
    wanted = sound(only_run(whole / "runs"))
    lines = sum(1 for _ in events(only_run(whole / "runs") / "ledger.jsonl"))
    kills = sum(campaign(broken, at) != 0 for at in range(9, lines, max(1, lines // 4)))
    assert campaign(broken) == 0
    state = sound(only_run(broken / "runs"))
    assert kills >= 3 and [m.subject for m in state.merges] == ["2 changes: less smoothing; less back off"]
    assert outcomes(state) == outcomes(wanted)
    assert [c.hypothesis for c in state.certifications] == [c.hypothesis for c in wanted.certifications]


def test_another_versions_calls_are_refused(tmp_path: Path, edge: Any) -> None:
    """A gate that does not repeat its decisions must not go on as if it did."""
    target(tmp_path / "target")
    with serving(Script([known("less smoothing"), END])) as (_, model):
        assert edge("run", "target", "--proposer", "llm", model=model)[0] == 0
    state = load(only_run(tmp_path / "runs"))
    first = next(call for call in state.calls if call.get("asks"))
    first["asks"] = [99]
    with pytest.raises(UserError, match="does not repeat"):
        calls.rulings(state, Rule(0.1, (3,), 0.002))

