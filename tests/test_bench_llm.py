"""Bench llm-faults: a few of its classes whole, and the list of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent import tiny
from agent.bench import command, llm
from agent.bench.llm_faults import classes


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, dict[str, object]]]:
    code = command.run("llm-faults", True, ["--runs", str(tmp_path), *options])
    return code, json.loads(capsys.readouterr().out)["classes"]


def test_there_are_enough_classes_and_each_names_its_word() -> None:
    found = classes("sk-0123456789")
    assert len(found) >= 40 and len({one.kind for one in found.values()}) >= 18
    assert sum(one.alone for one in found.values()) == 2


def test_a_stalled_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(tmp_path, capsys, "--only", "stall inside a stream")
    assert len(found) == 1 and all(one["ok"] for one in found.values()) and code == 0, found


@pytest.mark.slow
def test_a_key_that_expires_no_endpoint_and_a_reply_too_large(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(tmp_path, capsys, "--only", "key that expires,refused,TLS,50 MB")
    assert len(found) == 5 and all(one["ok"] for one in found.values()) and code == 0, found


def test_the_bench_can_fail(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "SLACK", -llm.DEADLINE)
    code, found = run(tmp_path, capsys, "--only", "503")
    assert code == 1 and "a question took" in str(found["503"]["detail"])


def test_a_key_in_a_file_or_at_the_wrong_endpoint_is_found(tmp_path: Path) -> None:

    tiny.write_repository(tmp_path / "made", {"x.py": "key = 'sk-canary-1'\n"})
    (tmp_path / "run").mkdir()
    (tmp_path / "made" / ".git").rename(tmp_path / "run" / "repo.git")
    (tmp_path / "run" / "night.log").write_text("sk-canary-2")
    keys = ("sk-canary-1", "sk-canary-2")
    leaks = llm._leaks(tmp_path / "run", "nothing", keys)
    assert {"night.log", "commits"} <= set(leaks)
    assert llm._crossed([[({"authorization": "sk-canary-2"}, "")], [({}, "sk-canary-2")]], keys) == [
        "headers 1", "prompt 2"]


@pytest.mark.slow
def test_an_outage_leaves_the_slot_busy_and_the_model_comes_back(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = command.run("pipeline", True, ["--runs", str(tmp_path), "--reply", "1", "--train", "2", "--candidates", "34",
                                        "--outage", "30"])
    found = json.loads(capsys.readouterr().out)
    assert found["returned"] and found["fallback_candidates"] > 5 and found["outage_busy"] > 0.5, found
    assert code in (0, 1)  # the share itself is for an idle machine to measure
