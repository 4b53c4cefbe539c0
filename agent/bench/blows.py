"""Blows that benches deal to a campaign: a run's supervisor, a process of a run, a command of git."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

from sandbox import process

_SHIM = """#!/bin/sh
# Ends one git, once in a while: while a file "kill" is there, the next command dies after that many seconds.
if mv {folder}/kill {folder}/kill.$$ 2>/dev/null; then
    after=$(cat {folder}/kill.$$)
    exec 3<&0  # a shell gives what it starts in the background an empty input, also under the name 0
    {git} "$@" <&3 3<&- &
    [ "$after" = 0.000 ] || sleep "$after"
    kill -9 $! 2>/dev/null && : > {folder}/killed
    wait $!
    exit $?
fi
exec {git} "$@"
"""


def add_shim(folder: Path) -> Path:
    """A folder for the front of a PATH: its git can be asked to die."""
    folder.mkdir(parents=True)
    (folder / "git").write_text(_SHIM.format(folder=folder, git=shutil.which("git")), encoding="utf-8")
    (folder / "git").chmod(0o755)
    return folder


def ask_git(shims: Path, chance: random.Random) -> None:
    """The next git of ``add_shim``'s folder dies within milliseconds, unless it ends first: most take three. It leaves
    a file ``killed`` there."""
    (shims / "kill").write_text(f"0.{chance.choice((0, 0, 1, 2, 4)):03d}", encoding="ascii")


def strike_run(kind: str, jobs: Path, struck: set[str], chance: random.Random) -> bool:
    """Kill the ``supervisor`` or a process (``job``) of the newest run that is on; False: there is none.

    A run is struck once at most: what the machine fails three times is given up by design.
    """
    for place in sorted(jobs.glob("*/supervisor.pid"), key=lambda path: -_changed(path)):
        stem = place.parent.name.partition(".")[0]
        pid = _pid(place)
        if not pid or stem in struck or place.parent.name.startswith(".") or (place.parent / "result.json").exists():
            continue
        targets = [pid] if kind == "supervisor" else list(process.descendants(pid))
        if targets and process.send_kill([chance.choice(targets)]):
            struck.add(stem)
            return True
    return False


def _pid(path: Path) -> int:
    """Pid of a supervisor by its file; 0 where it is gone or not whole."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(path.read_text(encoding="ascii").split()[0])
    return 0


def _changed(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
