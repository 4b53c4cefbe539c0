"""The closing audit: its rule against simulated merges, and whole audits of real campaigns on the tiny target."""

from __future__ import annotations

import difflib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import ablation, cli, git, tiny
from agent.ledger import State, replay
from agent.records import Edit, Estimate, Result
from agent.sooner import sooner

ROOT = Path(__file__).resolve().parents[1]
RULE = ablation.Rule(0.10, 4, (4, 8), 0.002)


# ------------------------------------------------------------------------------------------------------------ the rule

def simulated(rng: random.Random, effect: float, sd: float, margin: float, rule: ablation.Rule) -> str:
    effects: list[float] = []
    while True:
        decision = ablation.decide(effects, margin, rule)
        if isinstance(decision, ablation.Decision):
            return decision.outcome
        effects += [rng.gauss(effect, sd) for _ in range(decision - len(effects))]


def test_merges_at_their_margin_are_rarely_removed_and_harmful_ones_are() -> None:
    rng = random.Random(7)
    margin, sd, audits = 0.004, 0.004, 3000
    any_false = sum(any(simulated(rng, margin, sd, margin, RULE) == "remove" for _ in range(4)) for _ in range(audits))
    assert 0 < any_false / audits <= 0.10  # the guarantee is alpha for an audit of four merges
    harmful = sum(simulated(rng, -0.02, sd, margin, RULE) == "remove" for _ in range(1000))
    worth = sum(simulated(rng, 0.02, sd, margin, RULE) == "remove" for _ in range(1000))
    assert harmful >= 990 and worth == 0


@given(st.lists(st.floats(-1, 1), min_size=8, max_size=8), st.floats(0, 0.1), st.floats(0.01, 0.2))
def test_a_wider_margin_never_keeps_what_a_narrow_one_removes(effects: list[float], margin: float, more: float) -> None:
    narrow, wide = ablation.decide(effects, margin, RULE), ablation.decide(effects, margin + more, RULE)
    assert isinstance(narrow, ablation.Decision) and isinstance(wide, ablation.Decision)
    assert narrow.outcome != "remove" or wide.outcome == "remove"
    assert (narrow.outcome == "keep") == (wide.outcome == "keep")


def test_the_margin_is_at_most_half_of_what_was_certified() -> None:
    sure = Estimate("confirm", -0.03, -0.034, -0.001, 4, 0.002)
    assert ablation.margin(None, 0.002, sure) == pytest.approx(0.0005)
    assert ablation.margin(0.0001, 0.002, sure) == 0.0001
    assert ablation.margin(None, 0.002, Estimate("confirm", -0.01, -0.03, 0.01, 4, 0.002)) == 0
    assert ablation.margin(None, 0.002, None) == 0.002
    with pytest.raises(ValueError, match="no spread"):
        ablation.looks_of(1)


def test_time_to_target_on_two_straight_lines() -> None:
    slow = Result("a", None, charge_seconds=10.0, curve=tuple((step, 5 - step / 100) for step in range(10, 201, 10)))
    fast = Result("b", None, charge_seconds=10.0, curve=tuple((step, 5 - step / 50) for step in range(10, 201, 10)))
    found = sooner([(slow, fast), (slow, fast)])
    assert found is not None and (found.pairs, found.reached) == (2, 2)
    assert found.steps == pytest.approx(97.5, abs=5) and found.seconds == pytest.approx(5, abs=0.3)
    back = sooner([(fast, slow)])
    assert back is not None and back.reached == 0
    assert sooner([(Result("c", None), fast)]) is None


# ------------------------------------------------------------------------------------------------------- whole audits

def patch(folder: Path, target: Path, name: str, edit: Edit) -> Path:
    before = (target / edit.path).read_text(encoding="utf-8")
    after = before.replace(edit.search, edit.replace)
    assert before != after
    place = folder / f"{name.replace(' ', '-')}.patch"
    place.write_text("".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{edit.path}",
                                                  f"b/{edit.path}")), encoding="utf-8")
    return place


def smuggle(repo: Path, edit: Edit) -> str:
    """A commit of ``edit`` on the accepted branch that no ledger knows."""
    tip = git.resolve(repo, git.ACCEPTED)
    assert tip is not None
    work = repo.parent / "by-hand"
    git.run(repo.parent, "clone", "-q", "--branch", "accepted", str(repo), str(work), bare=False)
    text = (work / edit.path).read_text(encoding="utf-8")
    assert edit.search in text
    (work / edit.path).write_text(text.replace(edit.search, edit.replace), encoding="utf-8")
    tiny.commit(work, "Surely an improvement")
    git.run(work, "push", "-q", "origin", "HEAD:accepted", bare=False)
    return str(git.resolve(repo, git.ACCEPTED))


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished campaign that merged the two true improvements of the tiny target."""
    monkeypatch.chdir(tmp_path)
    tiny.write_tiny_target(tmp_path / "target")
    patches = [patch(tmp_path, tmp_path / "target", name, tiny.KNOWN[name].edit)
               for name in ("less smoothing", "less back-off")]
    assert cli.edge(["try", *map(str, patches), "--repo", "target", "--name", "n", "--level", "0",
                     "--unconfined"]) == 0
    folder = tmp_path / "runs" / "n"
    assert len(load(folder).merges) == 2
    return folder


def load(folder: Path) -> State:
    return replay(folder / "ledger.jsonl")[0]


AUDIT = ["audit", "n", "--pairs", "4", "--level", "0", "--unconfined"]


def test_true_merges_stay_and_a_smuggled_harmful_one_goes(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.edge([*AUDIT, "--dry-run"]) == 0 and "at most" in capsys.readouterr().out
    assert cli.edge(AUDIT) == 0
    state, repo = load(finished), finished / "repo.git"
    assert [one.outcome for one in state.ablations] == ["keep", "keep"] and not state.removals
    assert state.closings[-1].gain is not None and state.closings[-1].gain.effect < -1
    size = (finished / "ledger.jsonl").stat().st_size
    assert cli.edge(AUDIT) == 0 and (finished / "ledger.jsonl").stat().st_size == size  # again: all is known

    bad = smuggle(repo, tiny.KNOWN["more uniform"].edit)
    capsys.readouterr()
    assert cli.edge(AUDIT) == 0
    shown = capsys.readouterr().out
    assert "the ledger does not know it" in shown and "removed" in shown
    state = load(finished)
    (removal,) = state.removals
    assert removal.removes == (bad,) and removal.old_tip == bad and state.tip == removal.new_tip
    assert git.resolve(repo, git.ACCEPTED) == removal.new_tip
    assert git.resolve(repo, removal.new_tip, "tree") == git.resolve(repo, state.merges[-1].new_tip, "tree")
    text = git.run(repo, "log", "-1", "--format=%B", removal.new_tip).decode()
    assert f"Removes: {bad}" in text and "Effect: -" in text and "Run-Id: n/audit-2" in text
    assert {one.commits[0]: one.outcome for one in state.ablations if one.audit == 2}[bad] == "remove"
    assert cli.edge(["recompute", "audit-2", "--name", "n"]) == 0
    assert cli.edge(["log", "n"]) == 0 and "closing audit" in capsys.readouterr().out
    assert cli.edge(["report", "n"]) == 0
    assert "## Closing audit" in next(finished.glob("report/*.md")).read_text(encoding="utf-8")


def killed_audit(finished: Path, event: str, count: int) -> None:
    """An audit that dies by SIGKILL once the ledger holds ``count`` such events."""
    process = subprocess.Popen([sys.executable, "-m", "agent.cli", *AUDIT], cwd=finished.parent.parent,
                               env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while sum(f'"{event}"' in line for line in (finished / "ledger.jsonl").read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_merge_that_seems_harmful_beside_a_harmful_commit_is_asked_again_without_it(
        finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commit turns a constant round that a merge has tuned, so beside it the merge does harm too. Killed between
    the two audits, too."""
    mixed = "(1 - settings.BACKOFF) * (n + settings.SMOOTHING) / size + settings.BACKOFF * unigram[b]"
    own = mixed.replace("settings.BACKOFF", "(0.9 - settings.BACKOFF)")
    bad = smuggle(finished / "repo.git", Edit("train.py", mixed, own))
    killed_audit(finished, "audited", 1)
    assert cli.edge(["log", "n"]) == 0 and "the same command goes on" in capsys.readouterr().out
    assert cli.edge([*AUDIT[:2], *AUDIT[4:]]) == 0  # with the pairs that it was begun with
    shown = capsys.readouterr().out
    assert shown.count("closing audit of") == 2 and "asked again" in shown and "unchanged" in shown
    state = load(finished)
    first, second = ({one.commits[0]: one.outcome for one in state.ablations if one.audit == audit} for audit in (1, 2))
    assert first[bad] == "remove" and sorted(first.values()) == ["not separable", "remove", "remove"]
    assert sorted(second.values()) == ["keep", "keep"] and len(second) == 2
    assert [one.removes for one in state.removals] == [(bad,)] and [one.pairs for one in state.plans] == [4, 4]
    assert git.resolve(finished / "repo.git", state.tip, "tree") == git.resolve(
        finished / "repo.git", state.merges[-1].new_tip, "tree")
    assert [one.gain is None for one in state.closings] == [True, False]

    size = (finished / "ledger.jsonl").stat().st_size
    assert cli.edge([*AUDIT, "--json"]) == 0 and (finished / "ledger.jsonl").stat().st_size == size
    told = json.loads(capsys.readouterr().out)
    assert told["removed"] == [] and told["earlier"][0]["removed"] == [bad]


def test_a_killed_audit_goes_on_to_the_same_end(finished: Path) -> None:
    smuggle(finished / "repo.git", tiny.KNOWN["more uniform"].edit)
    killed_audit(finished, "ablation", 5)
    assert cli.edge(AUDIT) == 0
    state = load(finished)
    assert (len(state.plans), len(state.closings), len(state.removals)) == (2, 2, 1)
    done = [(run.tree, run.seed, run.audits) for run in state.runs.values() if run.purpose in ("ablation", "final")
            and state.results[run.id].fault is None]
    assert len(done) == len(set(done))


def test_a_run_that_is_not_finished_is_not_audited(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (finished / "ledger.jsonl").read_text(encoding="utf-8").splitlines(True)
    (finished / "ledger.jsonl").write_text("".join(
        line for line in lines if json.loads(line)["event"] != "finished"), encoding="utf-8")
    assert cli.edge(AUDIT) == 1
    assert "is not finished" in capsys.readouterr().err
