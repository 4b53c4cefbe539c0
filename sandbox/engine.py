"""Jobs from the agent's side: start a supervisor for a job folder, look at it, stop it.

State lives in the folder, so an agent that was restarted sees the same jobs. A supervisor outlives its agent.
``Engine`` is what the agent knows; here is the one for this machine. engine_ray.py and engine_slurm.py are for others,
and tests/test_engines.py asks the same of all three.

Supervisors are forked from one process that has imported what they need (forkserver.py). Once a job trains that says
what may be warm (``Job.warm``), a supervisor waits for the next of its kind on its device, with its boxes made
(warm.py). It is told of its job through a pipe, and ends when the pipe does, so it never outlives the agent. When it is
gone, late or made for other jobs, the next job simply starts cold.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Protocol

from sandbox import process, warm
from sandbox.forkserver import ForkServer
from sandbox.job import RESULT, Job, Progress, Result, read_progress, read_result, write_atomically, write_job

PASSED_ON = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "LANG")
"""The only variables of the agent's environment that a supervisor gets; a job gets none of them."""


AHEAD = ".ahead-"
"""Beginning of the names of folders in which boxes wait, beside the job folders; then the agent's pid and a number."""
SIGNING = 10.0
"""Seconds in which a started supervisor has noted whose the folder is, though its agent was killed before."""
PARTING = 10.0
"""Seconds for a waiting supervisor to end by itself."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A supervisor that waits for a job, and what its boxes are made from."""

    name: str
    """As in ``process.name_of``; empty: it has ended, or nobody knows."""
    pipe: BinaryIO
    """Its standard input."""
    folder: Path
    key: tuple[object, ...]

    @property
    def lives(self) -> bool:
        return _runs(self.name)


class EngineError(OSError):
    """An engine cannot work as it is set up: what is wrong, and what the user can do about it."""

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(f"{problem} {mend}")
        self.problem, self.mend = problem, mend


POLLS = 160
"""Looks at job folders a second, over all jobs: one is looked at 20 times a second, 64 every 0.4 s."""


class Engine(Protocol):
    """Runs jobs, each in a folder of its own. Every method returns at once but for ``start``, ``stop`` and ``rest``.

    Another object of the same kind, also in a later process, takes a job over by its folder alone: ``poll`` it. The
    promises: a result appears whole or not at all, with all that belongs to it in place before; a job that the machine
    lost has the fault ``infra``; once ``poll`` has given a result for a folder it gives no other; after ``stop`` no
    process of the job is left.
    """

    def start(self, folder: Path, job: Job) -> None:
        """Write ``job`` into ``folder`` and have it run.

        Raises FileExistsError when the folder has a result, EngineError for what the user must mend, OSError else.
        """

    def poll(self, folder: Path) -> Result | None:
        """The result; None while the job waits or runs; fault ``infra`` when it was lost."""

    def progress(self, folder: Path) -> Progress | None:
        """The newest glance at a running job, None before the first."""

    def stop(self, folder: Path, patience: float = 15.0) -> None:
        """End the job with its whole process tree; by force after ``patience`` seconds. Of an ended job: nothing."""

    def rest(self, folders: Sequence[Path], seconds: float) -> None:
        """Wait until one of these jobs may have ended: for ``seconds`` at most, and less where nothing tells of an end
        (``pause``)."""

    def close(self) -> None:
        """Give back what is held on other machines. Jobs that still run may end with it."""


class Cluster(Engine, Protocol):
    """An engine for other machines: what is there is asked before a campaign."""

    @property
    def gpus(self) -> int:
        """GPUs that jobs could get."""

    def reserve(self, gpu: bool, threads: int, slots: int | None, highest: int) -> tuple[str, ...]:
        """The device of each slot, at most ``slots``: all of one kind, so that their runs may be compared.

        ``threads``: CPU threads of a job; ``highest``: isolation level to probe for. Raises EngineError when there is
        none.
        """

    @property
    def level(self) -> int | None:
        """The lowest isolation level of the reserved slots; None: known only when a job runs."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the reserved slots, one line each."""


def pause(jobs: int, seconds: float) -> None:
    """Wait until it is time to look at as many jobs again, ``seconds`` at most."""
    time.sleep(max(0.0, min(seconds, max(0.05, jobs / POLLS))))


def settle(folder: Path, result: Result) -> Result:
    """Make ``result`` the one of ``folder``, unless it has one already: that one counts then. Returns what counts."""
    known = read_result(folder)
    if known is not None:
        return known
    write_atomically(folder / "result.json", RESULT.dump_json(result, indent=1))
    return result


class LocalEngine:
    """Runs jobs on this machine, each under a detached supervisor of its own.

    ``lifeline``: read end of a pipe; when its write end is closed, the supervisors stop their jobs. With one, jobs
    start cold: what waits would have to be told of it.
    """

    def __init__(self, lifeline: int | None = None) -> None:
        self._server = ForkServer(environment())
        self._lifeline = lifeline
        self._waiting: dict[str, Waiting] = {}
        """By device: one is enough, since the next begins as soon as a job trains."""
        self._next: dict[Path, Job] = {}
        """Running jobs that are still starting, for whose likes a supervisor should wait once they train."""
        self._taken: set[Path] = set()
        """Jobs handed to a supervisor that waited: if it was dying just then, they start cold."""
        self._held: dict[Path, process.Handle] = {}
        """Supervisors that were seen to run, where the kernel gives handles."""
        self._numbers = itertools.count()

    def start(self, folder: Path, job: Job) -> None:
        """Write ``job`` into ``folder`` and start its supervisor. Raises OSError when that cannot be done.

        A folder is for one job: raises FileExistsError when it has a result already, EngineError where no process can
        be started.
        """
        folder = folder.absolute()
        if (folder / "result.json").exists():
            raise FileExistsError(f"{folder} already has a result")
        write_job(folder, job)
        self._launch(folder, job)
        if warm.key(job) is not None and self._lifeline is None:
            self._next[folder] = job

    def _launch(self, folder: Path, job: Job | None) -> None:
        """A supervisor for the folder: one that waits for such a ``job``, else a new one."""
        self._let_go(folder)
        with (folder / "supervisor.log").open("ab") as log, _uninterrupted():
            name = self._handed_over(folder, job) if job is not None and self._lifeline is None else None
            if name is not None:
                self._taken.add(folder)
            else:
                try:
                    with open(os.devnull, "rb") as nothing:
                        name = self._server.fork([str(folder.resolve())], nothing.fileno(), log.fileno(),
                                                 self._lifeline)
                except OSError as error:
                    raise EngineError(f"No supervisor can be started: {error}.",
                                      f"Read {folder / 'supervisor.log'}; `ratchet doctor` tells more.") from error
            _sign(folder, name)

    def close(self) -> None:
        """End what waits for a job that will not come. Jobs are left alone."""
        self._next.clear()
        for folder in list(self._held):
            self._let_go(folder)
        for device in list(self._waiting):
            self._dismiss(device)
        self._server.close()

    def prepare(self, jobs: Path, job: Job) -> None:
        """Let a supervisor wait for a job like ``job`` on its device, with its files in the folder ``jobs``, unless one
        does. A machine that cannot is no error."""
        key = warm.key(job)
        known = self._waiting.get(job.device)
        if key is None or (known is not None and known.key == key and known.lives):
            return
        self._dismiss(job.device)
        _sweep(jobs)
        folder = jobs / f"{AHEAD}{os.getpid()}-{next(self._numbers)}"
        with contextlib.suppress(OSError):
            write_job(folder, replace(job, rival=(), stop_at=0))
            with (folder / "supervisor.log").open("ab") as log, _uninterrupted():
                inner, outer = os.pipe()
                pipe = os.fdopen(outer, "wb")
                try:
                    name = self._server.fork(["--ahead", str(folder.resolve())], inner, log.fileno())
                except OSError:
                    pipe.close()
                    raise
                finally:
                    os.close(inner)
                self._waiting[job.device] = Waiting(name or "", pipe, folder, key)
                _sign(folder, name)

    def ready(self, device: str) -> dict[str, Any] | None:
        """What the boxes that wait on ``device`` took and hold, once all are ready: ``boxes`` their number, of each its
        wall ``ready_seconds`` and ``cpu_seconds``, and ``memory_mb`` of all, shared pages counted once."""
        waiting = self._waiting.get(device)
        try:
            told: dict[str, Any] | None = json.loads((waiting.folder / warm.READY).read_bytes()) if waiting else None
        except FileNotFoundError:
            return None
        return told

    def _handed_over(self, folder: Path, job: Job) -> str | None:
        """Name of the waiting supervisor that took the job, or None."""
        waiting = self._waiting.get(job.device)
        if waiting is None or waiting.key != warm.key(job):
            return None
        del self._waiting[job.device]
        with contextlib.suppress(OSError), waiting.pipe as pipe:
            if waiting.lives:
                pipe.write(f"{folder.resolve()}\n".encode())
                pipe.flush()
                return waiting.name
        shutil.rmtree(waiting.folder, ignore_errors=True)
        return None

    def _dismiss(self, device: str) -> None:
        waiting = self._waiting.pop(device, None)
        if waiting is None:
            return
        with contextlib.suppress(OSError):
            waiting.pipe.close()
        deadline = time.monotonic() + PARTING
        while waiting.lives:
            if time.monotonic() > deadline:
                process.send_kill([int(waiting.name.split()[0])])  # its boxes die with it
            time.sleep(0.005)
        shutil.rmtree(waiting.folder, ignore_errors=True)

    def _think_ahead(self, folder: Path, ended: bool) -> None:
        """Once the job trains: its start-up should not share the processor with the next one's."""
        job = self._next.get(folder)
        if job is None:
            return
        glance = None if ended else read_progress(folder)
        if ended or (glance is not None and glance.phase != "start"):
            del self._next[folder]
            self.prepare(folder.parent, job)

    def poll(self, folder: Path) -> Result | None:
        """The result; None while the job runs; fault ``infra`` when its supervisor is gone without one."""
        folder = folder.absolute()
        alive = self.alive(folder)  # first: a supervisor that ends between the two looks has written its result
        if alive and folder in self._held:  # its end will be told
            self._think_ahead(folder, False)
            return None
        result = read_result(folder)
        self._think_ahead(folder, result is not None or not alive)
        if result is None and not alive and folder in self._taken and not (folder / "progress.json").exists():
            self._taken.discard(folder)
            try:
                self._launch(folder, None)
            except EngineError as error:
                return Result(folder.name, "infra", error.problem)
            return None
        if result is None and not (folder / "supervisor.pid").exists():
            # its agent died between noting and starting it, which is a stop and no failure of the machine
            return None if _starting(folder) else read_result(folder) or Result(folder.name, "infra", "stopped")
        if result is None and not alive:
            return Result(folder.name, "infra", "lost: the supervisor ended without a result "
                                                f"({last_line(folder / 'supervisor.log')})")
        return result

    def progress(self, folder: Path) -> Progress | None:
        """The newest glance, as the supervisor wrote it."""
        return read_progress(folder)

    def alive(self, folder: Path) -> bool:
        """Whether the folder's supervisor runs."""
        folder = folder.absolute()
        handle = self._held.get(folder)
        if handle is not None and not handle.ended:
            return True
        self._let_go(folder)
        found = _identity(folder)
        if found is None or not process.running(*found):
            return False
        handle = process.hold(*found)
        if handle is not None:
            self._held[folder] = handle
        return True

    def rest(self, folders: Sequence[Path], seconds: float) -> None:
        """As every engine: where all have handles, an end is told at once."""
        held = [self._held.get(folder.absolute()) for folder in folders]
        if self._next or not held or None in held:  # a job that is still starting is looked at: see _think_ahead
            pause(len(folders), seconds)
            return
        told = select.poll()
        for handle in held:
            if handle is not None:
                told.register(handle.descriptor, select.POLLIN)
        told.poll(max(0.0, seconds) * 1000)

    def _let_go(self, folder: Path) -> None:
        if (handle := self._held.pop(folder, None)) is not None:
            handle.close()

    def stop(self, folder: Path, patience: float = 15.0) -> None:
        """End the job: its supervisor kills the tree and writes a result; after ``patience`` seconds kill that too."""
        self._taken.discard(folder.absolute())
        self._next.pop(folder.absolute(), None)  # one that is stopped says nothing of what comes next
        deadline = time.monotonic() + patience
        while (found := _identity(folder)) is None and _starting(folder) and not (folder / "result.json").exists() and (
                time.monotonic() < deadline):
            time.sleep(0.02)  # it may have been started, and not signed yet
        if found is None or not self.alive(folder):
            return
        with contextlib.suppress(ProcessLookupError):  # it may end at any moment by itself
            os.kill(found[0], signal.SIGTERM)
            while self.alive(folder):
                if time.monotonic() > deadline:
                    os.kill(found[0], signal.SIGKILL)
                time.sleep(0.02)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and its like. One that came between a fork and the note of its pid would leave a supervisor
    that nobody knows of and so nobody stops.

    Only handlers written in Python raise in the middle of a call; what is ignored or fatal is left as it is, since a
    program that is executed meanwhile inherits it.
    """
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
               if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(number))]
    before = {number: signal.signal(number, hold) for number in numbers}
    try:
        yield
    finally:
        for restored, handler in before.items():
            signal.signal(restored, handler)
        for caught in held:
            signal.raise_signal(caught)


def _sign(folder: Path, name: str | None) -> None:
    """Note in the folder whose it is. A supervisor does so too: without a name here it has, or has ended."""
    if name:
        write_atomically(folder / "supervisor.pid", name.encode())


def _runs(name: str) -> bool:
    """Whether the process of this name runs; it is one of since the machine was started."""
    numbers = name.split()[:2]
    return len(numbers) == 2 and process.running(int(numbers[0]), int(numbers[1]))


def _sweep(jobs: Path) -> None:
    """Remove the folders of waiting supervisors that were killed, and whose agent is gone."""
    for folder in jobs.glob(f"{AHEAD}*-*"):
        found, agent = _identity(folder), folder.name.removeprefix(AHEAD).partition("-")[0]
        if not (agent.isdigit() and process.stat(int(agent))) and not (found and process.running(*found)):
            shutil.rmtree(folder, ignore_errors=True)


def _identity(folder: Path) -> tuple[int, int] | None:
    """(pid, start ticks) of the folder's supervisor, or None; also for one of before the machine was started anew,
    whose numbers may be another's now."""
    try:
        pid, ticks, *boot = (folder / "supervisor.pid").read_text(encoding="ascii").split()
        return (int(pid), int(ticks)) if boot in ([], [process.boot_id()]) else None
    except (OSError, ValueError):
        return None


def _starting(folder: Path) -> bool:
    """Whether a supervisor may have been started that had no time yet to sign."""
    try:
        return abs(time.time() - (folder / "supervisor.log").stat().st_mtime) < SIGNING
    except FileNotFoundError:
        return False


def environment() -> dict[str, str]:
    """A scrubbed environment in which this package is importable from wherever the agent found it."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    inside = (sys.prefix, sys.base_prefix)  # found by the interpreter itself
    paths = [str(Path(entry).absolute()) for entry in sys.path if entry and not entry.startswith(inside)]
    own = str(Path(__file__).resolve().parent.parent)
    return kept | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([own, *paths])), "PYTHONDONTWRITEBYTECODE": "1",
                   "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def last_line(path: Path) -> str:
    """The end of a log for a message: its last line, at most 200 characters."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][:200] if lines else "nothing in its log"
