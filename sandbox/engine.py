"""Jobs from the agent's side: start a supervisor for a job folder, look at it, stop it.

State lives in the folder, so an agent that was restarted sees the same jobs. A supervisor outlives its agent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from sandbox import process
from sandbox.job import Job, Result, read_result, write_atomically, write_job

PASSED_ON = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "LANG")
"""The only variables of the agent's environment that a supervisor gets; a job gets none of them."""


class LocalEngine:
    """Runs jobs on this machine, each under a detached supervisor of its own."""

    def __init__(self) -> None:
        self._started: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, folder: Path, job: Job) -> None:
        """Write ``job`` into ``folder`` and start its supervisor. Raises OSError when that cannot be done.

        A folder is for one job: raises FileExistsError when it has a result already.
        """
        folder = folder.resolve()
        if (folder / "result.json").exists():
            raise FileExistsError(f"{folder} already has a result")
        write_job(folder, job)
        with (folder / "supervisor.log").open("ab") as log, _uninterrupted():
            popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "sandbox.supervisor", str(folder)], cwd="/", env=_environment(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            self._started[popen.pid] = popen  # kept so that poll() reaps it
            found = process.stat(popen.pid)
            if found is not None:
                write_atomically(folder / "supervisor.pid", f"{popen.pid} {found.start_ticks}".encode())

    def poll(self, folder: Path) -> Result | None:
        """The result; None while the job runs; fault ``infra`` when its supervisor is gone without one."""
        alive = self.alive(folder)  # first: a supervisor that ends between the two looks has written its result
        result = read_result(folder)
        if result is None and not alive:
            return Result(folder.name, "infra", "lost: the supervisor ended without a result "
                                                f"({_last_line(folder / 'supervisor.log')})")
        return result

    def alive(self, folder: Path) -> bool:
        """Whether the folder's supervisor runs."""
        found = _identity(folder)
        if found is None:
            return False
        popen = self._started.get(found[0])
        if popen is not None and popen.poll() is not None:
            del self._started[found[0]]
        return process.running(*found)

    def stop(self, folder: Path, patience: float = 15.0) -> None:
        """End the job: its supervisor kills the tree and writes a result; after ``patience`` seconds kill that too."""
        found = _identity(folder)
        if found is None or not self.alive(folder):
            return
        deadline = time.monotonic() + patience
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


def _identity(folder: Path) -> tuple[int, int] | None:
    """(pid, start ticks) of the folder's supervisor, or None."""
    try:
        pid, ticks = (folder / "supervisor.pid").read_text(encoding="ascii").split()
        return int(pid), int(ticks)
    except (OSError, ValueError):
        return None


def _environment() -> dict[str, str]:
    """A scrubbed environment in which this package is importable from wherever the agent found it."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    inside = (sys.prefix, sys.base_prefix)  # found by the interpreter itself
    paths = [str(Path(entry).absolute()) for entry in sys.path if entry and not entry.startswith(inside)]
    own = str(Path(__file__).resolve().parent.parent)
    return kept | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([own, *paths])), "PYTHONDONTWRITEBYTECODE": "1",
                   "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][:200] if lines else "nothing in its log"
