"""The process tree of a box seen from outside: its CPU clock, its memory, its end.

Everything is read from ``/proc`` of the supervisor's own PID namespace, where the processes of a nested namespace are
visible under their outer ids. Nothing here asks the job for anything. Linux only.
"""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
HEAVY_MB = 32.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of ``/proc/PID/stat`` that matter here; times in seconds, 10 ms apart on most kernels."""

    state: str
    parent: int
    cpu: float
    reaped: float
    """CPU seconds of children that it waited for, and of theirs."""
    start_ticks: int


def stat(pid: int) -> Stat | None:
    """The process's line, or None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    utime, stime, cutime, cstime = (int(value) / TICKS for value in fields[11:15])
    return Stat(fields[0], int(fields[1]), utime + stime, cutime + cstime, int(fields[19]))


def running(pid: int, start_ticks: int) -> bool:
    """Whether that very process still runs: a reused pid has another start time, a zombie has ended."""
    found = stat(pid)
    return found is not None and found.start_ticks == start_ticks and found.state not in "ZX"


class Handle:
    """The kernel's handle of a running process (pidfd_open(2), Linux 5.3 on): it is never another's, whatever becomes
    of the number, and tells of the end without a look into /proc."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._asked = select.poll()
        self._asked.register(descriptor, select.POLLIN)

    @property
    def ended(self) -> bool:
        """Whether it has ended, waited for or not."""
        return bool(self._asked.poll(0))

    def close(self) -> None:
        """Let go of it; the process is left alone."""
        os.close(self.descriptor)


def hold(pid: int, start_ticks: int) -> Handle | None:
    """A handle of that very process; None where it has ended, and where the kernel gives none."""
    try:
        handle = Handle(os.pidfd_open(pid))
    except (AttributeError, OSError):
        return None
    if running(pid, start_ticks):  # asked afterwards: the handle is of whoever had the number then
        return handle
    handle.close()
    return None


@functools.cache
def boot_id() -> str:
    """Another one each time that the machine is started: pids and start ticks begin anew then."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


def name_of(pid: int, found: Stat) -> str:
    """A process in words that no other process ever has: pid, start ticks, boot."""
    return f"{pid} {found.start_ticks} {boot_id()}"


def retitle(words: Sequence[str]) -> None:
    """Make these words this process's command line, as ``ps`` and ``/proc/PID/cmdline`` show it. What is longer than
    the one that the process was started with is cut.

    Written where the kernel put the arguments (``arg_start`` and ``arg_end``, proc(5)). Its last byte stays 0, by which
    the kernel knows that this is the whole of it.
    """
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    room = end - start - 1
    if start <= 0 or room <= 0:  # the kernel does not tell
        return
    line = b"\0".join(map(os.fsencode, words))[:room]
    ctypes.memset(start, 0, room + 1)
    ctypes.memmove(start, line, len(line))


def children(pid: int) -> list[int]:
    """Direct children of all threads of ``pid``, zombies included."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    found: list[int] = []
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += [int(word) for word in file.read().split()]
        except FileNotFoundError:
            if os.path.exists(f"/proc/{pid}/task/{thread}/stat"):
                return _children_by_parent(pid)
        except OSError:
            continue
    return found


def _children_by_parent(pid: int) -> list[int]:
    """The slow way, for kernels without CONFIG_PROC_CHILDREN."""
    numbers = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [number for number in numbers if (line := stat(number)) is not None and line.parent == pid]


def descendants(pid: int) -> Iterator[int]:
    """Everything below ``pid``, breadth first. A process that forks meanwhile may be missed: callers loop."""
    queue, seen = children(pid), {pid}
    while queue:
        number = queue.pop(0)
        if number not in seen:
            seen.add(number)
            yield number
            queue += children(number)


def process_cpu_seconds(pid: int) -> float:
    """CPU seconds of one process, ended threads included, to the nanosecond.

    ``/proc/PID/stat`` counts in ticks of 10 ms, a step may take 5. The process's CPU clock has the scheduler's own
    sum; its id is ``~pid << 3 | CPUCLOCK_SCHED`` (clock_getcpuclockid(3), linux/posix-timers.h). Raises OSError.
    """
    return time.clock_gettime((~pid << 3) | 2)


class TreeClock:
    """CPU seconds spent by a process tree so far: the charging clock on ``cpu``.

    The sum over live processes of their own CPU time and of that of the children they reaped. A job can hide reaped
    children (it ignores SIGCHLD, so nobody is credited), hence every process ever seen keeps its last reading, and
    the larger of the two sums counts. Never runs backwards. A process whose parent ignores SIGCHLD and that lives and
    dies between two readings (the watch reads every 0.2 s) is seen by ``counted`` alone: the box's control group,
    where there is one, counts all that ever ran in it.
    """

    def __init__(self, root: int, adopted: Callable[[], Iterable[int]] = tuple,
                 counted: Callable[[], float] = float) -> None:
        self._root, self._adopted, self._counted = root, adopted, counted
        first = stat(root)
        self._root_start = first.start_ticks if first is not None else -1
        self._seen: dict[tuple[int, int], float] = {}
        self._lock = threading.Lock()
        self._latest = 0.0

    def pids(self) -> list[int]:
        """The tree as it is now: the root, all below it, and adopted orphans with all below them."""
        first = stat(self._root)
        same = first is not None and first.start_ticks == self._root_start  # a reused pid is somebody else's
        tops = [*([self._root] if same else []), *self._adopted()]
        return list(dict.fromkeys(pid for top in tops for pid in (top, *descendants(top))))

    def read(self) -> float:
        """CPU seconds since the root began."""
        with self._lock:
            live = 0.0
            for pid in self.pids():
                line = stat(pid)
                if line is None:
                    continue
                try:
                    own = process_cpu_seconds(pid)
                except OSError:
                    own = line.cpu
                key = (pid, line.start_ticks)
                self._seen[key] = max(own, self._seen.get(key, 0.0))
                live += self._seen[key] + line.reaped
            self._latest = max(self._latest, live, sum(self._seen.values()), self._counted())
            return self._latest


def reaped_cpu_seconds() -> float:
    """CPU seconds of all ended children of this process and of theirs (getrusage RUSAGE_CHILDREN)."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def real_uid(pid: int) -> int:
    """Real user id; -1 when there is no such process. Not by the owner of ``/proc/PID``, which a job can change."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Uid:"))
    except (OSError, StopIteration):
        return -1


def threads_of_user(uid: int) -> int:
    """Threads of all processes of a real user id: what RLIMIT_NPROC counts."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == uid:
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue
    return count


def memory_mb(pids: Iterable[int]) -> float:
    """Memory of a tree in MiB: resident pages, shared ones counted once as soon as two processes are heavy."""
    resident = {pid: _resident_mb(pid) for pid in pids}
    if sum(size > HEAVY_MB for size in resident.values()) < 2:
        return sum(resident.values())
    return sum(_proportional_mb(pid, size) if size > HEAVY_MB else size for pid, size in resident.items())


def _resident_mb(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE / 2**20
    except (OSError, IndexError):
        return 0.0


def _proportional_mb(pid: int, otherwise: float) -> float:
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return otherwise


def send_kill(pids: Iterable[int]) -> int:
    """SIGKILL each; how many were still there and not yet zombies."""
    count = 0
    for pid in pids:
        line = stat(pid)
        if line is None or line.state in "ZX":
            continue
        try:
            os.kill(pid, signal.SIGKILL)
            count += 1
        except (ProcessLookupError, PermissionError):
            continue
    return count


def kill_all(pids: Callable[[], Iterable[int]], patience: float = 10.0) -> bool:
    """Kill what ``pids`` names again and again until it names nothing alive; False when ``patience`` ran out.

    The loop is what catches a tree that forks while it is being killed.
    """
    deadline = time.monotonic() + patience
    while send_kill(pids()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def reap(keep: set[int]) -> None:
    """Collect ended children of this process that it adopted, except the ids in ``keep``, which others wait for."""
    for pid in children(os.getpid()):
        line = stat(pid)
        if pid not in keep and line is not None and line.state == "Z":
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue


def become_subreaper(adopt: bool = True) -> None:
    """Let orphans below this process become its children instead of init's, so that none is lost from sight; or no
    longer."""
    _prctl(PR_SET_CHILD_SUBREAPER, int(adopt))


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends. Call between fork and exec."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
