"""A machine whose memory is full, by a real limit of the kernel: whatever it kills, nothing is lost or blamed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import tiny
from agent.doctor import run_folder
from agent.ledger import replay
from tests.test_campaign import check_sound, environment, merged_titles, patch_file

PLACES = ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max"))


class Crowd:
    """A control group: what enters it shares so much memory."""

    def __init__(self, folder: Path, file: str) -> None:
        self.folder, self._file = folder, folder / file

    def limit(self, mib: int) -> None:
        self._file.write_text(str(mib << 20))

    def join(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    for above, file in PLACES:
        folder = above / f"ratchet-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            if (folder / file).exists():
                yield Crowd(folder, file)
                for _ in range(100):  # a job of a killed controller may have a second to live
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                        return
                    time.sleep(0.1)
                raise AssertionError((folder / "cgroup.procs").read_text())
            folder.rmdir()
    pytest.skip("no control group with a limit of memory can be made here")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_that_is_full_at_any_stage_loses_nothing(tmp_path: Path, crowd: Crowd) -> None:
    tiny.write_tiny_target(tmp_path / "t")
    patch = patch_file(tmp_path, tmp_path / "t", "less smoothing")
    ends = Counter[str]()
    for mib in (40, 64, 72, 88, 104, 128, 160, 400):
        runs = tmp_path / f"runs{mib}"
        command = [sys.executable, "-m", "agent.cli", "try", str(patch), "--repo", "t", "--level", "0", "--unconfined",
                   "--slots", "1", "--runs", str(runs)]
        crowd.limit(mib)
        tight = subprocess.run(command, cwd=tmp_path, env=environment(), preexec_fn=crowd.join, capture_output=True,
                               text=True, timeout=200)
        crowd.limit(4096)
        assert "Traceback" not in tight.stderr or "MemoryError" in tight.stderr, (mib, tight.stderr)
        for path in runs.glob("*/ledger.jsonl"):
            assert run_folder.tally(path.parent).problems == (), mib
            verdicts = [one.verdict for one in replay(path)[0].attempts.values() if one.verdict]
            assert all(one.outcome != "rejected" for one in verdicts), (mib, verdicts)
        ends[f"{tight.returncode}"] += 1
        if tight.returncode or not any(replay(path)[0].merges for path in runs.glob("*/ledger.jsonl")):
            loose = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True,
                                   timeout=200)
            assert loose.returncode == 0, (mib, loose.stderr)
        merged = [title for path in runs.glob("*/ledger.jsonl") for title in merged_titles(check_sound(path.parent))]
        assert merged == ["less smoothing"], mib
    assert ends["0"] and ends["-9"], ends
