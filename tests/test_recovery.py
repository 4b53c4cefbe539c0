"""What a start finds after a death, of the process, of its git, of the machine; and the check of a run folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_campaign import Script, edge, known, only_run, patch_file, serving  # noqa: F401 (edge is a fixture)

from agent import data_sums, git, recovery, tiny
from agent.bench import blows, chaos
from agent.doctor import run_folder
from agent.errors import UserError
from agent.ledger import Ledger, State, replay, utc_now
from sandbox import engine, faults, process


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with one merge and one refusal."""
    place = tmp_path_factory.mktemp("finished")
    tiny.write_tiny_target(place / "target")
    with serving(Script([known("less smoothing"), known("more uniform")])) as (_, model):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "RATCHET_"))} | model
        subprocess.run([sys.executable, "-m", "agent.cli", "run", "target", "--level", "0", "--unconfined"], cwd=place,
                       env=environment | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}, check=True,
                       capture_output=True, timeout=110)
    return only_run(place / "runs")


def told(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Check -> (state, text) of each of its lines."""
    found: dict[str, list[tuple[str, str]]] = {}
    for check in run_folder.examine(folder):
        found.setdefault(check.name, []).append((check.state, check.text))
    return found


def bad(folder: Path) -> list[str]:
    return [text for lines in told(folder).values() for state, text in lines if state == "error"]


def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs" / finished.name


def test_a_sound_run_has_no_line_to_complain_of(finished: Path, edge: Any) -> None:  # noqa: F811
    assert bad(finished) == [] and run_folder.tally(finished) == run_folder.Tally()
    code, out, _ = edge("doctor", str(finished))
    assert code == 0 and "no result lost, nothing counted twice, the tip is what was merged" in out
    assert edge("doctor", finished.name, "--runs", str(finished.parent))[0] == 0


def test_a_torn_line_and_a_lock_of_a_killed_git_are_work_for_the_next_start(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    with (run / "ledger.jsonl").open("ab") as file:
        file.write(b'{"n": 99, "t": "x", "ev')
    (run / "repo.git" / "refs" / "heads" / "accepted.lock").touch()
    lines = told(run)
    assert ("warning", "its last line is torn (23 bytes): the machine or the process died while it was written") in (
        lines["ledger"]) and any("accepted.lock" in text for _, text in lines["repo"]) and not bad(run)
    said: list[str] = []
    recovery.mend(run, replay(run / "ledger.jsonl")[0], said.append)
    assert "accepted.lock" in said[0] and not git.stale_locks(run / "repo.git")


@pytest.mark.parametrize("harm", ["twice", "tip", "result", "middle", "number", "repo", "object"])
def test_contradictions_are_errors(finished: Path, tmp_path: Path, harm: str) -> None:
    run = copied(finished, tmp_path)
    path, state = run / "ledger.jsonl", replay(finished / "ledger.jsonl")[0]
    lines = path.read_text().splitlines(keepends=True)
    verdict = next(at for at, line in enumerate(lines) if '"event": "verdict"' in line)
    if harm == "twice":
        path.write_text("".join([*lines, lines[verdict].replace(f'"n": {verdict}', f'"n": {len(lines)}', 1)]))
    elif harm == "tip":
        git.update_ref(run / "repo.git", git.ACCEPTED, str(state.campaign["start"]), None)
    elif harm == "result":
        place = next(run / one.folder for one in state.runs.values() if one.purpose == "pair")
        told_ = json.loads((place / "result.json").read_text())
        (place / "result.json").write_text(json.dumps(told_ | {"seconds": 1e4}))
    elif harm == "middle":
        path.write_text("".join([*lines[:verdict], "nonsense\n", *lines[verdict:]]))
    elif harm == "number":
        path.write_text("".join([*lines[:verdict], *lines[verdict + 1:]]))
    elif harm == "repo":
        shutil.rmtree(run / "repo.git")
    else:
        tree = git.resolve(run / "repo.git", state.tip, "tree")
        for place in (run / "repo.git" / "objects").rglob("*"):
            if place.is_file() and (place.parent.name + place.name == tree or place.suffix == ".pack"):
                place.chmod(0o644)
                place.write_bytes(place.read_bytes()[:20])
    expected = {"twice": "the verdict on 0", "tip": "the accepted branch is at", "middle": "is damaged",
                "result": "another result in its folder", "number": "lines are missing", "repo": "is gone",
                "object": "missing or damaged"}
    assert any(expected[harm] in text for text in bad(run)), told(run)


def test_a_clock_that_went_back_is_said_and_harms_nothing(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    entry = json.loads(lines[4])
    lines[4] = json.dumps(entry | {"t": "2001-01-01T00:00:00.000+00:00"}) + "\n"
    (run / "ledger.jsonl").write_text("".join(lines))
    assert any("went back at line 5" in text for _, text in told(run)["clock"]) and not bad(run)


def test_prepared_data_that_changed_are_found_and_prepared_again(finished: Path, tmp_path: Path, edge: Any) -> None:  # noqa: F811
    run = copied(finished, tmp_path)
    (place,) = (run.parent / ".data").iterdir()
    file = max((one for one in place.iterdir() if one.name != data_sums.SUMS), key=lambda one: one.stat().st_size)
    whole = file.read_bytes()
    stat = file.stat()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data_sums.broken(place) == "" and data_sums.broken(place, thorough=True) == file.name
    assert any(file.name in text for text in bad(run))
    os.utime(file)
    assert data_sums.broken(place) == file.name
    target = finished.parent.parent / "target"
    patch = patch_file(tmp_path, target, "unused constant")
    code, out, _ = edge("try", str(patch), "--repo", str(target), "--runs", str(run.parent), "--fresh", "--level", "0",
                        "--unconfined")
    assert code == 0 and "is damaged: the data are prepared again" in out, out
    assert file.read_bytes() == whole and data_sums.broken(place, thorough=True) == ""


def test_a_git_that_was_killed_is_asked_again_and_its_lock_goes(
        finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = copied(finished, tmp_path) / "repo.git"
    shim = tmp_path / "bin" / "git"
    shim.parent.mkdir()
    lock = repo / "refs" / "heads" / "x.lock"
    shim.write_text(f"#!/bin/sh\nif [ ! -e {tmp_path}/once ]; then : > {tmp_path}/once; : > {lock}; kill -9 $$; fi\n"
                    f"exec {shutil.which('git')} \"$@\"\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    tip = git.resolve(repo, git.ACCEPTED)
    assert tip and (tmp_path / "once").exists() and not lock.exists()
    (tmp_path / "once").unlink()
    git.update_ref(repo, "refs/heads/x", tip, "")
    assert git.resolve(repo, "refs/heads/x") == tip and not lock.exists()


def test_zeros_where_a_block_never_reached_the_disk_are_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with_one = Ledger(path, utc_now)
    with_one.append("note", {"text": "one"})
    with_one.close()
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"n": 1, "t"' + bytes(300) + b"\n")
    again = Ledger(path, utc_now)
    assert again.state.notes == ["one"] and path.stat().st_size == size
    again.close()


def test_a_run_folder_that_is_taken_away_is_one_line(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "run" / "ledger.jsonl", utc_now)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"is gone: somebody removed or moved the run's folder"):
        book.append("note", {"text": "lost"})
    book.close()


def test_after_a_reboot_trees_are_written_again_and_no_stranger_is_taken_for_a_job(tmp_path: Path) -> None:
    git.run(tmp_path, "init", "--bare", "-q", str(tmp_path / "repo.git"), bare=False)
    (tmp_path / "source" / "abc").mkdir(parents=True)
    said: list[str] = []
    facts = recovery.mend(tmp_path, State(campaign={"boot": "another"}), said.append)
    assert facts == {"boot": process.boot_id()} and not (tmp_path / "source").exists() and "started anew" in said[0]
    own = process.stat(os.getpid())
    assert own is not None
    job = tmp_path / "job"
    job.mkdir()
    (job / "supervisor.pid").write_text(process.name_of(os.getpid(), own))
    assert engine._identity(job) == (os.getpid(), own.start_ticks)
    (job / "supervisor.pid").write_text(f"{os.getpid()} {own.start_ticks} another-boot")
    assert engine._identity(job) is None


def test_who_is_killed_from_outside_is_run_again() -> None:
    killed = faults.from_exit(-signal.SIGKILL, "step 3")
    assert killed.fault == "infra" and faults.from_exit(137, "").fault == "infra"
    assert faults.from_exit(137, "torch.OutOfMemoryError: CUDA out of memory").fault == "oom"
    assert faults.from_exit(-signal.SIGSEGV, "").fault == "crash"


def test_a_git_that_ends_before_it_was_to_die_has_had_its_input(tmp_path: Path) -> None:
    """Else the bench itself would empty a file of a candidate."""
    shims = blows.add_shim(tmp_path / "bin")
    (shims / "kill").write_text("0.4", encoding="ascii")
    done = subprocess.run([shims / "git", "hash-object", "--stdin"], input=b"x\n", capture_output=True, check=True)
    assert done.stdout == b"587be6b4c3f93f93c489c0111bba5596147a26cb\n" and not (shims / "killed").exists()
    (shims / "kill").write_text("0.1", encoding="ascii")
    with subprocess.Popen([shims / "git", "cat-file", "--batch"], stdin=subprocess.PIPE) as waits:
        assert waits.wait(20) == 128 + signal.SIGKILL and (shims / "killed").exists()


def test_campaigns_that_are_killed_end_like_one_that_nobody_touched(tmp_path: Path) -> None:
    """In a process of its own, which adopts no orphan but those of its campaigns."""
    words = ["bench", "chaos", "--json", "--", "--quick", "--level", "0", "--runs", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "agent.cli", *words], cwd=Path(__file__).resolve().parent.parent,
                          text=True, capture_output=True, timeout=300)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["kills"] >= 12 and found["other_kills"] >= 3, found["problems"]
    assert (found["lost_results"], found["double_counted"], found["wrong_tip"], found["orphans"]) == (0, 0, 0, 0)
    assert found["verdicts_equal"] and set(found["boundaries_reached"]) == {"before", "torn", "after"}


def test_the_bench_of_kills_sees_a_result_that_is_not_the_quiet_night_s() -> None:
    assert chaos.alike((1.0, ("a", 2.0)), (1.0 + 1e-9, ("a", 2.0)))
    assert not chaos.alike((1.0, ("a", 2.0)), (1.0, ("a", 2.1)))
    assert not chaos.alike((1.0,), (1.0, 2.0))
