"""Jobs on a Slurm cluster, through its own commands: sbatch, squeue and scancel. No accounting (sacct) is needed.

The job folders lie on a *shared folder* that every node sees at the same path, as do the interpreter and this package:
Slurm assumes one, and so does this. A Slurm job runs the ordinary supervisor (slurm_start.py). What has happened is
read from the folder first and asked of Slurm second; squeue is asked for all jobs at once, less often the longer
nothing changes. A controller that does not answer is no lost job.

Slurm may start a job again, after a pre-emption or on another node; each start has a folder of its own and the first
result counts. A job is known by its number and name, since a controller that lost its state gives numbers again. Nodes
of another kind than the first result's (device, driver, torch, Python) are excluded from then on, and what ran there is
``infra``: say ``gres`` or ``--constraint`` so that one kind is asked for.

Tried with 22.05. Does not cover: job arrays, several nodes a job, heterogeneous jobs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox import gpu
from sandbox.engine import EngineError, environment, last_line, pause, settle
from sandbox.job import Job, Progress, Result, read_progress, read_result, write_atomically, write_job

ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
          "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
"""States of squeue in which a job may still come to a result."""
UNREACHABLE = ("Unable to contact", "timed out", "Connection refused", "temporarily unavailable", "Transport endpoint")
"""What Slurm's commands say when the controller does not answer: it may be started again."""
QUICK, SLOW = 1.0, 30.0
"""Seconds between two questions to squeue: at first, and at most."""
SETTLING = 10.0
"""Seconds that a result may take to be seen through the shared folder, after Slurm says that the job has ended."""
CALL_SECONDS = 60.0
SUBMISSIONS = (2.0, 5.0, 15.0, 30.0, 60.0, 120.0)
"""Seconds between tries to submit while the controller does not answer."""
SLOTS = 4
"""Jobs side by side when nothing says how many."""
NOTE, SCRIPT = "slurm.json", "slurm.sh"
PASSED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "SLURM_CONF", "LD_LIBRARY_PATH")
"""Variables that Slurm's commands get. sbatch stores its whole environment with the job: a key must not be there."""
OF_SLURM = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES")
"""Variables that the job's script passes on to the supervisor."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of Slurm for every job; empty: its default."""

    partition: str = ""
    account: str = ""
    time: str = ""
    """Empty: the job's own wall limits and some minutes."""
    gres: str = ""
    """Text of ``--gres`` of a GPU job, e.g. ``gpu:h100:1``."""
    extra: tuple[str, ...] = ()
    """Further arguments of sbatch, which win over the others."""


@dataclass(slots=True)
class Task:
    """A submitted job."""

    number: str
    submitted: float
    gone: float | None = None
    """When Slurm was first heard to know it no more."""
    state: str = ""
    told: float = 0.0


class SlurmEngine:
    """Submits each job by sbatch. Raises EngineError when Slurm's commands are not on this machine."""

    notes: tuple[str, ...] = ()
    level: int | None = None
    """Known only when a job runs, on the node that Slurm chose."""

    def __init__(self, request: Request, python: str = "") -> None:
        self._request, self._python = request, python or sys.executable
        self._tasks: dict[Path, Task] = {}
        self._asked, self._pause = 0.0, QUICK
        self._kind: dict[str, str] = {}
        self._excluded: set[str] = set()
        version = _call("sinfo", "--version")
        if version.returncode:
            raise EngineError(f"Slurm's commands do not work here: {_said(version)}.",
                              "Run ratchet on a machine from which you can submit jobs.")
        self.version = version.stdout.strip()

    @property
    def gpus(self) -> int:
        """1 if GPUs are asked for: what the partition has is Slurm's business."""
        return int("gpu" in self._request.gres)

    def reserve(self, gpu: bool, threads: int, slots: int | None, highest: int) -> tuple[str, ...]:
        """Nothing is taken yet: a slot is a job that may wait in the queue."""
        self.notes = (f"{self.version}: up to {slots or SLOTS} jobs side by side, on nodes that Slurm chooses",)
        return ("cuda:0" if gpu else "cpu",) * (slots or SLOTS)

    # ------------------------------------------------------------------------------------------------- the verbs

    def start(self, folder: Path, job: Job) -> None:
        """Submit the job. While the controller does not answer it is tried again for some minutes."""
        folder = folder.resolve()
        if (folder / "result.json").exists():
            raise FileExistsError(f"{folder} already has a result")
        write_job(folder, job)
        (folder / SCRIPT).write_text(self._script(folder), encoding="utf-8")
        words = self._words(folder, job)
        for seconds in (*SUBMISSIONS, None):
            done = _call("sbatch", *words)
            if not done.returncode:
                self._note(folder, done.stdout.strip().split(";")[0])
                return
            if seconds is None or not any(text in done.stderr for text in UNREACHABLE):
                raise EngineError(f"Slurm takes no job: {_said(done)}.",
                                  "Mend [engine] in ratchet.toml, or see `sinfo`.")
            time.sleep(seconds)
            if number := self._by_name(folder):  # it was taken, and only the answer was lost
                self._note(folder, number)
                return

    def poll(self, folder: Path) -> Result | None:
        """The first result of its starts; None while Slurm has the job; ``infra`` once it has not."""
        folder = folder.resolve()
        known = read_result(folder)
        if known is not None:
            return known
        task = self._task(folder)
        if task is None:
            return settle(folder, Result(folder.name, "infra", "lost: it was never submitted"))
        for start in _starts(folder, task.number):
            found = read_result(start)
            if found is None:
                continue
            if found.fault == "infra" and found.message == "stopped":  # by Slurm: ``stop`` delivers its own
                if self._active(task) is not False:
                    continue  # pre-empted, so that it may be started again
                found = dataclasses.replace(found, message=f"lost: Slurm ended job {task.number} ({task.state})")
            return self._deliver(folder, start, found)
        if self._active(task) is not False:
            task.gone = None
            return None
        task.gone = task.gone or time.monotonic()
        if time.monotonic() - task.gone < SETTLING:
            return None
        self._tasks.pop(folder)
        return settle(folder, Result(
            folder.name, "infra", f"lost: job {task.number} ended as {task.state or 'unknown to Slurm'} without a "
                                  f"result ({last_line(folder / 'supervisor.log')})"))

    def progress(self, folder: Path) -> Progress | None:
        """Of the newest start."""
        task = self._task(folder.resolve())
        starts = _starts(folder.resolve(), task.number) if task else []
        return next((found for start in reversed(starts) if (found := read_progress(start))), read_progress(folder))

    def stop(self, folder: Path, patience: float = 15.0) -> None:
        """SIGTERM to the supervisor, which ends the tree and writes a result; then the whole job is cancelled."""
        folder = folder.resolve()
        task = self._task(folder)
        if read_result(folder) is not None or task is None:
            return
        deadline, named = time.monotonic() + patience, f"--name={_name(folder)}"
        if _starts(folder, task.number):
            _call("scancel", "--batch", "--signal=TERM", named, task.number)
            while time.monotonic() < deadline and (start := _starts(folder, task.number)[-1]):
                found = read_result(start)
                if found is not None:
                    self._deliver(folder, start, found)
                    break
                time.sleep(0.1)
        _call("scancel", named, task.number)
        while self._state(folder, task.number) in ACTIVE and time.monotonic() < deadline + patience:
            time.sleep(0.5)
        self._tasks.pop(folder, None)
        settle(folder, Result(folder.name, "infra", "stopped"))

    def rest(self, folders: Sequence[Path], seconds: float) -> None:
        """As every engine. Nothing tells of an end."""
        pause(len(folders), seconds)

    def close(self) -> None:
        """Nothing is held: a slot is a job."""

    # ---------------------------------------------------------------------------------------------- what is asked

    def _script(self, folder: Path) -> str:
        """The supervisor with a scrubbed environment. PYTHONPATH: wherever this process found the package."""
        passed = " ".join(f'{name}="${{{name}:-}}"' for name in OF_SLURM)
        own = shlex.join(f"{name}={value}" for name, value in environment().items())
        words = shlex.join([self._python, "-P", "-m", "sandbox.slurm_start", str(folder)])
        return f"#!/bin/sh\nexec env -i {own} {passed} {words}\n"

    def _words(self, folder: Path, job: Job) -> list[str]:
        """Arguments of sbatch. Memory: the job's limit, and 1 GiB for the supervisor (weights, answers)."""
        asked, limits = self._request, job.limits
        seconds = limits.wall_seconds + (3 * job.evaluation.wall_seconds if job.evaluation else 0)
        options = {
            "job-name": _name(folder), "output": str(folder / "supervisor.log"), "chdir": "/", "ntasks": "1",
            "open-mode": "append", "cpus-per-task": str(job.threads), "mem": f"{limits.memory_mb + 1024}M",
            "time": asked.time or str(int(seconds / 60) + 5), "signal": "B:TERM@30", "partition": asked.partition,
            "account": asked.account, "exclude": ",".join(sorted(self._excluded)),
            "gres": asked.gres if gpu.index(job.device) is not None else ""}
        return ["--parsable", "--requeue", *(f"--{name}={value}" for name, value in options.items() if value),
                *asked.extra, str(folder / SCRIPT)]

    def _note(self, folder: Path, number: str) -> None:
        self._tasks[folder] = Task(number, time.monotonic())
        self._pause = QUICK
        write_atomically(folder / NOTE, json.dumps({"job": number}).encode())

    def _task(self, folder: Path) -> Task | None:
        """The job of ``folder``, also if an earlier process submitted it, or died between sbatch and its note."""
        if folder not in self._tasks:
            try:
                number = str(json.loads((folder / NOTE).read_text(encoding="utf-8"))["job"])
            except (OSError, ValueError):
                number = self._by_name(folder)
            if not number:
                return None
            self._tasks[folder] = Task(number, time.monotonic())
        return self._tasks[folder]

    def _by_name(self, folder: Path) -> str:
        found = _call("squeue", "--noheader", "--format=%i", f"--name={_name(folder)}")
        return (found.stdout.split() or [""])[0]

    def _state(self, folder: Path, number: str) -> str:
        found = _call("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={number}",
                      f"--name={_name(folder)}")
        return found.stdout.strip()

    def _active(self, task: Task) -> bool | None:
        """Whether Slurm still has the job; None: not known at the moment. Asks for all at once, ever less often."""
        now = time.monotonic()
        if now - self._asked >= self._pause:
            numbers = ",".join(known.number for known in self._tasks.values())
            found = _call("squeue", "--noheader", "--states=all", "--format=%i %j %T", f"--jobs={numbers}")
            self._asked = now
            before = [known.state for known in self._tasks.values()]
            if not found.returncode or "Invalid job id" in found.stderr:
                lines = [line.split() for line in found.stdout.splitlines() if len(line.split()) == 3]
                states = {(number, name): state for number, name, state in lines}
                for folder, known in self._tasks.items():
                    known.state, known.told = states.get((known.number, _name(folder)), ""), now
            changed = before != [known.state for known in self._tasks.values()]
            self._pause = QUICK if changed else min(SLOW, self._pause * 1.5)
        if task.told <= task.submitted:
            return None
        return task.state in ACTIVE

    # -------------------------------------------------------------------------------------------------- the result

    def _deliver(self, folder: Path, start: Path, found: Result) -> Result:
        """Move what a start left into the job folder, the result last."""
        for path in sorted(start.iterdir()):
            if path.name not in ("job.json", "supervisor.pid", "result.json") and not path.name.startswith("."):
                path.replace(folder / path.name)
        self._tasks.pop(folder, None)
        return settle(folder, self._of_one_kind(folder, dataclasses.replace(found, id=folder.name)))

    def _of_one_kind(self, folder: Path, found: Result) -> Result:
        """``found``, or ``infra`` in its place when it was made on another kind of node than the first result."""
        if not found.fingerprint or found.fault == "infra":
            return found
        self._kind = self._kind or found.fingerprint
        if found.fingerprint == self._kind:
            return found
        node = (folder / "node").read_text(encoding="utf-8")
        self._excluded.add(node)
        differs = ", ".join(f"{name} {value}" for name, value in found.fingerprint.items()
                            if self._kind.get(name) != value)
        return dataclasses.replace(found, fault="infra", scores={}, message=(
            f"node {node} is of another kind ({differs}): say in engine.gres or engine.extra which one is wanted"))


def _starts(folder: Path, number: str) -> list[Path]:
    """Folders of the job's starts, the oldest first."""
    return sorted(folder.glob(f"start-{number}-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def _name(folder: Path) -> str:
    """The Slurm job's name: one folder, one name."""
    return f"ratchet-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands. Whatever hinders it is told as its own failure would be."""
    kept = {name: os.environ[name] for name in PASSED if name in os.environ}
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=CALL_SECONDS, check=False, cwd="/",
                              stdin=subprocess.DEVNULL, env=kept)
    except FileNotFoundError:
        return subprocess.CompletedProcess(words, 127, "", f"there is no {words[0]}")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"{words[0]} timed out")


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return (" ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}")[-300:].rstrip(".")
