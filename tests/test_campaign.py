"""Whole campaigns on tiny targets: real git, real boxes, a real HTTP model on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent import cli, git, tiny
from agent.doctor import run_folder
from agent.ledger import Attempt, State, events, replay
from agent.llm.edit_modes import EXPECTED
from agent.llm.scripted import Delay, Fixed, Say, ScriptedModel, Status
from agent.recompute import recompute
from agent.records import Edit
from tests.sandbox_world import alive

ROOT = Path(__file__).resolve().parents[1]
REFUSAL = Say("I'm sorry, but I can't help with changing this code.")
END = Status(401, {"error": {"message": "the key has expired"}})
KNOWN, FOREIGN = tiny.KNOWN, tiny.KNOWN_FOREIGN


def reply(title: str, *edits: Edit) -> Say:
    return Say({"title": title, "hypothesis": f"Because of {title}.", "direction": "constants", "expected_effect": None,
                "edits": [{"path": e.path, "search": e.search, "replace": e.replace} for e in edits]})


def known(title: str) -> Say:
    return reply(title, KNOWN[title].edit)


class Script:
    """Answers by the attempt's number, so that an interrupted campaign gets the same answer again.

    ``repairs``: text in the model's own last answer -> what it says when it is shown the error; a refusal otherwise.
    """

    def __init__(self, openings: Sequence[Fixed], repairs: Mapping[str, Fixed] | None = None) -> None:
        self.openings, self.repairs = list(openings), dict(repairs or {})
        self.hiccups = 0
        self.served: set[int] = set()

    def __call__(self, body: dict[str, Any]) -> Fixed:
        messages = body["messages"]
        if messages[-2]["role"] == "assistant":
            said = messages[-2]["content"]
            return next((answer for text, answer in self.repairs.items() if text in said), REFUSAL)
        number = int(re.search(r"This is attempt (\d+)", messages[-1]["content"])[1])  # type: ignore[index]
        if number == 2 and not self.hiccups:
            self.hiccups = 1
            return Status(503, {"error": {"message": "overloaded"}}, {"retry-after": "0"})
        if number <= len(self.openings):
            self.served.add(number)
            return self.openings[number - 1]
        until = time.monotonic() + 5
        while len(self.served) < len(self.openings) and time.monotonic() < until:  # questions are asked side by side
            time.sleep(0.02)
        return END


@contextlib.contextmanager
def serving(script: Script) -> Iterator[tuple[ScriptedModel, dict[str, str]]]:
    with ScriptedModel([], then=script) as model:
        yield model, {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "sk-tiny-0123456789",
                      "RATCHET_MODEL": "scripted"}


def environment(model: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "RATCHET_"))}
    return kept | {"PYTHONPATH": str(ROOT)} | dict(model or {})


def ratchet(*arguments: str, cwd: Path, model: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A real `ratchet` process in ``cwd``."""
    return subprocess.run([sys.executable, "-m", "agent.cli", *arguments], cwd=cwd, env=environment(model), text=True,
                          capture_output=True, timeout=110)


@pytest.fixture
def edge(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """The command line in this process, started in ``tmp_path``: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "RATCHET_MODEL"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str, model: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (model or {}).items():
                patch.setenv(name, value)
            code = cli.edge(arguments)
        out = capfd.readouterr()
        return code, out.out, out.err

    return call


def load(folder: Path) -> State:
    return replay(folder / "ledger.jsonl")[0]


def only_run(runs: Path) -> Path:
    (folder,) = [path for path in runs.iterdir() if not path.name.startswith(".")]
    return folder


def merged_titles(state: State) -> list[str]:
    return [state.attempts[merge.candidate].proposal.title for merge in state.merges]


def attempt(state: State, title: str) -> Attempt:
    return next(a for a in state.attempts.values() if a.proposal.title == title)


def by_name(state: State) -> dict[str, Attempt]:
    return {a.proposal.title: a for a in state.attempts.values()}


def check_sound(folder: Path) -> State:
    """What holds for every campaign: replay, one verdict an attempt, merges of what was measured, refused refs."""
    state, count = replay(folder / "ledger.jsonl")
    assert replay(folder / "ledger.jsonl") == (state, count)
    verdicts = Counter(data["candidate"] for event, data, _ in events(folder / "ledger.jsonl") if event == "verdict")
    assert verdicts == dict.fromkeys(state.attempts, 1)
    repo, tip = folder / "repo.git", str(state.campaign["start"])
    for merge in state.merges:
        done = state.attempts[merge.candidate]
        assert done.candidate is not None and done.verdict is not None
        assert merge.old_tip == done.candidate.base == tip
        assert git.resolve(repo, merge.new_tip, "tree") == merge.tree == done.candidate.tree
        for pair in done.verdict.pairs:
            assert state.runs[pair.candidate_run].tree == merge.tree
            assert state.runs[pair.incumbent_run].tree == git.resolve(repo, tip, "tree")
            assert state.runs[pair.candidate_run].seed == state.runs[pair.incumbent_run].seed == pair.seed
        tip = merge.new_tip
    assert git.resolve(repo, git.ACCEPTED) == tip == state.tip
    for refused in state.refused:
        if refused.candidate is not None and refused.verdict is not None:
            text = git.run(repo, "log", "-1", "--format=%B", f"refs/ratchet/refused/{refused.proposal.id}").decode()
            assert " ".join(refused.verdict.reason.split())[:60] in " ".join(text.split())
    branches = git.run(repo, "for-each-ref", "--format=%(refname:lstrip=3)", "refs/heads/candidate").decode().split()
    assert state.phase != "finished" or set(branches) == {merge.candidate for merge in state.merges}
    good = Counter((r.tree, r.seed, r.steps, r.audits) for r in state.runs.values() if r.purpose != "preflight"
                   and r.id in state.results and state.results[r.id].fault != "infra")
    assert set(good.values()) <= {1}  # no run was paid for twice
    check_certified(folder, state)
    return state


def check_certified(folder: Path, state: State) -> None:
    """Certifications are numbered without gaps, their seeds were never used before, and their levels followed from what
    had been merged when they began."""
    assert [known.hypothesis for known in state.certifications] == [*range(1, len(state.certifications) + 1)]
    merged = 0
    for event, data, _ in events(folder / "ledger.jsonl"):
        merged += event == "merge"
        assert event != "certify" or data["merges"] == merged
    first = int(state.campaign["config"]["seeds"]["first"])
    for attempt in state.attempts.values():
        for pair in attempt.verdict.pairs if attempt.verdict else ():
            number, at = divmod(pair.seed - first, 1000)
            assert pair.fresh == (number > 0 and state.certifications[number - 1].candidate == attempt.proposal.id
                                  and at < 1000)
        if attempt.merge and attempt.verdict:
            number = int(attempt.verdict.evidence["hypothesis"])
            known = state.certifications[number - 1]
            assert (known.candidate, known.tree) == (attempt.proposal.id, attempt.merge.tree)
            assert {pair.seed // 1000 for pair in attempt.verdict.pairs if pair.fresh} == {number}


# ------------------------------------------------------------------------------------------------- (a) a whole night

SPOILT = Say('{"title": "less back-off", "edits": [{"path": "settings.py", "search": ')
NIGHT = Script(
    [known("less smoothing"), known("another salt"), SPOILT,
     reply("own score", Edit("serve.py", "wire = Wire()", "wire = Wire()  # mine\nimport os")), known("more uniform"),
     known("late crash"), known("early crash"), known("unused constant"), REFUSAL,
     Delay(0.7, reply("third salt", Edit("settings.py", 'SALT = "first"', 'SALT = "third"'))),
     reply("same again", Edit("settings.py", 'SALT = "first"', "SALT = 'second'  # the same in other words"))],
    {SPOILT.text: known("less back-off")})  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.CompletedProcess[str]]]:
    place = tmp_path_factory.mktemp("night")
    tiny.write_tiny_target(place / "target")
    with serving(NIGHT) as (_, model):
        done = ratchet("run", "target", "--proposer", "llm", cwd=place, model=model)
    yield place, done


def test_exactly_the_good_patches_are_merged(night: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    place, done = night
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    state = check_sound(only_run(place / "runs"))
    assert sorted(merged_titles(state)) == ["less back-off", "less smoothing"]
    assert NIGHT.hiccups == 1 and "Traceback" not in done.stdout
    ends = {title: (a.verdict.stage, a.verdict.fault) for title, a in by_name(state).items() if a.verdict}
    assert ends["own score"] == ("patch", None) and ends["early crash"] == ("preflight", "crash")
    assert ends["late crash"] == ("measure", "crash") and ends["unused constant"] == ("preflight", None)
    assert ends["another salt"][0] == ends["third salt"][0] == ends["more uniform"][0] == "judge"
    assert ends["no usable proposal"] == ("propose", None)
    again = attempt(state, "same again").verdict
    assert again is not None and again.stage == "patch"
    assert re.fullmatch(r"the same change as \d{3}-another-salt", again.reason)
    assert len(state.attempts) == 12  # the last one met the expired key
    assert any("refuses further calls" in note for note in state.notes)
    for a in state.attempts.values():  # how far a number can be trusted stands with it, also where it was refused
        assert a.verdict is not None and a.verdict.tier == "sealed"
        assert a.verdict.level == (state.campaign["level"] if a.runs else None)


def test_what_advances_and_what_is_merged_was_audited_first(night: tuple[Path, subprocess.CompletedProcess[str]]
                                                            ) -> None:
    folder = only_run(night[0] / "runs")
    state = load(folder)
    asked_again = state.audited
    for name, a in by_name(state).items():
        assert a.verdict is not None
        runs = [pair.candidate_run for pair in a.verdict.pairs if not pair.fault]
        due = {runs[0], runs[-1]} if a.merge else set(runs[:1]) if len(runs) > 1 else set()
        assert due <= set(asked_again), name
        if a.merge:
            assert a.verdict.evidence["audits"] == 2 and float(a.verdict.evidence["audit_max"]) < 1e-5
    assert {r.purpose for r in state.runs.values() if r.id in asked_again} == {"baseline", "pair", "final"}
    finals = {r.id for r in state.runs.values() if r.purpose == "final"}
    assert finals <= set(asked_again)
    kept = list(folder.glob("jobs/*/weights.safetensors"))
    assert {path.parent.name for path in kept} <= {r.id for r in state.runs.values() if r.purpose == "baseline"}


PEEK = Edit("serve.py", "answer = [-flat[", "answer = [-0.01 * flat[")


def test_a_model_that_looks_ahead_is_refused_before_it_advances(tmp_path: Path, edge: Any) -> None:
    """... and is merged where the owner turned the audits off: the defence is what refuses it."""
    for audit, title in ((32, "peeks"), (0, "peeks unseen")):
        target = tmp_path / f"target{audit}"
        tiny.write_tiny_target(target)
        config = (target / "ratchet.toml").read_text()
        config = config.replace('"train.py"]', '"train.py", "serve.py"]').replace('"wire.py", "serve.py"', '"wire.py"')
        (target / "ratchet.toml").write_text(config.replace("audit = 32", f"audit = {audit}"))
        tiny.commit(target, "Let the server be edited")
        with serving(Script([reply(title, PEEK, KNOWN["another salt"].edit)])) as (_, model):
            code, _, err = edge("run", str(target), "--name", f"n{audit}", "--proposer", "llm", model=model)
        assert (code, err) == (0, "")
        state = check_sound(tmp_path / f"runs/n{audit}")
        verdict = attempt(state, title).verdict
        assert verdict is not None
        if audit:
            assert (verdict.stage, verdict.fault, len(verdict.pairs)) == ("measure", "non_causal", 1)
            assert not state.merges and "later tokens are hidden" in verdict.reason
        else:
            assert verdict.outcome == "accepted" and "audits" not in verdict.evidence


def test_a_target_that_looks_ahead_itself_is_said_before_the_night(tmp_path: Path, edge: Any) -> None:
    tiny.write_tiny_target(tmp_path / "target")
    serve = tmp_path / "target/serve.py"
    serve.write_text(serve.read_text().replace(PEEK.search, PEEK.replace))
    tiny.commit(tmp_path / "target", "Peek")
    told = said(edge, "run", "target", "--proposer", "ideas")
    assert "The target's own model cannot be audited (non_causal)" in told and "evaluate.audit = 0" in told


def test_effects_are_those_of_the_known_truth(night: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    state = load(only_run(night[0] / "runs"))
    first = state.attempts[state.merges[0].candidate]
    assert first.verdict is not None and first.verdict.estimate is not None
    assert first.verdict.estimate.effect == pytest.approx(KNOWN[first.proposal.title].effect, abs=0.03)
    assert first.verdict.estimate.split == "confirm" and first.verdict.estimate.pairs == 3
    assert state.gain is not None and state.gain.split == "final" and len(state.gain.pairs) == 2
    assert state.gain.low < state.gain.effect < state.gain.high < -1.3
    assert {p.seed for p in state.gain.pairs}.isdisjoint(p.seed for p in first.verdict.pairs)


def test_every_figure_of_a_verdict_can_be_computed_again(night: tuple[Path, subprocess.CompletedProcess[str]],
                                                         edge: Any) -> None:
    folder = only_run(night[0] / "runs")
    state = load(folder)
    judged = [attempt for attempt in state.attempts.values() if attempt.verdict and attempt.verdict.pairs]
    assert any(attempt.merge for attempt in judged) and any(not attempt.merge for attempt in judged)
    for attempt in judged:
        code, out, err = edge("recompute", attempt.proposal.id, "--runs", str(night[0] / "runs"))
        assert (code, err) == (0, "") and "6 of 6 agree to the last digit" in out, out
    merged = next(attempt for attempt in judged if attempt.merge)
    pair = merged.verdict.pairs[-2] if merged.verdict else None  # the last one's audit would correct it
    assert pair is not None
    result = state.results[pair.candidate_run]
    state.results[pair.candidate_run] = dataclasses.replace(
        result, scores={name: dataclasses.replace(score, value=score.value - 1e-3)
                        for name, score in result.scores.items()})
    found = {figure.name: figure.same for figure in recompute(state, merged, folder / "repo.git")}
    assert not found["Scores"] and not found["Evidence"] and found["Seeds"]


def test_each_merge_commit_has_every_trailer(night: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder = only_run(night[0] / "runs")
    state = load(folder)
    for merge in state.merges:
        text = git.run(folder / "repo.git", "log", "-1", "--format=%(trailers:only,unfold)", merge.new_tip).decode()
        trailers = dict(line.split(": ", 1) for line in text.strip().splitlines())
        for name in ("Metric", "Effect", "Pairs", "Seeds", "Evidence", "Budget", "Device", "GPU-seconds", "Cost-USD",
                     "Proposer", "Run-Id"):
            assert trailers[name].strip(), name
        first = 1 + 1000 * next(c.hypothesis for c in reversed(state.certifications)
                                if c.candidate == merge.candidate)
        assert trailers["Seeds"] == f"{first} {first + 1} {first + 2}"
        assert trailers["Budget"] == "30 steps" and trailers["GPU-seconds"] == "0"
        assert trailers["Isolation"] == f"level {state.campaign['level']}" and "(scripted)" in trailers["Proposer"]
        assert trailers["Run-Id"] == f"{folder.name}/{merge.candidate}" and float(trailers["Cost-USD"]) > 0
        assert "Because of" in git.run(folder / "repo.git", "log", "-1", "--format=%b", merge.new_tip).decode()


def test_vain_rounds_of_the_model_are_paid_for(night: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    state = load(only_run(night[0] / "runs"))
    calls = {a.proposal.title: a.proposal.cost.calls for a in state.attempts.values()}
    assert calls["early crash"] == calls["own score"] == 2  # a repair that came to nothing
    assert calls["less back-off"] == 2 and calls["another salt"] == 2 and calls["unused constant"] == 1
    assert state.usd == pytest.approx(sum(a.proposal.cost.usd for a in state.attempts.values())) and state.usd > 1


def test_every_reply_of_the_model_is_accounted_for(night: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Each reply stands in the ledger with where it was refused and why, or as applied."""
    attempts = load(only_run(night[0] / "runs")).attempts.values()
    proposals = {a.proposal.title: a.proposal for a in attempts if a.proposal.replies}
    stages = {title: [(reply.stage, reply.placed) for reply in known.replies] for title, known in proposals.items()}
    assert stages["less smoothing"] == stages["another salt"] == [("", True)]
    assert stages["less back-off"] == [("propose", False), ("", True)]
    assert stages["own score"] == [("patch", True), ("propose", False)]
    assert stages["early crash"][0] == ("preflight", True)
    assert stages["no usable proposal"] == [("propose", False), ("propose", False)]
    for known in proposals.values():
        assert all(bool(reply.problem) == bool(reply.stage) for reply in known.replies)
        assert all(reply.model == "scripted" and reply.mode in EXPECTED for reply in known.replies)


def test_status_of_the_night(night: tuple[Path, subprocess.CompletedProcess[str]], edge: Any) -> None:
    runs = night[0] / "runs"
    code, out, err = edge("status", "--json", "--runs", str(runs))
    told = json.loads(out)
    assert (code, err) == (0, "") and list(told) == [
        "run", "state", "attempts", "merged", "refused", "reverted", "waiting", "paused", "forecast", "tip", "gain",
        "spent", "time"]
    assert (told["state"], told["attempts"], told["merged"], told["refused"]) == ("finished", 12, 2, 10)
    assert told["gain"]["effect"] < 0 and set(told["spent"]) == {"runs", "seconds", "usd"}
    assert (only_run(runs) / "report" / "progress.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------- (b) somebody else's repo

def fingerprint(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()}


def test_a_foreign_repository_is_improved_and_left_alone(tmp_path: Path, edge: Any) -> None:
    target = tmp_path / "line"
    tiny.write_foreign_target(target)
    (target / "src/line/fit.py").write_text("this is not Python, and not committed\n")
    (target / "notes.txt").write_text("untracked\n")
    (target / "README.md").write_text("staged\n")
    git.run(target, "add", "README.md", bare=False)
    before = fingerprint(target)
    script = Script([reply(title, FOREIGN[title].edit) for title in ("faster", "slower", "late crash")])
    with serving(script) as (sent, model):
        code, out, err = edge("run", "line", "--proposer", "llm", model=model)
    assert (code, err) == (0, ""), out
    state = check_sound(only_run(tmp_path / "runs"))
    assert merged_titles(state) == ["faster"] and "uncommitted changes" in out
    crashed = attempt(state, "late crash").verdict
    assert crashed is not None and (crashed.stage, crashed.fault) == ("measure", "crash")
    slower = attempt(state, "slower").verdict
    assert slower is not None and slower.outcome == "rejected" and slower.fault is None
    estimate = attempt(state, "faster").verdict.estimate  # type: ignore[union-attr]
    assert estimate is not None and estimate.effect == pytest.approx(FOREIGN["faster"].effect, abs=0.02)
    assert state.gain is not None and state.gain.effect > 0.25
    told = json.loads(edge("status", "--json")[1])
    assert told["gain"]["effect"] < -0.25  # better is negative there, whichever way the metric goes
    assert "not committed" not in "".join(request.prompt for request in sent.requests)
    assert fingerprint(target) == before
    assert edge("export", "--branch", "ratchet/night")[0] == 0
    after = fingerprint(target)
    new = {path for path in after if path not in before}
    assert {path: after[path] for path in before} == before
    assert all(path == ".git/refs/heads/ratchet/night" or path.startswith((".git/objects/", ".git/logs/refs/heads/"))
               for path in new), new
    assert git.resolve(target, "ratchet/night", bare=False) == state.tip
    diff = git.run(target, "diff", "--stat", "main", "ratchet/night", bare=False).decode()
    assert "src/line/fit.py" in diff and "1 file changed" in diff


def test_a_target_that_prints_its_own_number_survives_a_kill_at_any_moment(tmp_path: Path, edge: Any) -> None:
    tiny.write_tiny_target(tmp_path / "alone", served=False)
    patch = patch_file(tmp_path, tmp_path / "alone", "less smoothing")
    code, _, err = edge("try", str(patch), "--repo", "alone", "--level", "0", "--unconfined")
    assert (code, err) == (0, "")
    state = check_sound(only_run(tmp_path / "runs"))
    assert merged_titles(state) == ["less smoothing"] and state.gain is not None and state.gain.split == "val"
    runs = {run: state.runs[run].folder for run in state.runs}
    for kept in ("pair known", "verdict", "merge_intent"):  # a kill at that moment
        cut_back(tmp_path / "runs", kept)
        code, out, err = edge("try", str(patch), "--repo", "alone", "--level", "0", "--unconfined")
        assert (code, err) == (0, "") and "going on with" in out
        again = check_sound(only_run(tmp_path / "runs"))
        assert merged_titles(again) == ["less smoothing"] and len(again.runs) == len(runs), kept


def cut_back(runs: Path, kept: str) -> None:
    """Put a finished campaign of one merge back to where its ledger held ``kept`` as its last event."""
    folder = only_run(runs)
    path = folder / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    event = "verdict" if kept == "pair known" else kept
    end = next(i for i, line in enumerate(lines) if f'"event": "{event}"' in line) + (kept != "pair known")
    path.write_text("".join(lines[:end]))
    state = load(folder)
    for job in (folder / "jobs").iterdir():
        if job.name not in state.runs:
            shutil.rmtree(job)
    git.update_ref(folder / "repo.git", git.ACCEPTED, str(state.campaign["start"]), None)


# -------------------------------------------------------------------------------------------- (c) stop, go on, go on

def patch_file(place: Path, target: Path, title: str) -> Path:
    """``title`` of KNOWN as a patch file made by git, the target's work tree left as it was."""
    edit = KNOWN[title].edit
    path = target / edit.path
    text = path.read_text()
    path.write_text(text.replace(edit.search, edit.replace))
    made = place / f"{title.replace(' ', '_').replace('-', '_')}.patch"
    made.write_bytes(git.run(target, "diff", bare=False))
    path.write_text(text)
    return made


def wait_for(ledger: Path, event: str, count: int, process: subprocess.Popen[str]) -> None:
    """Until the ledger holds ``count`` such events."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if ledger.read_bytes().count(f'"event": "{event}"'.encode()) >= count:
                return
        time.sleep(0.02)
    raise AssertionError(f"no {count} {event} events; exit code {process.poll()}")


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_an_interrupted_campaign_goes_on_to_the_same_end(tmp_path: Path, edge: Any, how: str) -> None:
    tiny.write_tiny_target(tmp_path / "target")
    arguments = ["run", "target", "--name", "n", "--level", "0", "--unconfined", "--proposer", "llm"]
    script = Script([known("less smoothing"), known("more uniform"), known("unused constant")])
    with serving(script) as (_, model):
        process = subprocess.Popen([sys.executable, "-m", "agent.cli", *arguments], cwd=tmp_path,
                                   env=environment(model), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for(tmp_path / "runs/n/ledger.jsonl", "run_started", 5, process)
        process.send_signal(signal.Signals[how])
        _, err = process.communicate(timeout=40)
        if how == "SIGINT":
            assert process.returncode == 130 and err == "stopped; the same command goes on from here\n"
            stopped = load(tmp_path / "runs/n")
            assert stopped.phase == "stopped" and not alive(str(tmp_path / "runs"))
        script.openings += [known("unused constant")] * 8  # whatever was asked for when it stopped, this is a duplicate
        code, out, err = edge(*arguments[:2], "--level", "0", "--proposer", "llm", model=model)  # consent is remembered
        assert (code, err) == (0, "") and "going on with run n" in out
        state = check_sound(tmp_path / "runs/n")
        assert state.phase == "finished" and merged_titles(state) == ["less smoothing"] and not state.open_runs
        tried = [a for a in state.attempts.values() if a.verdict and a.verdict.stage not in ("propose", "patch")]
        assert len(tried) == 3 and state.gain is not None
        if how == "SIGKILL":
            return
        assert edge("run", "target", "--name", "n", "--proposer", "llm", model=model)[0] == 1  # finished is finished
    with serving(Script([known("more uniform")])) as (_, model):
        code, out, err = edge("run", "target", "--level", "0", "--unconfined", "--proposer", "llm", model=model)
    assert (code, err) == (0, "") and f"n, is finished: this one starts from its accepted tip {state.tip[:12]}" in out
    (second,) = [path for path in (tmp_path / "runs").iterdir() if path.name not in ("n", ".data")]
    after = check_sound(second)
    assert after.campaign["previous"] == "n" and after.campaign["start"] == state.tip and not after.merges
    # ... and a third one does not fall back to the start, though the second merged nothing
    with serving(Script([])) as (_, model):
        code, out, _ = edge("run", "target", "--level", "0", "--unconfined", "--proposer", "llm", model=model)
    assert code == 1 and f"starts from its accepted tip {state.tip[:12]}" in out


def test_without_a_box_only_idea_cards_are_run_unless_the_user_consents(tmp_path: Path, edge: Any) -> None:
    target = tmp_path / "t"
    tiny.write_tiny_target(target)
    patch = patch_file(tmp_path, target, "unused constant")
    line = said(edge, "try", str(patch), "--repo", "t", "--level", "0")
    assert "only the idea cards" in line and "--unconfined" in line and "ratchet doctor" in line
    with serving(Script([known("less smoothing")])) as (_, model):
        assert "--unconfined" in said(edge, "run", "t", "--level", "0", "--proposer", "llm", model=model)
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name != ".data"]
    # the cards come with ratchet: none fits this target, so nothing of them is run, and the incumbent is the user's own
    code, _, err = edge("run", "t", "--level", "0", "--proposer", "ideas", "--name", "cards", "--budget-runs", "1")
    assert (code, err) == (0, "")
    started = load(tmp_path / "runs/cards").campaign
    assert (started["level"], started["unread"], started["unconfined"]) == (0, False, False)
    code, _, err = edge("try", str(patch), "--repo", "t", "--level", "0", "--unconfined", "--name", "mine")
    assert (code, err) == (0, "") and load(tmp_path / "runs/mine").campaign["unconfined"] is True


# ---------------------------------------------------------------------------------------------------- (d) user errors

def said(edge: Any, *arguments: str, **more: Any) -> str:
    """The one line on stderr of a command that the user must mend something for."""
    code, _, err = edge(*arguments, **more)
    assert code == 1 and err.count("\n") == 1 and err.startswith("ratchet: ") and "Traceback" not in err, err
    return str(err)


@pytest.mark.parametrize(("old", "new", "told"), [
    ("[budget]", "[budgett]", r"unknown key budgett\. Did you mean 'budget'\? Known keys here: .*train"),
    ("amount = 30", 'amount = "many"', r"budget\.amount .*number.*got 'many'.*It should be: steps or seconds"),
    ('command = "python train.py"', "", r'does not say how to train\. Add: \[train\]'),
    ("amount = 30", "amount = 30 30", r"not valid TOML: .*line 22.* Correct that line"),
    ("python prepare.py {out}", "python missing.py {out}", r"data\.prepare failed .*missing\.py.* Run it by hand in"),
])
def test_a_wrong_config_is_one_line(tmp_path: Path, edge: Any, old: str, new: str, told: str) -> None:
    tiny.write_tiny_target(tmp_path / "t")
    config = tmp_path / "t/ratchet.toml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    tiny.commit(tmp_path / "t", "Wrong")
    assert re.search(told, said(edge, "run", "t", "--proposer", "ideas"))
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name != ".data"]  # no half-made run


def test_a_path_that_is_no_repository_or_has_no_commit_is_one_line(tmp_path: Path, edge: Any) -> None:
    (tmp_path / "plain").mkdir()
    assert "is not in a git repository. Make it one: git -C" in said(edge, "run", "plain")
    git.run(tmp_path / "plain", "init", "-q", bare=False)
    assert "has no commits. Make one: git add" in said(edge, "run", "plain")
    (tmp_path / "plain/x").write_text("x")
    tiny.commit(tmp_path / "plain", "Start")
    assert "No ratchet.toml is committed" in said(edge, "run", "plain")
    assert "has passed. Give a time in the future" in said(edge, "run", "plain", "--until", "2020-01-01T00:00")


def test_a_target_that_crashes_is_one_line_and_runs_once_it_is_mended(tmp_path: Path, edge: Any) -> None:
    target = tmp_path / "t"
    tiny.write_tiny_target(target)
    sound = (target / "train.py").read_text()
    (target / "train.py").write_text("import missing_module\n" + sound)
    tiny.commit(target, "Break")
    line = said(edge, "try", str(patch_file(tmp_path, target, "unused constant")), "--repo", "t",
                "--level", "0", "--unconfined")
    assert "The target itself fails to train (crash): ModuleNotFoundError: No module named 'missing_module'" in line
    log = re.search(r"Read (\S+/log\.txt), mend it, commit, and run again", line)
    assert log is not None and "missing_module" in Path(log[1]).read_text()
    (target / "train.py").write_text(sound)
    tiny.commit(target, "Mend")
    code, out, err = edge("try", "unused_constant.patch", "--repo", "t", "--level", "0", "--unconfined")
    assert (code, err) == (0, "") and "incumbent: val_bpb" in out


def test_a_bad_key_is_one_line(tmp_path: Path, edge: Any) -> None:
    tiny.write_tiny_target(tmp_path / "t")
    with serving(Script([])) as (_, model):
        line = said(edge, "run", "t", "--level", "0", "--unconfined", "--proposer", "llm", model=model)
    assert "refused the key in OPENAI_API_KEY (401). Set a valid key, or unset it to use the idea book." in line
    assert "sk-tiny" not in line
    assert "no model is named" in said(edge, "run", "t", "--proposer", "llm").replace("No model", "no model")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB, mounted on ``tmp_path``/runs."""
    place = tmp_path / "runs"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True,
                          text=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot mount a small disk here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("left_kb", [0, 60, 300])
def test_a_full_disk_is_one_line(tmp_path: Path, edge: Any, small_disk: Path, left_kb: int) -> None:
    tiny.write_tiny_target(tmp_path / "t")
    patch = patch_file(tmp_path, tmp_path / "t", "less smoothing")
    (small_disk / ".filler").write_bytes(b"x" * ((2048 - left_kb) * 1024))
    line = said(edge, "try", str(patch), "--repo", "t", "--level", "0", "--unconfined")
    assert "disk" in line.lower() and "ratchet gc" in line
    if left_kb < 300:
        return
    (small_disk / ".filler").unlink()  # the mend; the same command then does what it should
    code, out, err = edge("try", str(patch), "--repo", "t", "--level", "0", "--unconfined")
    assert (code, err) == (0, ""), out
    assert [merged_titles(check_sound(path)) for path in small_disk.iterdir() if path.name != ".data"] == [
        ["less smoothing"]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_that_fills_at_any_stage_loses_nothing(tmp_path: Path, edge: Any, small_disk: Path) -> None:
    tiny.write_tiny_target(tmp_path / "t")
    patch = patch_file(tmp_path, tmp_path / "t", "less smoothing")
    command = ("try", str(patch), "--repo", "t", "--level", "0", "--unconfined")
    stages = Counter[str]()
    for left_kb in (*range(0, 400, 100), *range(400, 2048, 40)):
        for old in small_disk.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        (small_disk / ".filler").write_bytes(b"x" * ((2048 - left_kb) * 1024))
        code, out, err = edge(*command)
        (small_disk / ".filler").unlink()
        began = [path for path in small_disk.iterdir() if (path / "ledger.jsonl").exists()]
        if code == 0:
            break
        assert len(err.splitlines()) == 1 and "disk" in err.lower(), (left_kb, out, err)
        assert all(run_folder.tally(path).problems == () for path in began), left_kb
        reached = replay(began[0] / "ledger.jsonl")[0] if began else None
        stages["measured" if reached and reached.results else "begun" if reached else "before"] += 1
        finished = reached is not None and reached.phase == "finished"
        assert finished == ("ratchet report" in err), (left_kb, err)
        code, out, err = edge("report") if finished else edge(*command)
        assert (code, err) == (0, ""), (left_kb, out, err)
        assert [merged_titles(check_sound(path)) for path in small_disk.iterdir() if path.name != ".data"] == [
            ["less smoothing"]], left_kb
    assert code == 0 and {"before", "measured"} <= set(stages), stages


# ---------------------------------------------------------- (e, g) the user's own patches; a merge during another trial

def test_a_merge_rebuilds_the_trials_in_flight(tmp_path: Path, edge: Any) -> None:
    target = tmp_path / "t"
    tiny.write_tiny_target(target)
    patches = [patch_file(tmp_path, target, title) for title in ("less smoothing", "less back-off")]
    code, out, err = edge("try", *map(str, patches), "--repo", "t", "--slots", "2")
    assert (code, err) == (0, ""), out
    folder = only_run(tmp_path / "runs")
    state = check_sound(folder)
    assert sorted(merged_titles(state)) == ["less back off", "less smoothing"]
    built = Counter(data["id"] for event, data, _ in events(folder / "ledger.jsonl") if event == "candidate")
    assert built[state.merges[1].candidate] == 2  # built again on the new tip, and measured there from the first pair
    second = state.attempts[state.merges[1].candidate]
    assert len({r.tree for r in second.runs}) == 2 and second.runs[-1].tree == state.merges[1].tree
    assert all(a.proposal.author == "human" for a in state.attempts.values())


# ------------------------------------------------------------------------------------------------------- (f) budgets

def endless(known_first: Sequence[Fixed]) -> Script:
    salts = [reply(f"salt {i}", Edit("settings.py", 'SALT = "first"', f'SALT = "s{i}"')) for i in range(200)]
    return Script([*known_first, *salts])


def test_a_budget_of_runs_is_not_exceeded(tmp_path: Path, edge: Any) -> None:
    tiny.write_tiny_target(tmp_path / "t")
    path = tmp_path / "t" / "ratchet.toml"
    path.write_text(path.read_text().replace("search = false", "search = false\nparallel = 1"))  # replies in order
    tiny.commit(tmp_path / "t", "One question at a time")
    with serving(endless([known("less smoothing")])) as (_, model):
        code, out, err = edge("run", "t", "--budget-runs", "15", "--level", "0", "--unconfined", "--proposer", "llm",
                              model=model)
    assert (code, err) == (0, ""), out
    state = check_sound(only_run(tmp_path / "runs"))
    assert merged_titles(state) == ["less smoothing"] and state.gain is not None and len(state.gain.pairs) == 2
    assert 12 <= json.loads(edge("status", "--json")[1])["spent"]["runs"] <= 15


def test_the_clock_stops_a_campaign_in_time_with_its_gain(tmp_path: Path, edge: Any) -> None:
    tiny.write_tiny_target(tmp_path / "t")
    until = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=9)
    with serving(endless([known("less smoothing")])) as (_, model):
        code, out, err = edge("run", "t", "--until", until.isoformat(timespec="seconds"), "--level", "0",
                              "--unconfined", "--proposer", "llm", model=model)
    late = (datetime.datetime.now().astimezone() - until).total_seconds()
    assert (code, err) == (0, "") and late < 5, out
    state = check_sound(only_run(tmp_path / "runs"))
    assert state.phase == "finished" and len(state.attempts) >= 2
    assert not state.merges or state.gain is not None or any("the time was up" in note for note in state.notes), out


def test_fresh_drops_what_an_earlier_run_merged(tmp_path: Path, edge: Any) -> None:
    target = tmp_path / "t"
    tiny.write_tiny_target(target)
    good, idle = (patch_file(tmp_path, target, title) for title in ("less smoothing", "unused constant"))
    assert edge("try", str(good), "--repo", "t")[0] == 0
    first = only_run(tmp_path / "runs")
    assert len(load(first).merges) == 1
    code, out, _ = edge("try", str(idle), "--repo", "t", "--fresh")
    assert code == 0 and "starts from its accepted tip" not in out
    (second,) = [path for path in (tmp_path / "runs").iterdir() if path.name not in (first.name, ".data")]
    assert load(second).campaign["start"] == load(first).campaign["start"]
    assert "There is a run" in said(edge, "try", str(good), "--repo", "t", "--fresh", "--name", first.name)


def test_a_bad_patch_file_leaves_no_run_and_a_book_without_a_card_is_said(tmp_path: Path, edge: Any) -> None:
    tiny.write_foreign_target(tmp_path / "t")
    (tmp_path / "bad.patch").write_text("nothing\n")
    assert "is not a unified diff" in said(edge, "try", "bad.patch", "--repo", "t")
    assert not (tmp_path / "runs").exists()
    assert "There is nothing to try: no model is set up" in said(edge, "run", "t")


def test_a_model_that_cannot_be_reached_is_one_line_and_the_run_can_go_on(tmp_path: Path, edge: Any) -> None:
    tiny.write_tiny_target(tmp_path / "t")
    with serving(Script([])) as (_, model):
        pass  # an address where nobody listens any more
    line = said(edge, "run", "t", "--name", "n", "--proposer", "llm", model=model)
    assert "does not answer: no connection" in line and "run the same command again" in line
    assert load(tmp_path / "runs/n").phase == "running" and not load(tmp_path / "runs/n").attempts
    with serving(Script([known("less smoothing")])) as (_, model):
        assert edge("run", "t", "--name", "n", "--proposer", "llm", model=model)[0] == 0
    assert merged_titles(load(tmp_path / "runs/n")) == ["less smoothing"]
