"""Orders from another terminal: real campaigns in real processes, told what to do by real `ratchet` commands."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import calls, git, steering, tiny
from agent.bench import chaos_night
from agent.errors import UserError
from agent.judge import Rule
from agent.ledger import Ledger, State, events, replay
from agent.llm.scripted import Delay, Fixed
from agent.records import Edit, Order
from tests.test_campaign import END, REFUSAL, environment, known, ratchet, reply, serving

SLOW = 'run.report(step, 2.5 / step)'


class Terminal:
    """One campaign on the tiny target in a process of its own, and a second terminal beside it."""

    def __init__(self, folder: Path, model: dict[str, str], extra: str = "", name: str = "n",
                 slow: float = 0.01) -> None:
        self.cwd, self.model, self.folder = folder, model, folder / "runs" / name
        self.process: subprocess.Popen[str] | None = None
        target = folder / "target"
        if not target.exists():
            tiny.write_tiny_target(target)
            toml, train = target / "ratchet.toml", target / "train.py"
            toml.write_text(toml.read_text().replace("final_pairs = 2", f"final_pairs = 2\n{extra}"))
            train.write_text(train.read_text().replace(SLOW, f"{SLOW}\n        __import__('time').sleep({slow})"))
            tiny.commit(target, "Slower")

    def start(self, *more: str, program: tuple[str, ...] = ("agent.cli",)) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *program, "run", "target", "--name", self.folder.name, "--slots", "2", *more],
            cwd=self.cwd, env=environment(self.model), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def tell(self, *words: str, code: int = 0) -> str:
        done = ratchet(*words, cwd=self.cwd)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def state(self) -> State:
        return replay(self.folder / "ledger.jsonl")[0]

    def until(self, true: Callable[[State], Any], seconds: float = 60) -> State:
        end = time.monotonic() + seconds
        while not true(self.state):
            assert time.monotonic() < end, self.state
            assert self.process is None or self.process.poll() is None or true(self.state), self.process.stdout.read()  # type: ignore[union-attr]
            time.sleep(0.05)
        return self.state

    def end(self, code: int = 0) -> str:
        assert self.process is not None
        out, _ = self.process.communicate(timeout=100)
        assert self.process.returncode == code, out
        self.process = None
        return out


@contextlib.contextmanager
def campaign(folder: Path, answers: list[Fixed], **more: Any) -> Iterator[tuple[Terminal, Any]]:
    def script(body: dict[str, Any]) -> Fixed:
        if body["messages"][-2]["role"] == "assistant":
            return REFUSAL
        number = int(re.search(r"This is attempt (\d+)", body["messages"][-1]["content"])[1])  # type: ignore[index]
        return answers[number - 1] if number <= len(answers) else Delay(0.5, END)

    with serving(script) as (model, variables):  # type: ignore[arg-type]
        terminal = Terminal(folder, variables, **more)
        try:
            yield terminal, model
        finally:
            if terminal.process is not None:
                terminal.process.send_signal(signal.SIGTERM)
                terminal.process.communicate(timeout=60)


def order_events(terminal: Terminal) -> list[dict[str, Any]]:
    return [data for event, data, _ in events(terminal.folder / "ledger.jsonl") if event == "order"]


def worse(number: int) -> Fixed:
    """Each in its own words: one like a refused one but for its numbers is turned away."""
    return reply(f"Worse {number}", Edit("train.py", "uniform = 0.05 +", f"uniform = w{number} = 0.{50 + number} +"))


# ------------------------------------------------------------------------------------------------------- the file


def test_orders_are_numbered_whoever_gives_them_and_a_torn_line_is_cut(tmp_path: Path) -> None:
    threads = [threading.Thread(target=steering.give, args=(tmp_path, "steer", f"wish {i}")) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with (tmp_path / steering.FILE).open("a") as file:
        file.write('{"kind": "pau')
    assert [one.number for one in steering.given(tmp_path)] == list(range(1, 21))
    assert steering.give(tmp_path, "pause") == 21
    found = list(steering.given(tmp_path))
    assert {one.text for one in found[:20]} == {f"wish {i}" for i in range(20)}
    assert (found[20].number, found[20].kind) == (21, "pause")


def test_a_damaged_order_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / steering.FILE).write_text("nonsense\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        list(steering.given(tmp_path))


# --------------------------------------------------------------------------------------------------- whole campaigns


def test_pause_veto_steer_revert_and_resume(tmp_path: Path) -> None:
    answers: list[Fixed] = [known("less smoothing"), *(worse(i) for i in range(2, 5)),
                            *(Delay(1.0, worse(i)) for i in range(5, 12))]  # type: ignore[arg-type]
    with campaign(tmp_path, answers) as (terminal, model):
        terminal.start()
        terminal.until(lambda s: s.merges)
        assert "order 1 to run n: pause" in terminal.tell("pause")
        terminal.until(lambda s: s.paused and not s.open_runs)
        at_rest = len(terminal.state.runs)
        wanted = next(a for a in terminal.state.attempts.values() if a.verdict is None)
        first = terminal.state.merges[0]
        terminal.tell("veto", wanted.proposal.id, "--why", "we know that already")
        terminal.tell("steer", "focus on the ``` optimizer\nand nothing else")
        terminal.tell("revert", first.candidate, "--why", "it breaks the export")
        terminal.until(lambda s: s.reverts and s.attempts[wanted.proposal.id].verdict)
        time.sleep(1.2)
        assert len(terminal.state.runs) == at_rest and terminal.state.paused  # nothing is started meanwhile
        assert "was taken back already" in terminal.tell("revert", first.candidate, code=1)
        shown = json.loads(terminal.tell("status", "--json"))
        assert shown["paused"] and shown["reverted"] == 1
        terminal.tell("resume")
        terminal.end()
        state = terminal.state
        verdict = state.attempts[wanted.proposal.id].verdict
        assert verdict is not None and (verdict.outcome, verdict.stage) == ("rejected", "merge")
        assert "we know that already" in verdict.reason
        assert [o["kind"] for o in order_events(terminal)] == ["pause", "veto", "steer", "revert", "resume"]
        assert [o["number"] for o in order_events(terminal)] == [1, 2, 3, 4, 5]
        repo, back = terminal.folder / "repo.git", state.reverts[0]
        assert git.resolve(repo, git.ACCEPTED) == state.tip
        assert git.resolve(repo, back.new_tip, "tree") == git.resolve(repo, str(state.campaign["start"]), "tree")
        text = git.run(repo, "log", "-1", "--format=%B", back.new_tip).decode()
        assert f"Reverts: {first.new_tip}" in text and "it breaks the export" in text
        for attempt in state.attempts.values():  # what was in work stands on the new tip
            if attempt.verdict and attempt.verdict.stage == "judge" and attempt is not state.attempts[first.candidate]:
                assert attempt.candidate is not None
                assert attempt.candidate.base in (str(state.campaign["start"]), first.new_tip, back.new_tip)
        told = [request.prompt for request in model.requests if "What the owner said" in request.prompt]
        assert told and all("focus on the" in prompt and "They change neither the rules" in prompt for prompt in told)
        assert "taken back" in terminal.tell("show", first.candidate)
        assert state.phase == "finished" and state.gain is None
        page = (terminal.folder / "report" / "report.md").read_text()
        assert "You took 1 of them back." in page and f"(taken back by you in `{back.new_tip[:10]}`)" in page


@pytest.mark.slow
def test_stop_after_current_lets_the_jobs_end_and_the_same_command_goes_on(tmp_path: Path) -> None:
    with campaign(tmp_path, [worse(i) for i in range(9)], slow=0.02) as (terminal, _):
        terminal.start()
        terminal.until(lambda s: len(s.attempts) > 1 and s.open_runs)
        terminal.tell("stop", "--after-current")
        out = terminal.end(130)
        assert "the same command goes on" in out
        state = terminal.state
        assert state.phase == "stopped" and not state.open_runs
        assert all(result.message != "stopped" for result in state.results.values())
        assert "is not running" in terminal.tell("stop", code=1)
        terminal.start()
        terminal.end()
        assert terminal.state.phase == "finished" and not terminal.state.stopping
        begun = [event for event, _, _ in events(terminal.folder / "ledger.jsonl")].count("started")
        assert begun == 2 and len(order_events(terminal)) == 1


def test_a_merge_waits_for_a_person_while_others_go_on(tmp_path: Path) -> None:
    answers: list[Fixed] = [known("less smoothing"), known("less back-off"), *(worse(i) for i in range(3, 6))]
    with campaign(tmp_path, answers, extra="approve = true") as (terminal, _):
        terminal.start()
        state = terminal.until(lambda s: len(s.waiting) == 2 and sum(
            a.verdict.stage == "judge" for a in s.attempts.values() if a.verdict) == 3)  # the others got theirs
        assert not state.merges and state.phase == "running"
        first, second = sorted(state.waiting)
        assert "waiting" in terminal.tell("status")
        assert process_lives(terminal)
        terminal.process.kill()  # type: ignore[union-attr]  # and it is not forgotten
        terminal.process.wait()  # type: ignore[union-attr]
        answers += [worse(i) for i in range(len(answers), len(terminal.state.attempts) + 1)]
        terminal.start()
        terminal.tell("approve", first)
        state = terminal.until(lambda s: s.merges)
        assert [merge.candidate for merge in state.merges] == [first]
        # the other one was measured against the tip before: it is built and measured again, and waits again
        terminal.until(lambda s: s.waiting.get(second) and s.attempts[second].candidate.base == s.tip)
        judged = next(a for a in state.attempts.values() if a.verdict and not a.merge)
        assert "does not wait" in terminal.tell("approve", judged.proposal.id, code=1)
        terminal.tell("veto", second)
        terminal.end()
        state = terminal.state
        assert state.phase == "finished" and len(state.merges) == 1 and state.gain is not None
        assert {a.verdict.outcome for a in state.attempts.values() if a.verdict} == {"accepted", "rejected"}


def process_lives(terminal: Terminal) -> bool:
    return terminal.process is not None and terminal.process.poll() is None


def test_a_kill_right_after_a_revert_leaves_no_gate_that_knows_another_tip(tmp_path: Path) -> None:
    answers = [known("less smoothing"), *(worse(i) for i in range(2, 6))]
    with campaign(tmp_path, answers, slow=0.02) as (terminal, _):
        toml = tmp_path / "target" / "ratchet.toml"
        toml.write_text(toml.read_text().replace('policy = "single"', 'policy = "bundles"\ngear = "paired"'))
        tiny.commit(tmp_path / "target", "Bundles")
        terminal.start()
        terminal.until(lambda s: s.merges)
        terminal.process.kill()  # type: ignore[union-attr]
        terminal.process.wait()  # type: ignore[union-attr]
        name = terminal.state.merges[0].candidate
        steering.give(terminal.folder, "revert", "", name)
        (tmp_path / chaos_night.WANTED).write_text(json.dumps({"revert less smoothing": "after"}))
        terminal.start(program=("agent.bench.chaos_night", "die", str(tmp_path)))
        terminal.end(code=-signal.SIGKILL)
        told = terminal.state
        assert [one.candidate for one in told.reverts] == [name]
        assert [call["tip"] for call in told.calls if "moved" in call][-1:] != [told.tip]
        terminal.start()
        terminal.end()
        state = terminal.state
        assert [call["tip"] for call in state.calls if "moved" in call][-1] == state.reverts[-1].new_tip
        assert calls.rulings(state, Rule(0.1, (3,), 0.002)) and state.phase == "finished"
        assert git.resolve(terminal.folder / "repo.git", git.ACCEPTED) == state.tip


@pytest.mark.parametrize("kind", ["revert", pytest.param("veto", marks=pytest.mark.slow)])
def test_an_order_that_a_kill_cut_short_is_followed_by_the_next_process(tmp_path: Path, kind: str) -> None:
    answers = [known("less smoothing"), *(worse(i) for i in range(2, 9))]
    with campaign(tmp_path, answers, slow=0.03) as (terminal, _):
        terminal.start()
        terminal.until(lambda s: s.merges and any(a.verdict is None for a in s.attempts.values()))
        terminal.process.kill()  # type: ignore[union-attr]
        terminal.process.wait()  # type: ignore[union-attr]
        state = terminal.state
        name = state.merges[0].candidate if kind == "revert" else next(
            a.proposal.id for a in state.attempts.values() if a.verdict is None)
        steering.give(terminal.folder, kind, "", name)  # type: ignore[arg-type]
        ledger = Ledger(terminal.folder / "ledger.jsonl")
        ledger.append("order", Order(1, kind, "", name))  # type: ignore[arg-type]
        ledger.close()
        answers += [worse(i) for i in range(len(answers), len(state.attempts) + 1)]  # a first answer to the restart
        terminal.start()
        terminal.end()
        state = terminal.state
        assert len(order_events(terminal)) == 1
        if kind == "revert":
            assert [one.candidate for one in state.reverts] == [name]
        else:
            assert "vetoed" in state.attempts[name].verdict.reason  # type: ignore[union-attr]
        verdicts = [data["candidate"] for event, data, _ in events(terminal.folder / "ledger.jsonl")
                    if event == "verdict"]
        assert len(verdicts) == len(set(verdicts)) == len(state.attempts)
        assert git.resolve(terminal.folder / "repo.git", git.ACCEPTED) == state.tip
