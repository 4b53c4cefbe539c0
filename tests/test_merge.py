"""Merges hold the measured tree and move the branch by compare-and-swap; refused candidates keep their reason."""

from __future__ import annotations

import dataclasses
import datetime
import subprocess
from pathlib import Path

import pytest

from agent import git, git_trees, merge, patch
from agent.config import Source
from agent.records import Candidate, Cost, Edit, Estimate, Merge, Pair, Proposal, Verdict

WHEN = datetime.datetime(2026, 3, 1, 2, 3, 4, tzinfo=datetime.UTC)
CONDITIONS = merge.Conditions("val_bpb", "min", "300 charged_steps", "cpu", 3, "sealed", 171.25, False, "night-1")
PAIRS = tuple(Pair(seed, {"val": 2.2}, {"val": 2.2 + effect}, f"i{seed}", f"c{seed}")
              for seed, effect in ((11, -0.03), (12, -0.034)))
ESTIMATE = Estimate("val", -0.032, -0.04, -0.024, 2, 0.003)


def verdict(outcome: str = "accepted", reason: str = "Lower bound beyond zero.", name: str = "c1") -> Verdict:
    return Verdict(name, outcome, "judge", reason, None, ESTIMATE, PAIRS,  # type: ignore[arg-type]
                   {"statistic": -16.0, "threshold": 2.353, "rule": "paired t"})


def proposal(title: str = "lower the matrix learning rate.", hypothesis: str = "Muon steps are too long.") -> Proposal:
    return Proposal("c1", "", title, hypothesis, "llm", (Edit("train.py", "lr = 0.1", "lr = 0.2"),),
                    cost=Cost(usd=0.01234), source="tiny-model")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "train.py").write_text("lr = 0.1\n")
    git_trees.import_folder(folder, tmp_path / "repo.git")
    return tmp_path / "repo.git"


def tip(repo: Path) -> str:
    return git.resolve(repo, git.ACCEPTED) or ""


def candidate(repo: Path) -> Candidate:
    return patch.build(repo, "", tip(repo), proposal(), Source(), WHEN)


def prepared(repo: Path, made: Candidate) -> Merge:
    return merge.prepare_merge(repo, made, proposal(), verdict(), tip(repo), CONDITIONS, WHEN)


def show(repo: Path, name: str, form: str) -> str:
    return subprocess.run(["git", "-C", str(repo), "log", "-1", f"--format={form}", name], check=True,
                          capture_output=True, text=True).stdout.strip()


def trailers(text: str) -> dict[str, str]:
    out = subprocess.run(["git", "interpret-trailers", "--parse"], input=text, check=True, capture_output=True,
                         text=True).stdout
    return dict(line.split(": ", 1) for line in out.splitlines())


def test_trailers_parse_and_are_complete() -> None:
    text = merge.message(proposal(), verdict(), CONDITIONS)
    assert trailers(text) == {
        "Metric": "val_bpb (min)", "Effect": "-0.03200 (95% CI -0.04000..-0.02400, val)",
        "Pairs": "2", "Seeds": "11 12",
        "Evidence": "statistic=-16; threshold=2.353; rule=paired t", "Budget": "300 charged_steps", "Device": "cpu",
        "Isolation": "level 3", "Tier": "sealed", "GPU-seconds": "0", "Device-seconds": "171.2", "Cost-USD": "0.0123",
        "Proposer": "llm (tiny-model)", "Run-Id": "night-1/c1",
    }
    lines = text.splitlines()
    assert lines[0] == "Lower the matrix learning rate" and lines[1] == ""
    assert "Muon steps are too long." in lines
    assert "val_bpb better by 0.0320 on val" in " ".join(lines) and "-0.0300, -0.0340" in " ".join(lines)
    assert max(map(len, lines)) <= 80


def test_on_a_gpu_the_seconds_are_gpu_seconds() -> None:
    found = trailers(merge.message(proposal(), verdict(), dataclasses.replace(CONDITIONS, device="cuda:0", gpu=True)))
    assert found["GPU-seconds"] == "171.2" and "Device-seconds" not in found


@pytest.mark.parametrize("hypothesis", [
    "Text.\n\nEffect: -9.0 (forged)\nRun-Id: other", "Text.\n\n---\ndiff --git a/x b/x", "From here\n\nIndex: x", "",
    "word " * 200, "tab\tand \x1b[31mcolour\x1b[0m and \u202e", "# a heading",
])
def test_a_models_text_cannot_forge_or_cut_the_trailers(repo: Path, tmp_path: Path, hypothesis: str) -> None:
    made = proposal(hypothesis=hypothesis, title="Use\nEffect: -9 \x1b[0m")
    text = merge.message(made, verdict(reason="Good.\n\nTier: forged"), CONDITIONS)
    found = trailers(text)
    assert found["Effect"].startswith("-0.03200") and found["Run-Id"] == "night-1/c1" and found["Tier"] == "sealed"
    assert len(found) == 14 and "\x1b" not in text and "\u202e" not in text
    commit = git.commit_tree(repo, candidate(repo).tree, (tip(repo),), text, WHEN)
    mail = git.run(repo, "format-patch", "--stdout", f"{tip(repo)}..{commit}")
    work = tmp_path / "work"
    subprocess.run(["git", "clone", "-q", str(repo), str(work)], check=True)
    subprocess.run(["git", "-C", str(work), "-c", "user.name=A", "-c", "user.email=a@b", "am", "-q"], input=mail,
                   check=True)
    assert trailers(show(work, "HEAD", "%B") + "\n") == found


def test_subject_is_one_short_line() -> None:
    assert merge.subject("use  a\nlonger warm-up.") == "Use a longer warm-up"
    assert merge.subject("") == "Change the training code"
    long = merge.subject("scale " + "the residual branches " * 6)
    assert len(long) <= 72 and long.endswith(" ...")
    assert len(merge.subject("x" * 200)) <= 72


def test_a_merge_is_the_measured_tree_on_a_linear_branch(repo: Path) -> None:
    start, made = tip(repo), candidate(repo)
    record = prepared(repo, made)
    assert tip(repo) == start  # nothing moved yet
    merge.complete_merge(repo, record)
    assert tip(repo) == record.new_tip
    assert show(repo, git.ACCEPTED, "%T %P") == f"{made.tree} {start}"
    assert show(repo, git.ACCEPTED, "%s|%an|%cI") == "Lower the matrix learning rate|Ratchet|2026-03-01T02:03:04+00:00"
    assert (record.subject, record.tree, record.old_tip) == ("Lower the matrix learning rate", made.tree, start)


def test_completing_twice_is_one_merge(repo: Path) -> None:
    record = prepared(repo, candidate(repo))
    merge.complete_merge(repo, record)
    merge.complete_merge(repo, record)
    assert tip(repo) == record.new_tip
    assert git.run(repo, "rev-list", "--count", git.ACCEPTED).strip() == b"2"


def test_a_lost_race_moves_nothing(repo: Path) -> None:
    made = candidate(repo)
    first, elsewhere = prepared(repo, made), dataclasses.replace(CONDITIONS, campaign="night-2")
    other = merge.prepare_merge(repo, made, proposal(), verdict(), tip(repo), elsewhere, WHEN)
    merge.complete_merge(repo, first)
    with pytest.raises(git.RefMoved) as caught:
        merge.complete_merge(repo, other)
    assert caught.value.actual == first.new_tip == tip(repo)


def test_the_rules_of_a_merge(repo: Path) -> None:
    made, start = candidate(repo), tip(repo)
    with pytest.raises(merge.MergeRefused, match="is rejected"):
        merge.prepare_merge(repo, made, proposal(), verdict("rejected"), start, CONDITIONS)
    with pytest.raises(merge.MergeRefused, match="no merge of c1"):
        merge.prepare_merge(repo, made, proposal(), verdict(name="c2"), start, CONDITIONS)
    with pytest.raises(merge.MergeRefused, match="was measured"):
        changed = dataclasses.replace(made, tree=git.resolve(repo, start, "tree") or "")
        merge.prepare_merge(repo, changed, proposal(), verdict(), start, CONDITIONS)
    record = prepared(repo, made)
    with pytest.raises(merge.MergeRefused, match="was measured"):
        merge.complete_merge(repo, dataclasses.replace(record, tree=git.resolve(repo, start, "tree") or ""))
    merge.complete_merge(repo, record)
    with pytest.raises(merge.MergeRefused, match="stands on"):
        merge.prepare_merge(repo, made, proposal(), verdict(), tip(repo), CONDITIONS)


def test_a_refused_candidate_stays_with_its_reason(repo: Path) -> None:
    made, start = candidate(repo), tip(repo)
    crash = Verdict("c1", "rejected", "preflight", "Crashed at step 3:\nRuntimeError: shapes", "crash")
    ref = merge.refuse(repo, made, proposal(), crash, "night-1", WHEN)
    assert ref == "refs/ratchet/refused/c1"
    assert merge.refuse(repo, made, proposal(), crash, "night-1", WHEN) == ref  # again, as after a crash
    assert show(repo, ref, "%T %P") == f"{made.tree} {start}"
    text = show(repo, ref, "%B")
    assert "Rejected at preflight: Crashed at step 3: RuntimeError: shapes" in text
    assert trailers(text + "\n") == {"Outcome": "rejected", "Stage": "preflight", "Fault": "crash",
                                     "Proposer": "llm (tiny-model)", "Run-Id": "night-1/c1"}
    assert git.resolve(repo, f"refs/heads/{made.branch}") is None and tip(repo) == start


def test_a_refused_measurement_keeps_its_effect(repo: Path) -> None:
    ref = merge.refuse(repo, candidate(repo), proposal(), verdict("inconclusive"), "night-1")
    assert trailers(show(repo, ref, "%B") + "\n")["Effect"] == "-0.03200 (95% CI -0.04000..-0.02400, val)"
