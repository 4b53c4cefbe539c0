"""One running box: started, watched against its limits, its log kept within bounds, and surely dead at the end.

The kernel ties ``die with parent`` to the *thread* that forked, so boxes are started from the supervisor's main
thread. The watch is another thread; it never waits for the job, the main thread never polls.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sandbox import box as boxes
from sandbox import cgroup, gpu, gpu_watch, process, view
from sandbox.job import Limits
from sandbox.view import BoxSpec

Reason = Literal["done", "stopped", "timeout", "memory", "log", "output", "processes", "watch", "device"]
TICK = 0.05
SAMPLE_EVERY, GLANCE_EVERY, DISK_EVERY, GPU_EVERY = 4, 10, 20, 40
"""Ticks between samples of clock and memory (0.2 s), progress (0.5 s), disk (1 s), GPU memory (2 s)."""
FLOOD = 16
"""A job that prints this many times its log limit is killed: reading its log costs the machine time."""
TAIL = 1 << 16
FILES = 200_000
"""Files that a box may have in memory: some 200 MiB of the kernel's."""
THREADS = 4
"""Threads granted for each process of the limit, since RLIMIT_NPROC counts threads."""
CONTROL = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")


class Log:
    """What a job printed: the first half of the limit as it comes, the last half at the end, control bytes gone."""

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._half = path, max(most // 2, TAIL)
        self._last = bytearray()
        self._written = 0
        self.received = 0
        path.write_bytes(b"")

    def read_all(self, descriptor: int) -> None:
        """Read until every writer is gone. A full disk costs the file, not the job, which would block on its pipe."""
        with self._path.open("ab", buffering=0) as file:
            while data := _read(descriptor):
                self.received += len(data)
                text = CONTROL.sub(b"", data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
                room = max(self._half - self._written, 0)
                with contextlib.suppress(OSError):
                    file.write(text[:room])
                self._written += len(text)
                self._last += text
                if len(self._last) > 2 * self._half:
                    del self._last[:-self._half]
            dropped = self._written - 2 * self._half
            rest = max(self._written - self._half, 0)
            with contextlib.suppress(OSError):
                if dropped > 0:
                    file.write(b"\n[... %d bytes left out ...]\n" % dropped)
                if rest:
                    file.write(bytes(self._last[-min(rest, self._half):]))

    def tail(self, most: int = TAIL) -> str:
        """The newest text, up to ``most`` bytes."""
        return bytes(self._last[-most:]).decode("utf-8", errors="replace")

    def text(self) -> str:
        """All that was kept."""
        return self._path.read_text(encoding="utf-8", errors="replace")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""


@dataclass(slots=True)
class RunningBox:
    """A started box. Call ``watch`` once, then ``close`` in any case."""

    spec: BoxSpec
    level: boxes.Level
    popen: subprocess.Popen[bytes]
    sock: socket.socket | None
    """The harness's end of the wire, if the job has one."""
    log: Log
    clock: process.TreeClock
    wall_seconds: float
    status: int
    """Where the wrapper reports whether the command was executed; -1 at level 0."""
    roots: set[int]
    """First processes of all boxes of this supervisor, for which Popen waits."""
    group: cgroup.Cgroup | None = None
    began: float = field(default_factory=time.monotonic)
    """Start of the box, or the moment when a waiting one was given its job (sandbox/warm.py)."""
    ahead: float = 0.0
    """Seconds that a waiting box took to get ready before it had a job."""
    cpu_ahead: float = 0.0
    """CPU seconds of the tree before it had a job."""
    ended: threading.Event = field(default_factory=threading.Event)
    reason: Reason | None = None
    """Why the harness killed it; None when it ended by itself."""
    peak_memory_mb: float = 0.0
    gpu_memory_mb: float = 0.0
    gpus: gpu_watch.Watch | None = None
    """The watch over the job's GPUs that this box looks after."""
    executed: bool = True
    """False when the box itself could not be set up."""
    trouble: str = ""
    """Why, where the launcher said so; else it is in the log."""
    seconds: float = 0.0
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def returncode(self) -> int:
        """Exit code; only after ``ended``."""
        return self.popen.returncode if self.popen.returncode is not None else -1

    def watch(self, glance: Callable[[], None]) -> None:
        """Begin reading the log and guarding the limits. ``glance`` is called about twice a second."""
        assert self.popen.stdout is not None
        self._threads = [
            threading.Thread(target=self.log.read_all, args=(self.popen.stdout.fileno(),), daemon=True),
            threading.Thread(target=self._guard, args=(glance,), daemon=True)]
        for thread in self._threads:
            thread.start()

    def kill(self, reason: Reason) -> None:
        """Kill the tree. The first reason given stays. Takes no lock, so a signal may interrupt with it."""
        if self.reason is None and not self.ended.is_set():
            self.reason = reason
        process.send_kill(self.clock.pids())
        if self.group is not None:
            self.group.kill()

    def finish(self, grace: float) -> None:
        """Let the job end by itself for ``grace`` seconds, then kill it; return when it is gone."""
        if not self.ended.wait(grace):
            self.kill("done")
            self.ended.wait()

    def close(self) -> None:
        """End everything: the tree, the threads, the socket, the box's folder."""
        self.kill("done")
        if not self._threads:
            self.popen.wait()
            self._remove_group()
            _close(self.status)
            self.status = -1
        if self.sock is not None:
            self.sock.close()
        for thread in reversed(self._threads):
            thread.join(15)
        if self.popen.stdout is not None and not any(thread.is_alive() for thread in self._threads):
            self.popen.stdout.close()
        shutil.rmtree(self.spec.folder, ignore_errors=True)

    def _guard(self, glance: Callable[[], None]) -> None:
        """The watch: guards the limits; when the command ends, or the watch itself fails, nothing stays behind."""
        failed = True
        try:
            self._watch_limits(glance)
            failed = False
        finally:
            if failed:
                self.kill("watch")
            self.popen.wait()
            self.seconds = time.monotonic() - self.began
            process.kill_all(self._survivors)
            process.reap(keep=self.roots)
            self._remove_group()
            self._read_status()
            self._threads[0].join(5)
            self.ended.set()

    def _remove_group(self) -> None:
        """The group goes with the box; that it ran out of memory is the reason of its end, whatever the job says."""
        if self.group is not None:
            if self.reason is None and self.group.out_of_memory():
                self.reason = "memory"
            self.group.remove()

    def _watch_limits(self, glance: Callable[[], None]) -> None:
        tick = 0
        while self.popen.poll() is None:
            if time.monotonic() - self.began > self.wall_seconds:
                self.kill("timeout")
            elif self.log.received > FLOOD * (self.spec.limits.log_mb << 20):
                self.kill("log")
            elif tick % SAMPLE_EVERY == 0:
                self._sample()
            if tick % DISK_EVERY == DISK_EVERY - 1 and (
                    self._disk_mb() > self.spec.limits.scratch_mb or self._files() > FILES):
                self.kill("output")
            if tick % GPU_EVERY == GPU_EVERY - 1:
                self._look_at_gpus()
            if tick % GLANCE_EVERY == 0:
                glance()
            tick += 1
            time.sleep(TICK)

    def _sample(self) -> None:
        self.clock.read()
        pids = self.clock.pids()
        used = process.memory_mb(pids)
        self.peak_memory_mb = max(self.peak_memory_mb, used)
        if len(pids) > self.spec.limits.processes:  # first: the shared pages of many small ones are counted often
            self.kill("processes")
        elif used > self.spec.limits.memory_mb or (self.group is not None and self.group.out_of_memory()):
            self.kill("memory")

    def _survivors(self) -> list[int]:
        """Processes of the box that outlived its command: in its tree, or orphans that came to the supervisor."""
        process.reap(keep=self.roots)
        inside = self.group.pids() if self.group is not None else []
        adopted = orphans(self.roots, _own_uid(self.spec, self.level))
        return list(dict.fromkeys([*process.descendants(self.popen.pid), *adopted, *inside]))

    def _disk_mb(self) -> float:
        """What the job has written on real disk: its output folder, and below level 2 its box folder."""
        folders = [self.spec.output] if self.spec.output is not None and self.spec.output_writable else []
        if self.level < boxes.Level.USER:
            folders.append(self.spec.folder)
        return sum(_folder_bytes(folder) for folder in folders) / 2**20

    def _files(self) -> int:
        """Files in the box's own file systems (levels 2 and 3), whose size does not count them: each costs the kernel
        about 1 KiB. Looked at through the newest process of the tree; 0 when that is just gone, or not inside yet:
        the box's own file systems are known by their size."""
        if self.level < boxes.Level.USER:
            return 0
        inside = next(iter(reversed(self.clock.pids())), 0)
        count = 0
        for place in ("/tmp", "/dev/shm", view.CACHES):
            with contextlib.suppress(OSError):
                found = os.statvfs(f"/proc/{inside}/root{place}")
                if found.f_blocks * found.f_frsize == self.spec.limits.scratch_mb << 20:
                    count += found.f_files - found.f_ffree
        return count

    def _look_at_gpus(self) -> None:
        """Through the job's watch, which also says whether they are fit to measure on; without NVML memory alone."""
        if self.gpus is not None:
            self.gpus.look()
            self.gpu_memory_mb = max(self.gpu_memory_mb, self.gpus.memory_mb)
            if self.gpus.complaint:
                self.kill("device")
        elif cards := gpu.cards(self.spec.device):
            self.gpu_memory_mb = max(self.gpu_memory_mb, sum(gpu.memory_reader(card)() for card in cards))

    def _read_status(self) -> None:
        """Whether the command was executed at all, by what the wrapper reported."""
        if self.status < 0:
            return
        text = b""
        os.set_blocking(self.status, False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.status, 4096):
                text += data
        os.close(self.status)
        said = boxes.trouble(self.level, text)
        self.executed = self.reason is not None or said is None
        self.trouble = said or ""


def orphans(roots: set[int], uid: int = -1) -> list[int]:
    """Processes that this one adopted from its boxes, with all below them; only those of ``uid`` if it is given.

    ``roots`` are the boxes' own first processes; helpers of this process (nvidia-smi) share its session, while every
    box is started in a new one. With two boxes below level 2 that share a user id an orphan cannot be told from the
    other box's: both lose it, and both are charged for it.
    """
    own = os.getsid(0)
    found: list[int] = []
    for pid in process.children(os.getpid()):
        with contextlib.suppress(OSError):
            if pid not in roots and os.getsid(pid) != own and uid in (-1, process.real_uid(pid)):
                found += [pid, *process.descendants(pid)]
    return found


def _own_uid(spec: BoxSpec, level: boxes.Level) -> int:
    """The user id that only this box's processes have, where its orphans must be told from another box's; else -1."""
    return spec.uid if level is boxes.Level.LANDLOCK and boxes.changes_uid(level) else -1


def start(spec: BoxSpec, level: boxes.Level, log: Path, wall_seconds: float, roots: set[int], *,
          wire: bool) -> RunningBox:
    """Start ``spec`` at ``level`` from the calling thread, which must outlive it. Raises OSError.

    ``roots``: first processes of all boxes of this process; the new one is added.
    """
    ours, theirs = socket.socketpair() if wire else (None, None)
    try:
        launch = boxes.command(_readable(spec, level), level, theirs.fileno() if theirs is not None else None)
        status, report = os.pipe() if launch.wrapper or launch.launcher else (-1, -1)
        group = _group(spec, level)
        try:
            with boxes.opened(launch, report) as (argv, fds):
                popen = subprocess.Popen(argv, env=launch.env, cwd=launch.cwd, stdin=subprocess.DEVNULL,
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                         pass_fds=[*fds, *([theirs.fileno()] if theirs is not None else [])],
                                         preexec_fn=_preparation(spec, level, group))
        except BaseException:
            _close(status)
            if group is not None:
                group.remove()
            raise
        finally:
            _close(report)
    except BaseException:
        if ours is not None:
            ours.close()
        raise
    finally:
        if theirs is not None:
            theirs.close()
    roots.add(popen.pid)
    adopted = functools.partial(orphans, roots, _own_uid(spec, level)) if level < boxes.Level.USER else tuple
    clock = process.TreeClock(popen.pid, adopted, group.cpu_seconds if group is not None else float)
    return RunningBox(spec, level, popen, ours, Log(log, spec.limits.log_mb << 20), clock, wall_seconds, status, roots,
                      group)


def _group(spec: BoxSpec, level: boxes.Level) -> cgroup.Cgroup | None:
    """The box's own group where one can be made. What bubblewrap itself needs is far below what rounding leaves."""
    if level is boxes.Level.PLAIN:
        return None
    limits = spec.limits
    return cgroup.create(cgroup.Limit((limits.memory_mb + limits.scratch_mb) << 20, THREADS * limits.processes))


def _preparation(spec: BoxSpec, level: boxes.Level, group: cgroup.Cgroup | None) -> Callable[[], None]:
    """What the new process does to itself before it becomes the wrapper."""
    limits = _rlimits(spec, level)

    def prepare() -> None:
        process.die_with_parent()
        if group is not None:
            group.enter()
        for kind, most in limits:
            resource.setrlimit(kind, (most, most))
        if spec.cpus:
            os.sched_setaffinity(0, spec.cpus)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")  # if memory runs out, the kernel should choose the job and not the agent

    return prepare


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)


def _rlimits(spec: BoxSpec, level: boxes.Level) -> list[tuple[int, int]]:
    """(resource, limit) pairs, none above this process's own hard limits. Never RLIMIT_AS: CUDA reserves far more.

    RLIMIT_NPROC counts threads of the user id everywhere: an id of the job's own has no others; else those that run
    already are added. It does not bind root, so the watch counts processes as well.
    """
    limits: Limits = spec.limits
    others = 0 if boxes.changes_uid(level) else process.threads_of_user(os.getuid())
    wanted = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 4096),
              (resource.RLIMIT_FSIZE, max(limits.scratch_mb, limits.weights_mb) << 20),
              (resource.RLIMIT_NPROC, THREADS * limits.processes + others)]
    result = []
    for kind, most in wanted:
        hard = resource.getrlimit(kind)[1]
        result.append((kind, most if hard == resource.RLIM_INFINITY else min(most, hard)))
    return result


def _readable(spec: BoxSpec, level: boxes.Level) -> BoxSpec:
    """Where the job has another user id, source that others may not read is copied, and output handed over."""
    if not boxes.changes_uid(level):
        return spec
    if spec.output is not None and spec.output_writable:
        os.chown(spec.output, spec.uid, spec.uid)
    closed = any(not os.path.islink(path) and os.stat(path).st_mode & need != need
                 for place, _, names in os.walk(spec.source)
                 for path, need in [(place, 0o005), *((os.path.join(place, name), 0o004) for name in names)])
    if not closed:
        return spec
    copy = spec.folder / "source"
    copy_for_others(spec.source, copy)
    return replace(spec, source=copy)


def copy_for_others(source: Path, copy: Path) -> None:
    """Copy ``source`` to the folder ``copy``, empty or not there yet, so that every user may read it. Raises OSError.
    """
    shutil.copytree(source, copy, symlinks=True, dirs_exist_ok=True)
    for place, _, names in os.walk(copy):
        os.chmod(place, 0o755)
        for name in names:
            path = Path(place, name)
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | 0o444)


def _folder_bytes(folder: Path) -> int:
    """Bytes on the disk; an empty file and a folder cost at least their inode."""
    total = 0
    for place, _, names in os.walk(folder):
        total += 4096
        for name in names:
            with contextlib.suppress(OSError):
                total += max(os.lstat(os.path.join(place, name)).st_blocks * 512, 1024)
    return total
