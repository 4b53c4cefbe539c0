"""A slot on a node of a Ray cluster: one device, and the ordinary supervisor, in a folder of the node's own disk.

The engine makes one of these an actor (engine_ray.py). It outlives the process that made it, so that a campaign which
was killed finds its jobs again; but it ends with its jobs when nobody has asked for ``lease`` seconds, and a job never
outlives it: the supervisors hold a pipe of this process.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from sandbox import box, gpu, parcels
from sandbox.engine import LocalEngine
from sandbox.fingerprint import fingerprint
from sandbox.job import JOB

TICK = 1.0


@dataclass(frozen=True, slots=True)
class About:
    """What a slot is."""

    host: str
    device: str
    """``cpu`` or ``cuda:N``, as nvidia-smi counts on that node."""
    level: int
    """Isolation level that this node offers, found by trying the escapes."""
    why: str
    """Why none higher, in one line."""
    fingerprint: dict[str, str]
    python: str


@dataclass(frozen=True, slots=True)
class Look:
    """How a job does: ``result`` and ``leavings`` once it has ended, ``progress`` before."""

    alive: bool
    progress: bytes | None = None
    result: bytes | None = None
    message: str = ""
    leavings: tuple[tuple[str, int, int], ...] = ()


class Node:
    """One slot. Jobs go by names that the caller makes up and never uses twice."""

    def __init__(self, gpus: int, highest: int, scratch: str, lease: float) -> None:
        self._root = _own_folder(scratch)
        self._store = parcels.Store(self._root / "store")
        self._device = _device(gpus)
        self._highest, self._lease = highest, lease
        lifeline, self._cord = os.pipe()
        self._engine = LocalEngine(lifeline)
        self._heard = time.monotonic()
        threading.Thread(target=self._expire, daemon=True).start()

    def about(self) -> About:
        """What this slot is. The level is probed: it takes a second or two."""
        self._heard = time.monotonic()
        found = box.explain(self._highest)
        why = "; ".join(f"level {int(level)}: {reason}" for level, reason in found.refused.items())
        return About(socket.gethostname(), self._device, int(found.level), why, fingerprint(self._device),
                     f"{platform.python_version()} at {sys.executable}")

    def lacks(self, names: list[str]) -> list[str]:
        """Those of the parcels that this node has not got."""
        self._heard = time.monotonic()
        return [name for name in names if not self._store.has(name)]

    def put(self, name: str, mark: str, inner: str, mode: int, data: bytes) -> None:
        self._heard = time.monotonic()
        self._store.put(name, mark, inner, mode, data)

    def done(self, name: str, mark: str) -> None:
        self._heard = time.monotonic()
        self._store.done(name, mark)

    def start(self, name: str, text: bytes) -> None:
        """Start a job whose parcels are here."""
        self._heard = time.monotonic()
        job = parcels.named(JOB.validate_json(text), lambda parcel, _: str(self._store.place(parcel)))
        job = replace(job, device=self._device, hidden=tuple(map(parcels.local, job.hidden)))
        self._engine.start(self._folder(name), job)

    def look(self, name: str) -> Look:
        """How the job does; a heartbeat in both directions."""
        self._heard = time.monotonic()
        folder = self._folder(name)
        if not folder.exists():
            return Look(False, message="its folder is gone")
        alive = self._engine.alive(folder)  # first: one that ends between the two looks has written its result
        found = {file: (folder / file).read_bytes() if (folder / file).exists() else None
                 for file in ("result.json", "progress.json")}
        if found["result.json"] is None or alive:  # alive: it is still clearing up
            lost = None if alive else self._engine.poll(folder)
            return Look(alive, found["progress.json"], message=lost.message if lost is not None else "")
        return Look(False, found["progress.json"], found["result.json"], "", tuple(parcels.leavings(folder)))

    def fetch(self, name: str, inner: str, offset: int) -> bytes:
        """A chunk of a file that the job left."""
        self._heard = time.monotonic()
        with (self._folder(name) / inner).open("rb") as file:
            file.seek(offset)
            return file.read(parcels.CHUNK)

    def stop(self, name: str, patience: float) -> None:
        self._engine.stop(self._folder(name), patience)
        self._heard = time.monotonic()

    def forget(self, name: str) -> None:
        """Delete the folder of a job that was brought home."""
        shutil.rmtree(self._folder(name), ignore_errors=True)

    def _folder(self, name: str) -> Path:
        return self._root / "jobs" / name

    def _expire(self) -> None:
        """End with all jobs when the lease runs out."""
        while time.monotonic() - self._heard < self._lease:
            time.sleep(min(TICK, self._lease / 4))
        os._exit(0)  # the lifeline is cut by it, so the supervisors stop their jobs


def _own_folder(scratch: str) -> Path:
    """This user's folder on the node's disk. Others may pass through it (a job at level 1 is another user), not write.

    Raises PermissionError when somebody else has made it.
    """
    place = Path(scratch or tempfile.gettempdir()) / f"lossratchet-{os.geteuid()}"
    place.mkdir(parents=True, exist_ok=True, mode=0o755)
    facts = place.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        raise PermissionError(f"{place} belongs to somebody else: set engine.scratch to another folder")
    place.chmod(0o755)
    return place


def _device(gpus: int) -> str:
    """The device that Ray has given to this actor. Ray counts as nvidia-smi does, unless it was started with fewer."""
    if not gpus:
        return "cpu"
    import ray
    (number,) = ray.get_gpu_ids()
    if str(number).isdigit():
        return f"cuda:{number}"
    found = next((i for i in range(64) if (one := gpu.find(i)) is not None and one.uuid == number), 0)
    return f"cuda:{found}"
