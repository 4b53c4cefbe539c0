"""The ledger: torn and damaged lines, replay, a writer that is killed, a disk that is full."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.errors import UserError
from agent.ledger import Ledger, events, replay
from tests.night import whole_night

ROOT = Path(__file__).resolve().parents[1]
WRITER = """
import sys
from pathlib import Path
from agent.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for number in range(10**6):
    ledger.append("note", {"text": f"{number} " + "x" * 3000})
"""


def test_replay_gives_what_the_writer_had(tmp_path: Path) -> None:
    night = whole_night(tmp_path)
    state, count = replay(night.ledger.path)
    assert state == night.state and count == len(list(events(night.ledger.path)))
    numbers = [json.loads(line)["n"] for line in night.ledger.path.read_text().splitlines()]
    assert numbers == list(range(count))


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_is_cut_off_and_written_again(tmp_path: Path, cut: int) -> None:
    path = whole_night(tmp_path).ledger.path
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[:max(last, len(whole) - cut)])
    before = replay(path)
    assert before[1] == whole.count(b"\n") - 1 and before[0].phase != "finished"  # readers skip it, too
    ledger = Ledger(path)
    assert path.read_bytes() == whole[:last]
    ledger.append("finished", {})
    ledger.close()
    assert replay(path)[0].phase == "finished" and replay(path)[1] == whole.count(b"\n")


@pytest.mark.parametrize(("old", "new"), [
    (b'"event": "merge"', b'"event": merge'),
    (b'"outcome": "accepted"', b'"outcome": "acc?pted"'),
    (b'"proposal", "data": {"id"', b'"proposal", "data": {"di"'),
    (b'{"n": 5,', b'["n", 5,'),
])
def test_a_damaged_line_in_the_middle_is_the_users_to_mend(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = whole_night(tmp_path).ledger.path
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    number = data[:data.index(old)].count(b"\n") + 1
    for read in (replay, Ledger):
        with pytest.raises(UserError, match=rf"line {number} is damaged .*Restore the file from a backup"):
            read(path)


def test_a_writer_killed_at_any_moment_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    written = 0
    for pause in (0.0, 0.003, 0.01):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT)
        end = time.monotonic() + 20
        while (not path.exists() or path.stat().st_size <= written + 9000) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        state, count = replay(path)
        assert len(state.notes) == count > 2
        written = path.stat().st_size
    ledger = Ledger(path)
    ledger.append("note", {"text": "end"})
    assert replay(path) == (ledger.state, count + 1) and ledger.state.notes[-1] == "end"
    ledger.close()


def test_a_full_disk_leaves_whole_lines_and_names_the_mend(tmp_path: Path) -> None:
    program = (
        "import resource, sys\nfrom pathlib import Path\nfrom agent.errors import UserError\n"
        "from agent.ledger import Ledger, replay\n"
        "ledger = Ledger(Path(sys.argv[1]))\nledger.append('note', {'text': 'a'})\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))\n"
        "try:\n    ledger.append('note', {'text': 'b' * 900})\n"
        "except UserError as error:\n    print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\n"
        "ledger.append('note', {'text': 'c'})\nledger.close()\nprint(replay(Path(sys.argv[1]))[0].notes)\n")
    path = tmp_path / "ledger.jsonl"
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"Cannot write {path}: ") and "ratchet gc" in first and second == "['a', 'c']"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 500 and path.stat().st_size < 300
