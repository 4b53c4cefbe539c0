"""Warm start: boxes whose interpreter runs and has imported the slow libraries before their job is known.

Most of what a short run spends before its first batch is the import of torch, the same every time. So while one job
trains, a supervisor for the next already waits (engine.py starts it with ``--ahead``) with two boxes: the one that
trains and the one that serves the model, or both sides of a twin job. A waiting box is a box like any other (made by
running.py from the same limits, at the same level), in which nothing of a candidate has been: it sees an empty source
folder, has imported the owner's modules (warm_inside.py), and has not touched CUDA. When the job comes, the supervisor
writes a copy of the source into that folder, from outside, and says which script to run.

Promises
- A box serves one job and dies with it; one that was never used dies with its supervisor. There is no process that
  outlives a job and no fork of one that another job could have reached, so nothing is carried from job to job.
- The run is the one that a cold start gives, bit for bit. Where it could be another one, the start is cold: when a file
  beside the script has the name of a module that is loaded already, which it would have shadowed; when the environment
  steers Python's own imports; when the command is not ``python SCRIPT.py``.
- No box, no error: when nothing waits, or what waits died, is late or was made for other limits, the start is cold.

The waiting time is not the job's: its wall limit and its clocks begin when it is handed over. The CPU seconds of the
imports stay in the charge (``Result.startup_charge``), so that a warm run and a cold one cost the same.

Does not cover jobs that the harness does not serve (the exchange runs over the wire's socket), and the run that leaves
its compiled kernels to others.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from sandbox import box as boxes
from sandbox import process, warm_inside
from sandbox.job import Job, write_atomically
from sandbox.running import Log, RunningBox, copy_for_others, start
from sandbox.view import BoxSpec
from sandbox.wire import WireError, receive, send

AHEAD = 2
"""Boxes of one waiting supervisor: no kind of job needs more at once or in turn."""
PATIENCE = 60.0
"""Seconds for a box to say that it is ready, from the moment that its job is there."""
MOST_READY = 1 << 20
READY = "ready.json"


@dataclass(slots=True)
class WarmBox:
    """A box without a job."""

    box: RunningBox
    place: Path
    """Where it will find its source, as seen from outside; empty."""
    modules: frozenset[str] | None = None
    """Top-level names of what it has imported; None: it has not said that it is ready."""
    began: float = field(default_factory=time.monotonic)
    ready: float = 0.0
    """When it was ready (monotonic)."""


@dataclass(slots=True)
class Ahead:
    """What a waiting supervisor has made for a job like ``job``. ``close`` ends what was not used."""

    folder: Path
    job: Job
    roots: set[int] = field(default_factory=set)
    """First processes of the boxes, as in running.py."""
    boxes: list[WarmBox] = field(default_factory=list)

    def close(self) -> None:
        for waiting in self.boxes:
            waiting.box.close()
        self.boxes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def key(job: Job) -> tuple[object, ...] | None:
    """What a box is made from: jobs of one key may take each other's. None: this job starts cold."""
    inside = (Path(name) for name in (*job.hidden, *job.data))
    if (not job.warm or job.batches is None or job.keep_compile_cache
            or any(name.startswith(("PYTHON", "HARNESS_FD")) for name in job.environment)
            or any(path.is_relative_to(source) for path in inside for source in (job.source, job.twin_source) if source)
            or script(job.command) is None):
        return None
    return (job.warm, job.device, job.threads, job.data, job.hidden, tuple(sorted(job.environment.items())),
            job.limits, job.compile_cache, job.max_level, job.min_level)


def script(command: tuple[str, ...]) -> list[str] | None:
    """SCRIPT and its arguments of a command ``python SCRIPT.py ...``; None for any other."""
    if len(command) < 2 or command[0] not in ("python", "python3") or not command[1].endswith(".py"):
        return None
    return None if command[1].startswith("-") or os.path.isabs(command[1]) else list(command[1:])


def prepare(folder: Path, job: Job, library_hints: tuple[str, ...]) -> Ahead:
    """Start the waiting boxes for a job like ``job``, with all their files in ``folder``. Raises OSError.

    None are started where the wanted level does not hold: the job must find that out anew, and say so.
    """
    ahead = Ahead(folder, job)
    level = boxes.probe(job.max_level)
    if level < job.min_level:
        return ahead
    command = ("python", "-c", Path(warm_inside.__file__).read_text(encoding="utf-8"), *job.warm)
    try:
        for number in range(AHEAD):
            place = folder / f"box{number}"
            source = place / "source"
            source.mkdir(parents=True, mode=0o755)
            spec = BoxSpec(command, source, place, boxes.job_uid(number), job.device, job.threads, job.limits,
                           job.environment, job.data, job.hidden, compile_cache=job.compile_cache,
                           library_hints=library_hints)
            # wall limit: the job's own, set when it comes; nobody watches a box in which nothing of a job runs
            box = start(spec, level, folder / f"log{number}.txt", 0.0, ahead.roots, wire=True)
            ahead.boxes.append(WarmBox(box, place / "src" if level is boxes.Level.PLAIN else source))
    except BaseException:
        ahead.close()
        raise
    return ahead


def hand_over(waiting: WarmBox, command: tuple[str, ...], source: Path, log: Path, wall_seconds: float,
              cpus: frozenset[int]) -> RunningBox | None:
    """Give the box its job; None, with the box ended, where the job must start cold.

    Does not raise for the box's sake. From here on the box's clocks are the job's: see ``RunningBox.ahead``.
    """
    box = waiting.box
    try:
        words = script(command)
        if waiting.modules is None:
            listen(waiting)
        if words is None or shadowed(source / Path(words[0]).parent, waiting.modules or frozenset()):
            box.close()
            return None
        copy_for_others(source, waiting.place)
        for pid in box.clock.pids() if cpus else ():
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), cpus)
        box.ahead = waiting.ready - waiting.began
        box.log, box.wall_seconds = Log(log, box.spec.limits.log_mb << 20), wall_seconds
        box.cpu_ahead, box.began = box.clock.read(), time.monotonic()
        assert box.sock is not None
        send(box.sock, b"g", json.dumps(words).encode())
    except (WireError, OSError):
        box.close()
        return None
    return box


def listen(waiting: WarmBox) -> None:
    """Wait until the box says that its imports are done. Raises WireError. Nothing of a candidate speaks here."""
    sock = waiting.box.sock
    assert sock is not None
    sock.settimeout(PATIENCE)
    kind, payload = receive(sock, MOST_READY)
    sock.settimeout(None)
    if kind != b"r":
        raise WireError(f"a waiting box sent {kind!r}")
    told = json.loads(payload)
    waiting.modules, waiting.ready = frozenset(told["modules"]), float(told["at"])


def await_job(ahead: Ahead, line: TextIO) -> str:
    """The line that names the job; empty when none will come. Meanwhile the boxes get ready, and dead ones are closed.

    When all are ready, READY in the folder tells what they took and hold: for benches.
    """
    while True:
        silent = {waiting.box.sock.fileno(): waiting for waiting in ahead.boxes
                  if waiting.modules is None and waiting.box.sock is not None}
        heard = select.select([line.fileno(), *silent], [], [])[0]
        if line.fileno() in heard:
            return line.readline().rstrip("\n")
        for waiting in (silent[number] for number in heard):
            try:
                listen(waiting)
            except WireError:
                ahead.boxes.remove(waiting)
                waiting.box.close()
        if all(waiting.modules is not None for waiting in ahead.boxes):
            write_atomically(ahead.folder / READY, json.dumps({
                "boxes": len(ahead.boxes), "ready_seconds": [one.ready - one.began for one in ahead.boxes],
                "cpu_seconds": [one.box.clock.read() for one in ahead.boxes],
                "memory_mb": process.memory_mb(pid for one in ahead.boxes for pid in one.box.clock.pids())}).encode())


def shadowed(folder: Path, modules: frozenset[str]) -> frozenset[str]:
    """Loaded modules whose names files or folders beside the script have: a cold start might import those instead."""
    with contextlib.suppress(OSError):
        return modules & {name.partition(".")[0] for name in os.listdir(folder)}
    return frozenset()


def age() -> float:
    """Seconds since this process was started, 10 ms apart."""
    own = process.stat(os.getpid())
    if own is None:
        return 0.0
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - own.start_ticks / process.TICKS, 0.0)
