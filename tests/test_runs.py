"""The runs folder: names, the newest run, the lock between real processes, gc."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent import runs
from agent.errors import UserError
from tests.night import Night, whole_night

HOLD = """
import sys
from pathlib import Path
from agent import runs
with runs.lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def noon() -> datetime.datetime:
    return datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until it is told to end."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def fill(folder: Path, megabytes: int = 1) -> None:
    """Job folders as a campaign leaves them, one of them closed by the job."""
    for part in ("jobs/one", "source/tree"):
        (folder / part).mkdir(parents=True)
        (folder / part / "blob").write_bytes(os.urandom(megabytes << 20))
    shut = folder / "jobs/one/shut"
    shut.mkdir()
    (shut / "file").write_text("x")
    shut.chmod(0)


def test_new_names_are_dates_and_count_on() -> None:
    assert runs.new_name([], noon) == "2026-03-01"
    assert runs.new_name(["2026-03-01", "2026-03-01-2", "other"], noon) == "2026-03-01-3"


def test_newest_is_the_run_worked_on_last_whatever_its_name(tmp_path: Path) -> None:
    assert runs.newest(tmp_path / "none") is None
    Night(tmp_path, "zebra", day=1)
    Night(tmp_path, "apple", day=3)
    Night(tmp_path, "melon", day=2)
    (tmp_path / "stray").mkdir()
    (tmp_path / "README.md").write_text("not a run")
    assert runs.names(tmp_path) == ["zebra", "melon", "apple"]
    assert runs.resolve(tmp_path) == tmp_path / "apple"
    assert runs.resolve(tmp_path, "zebra") == tmp_path / "zebra"


def test_newest_reads_past_a_torn_line_and_an_event_larger_than_the_tail(tmp_path: Path) -> None:
    night = Night(tmp_path, "big", day=2)
    Night(tmp_path, "small", day=1)
    night.ledger.append("note", {"text": "x" * 200_000})
    with night.ledger.path.open("ab") as file:
        file.write(b'{"n": 9, "t": "torn')
    assert runs.newest(tmp_path) == "big"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", " ", "x" * 101])
def test_no_name_leaves_the_folder(name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a run"):
        runs.check_name(name)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Start one with"):
        runs.resolve(tmp_path)
    Night(tmp_path, "known")
    with pytest.raises(UserError, match=r"no run 'other'.*Known runs: known"):
        runs.resolve(tmp_path, "other")


def test_a_second_process_cannot_take_the_lock_until_the_first_is_gone(tmp_path: Path) -> None:
    assert not runs.held(tmp_path / "fresh")
    process = holder(tmp_path)
    try:
        assert runs.held(tmp_path)
        with pytest.raises(UserError, match=rf"in use by another ratchet \(process {process.pid}\)"), \
                runs.lock(tmp_path, patience=0.05):
            pass
    finally:
        process.kill()  # the kernel lets go: no stale lock
        process.communicate()
    assert not runs.held(tmp_path)
    with runs.lock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_gc_frees_old_runs_and_keeps_ledgers_reports_and_commits(tmp_path: Path) -> None:
    for day, name in enumerate(("first", "second", "third"), start=1):
        night = whole_night(tmp_path, name, day)
        fill(night.folder)
        for kept in ("report", "repo.git"):
            (night.folder / kept).mkdir()
            (night.folder / kept / "file").write_text("kept")
    ledgers = {name: (tmp_path / name / "ledger.jsonl").read_bytes() for name in ("first", "second", "third")}
    planned = runs.collect(tmp_path, keep=1, dry_run=True)
    assert [one.name for one in planned] == ["first", "second"]
    assert all(2.0 < one.megabytes < 2.5 for one in planned)
    assert (tmp_path / "first/jobs/one/blob").exists()
    assert [one.size for one in runs.collect(tmp_path, keep=1)] == [one.size for one in planned]
    for name in ("first", "second"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "ledger.jsonl", "lock", "repo.git", "report"]
    assert (tmp_path / "third/jobs/one/blob").exists()
    assert ledgers == {name: (tmp_path / name / "ledger.jsonl").read_bytes() for name in ledgers}
    assert all(one.size == 0 for one in runs.collect(tmp_path, keep=1))


def test_gc_leaves_a_run_in_use_and_what_links_point_to(tmp_path: Path) -> None:
    busy, linked = Night(tmp_path / "runs", "busy", day=1), Night(tmp_path / "runs", "linked", day=2)
    fill(busy.folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (linked.folder / "jobs").symlink_to(outside)
    (linked.folder / "source").mkdir()
    (linked.folder / "source/link").symlink_to(outside)
    process = holder(busy.folder)
    try:
        freed = {one.name: one for one in runs.collect(tmp_path / "runs", keep=0)}
    finally:
        process.communicate("\n")
    assert freed["busy"].in_use and (busy.folder / "jobs/one/blob").exists()
    assert not (linked.folder / "source").exists()
    assert (outside / "precious").read_text() == "x"
