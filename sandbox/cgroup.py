"""A control group a box, where root can make one: memory and processes capped by the kernel instead of polled.

Version 2 is used where an ancestor of this process hands the controllers ``memory`` and ``pids`` on to its children;
else version 1 where both hierarchies are mounted and writable (and ``cpuacct``, where it is too); else there is none
and the supervisor's polling is all.
A box's memory there is that of its processes and of the files in its sized file systems, so the cap is the sum of both
limits; the polled limit on its processes alone holds besides.

A group is removed with its box. One whose supervisor was killed is removed, and what runs in it killed, by the next
supervisor on the machine: its name holds the PID namespace, pid and start time of the one who made it.

Does not cover: memory on a GPU, ordinary users with a delegated group, and hierarchies that are mounted read-only, as
in most containers.
"""

from __future__ import annotations

import functools
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sandbox import process

PREFIX = "ratchet-"


@dataclass(frozen=True, slots=True)
class Limit:
    """Caps of one group: bytes of memory, and tasks (threads count)."""

    memory: int
    tasks: int


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One box's group: one folder (version 2), or one in each hierarchy (version 1)."""

    folders: tuple[Path, ...]

    def enter(self) -> None:
        """Move the calling process in; its children are born there. Raises OSError."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text("0", encoding="ascii")

    def pids(self) -> list[int]:
        """Everything that runs in it."""
        found: list[int] = []
        for folder in self.folders:
            with suppress(OSError):
                found += map(int, (folder / "cgroup.procs").read_text(encoding="ascii").split())
        return [pid for pid in dict.fromkeys(found) if pid > 0]  # 0: of another PID namespace

    def kill(self) -> None:
        """SIGKILL all that is in it: at once where the kernel knows how (5.14), else one by one; callers loop."""
        try:
            _write(self.folders[0] / "cgroup.kill", "1")
        except OSError:
            process.send_kill(self.pids())

    def out_of_memory(self) -> bool:
        """Whether the kernel killed a process in it for reaching the cap."""
        for folder in self.folders:
            for name in ("memory.events", "memory.oom_control"):
                with suppress(OSError):
                    words = (folder / name).read_text(encoding="ascii").split()
                    return dict(zip(words[::2], words[1::2], strict=False)).get("oom_kill", "0") != "0"
        return False

    def cpu_seconds(self) -> float:
        """CPU seconds of all that ever ran in it, also of what nobody waited for; 0 where no controller counts."""
        for folder in self.folders:
            with suppress(OSError):
                return int((folder / "cpuacct.usage").read_text(encoding="ascii")) / 1e9
            with suppress(OSError):
                words = (folder / "cpu.stat").read_text(encoding="ascii").split()
                if "usage_usec" in words:
                    return int(words[words.index("usage_usec") + 1]) / 1e6
        return 0.0

    def remove(self, patience: float = 2.0) -> bool:
        """Remove it; what still runs in it is killed. False when it would not go within ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while left := [folder for folder in self.folders if not _rmdir(folder)]:
            if time.monotonic() > deadline:
                return False
            Cgroup(tuple(left)).kill()
            time.sleep(0.005)
        return True


def create(limit: Limit, parents: tuple[Path, ...] | None = None) -> Cgroup | None:
    """A new group below ``parents`` (found if left out), or None where there can be none."""
    parents = available() if parents is None else parents
    if not parents:
        return None
    made = Cgroup(tuple(parent / f"{_own_name()}-{secrets.token_hex(4)}" for parent in parents))
    try:
        for folder in made.folders:
            folder.mkdir()
            _limit(folder, limit)
    except OSError:
        made.remove()
        return None
    return made


def _limit(folder: Path, limit: Limit) -> None:
    """Write the caps that the folder's controllers know. Raises OSError. Swap is none where it is counted."""
    if (folder / "memory.max").exists():
        _write(folder / "memory.max", str(limit.memory))
        with suppress(OSError):
            _write(folder / "memory.swap.max", "0")
        _write(folder / "memory.oom.group", "1")
    elif (folder / "memory.limit_in_bytes").exists():
        _write(folder / "memory.limit_in_bytes", str(limit.memory))
        with suppress(OSError):  # memory and swap together, where swap is accounted
            _write(folder / "memory.memsw.limit_in_bytes", str(limit.memory))
    if (folder / "pids.max").exists():
        _write(folder / "pids.max", str(limit.tasks))


@functools.cache
def available() -> tuple[Path, ...]:
    """Folders in which groups can be made: one, or one a hierarchy; empty: none. Sweeps what dead supervisors left."""
    if os.geteuid() != 0:
        return ()
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts, open("/proc/self/cgroup", encoding="utf-8") as own:
        found = parents(mounts.read(), own.read())
    sweep(found)
    probe = create(Limit(1 << 30, 1 << 10), found)
    if probe is None:
        return ()
    probe.remove()
    return found


def parents(mountinfo: str, own: str) -> tuple[Path, ...]:
    """Where this process could make groups, by its mounts and its own groups (proc_pid_mountinfo(5), cgroups(7))."""
    groups = {name: path for line in own.splitlines() for _, names, path in [line.split(":", 2)]
              for name in names.split(",")}
    hierarchies: dict[str, Path] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        root, place = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        names = [""] if kind == "cgroup2" else options.split()[-1].split(",") if kind == "cgroup" else []
        for name in names:
            if name in groups:
                inside = groups[name].removeprefix(root.rstrip("/")) if root != "/" else groups[name]
                hierarchies.setdefault(name, Path(place) / inside.lstrip("/"))
    if "" in hierarchies:
        for folder in _upwards(hierarchies[""]):
            with suppress(OSError):
                if {"memory", "pids"} <= set((folder / "cgroup.subtree_control").read_text("ascii").split()):
                    return (folder,) if os.access(folder, os.W_OK) else ()
    if "memory" in hierarchies and "pids" in hierarchies:
        counted = hierarchies.get("cpuacct")
        more = [counted] if counted is not None and os.access(counted, os.W_OK) else []
        return tuple(dict.fromkeys([hierarchies["memory"], hierarchies["pids"], *more]))
    return ()


def _upwards(folder: Path) -> Iterator[Path]:
    """``folder`` and those above it within the file system of groups."""
    while (folder / "cgroup.procs").exists():
        yield folder
        folder = folder.parent


def sweep(places: tuple[Path, ...]) -> None:
    """Remove the groups of supervisors that are gone, and kill what runs in them."""
    mine = _own_name().rsplit("-", 2)[0]
    for parent in places:
        for folder in parent.glob(f"{mine}-*"):
            pid, ticks = folder.name.split("-")[2:4]
            if not process.running(int(pid), int(ticks)):
                Cgroup((folder,)).remove()


def _own_name() -> str:
    """``ratchet-<PID namespace>-<pid>-<start ticks>``: names a process of the machine for as long as it runs."""
    stat = process.stat(os.getpid())
    return f"{PREFIX}{os.stat('/proc/self/ns/pid').st_ino}-{os.getpid()}-{stat.start_ticks if stat else 0}"


def _rmdir(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _write(path: Path, text: str) -> None:
    """Without creating the file: one that is not there is a feature that the kernel lacks. Raises OSError."""
    with open(os.open(path, os.O_WRONLY), "w", encoding="ascii") as file:
        file.write(text)
