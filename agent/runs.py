"""The runs folder: one folder a campaign, its name, its lock, and what may be freed.

``runs/<name>/`` holds ledger.jsonl (decisions), repo.git (code), jobs/ and source/ (raw output and checked-out
trees, which can be freed) and report/ (a view). A campaign holds the flock on ``lock`` for as long as it lives: the
kernel lets go of it however the process ends, so a lock can never be stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.errors import UserError
from agent.ledger import Clock

LEDGER, LOCK = "ledger.jsonl", "lock"
FREED = ("jobs", "source")
"""What ``free`` removes. Ledger, report and repo.git stay: they are the memory and the result."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Freed:
    """One run's answer to gc: bytes on disk that were (or, in a dry run, would be) freed."""

    name: str
    size: int
    in_use: bool = False

    @property
    def megabytes(self) -> float:
        return self.size / 1e6


def new_name(existing: Collection[str], clock: Clock) -> str:
    """Today's date, with -2, -3, ... when that is taken."""
    day = clock().date().isoformat()
    number, name = 1, day
    while name in existing:
        number += 1
        name = f"{day}-{number}"
    return name


def check_name(name: str) -> str:
    """``name`` if it can be a folder's name here. Raises UserError otherwise, so that no name leaves the folder."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot be the name of a run.",
                        "Use letters, digits, '.', '_' and '-', beginning with a letter or a digit.")
    return name


def names(runs: Path) -> list[str]:
    """Every run with at least one event, the one worked on last at the end."""
    if not runs.is_dir():
        return []
    dated = [(_last_time(folder / LEDGER), folder.name) for folder in runs.iterdir() if (folder / LEDGER).is_file()]
    return [name for when, name in sorted(dated) if when]


def newest(runs: Path) -> str | None:
    """The run that was worked on last, or None."""
    known = names(runs)
    return known[-1] if known else None


def resolve(runs: Path, name: str = "") -> Path:
    """Folder of run ``name``, or of the newest one. Raises UserError when there is none."""
    known = names(runs)
    if not known:
        raise UserError(f"There is no run in {runs}/ yet.", "Start one with `ratchet run`, or point --runs elsewhere.")
    if not name:
        return runs / known[-1]
    if check_name(name) not in known:
        shown = ", ".join(known[-6:])
        raise UserError(f"There is no run {name!r} in {runs}/.", f"Known runs: {shown}.")
    return runs / name


@contextlib.contextmanager
def lock(folder: Path, patience: float = 0.5) -> Iterator[None]:
    """Hold ``folder`` for this process. Raises UserError when another process holds it.

    ``patience`` (seconds) covers a reader that looks at the lock (``held``) at the same moment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _acquire(file, patience):
            holder = os.pread(file, 32, 0).decode("ascii", "replace").strip()
            by = f" (process {holder})" if holder.isdigit() else ""
            raise UserError(f"Run {folder.name} is in use by another ratchet{by}.",
                            "Wait until it ends, stop it with Ctrl-C, or start another run with --name.")
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(file)


def held(folder: Path) -> bool:
    """Whether a living process works on the run at this moment."""
    try:
        file = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(file)


def collect(runs: Path, keep: int, dry_run: bool = False) -> list[Freed]:
    """Free ``FREED`` of all but the ``keep`` runs worked on last; a run in use is left alone. Oldest first."""
    known = names(runs)
    return [_free(runs / name, dry_run) for name in known[: max(0, len(known) - keep)]]


def _free(folder: Path, dry_run: bool) -> Freed:
    size = sum(disk_size(folder / part) for part in FREED)
    if held(folder):
        return Freed(folder.name, size, in_use=True)
    if size and not dry_run:
        with lock(folder):
            for part in FREED:
                _remove(folder / part)
    return Freed(folder.name, size)


def disk_size(folder: Path) -> int:
    """Bytes that ``folder`` takes on disk; hard-linked files count once, links are not followed."""
    total, linked = 0, set()
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                info = os.lstat(f"{where}/{name}")  # no Path: a run has tens of thousands of files
                if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
                    if (info.st_dev, info.st_ino) in linked:
                        continue
                    linked.add((info.st_dev, info.st_ino))
                total += info.st_blocks * 512
    return total


def _remove(folder: Path) -> None:
    """Remove a tree that a job may have written: it can hold folders without permissions. Links are not followed."""
    if folder.is_symlink() or not folder.is_dir():
        return
    try:
        folder.chmod(stat.S_IRWXU)
        for where, folders, _ in os.walk(folder):
            for inner in (Path(where) / name for name in folders):
                if not inner.is_symlink():
                    inner.chmod(stat.S_IRWXU)
        shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"Cannot remove {error.filename}: {error.strerror}.",
                        "It may belong to another user: run the same command as that user.") from error


def _acquire(file: int, patience: float) -> bool:
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        else:
            return True


def _last_time(path: Path) -> str:
    """Time of the last whole event of a ledger, read from its end; empty when there is none."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
        found = _time_of(tail)
        if not found and size > _TAIL_BYTES:  # one event larger than the tail
            file.seek(0)
            found = _time_of(file.read())
    return found


def _time_of(tail: bytes) -> str:
    """``t`` of the last line of ``tail`` that is whole and an event of a night. A promotion is none: it must not make
    an old run the one that the next night goes on from."""
    for line in reversed(tail[: tail.rfind(b"\n") + 1].splitlines()):
        try:
            entry = json.loads(line)
            if entry["event"] != "promotion":
                return str(entry["t"])
        except (ValueError, KeyError, TypeError):
            continue
    return ""
