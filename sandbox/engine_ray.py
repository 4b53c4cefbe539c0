"""Jobs on a Ray cluster: one actor a GPU, or a set of CPU threads, each with the ordinary supervisor on its node.

No folder is shared. What a job needs goes to the node once and stays there under its hash (parcels.py); result, logs,
weights and bulk answers come back, the result last. This object alone writes the caller's job folder, so a result
appears once, whatever a node that was given up says later. A slot whose node is gone has its jobs run on a new node of
the same kind, or wait for another slot; the job that was lost is ``infra``, and whoever wants it starts it again.

Slots are *kept to one kind*: the fingerprints of all are equal (device model, driver, torch, Python, ruler), since
runs of two kinds could not be compared. The largest group of equal slots is taken.

Covers Ray 2.40 and later, of one version (and one Python) on all nodes. Does not cover: GPUs that jobs share, MIG.
Nodes that join are used only in the place of those that were lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox import parcels
from sandbox.engine import EngineError, pause, settle
from sandbox.job import JOB, RESULT, Job, Progress, Result, read_progress, read_result, write_atomically, write_job
from sandbox.ray_node import About, Look, Node

LEASE = 900.0
"""Seconds for which a slot that nobody asks keeps its jobs, and its GPU."""
SILENCE = 60.0
"""Seconds without an answer after which a job is given up as lost."""
READY = 90.0
"""Seconds that slots get to start. One that is not ready then has its GPU taken by somebody else."""
GLANCE = 0.4
"""Seconds between two looks at a job."""
RESCAN = 5.0
"""Seconds between two searches for a node in the place of a lost one."""
PATIENCE = 600.0
"""Seconds that a job waits for a slot when none is left."""
PER_NODE = 8
"""CPU slots of one node at most, as on a single machine."""
NOTE = "ray.json"
"""In the job folder: the actor and the name of the job there."""


class LostError(Exception):
    """A node does not answer as it should: the jobs on it are gone."""


@dataclass(slots=True, eq=False)
class Slot:
    """An actor, and the job on it."""

    actor: Any
    name: str
    node: str
    about: About | None = None
    asked: Any = None
    """The pending answer about itself."""
    since: float = 0.0
    job: Path | None = None

    @property
    def device(self) -> str:
        return f"ray:{self.node[:8]}:{self.about.device if self.about else 'cpu'}"


@dataclass(slots=True)
class Task:
    """A job that this engine started or took over. Without a slot it waits for one."""

    name: str
    slot: Slot | None = None
    job: Job | None = None
    asked: Any = None
    since: float = field(default_factory=time.monotonic)
    """Of the last answer; of the start, while it waits."""
    looked: float = 0.0


class RayEngine:
    """Runs jobs on the slots that ``reserve`` has taken on a cluster.

    ``owner``: the campaign's folder; it names the slots, so that a later process finds them. ``address``: of a running
    cluster, as ``ray.init`` takes it; empty: the one that RAY_ADDRESS or this machine names, else one of this machine
    alone, which ends with this process. ``scratch``: folder on the nodes; empty: their temporary one.
    Raises EngineError when Ray is missing or the cluster does not answer.
    """

    def __init__(self, owner: Path, address: str = "", scratch: str = "", lease: float = LEASE) -> None:
        self._ray = _import()
        self._owned = _connect(self._ray, address)
        self._space = f"ratchet-{hashlib.sha256(str(owner.resolve()).encode()).hexdigest()[:12]}"
        self._scratch, self._lease = scratch, lease
        self._slots: list[Slot] = []
        self._coming: list[Slot] = []
        self._tasks: dict[Path, Task] = {}
        self._packer = parcels.Packer()
        self._kind: tuple[tuple[str, str], ...] = ()
        self._gpu, self._threads, self._highest, self._wanted, self._scanned = False, 1, 3, 0, 0.0
        self.notes: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """GPUs of the cluster, busy or not."""
        return sum(int(node["Resources"].get("GPU", 0)) for node in self._nodes())

    @property
    def level(self) -> int | None:
        return min((slot.about.level for slot in self._slots if slot.about), default=None)

    def about(self) -> list[tuple[str, About]]:
        """(device, facts) of each reserved slot."""
        return [(slot.device, slot.about) for slot in self._slots if slot.about]

    # ---------------------------------------------------------------------------------------------------- slots

    def reserve(self, gpu: bool, threads: int, slots: int | None, highest: int) -> tuple[str, ...]:
        """Take a slot for each free GPU, or each set of CPU threads; those of an earlier process first.

        Raises EngineError.
        """
        self._gpu, self._threads, self._highest = gpu, threads, highest
        found = list(self._left_over())
        for node in self._nodes():
            held = sum(slot.node == node["NodeID"] for slot in found)
            found += [self._spawn(node["NodeID"]) for _ in range(self._capacity(node) - held)]
        deadline = time.monotonic() + READY
        ready = [slot for slot in found if self._ready(slot, max(0.0, deadline - time.monotonic()))]
        kinds = Counter(_kind(slot) for slot in ready)
        if not kinds:
            self._kill(found)
            what = "GPU" if gpu else f"{threads} CPUs"
            raise EngineError(f"No node of the Ray cluster has {what} free for a slot ({len(found)} were asked).",
                              "See `ray status`; nodes need the same ratchet, Ray and Python as this machine.")
        self._kind = max(sorted(kinds), key=lambda kind: kinds[kind])
        chosen = sorted((slot for slot in ready if _kind(slot) == self._kind), key=lambda slot: slot.device)
        chosen = _spread(chosen)[:slots]
        self._kill([slot for slot in found if slot not in chosen])
        self._slots, self._wanted = chosen, len(chosen)
        self.notes = tuple(self._told(ready, len(found)))
        return tuple(slot.device for slot in chosen)

    def _told(self, ready: list[Slot], asked: int) -> Iterator[str]:
        for node in dict.fromkeys(slot.node for slot in self._slots):
            own = [slot for slot in self._slots if slot.node == node]
            about = own[0].about
            assert about is not None
            yield (f"node {node[:8]} ({about.host}): {len(own)} slots, {about.fingerprint['device']}, torch "
                   f"{about.fingerprint['torch']}, isolation level {about.level}"
                   + (f" ({about.why})" if about.level < 2 and about.why else ""))
        others = Counter((slot.about.host, _kind(slot)) for slot in ready if slot.about and _kind(slot) != self._kind)
        for (host, kind), count in others.items():
            differs = ", ".join(f"{name} {value}" for name, value in kind if (name, value) not in self._kind)
            yield f"left out, of another kind: {count} slots of {host} ({differs})"
        if len(ready) < asked:
            yield f"left out, not ready within {READY:.0f} s: {asked - len(ready)} slots"

    def _left_over(self) -> Iterator[Slot]:
        """Slots that an earlier process of this campaign has left."""
        for known in self._ray.util.list_named_actors(all_namespaces=True):
            if known["namespace"] == self._space:
                with contextlib.suppress(ValueError, self._ray.exceptions.RayError):
                    actor = self._ray.get_actor(known["name"], namespace=self._space)
                    yield Slot(actor, known["name"], known["name"].partition("-")[0], asked=actor.about.remote(),
                               since=time.monotonic())

    def _spawn(self, node: str) -> Slot:
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        name = f"{node}-{uuid.uuid4().hex[:8]}"
        actor = self._ray.remote(Node).options(
            name=name, namespace=self._space, lifetime="detached", max_restarts=0, num_gpus=int(self._gpu),
            num_cpus=self._threads, scheduling_strategy=strategy).remote(
            int(self._gpu), self._highest, self._scratch, self._lease)
        return Slot(actor, name, node, asked=actor.about.remote(), since=time.monotonic())

    def _ready(self, slot: Slot, seconds: float) -> bool:
        """Whether the slot has told what it is."""
        done, _ = self._ray.wait([slot.asked], timeout=seconds)
        if done:
            with contextlib.suppress(self._ray.exceptions.RayError):
                slot.about = self._ray.get(slot.asked)
        return slot.about is not None

    def _nodes(self) -> list[dict[str, Any]]:
        return sorted((node for node in self._ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))

    def _capacity(self, node: dict[str, Any]) -> int:
        resources = node["Resources"]
        cpus = int(resources.get("CPU", 0) // self._threads)
        return min(int(resources.get("GPU", 0)), cpus) if self._gpu else min(cpus, PER_NODE)

    def _kill(self, slots: list[Slot]) -> None:
        for slot in slots:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(slot.actor, no_restart=True)

    def _lose(self, slot: Slot) -> None:
        """Give a slot up. It is killed, so that it ends its jobs should it still live."""
        if slot in self._slots:
            self._slots.remove(slot)
        self._kill([slot])

    def _replace(self) -> None:
        """Look for slots in the place of lost ones: on nodes that have come, or that lost a slot."""
        for slot in list(self._coming):
            if self._ready(slot, 0) and len(self._slots) < self._wanted and _kind(slot) == self._kind:
                self._slots.append(slot)
            elif slot.about is None and time.monotonic() - slot.since < READY:
                continue
            else:
                self._kill([slot])
            self._coming.remove(slot)
        if len(self._slots) >= self._wanted or time.monotonic() - self._scanned < RESCAN:
            return
        self._scanned = time.monotonic()
        missing = self._wanted - len(self._slots) - len(self._coming)
        for node in self._nodes():
            held = sum(slot.node == node["NodeID"] for slot in (*self._slots, *self._coming))
            for _ in range(min(missing, self._capacity(node) - held)):
                self._coming.append(self._spawn(node["NodeID"]))
                missing -= 1

    # ----------------------------------------------------------------------------------------------------- jobs

    def start(self, folder: Path, job: Job) -> None:
        """Send the job to the slot of its device; if that is gone, to another, as soon as one is free."""
        folder = folder.resolve()
        if (folder / "result.json").exists():
            raise FileExistsError(f"{folder} already has a result")
        write_job(folder, job)
        task = self._tasks[folder] = Task(uuid.uuid4().hex, job=job)
        self._place(folder, task)

    def _place(self, folder: Path, task: Task) -> None:
        """Give a waiting job to a free slot, its own device's first."""
        assert task.job is not None
        self._replace()
        free = [slot for slot in self._slots if slot.job is None]
        while free:
            slot = next((slot for slot in free if slot.device == task.job.device), free[0])
            free.remove(slot)
            write_atomically(folder / NOTE, json.dumps(
                {"actor": slot.name, "job": task.name, "node": slot.node,
                 "host": slot.about.host if slot.about else ""}).encode())
            try:
                self._send(slot, task)
            except LostError:
                self._lose(slot)
                continue
            slot.job, task.slot, task.since = folder, slot, time.monotonic()
            return

    def _send(self, slot: Slot, task: Task) -> None:
        """Bring what the node lacks, then start the job there. Raises LostError."""
        assert task.job is not None
        portable, wanted = self._packer.pack(task.job)
        lacking = set(self._get(slot.actor.lacks.remote([parcel.name for parcel in wanted])))
        for parcel in wanted:
            if parcel.name in lacking:
                mark = uuid.uuid4().hex[:8]
                for inner, _, mode in parcel.parts:
                    for data in _chunks(parcel.origin if inner == "." else parcel.origin / inner):
                        self._get(slot.actor.put.remote(parcel.name, mark, inner, mode, self._ray.put(data)))
                self._get(slot.actor.done.remote(parcel.name, mark))
        self._get(slot.actor.start.remote(task.name, JOB.dump_json(portable)))

    def _get(self, answer: Any, seconds: float = SILENCE) -> Any:
        """The answer of a node. Raises LostError; a fault of the code on the node propagates."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(answer, timeout=seconds)
        except errors.RayTaskError as error:
            raise LostError(f"the node failed: {' '.join(str(error.cause).split())[:300]}") from error
        except errors.RayError as error:
            raise LostError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error

    def poll(self, folder: Path) -> Result | None:
        """The result, once all that belongs to it is home; None before; ``infra`` when node or actor are gone."""
        folder = folder.resolve()
        known = read_result(folder)
        if known is not None:
            return known
        task = self._tasks.get(folder) or self._adopt(folder)
        if task is None:
            return self._end(folder, Result(folder.name, "infra", "lost: no slot of the cluster has this job"))
        if task.slot is None:
            self._place(folder, task)
            if task.slot is None and not self._slots and time.monotonic() - task.since > PATIENCE:
                return self._end(folder, Result(folder.name, "infra", "lost: no node of this kind is left"))
            return None
        try:
            look = self._look(task, task.slot)
            return self._come_home(folder, task.name, task.slot, look) if look is not None else None
        except LostError as error:
            self._lose(task.slot)
            return self._end(folder, Result(
                folder.name, "infra", f"lost: {task.slot.device} is gone ({error})"))

    def _look(self, task: Task, slot: Slot) -> Look | None:
        """The slot's word on its job, at most every GLANCE seconds; None meanwhile. Raises LostError."""
        now, errors = time.monotonic(), self._ray.exceptions
        if task.asked is None:
            if now - task.looked < GLANCE:
                return None
            task.asked, task.looked = slot.actor.look.remote(task.name), now
        done, _ = self._ray.wait([task.asked], timeout=0)
        if done:
            asked, task.asked = task.asked, None
            try:
                look: Look = self._ray.get(asked)
            except errors.ActorUnavailableError:
                pass  # its network may come back
            except errors.RayError as error:
                raise LostError(type(error).__name__) from error
            else:
                task.since = now
                return look
        if now - task.since > SILENCE:
            raise LostError(f"no answer for {SILENCE:.0f} s")
        return None

    def _come_home(self, folder: Path, name: str, slot: Slot, look: Look) -> Result | None:
        """Take over what the job shows; all that it left once it has ended, the result last. Raises LostError."""
        if look.progress is not None:
            write_atomically(folder / "progress.json", look.progress)
        if look.alive:
            return None
        if look.result is None:
            return self._end(folder, Result(folder.name, "infra", look.message or "lost: it ended without a result"))
        for inner, size, mode in look.leavings:
            chunks = (self._get(slot.actor.fetch.remote(name, inner, offset))
                      for offset in range(0, size, parcels.CHUNK))
            parcels.bring(folder, inner, mode, chunks)
        slot.actor.forget.remote(name)
        return self._end(folder, replace(RESULT.validate_json(look.result), id=folder.name))

    def _end(self, folder: Path, result: Result) -> Result:
        task = self._tasks.pop(folder, None)
        if task is not None and task.slot is not None:
            task.slot.job = None
        return settle(folder, result)

    def _adopt(self, folder: Path) -> Task | None:
        """A job that an earlier process started, if its slot still is."""
        try:
            told = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        slot = next((slot for slot in self._slots if slot.name == told["actor"]), None)
        if slot is None:
            with contextlib.suppress(ValueError, self._ray.exceptions.RayError):
                actor = self._ray.get_actor(told["actor"], namespace=self._space)
                slot = Slot(actor, told["actor"], told["node"])
        if slot is None:
            return None
        slot.job = folder
        task = self._tasks[folder] = Task(told["job"], slot)
        return task

    def progress(self, folder: Path) -> Progress | None:
        """As old as the last ``poll``."""
        return read_progress(folder)

    def stop(self, folder: Path, patience: float = 15.0) -> None:
        """End the job: the supervisor on the node kills the tree. A slot that does not answer is killed itself."""
        folder = folder.resolve()
        if read_result(folder) is not None:
            return
        task = self._tasks.get(folder) or self._adopt(folder)
        if task is None:
            return
        if task.slot is None:
            self._end(folder, Result(folder.name, "infra", "stopped"))
            return
        try:
            self._get(task.slot.actor.stop.remote(task.name, patience), patience + 10)
            self._come_home(folder, task.name, task.slot, self._get(task.slot.actor.look.remote(task.name)))
        except LostError:
            self._lose(task.slot)
            self._end(folder, Result(folder.name, "infra", "stopped"))

    def rest(self, folders: Sequence[Path], seconds: float) -> None:
        """As every engine. Nothing tells of an end."""
        pause(len(folders), seconds)

    def close(self) -> None:
        """Give the slots back; what runs on them ends."""
        self._kill([*self._slots, *self._coming])
        self._slots, self._coming = [], []
        if self._owned:
            self._ray.shutdown()


def _import() -> Any:
    """Ray, without the signal handlers that it installs. Raises EngineError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
    with _own_signals():
        try:
            ray = importlib.import_module("ray")
            importlib.import_module("ray.util.scheduling_strategies")
        except ImportError as error:
            raise EngineError("The engine ray needs the package ray, which is not installed.",
                              "pip install 'lossratchet[ray]', in one version on all nodes.") from error
    return ray


def _connect(ray: Any, address: str) -> bool:
    """Join the cluster, or start one of this machine. True when this process is to leave it. Raises EngineError."""
    if ray.is_initialized():
        return False
    own = Path(__file__).resolve().parent  # the nodes run the sandbox of this very version
    with _own_signals():
        try:
            ray.init(address=address or None, log_to_driver=False, logging_level="error",
                     runtime_env={"py_modules": [str(own)]})
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            raise EngineError(f"The Ray cluster{f' at {address}' if address else ''} cannot be joined: "
                              f"{' '.join(str(error).split())[:300]}.",
                              "Start one with `ray start --head`, or set engine.address.") from error
    return True


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray sets handlers of its own for signals that end a program: they would end a campaign uncleanly."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread: Ray could not set any either
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def _kind(slot: Slot) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(slot.about.fingerprint.items())) if slot.about else ()


def _spread(slots: list[Slot]) -> list[Slot]:
    """One of each node in turn, so that a few slots are on many nodes."""
    nodes = [[slot for slot in slots if slot.node == node] for node in dict.fromkeys(slot.node for slot in slots)]
    return [slot for rank in itertools.zip_longest(*nodes) for slot in rank if slot is not None]


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in pieces; one empty piece of an empty file."""
    with path.open("rb") as file:
        yield file.read(parcels.CHUNK)
        while data := file.read(parcels.CHUNK):
            yield data
