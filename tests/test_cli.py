"""The command line: real processes for the error edge, typer's runner for the rest; both screens."""

from __future__ import annotations

import datetime
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from agent import __version__, cli, git, git_trees, runs, tiny
from agent.doctor import checks as doctor
from agent.ledger import State
from agent.records import Merge, Verdict
from agent.show import screen
from sandbox.job import Progress
from tests.night import Night, whole_night


def ratchet(*arguments: str, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """A real `ratchet` process in ``cwd``."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.run([sys.executable, "-m", "agent.cli", *arguments], cwd=cwd, env=environment, text=True,
                          stderr=subprocess.PIPE, timeout=60, **({"stdout": subprocess.PIPE} | options))  # type: ignore[call-overload,no-any-return]


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_version_and_help_name_every_command() -> None:
    assert invoke("--version") == f"ratchet {__version__}\n"
    told = invoke("--help")
    for command in ("run", "try", "status", "log", "show", "report", "export", "doctor", "gc", "calibrate", "bench"):
        assert f"\n  {command} " in told


def test_status_json_is_exactly_one_object(tmp_path: Path) -> None:
    night = whole_night(tmp_path / "runs")
    done = ratchet("status", "--json", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    told = json.loads(done.stdout)
    assert 0 < told.pop("time")["busy"] <= 1
    assert told == {
        "run": "2026-03-01", "state": "finished", "attempts": 5, "merged": 2, "refused": 3, "tip": night.state.tip,
        "gain": {"metric": "val_bpb", "split": "final", "effect": -0.1, "low": -0.11, "high": -0.08},
        "spent": {"runs": 13, "seconds": 133.0, "usd": 0.25}, "forecast": None, "paused": False, "reverted": 0,
        "waiting": [],
    }


def test_status_takes_the_newest_run_and_sees_whether_it_lives(tmp_path: Path) -> None:
    whole_night(tmp_path, "old", day=1)
    night = Night(tmp_path, "new", day=2, previous="old")
    night.propose("Something")
    told = json.loads(invoke("status", "--json", "--runs", str(tmp_path)))
    assert told | {"spent": None} == {"run": "new", "state": "stopped", "attempts": 1, "merged": 0, "refused": 0,
                                      "tip": "a" * 40, "gain": None, "spent": None, "forecast": None, "paused": False,
                                      "reverted": 0, "waiting": []}
    with runs.lock(night.folder):
        assert json.loads(invoke("status", "--json", "--runs", str(tmp_path)))["state"] == "running"
    text = invoke("status", "--runs", str(tmp_path))
    assert "goes on   from the accepted tip of old" in text and "1 in work" in text
    assert json.loads(invoke("status", "old", "--json", "--runs", str(tmp_path)))["merged"] == 2


def test_log_has_one_line_an_attempt_newest_last(tmp_path: Path) -> None:
    whole_night(tmp_path)
    lines = invoke("log", "--runs", str(tmp_path)).splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5"]
    assert "accepted" in lines[0] and "-0.0800 [-0.0850, -0.0750]" in lines[0] and "2 pairs" in lines[0]
    assert "[nan]" in lines[3] and lines[1].endswith("| the text to replace is not there")


def test_show_and_report_and_gc_print_where_things_lie(tmp_path: Path) -> None:
    night = whole_night(tmp_path)
    (night.folder / "jobs").mkdir()
    (night.folder / "jobs/blob").write_bytes(b"x" * 3_000_000)
    assert f"{night.folder}/jobs/001-unembedding-1c/log.txt" in invoke("show", "1", "--runs", str(tmp_path))
    page = Path(invoke("report", "--runs", str(tmp_path)).strip())
    assert page.is_file() and page.with_name("progress.png").is_file()
    assert "3.0 MB would be freed" in invoke("gc", "--keep", "0", "--dry-run", "--runs", str(tmp_path))
    assert (night.folder / "jobs/blob").exists()
    assert "3.0 MB freed" in invoke("gc", "--keep", "0", "--runs", str(tmp_path))
    assert not (night.folder / "jobs").exists()
    assert invoke("status", "--runs", str(tmp_path)).startswith("run       2026-03-01 (finished)")


@pytest.mark.parametrize(("arguments", "said"), [
    (("status",), "There is no run in runs/ yet. Start one with `ratchet run`"),
    (("status", "../x"), "There is no run in runs/ yet."),
    (("run", "missing"), "missing does not exist. Give the folder of a git repository"),
    (("run", "file"), "file is not a folder."),
    (("run", "--proposer", "gpt"), "There is no proposer 'gpt'. Choose hybrid, llm, search, random or ideas"),
    (("try", "missing.patch"), "There is no patch file missing.patch."),
])
def test_what_the_user_must_mend_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    (tmp_path / "file").write_text("x")
    done = ratchet(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"ratchet: {said}") and done.stderr.count("\n") == 1


def test_export_of_nothing_says_so(tmp_path: Path) -> None:
    Night(tmp_path / "runs", "empty").refuse("Something")
    done = ratchet("export", cwd=tmp_path)
    assert done.returncode == 1 and "has merged nothing" in done.stderr and done.stderr.count("\n") == 1


def test_a_damaged_ledger_is_one_line(tmp_path: Path) -> None:
    night = whole_night(tmp_path / "runs")
    path = night.folder / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"event": "merge"', b'"event": merge'))
    done = ratchet("log", cwd=tmp_path)
    assert done.returncode == 1 and "is damaged" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    whole_night(tmp_path / "runs")
    with Path("/dev/full").open("w") as full:
        done = ratchet("log", cwd=tmp_path, stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("ratchet: The disk is full") and "Traceback" not in done.stderr


def test_a_fault_of_ratchet_is_a_line_and_a_file(tmp_path: Path) -> None:
    night = Night(tmp_path / "runs", "odd")
    (night.folder / "report").write_text("a file where ratchet makes its folder")
    done = ratchet("report", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    saved = Path(done.stderr.split("The traceback is in ")[1].split(";")[0])
    try:
        assert "FileExistsError" in saved.read_text() and "Traceback" in saved.read_text()
    finally:
        saved.unlink()


def test_wrong_usage_is_exit_2(tmp_path: Path) -> None:
    done = ratchet("status", "--bogus", cwd=tmp_path)
    assert done.returncode == 2 and "--bogus" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_at_the_edge_says_how_to_go_on(capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced command, since the moment of a real signal cannot be chosen from outside."""
    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(cli.runs, "resolve", interrupt)
    assert cli.edge(["status"]) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"


def test_a_closed_terminal_ends_like_ctrl_c_and_nohup_stays() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), cli._end_like_ctrl_c():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with cli._end_like_ctrl_c():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def commit(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    for arguments in (("init", "-q"), ("add", "-A"),
                      ("-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "start")):
        subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)
    return folder


def merged_night(tmp_path: Path) -> tuple[Path, str, Night]:
    """A user's repository, its start, and a run with one real merge on it."""
    user = commit(tmp_path / "user", {"model.py": "lr = 1\n"})
    start = git.locate(user).head
    night = Night(tmp_path / "runs", "n", start=start, toplevel=str(user))
    repo = night.folder / "repo.git"
    git.clone_bare(user, repo, start)
    tree = git_trees.write_tree(repo, start, "", {"model.py": b"lr = 2\n"})
    tip = git.commit_tree(repo, tree, (start,), "Raise lr\n")
    git.update_ref(repo, git.ACCEPTED, tip, start)
    name = night.propose("Raise lr")
    night.ledger.append("verdict", Verdict(name, "accepted", "judge", "better"))
    night.ledger.append("merge", Merge(name, start, tip, tree, "Raise lr"))
    return user, tip, night


def test_export_makes_a_branch_a_series_and_a_push_and_leaves_the_checkout(tmp_path: Path) -> None:
    user, tip, night = merged_night(tmp_path)
    (user / "model.py").write_text("lr = 1  # in work\n")
    where = ("--runs", str(tmp_path / "runs"))
    assert "branch better in" in invoke("export", "--branch", "better", *where)
    assert git.resolve(user, "refs/heads/better", bare=False) == tip
    assert (user / "model.py").read_text() == "lr = 1  # in work\n"
    assert "0001-Raise-lr.patch" in invoke("export", "n", "--out", str(tmp_path / "series"), *where)
    assert "+lr = 2" in (tmp_path / "series/0001-Raise-lr.patch").read_text()
    assert str(night.folder / "patches") in invoke("export", *where)
    remote = tmp_path / "remote.git"
    subprocess.run(["git", "init", "-q", "--bare", str(remote)], check=True)
    assert "as ratchet/n" in invoke("export", "--push", str(remote), *where)
    assert git.resolve(remote, "refs/heads/ratchet/n") == tip
    assert ratchet("export", "--branch", "better", cwd=tmp_path).returncode == 0  # it stands there already
    git.update_ref(user, "refs/heads/mine", str(night.state.campaign["start"]), "", bare=False)
    taken = ratchet("export", "--branch", "mine", cwd=tmp_path)
    assert taken.returncode == 1 and "already has a branch mine" in taken.stderr


def test_the_default_target_has_no_place_for_a_branch(tmp_path: Path) -> None:
    whole_night(tmp_path / "runs")
    done = ratchet("export", "--branch", "b", cwd=tmp_path)
    assert done.returncode == 1 and "no place for a branch. Use --out DIR" in done.stderr


def test_doctor_says_what_is_wrong_and_how_to_mend_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "RATCHET_MODEL"):
        monkeypatch.delenv(name, raising=False)
    wrong = commit(tmp_path / "wrong", {"ratchet.toml": '[train]\ncommand = "python t.py"\n[budgets]\n'})
    checks = {check.name: check for check in doctor.examine(wrong, tmp_path / "runs")}
    assert checks["python"].state == checks["git"].state == checks["target"].state == checks["disk"].state == "ok"
    assert checks["config"].state == "error" and "unknown key budgets. Did you mean 'budget'?" in checks["config"].text
    assert checks["model"].state == "warning" and "RATCHET_MODEL" in checks["model"].text
    assert "level" in checks["box"].text and "memory" in checks["box"].text
    assert checks["stops"].text and "exploits of the kernel" in checks["leaves"].text
    assert "cores" in checks["devices"].text or "cuda" in checks["devices"].text
    assert checks["torch"].line().startswith(("OK       torch", "WARNING  torch"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("old", "new", "state", "told"), [
    ("", "", "ok", "and audits what advances"),
    ("audit = 32", "audit = 0", "warning", "a model that looks ahead would be merged"),
    ('tier = "sealed"', 'tier = "protected"\npattern = "x: (.*)"', "ok", "offer the seam of target_repo/README.md"),
    ('tier = "sealed"', 'tier = "reported"\npattern = "x: (.*)"', "warning", "a patch could print a better one")])
def test_doctor_names_the_tier_and_what_would_raise_it(tmp_path: Path, old: str, new: str, state: str, told: str
                                                       ) -> None:
    tiny.write_tiny_target(tmp_path / "t")
    config = tmp_path / "t/ratchet.toml"
    config.write_text(config.read_text().replace(old, new))
    check = next(check for check in doctor._target(tmp_path / "t", "")[0] if check.name == "tier")
    assert check.state == state and told in check.line()


def test_doctor_passes_a_sound_target_and_warns_of_uncommitted_files(tmp_path: Path) -> None:
    sound = commit(tmp_path / "sound", {"ratchet.toml": '[train]\ncommand = "python t.py"\n[evaluate]\n'
                                                        "pattern = 'loss ([0-9.]+)'\n"})
    told, found = doctor._target(sound, "")
    assert [check.state for check in told] == ["ok", "ok", "warning"] and found is not None
    (sound / "new.py").write_text("x = 1\n")
    told, _ = doctor._target(sound, "")
    assert told[0].state == "warning" and "uncommitted" in told[0].text
    told, found = doctor._target(tmp_path / "none", "")
    assert [check.state for check in told] == ["error"] and found is None


class Hours:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = datetime.datetime(2026, 3, 1, 22, 0, tzinfo=datetime.UTC)

    def __call__(self) -> datetime.datetime:
        return self.now


def drive(observer: screen.Screen, state: State, hours: Hours) -> None:
    """Ten minutes of a campaign, two glances a second."""
    with observer:
        observer.phase("measure 005-betas")
        observer.note("The idea book proposes.\nSet OPENAI_API_KEY to use a model.")
        for step in range(1200):
            hours.now += datetime.timedelta(seconds=0.5)
            observer.phase("measure 005-betas")
            observer.jobs([("005-betas seed 1", Progress("train", step, 1200, 2.5, step / 2, 600 - step / 2)),
                           ("005-betas seed 2", None)])
        observer.attempt(state, state.attempts["005-betas"])
        observer.finished(state)


def test_plain_lines_are_few_and_carry_no_codes(tmp_path: Path) -> None:
    state, hours, out = whole_night(tmp_path).state, Hours(), io.StringIO()
    observer = screen.open_screen(Console(file=out, width=60, highlight=False), hours)
    assert isinstance(observer, screen.PlainScreen)
    drive(observer, state, hours)
    text = out.getvalue()
    lines = text.splitlines()
    assert "\x1b" not in text and "\r" not in text
    assert sum("running:" in line for line in lines) == 10  # one a minute
    assert sum("measure 005-betas" in line for line in lines) <= 11
    assert any(line.endswith("  Set OPENAI_API_KEY to use a model.") for line in lines)
    assert any("accepted  #5 Betas (0.8, 0.99)  -0.0300 [-0.0350, -0.0250]" in line for line in lines)
    assert "2 of 5 attempts merged:" in lines and observer.state is state
    assert any(line.startswith("gain   val_bpb -0.1000 [-0.1100, -0.0800]") for line in lines)


def test_the_live_screen_shows_phase_bars_verdicts_and_cost(tmp_path: Path) -> None:
    state, out = whole_night(tmp_path).state, io.StringIO()
    console = Console(file=out, width=140, height=40, force_terminal=True, color_system="truecolor",
                      _environ={"TERM": "xterm-256color"})
    observer = screen.open_screen(console)
    assert isinstance(observer, screen.LiveScreen)
    with observer:
        observer.phase("measure 005-betas")
        observer.attempt(state, state.attempts["005-betas"])
        observer.jobs([("005-betas seed 1", Progress("train", 120, 300, 2.31, 9.0, 8.0))])
        frame = io.StringIO()
        Console(file=frame, width=140).print(observer._draw())
    shown = frame.getvalue()
    for part in ("measure 005-betas", "120/300, loss 2.310, 8 s left", "━", "Betas (0.8, 0.99)", "2 merged, 3 refused",
                 "best so far: val_bpb -0.1100", "13 runs"):
        assert part in shown
    assert "\x1b[" in out.getvalue() and out.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_doctor_says_when_a_run_would_read_another_config(tmp_path: Path) -> None:
    tiny.write_tiny_target(tmp_path / "t")
    config = tmp_path / "t/ratchet.toml"

    def names() -> dict[str, doctor.Check]:
        return {check.name: check for check in doctor._target(tmp_path / "t", "")[0]}

    assert "commit" not in names()
    config.write_text(config.read_text() + "\n# changed\n")
    assert names()["commit"].state == "warning" and "not the committed one" in names()["commit"].text
    text = config.read_text()
    config.unlink()
    tiny.commit(tmp_path / "t", "Forget the config")
    config.write_text(text)
    assert names()["commit"].state == "error" and names()["commit"].mend.startswith("git add")
