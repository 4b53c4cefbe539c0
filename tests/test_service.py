"""The printed units, read by systemd itself where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from agent import service
from agent.errors import UserError


def written(folder: Path, repo: Path) -> list[Path]:
    text = "\n".join(service.units(repo, folder / "runs", "22:00", "07:00"))
    unit, timer = text.split("# ~/.config/systemd/user/ratchet.timer\n")
    paths = [folder / "ratchet.service", folder / "ratchet.timer"]
    for path, part in zip(paths, (unit, timer), strict=True):
        path.write_text(part)
    return paths


@pytest.mark.parametrize("name", ["plain", 'a "b" 100% $HOME'])
def test_systemd_accepts_the_units_and_reads_the_command_as_it_was_meant(tmp_path: Path, name: str) -> None:
    paths = written(tmp_path, tmp_path / name)
    text = paths[0].read_text()
    command = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    assert "--until 07:00" in command
    if name != "plain":
        assert '"' + str(tmp_path) + r'/a \"b\" 100%% $$HOME"' in command
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    done = subprocess.run(["systemd-analyze", "verify", *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "ratchet" not in done.stderr, done.stderr


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--at 'late'"):
        list(service.units(None, tmp_path, "late", "07:00"))
