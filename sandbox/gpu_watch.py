"""Is the GPU fit to measure on? Looked at through NVML while a job runs, and again before a slot that rested works.

Three things void a run on it, whatever the job's code did (fault ``infra``):
- *lost*: the driver says that the GPU is gone or must be reset, or reports an Xid that no program causes by itself.
- *stranger*: a process that is not of this campaign computes there, in two looks one after the other.
- *slowed*: in a fifth of the looks, and three at least, heat or the power supply had the clocks lowered. The cap on
  power (``SwPowerCap``) is no reason: a GPU at full load is always at it.

Whose a process is. In the machine's own PID namespace (no container) the pids of NVML can be looked up: ours are those
below a supervisor whose job folder lies beside this one's. In a container they cannot, so there a stranger is a process
that computes on the GPU before the job's box is made and stays, and only where no two jobs of the campaign share it.

Does not cover: a stranger that comes in the middle of a run in a container; one in a virtual machine beside ours; MIG;
machines without NVML (nvidia-smi alone), where nothing is looked at. Xids that programs cause (an illegal address, a
fault of the MMU) stay the job's, or a crashing patch would be tried for ever.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox import gpu, process

PROGRAMS_XIDS = frozenset({13, 31, 43, 45, 68, 109})
"""Xids after which the GPU itself is healthy; the same as NVIDIA's k8s-device-plugin leaves out."""
SLOWING = {"HwSlowdown": 0x8, "SwThermalSlowdown": 0x20, "HwThermalSlowdown": 0x40, "HwPowerBrakeSlowdown": 0x80}
"""Bits of nvmlClocksEventReasons (nvml.h) that are no normal state under load."""
LOST = {15: "it is lost (fallen off the bus)", 16: "it must be reset"}
"""NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED."""
NVML_ERROR_TIMEOUT = 10
SLOWED_SHARE, SLOWED_LEAST, STRANGER_LOOKS = 0.2, 3, 2
IN_USE = 0.05
"""Utilisation above which a look's clock counts."""
INITIAL_NAMESPACE = 0xEFFFFFFC
"""Inode of the first PID namespace (PROC_PID_INIT_INO, include/linux/proc_ns.h)."""
SERVANTS = ("nvidia-cuda-mps",)
"""Beginnings of the names of processes that compute for others."""


@dataclass(frozen=True, slots=True)
class Look:
    """One reading of one GPU. What the driver does not tell is None, 0 or empty."""

    busy: float | None = None
    clock_mhz: float = 0.0
    memory_mb: float = 0.0
    slowed: tuple[str, ...] = ()
    pids: frozenset[int] = frozenset()
    trouble: str = ""
    """Why the GPU can no longer be used."""


@dataclass(slots=True)
class Watched:
    """One GPU of a job."""

    card: gpu.Gpu
    handle: Any
    events: Any = None
    before: frozenset[int] = frozenset()
    """Pids that computed on it before the job began."""
    strangers: dict[int, int] = field(default_factory=dict)
    """Looks in a row in which a stranger was there, by pid."""
    slowed: dict[str, int] = field(default_factory=dict)


class Watch:
    """The GPUs of one job. ``look`` every few seconds; then ``complaint`` says what is wrong with one, if anything is.

    Never raises for a GPU's sake.
    """

    def __init__(self, cards: Sequence[gpu.Gpu], nvml: Any, ours: Callable[[int], bool | None],
                 shared: bool = False) -> None:
        """``nvml``: pynvml, or what has its shape. ``ours``: whether a pid belongs to this campaign; None: it cannot be
        told. ``shared``: other jobs of the campaign may use these GPUs meanwhile."""
        self._nvml, self._ours, self._shared = nvml, ours, shared
        self._gpus: list[Watched] = []
        self._busy: list[float] = []
        self._clocks: list[float] = []
        self._looks = 0
        self.memory_mb = 0.0
        """Highest sum over the GPUs."""
        self.complaint = ""
        for card in cards:
            try:
                one = Watched(card, nvml.nvmlDeviceGetHandleByUUID(card.uuid))
            except nvml.NVMLError as error:
                self._complain(card, LOST.get(_code(error), f"NVML does not find it ({error})"))
                continue
            one.before = look(nvml, one.handle).pids
            with contextlib.suppress(nvml.NVMLError):  # not everywhere supported
                one.events = nvml.nvmlEventSetCreate()
                nvml.nvmlDeviceRegisterEvents(one.handle, nvml.nvmlEventTypeXidCriticalError, one.events)
            self._gpus.append(one)

    @property
    def busy(self) -> float | None:
        """Mean utilisation over the looks and the GPUs, 0 to 1."""
        return statistics.fmean(self._busy) if self._busy else None

    @property
    def clock_mhz(self) -> float:
        """Median clock of the looks in which a GPU was in use."""
        return statistics.median(self._clocks) if self._clocks else 0.0

    def look(self) -> None:
        """Read every GPU once."""
        self._looks += 1
        memory = 0.0
        for one in self._gpus:
            seen = look(self._nvml, one.handle)
            memory += seen.memory_mb
            if seen.busy is not None:
                self._busy.append(seen.busy)
                if seen.busy > IN_USE and seen.clock_mhz:
                    self._clocks.append(seen.clock_mhz)
            for reason in seen.slowed:
                one.slowed[reason] = one.slowed.get(reason, 0) + 1
            strangers = self._strangers(one, seen.pids)
            one.strangers = {pid: one.strangers.get(pid, 0) + 1 for pid in strangers}
            xid = self._xid(one)
            if seen.trouble or xid:
                self._complain(one.card, seen.trouble or f"the driver reported Xid {xid}")
            staying = [pid for pid, looks in one.strangers.items() if looks >= STRANGER_LOOKS]
            if staying:
                self._complain(one.card, f"it is shared with a stranger ({named(staying[0])})")
        self.memory_mb = max(self.memory_mb, memory)

    def end(self) -> str:
        """A last look, and what is wrong over all of them; empty: the GPUs were fit to measure on."""
        self.look()
        for one in self._gpus:
            worst = max(one.slowed, key=lambda reason: one.slowed[reason], default="")
            if worst and one.slowed[worst] >= max(SLOWED_LEAST, SLOWED_SHARE * self._looks):
                self._complain(one.card, f"it was slowed down ({worst}) in {one.slowed[worst]} of {self._looks} looks")
            if one.events is not None:
                with contextlib.suppress(self._nvml.NVMLError):
                    self._nvml.nvmlEventSetFree(one.events)
        return self.complaint

    def _complain(self, card: gpu.Gpu, what: str) -> None:
        self.complaint = self.complaint or f"GPU {card.index}: {what}"

    def _strangers(self, one: Watched, pids: Iterable[int]) -> list[int]:
        told = {pid: self._ours(pid) for pid in pids}
        return [pid for pid, mine in told.items()
                if mine is False or (mine is None and not self._shared and pid in one.before)]

    def _xid(self, one: Watched) -> int:
        """The Xid of the device that came since the last look; 0: none."""
        if one.events is None:
            return 0
        while True:
            try:
                data = self._nvml.nvmlEventSetWait_v2(one.events, 0)
            except self._nvml.NVMLError as error:
                if _code(error) != NVML_ERROR_TIMEOUT:
                    one.events = None
                return 0
            if int(data.eventData) not in PROGRAMS_XIDS:
                return int(data.eventData)


def look(nvml: Any, handle: Any) -> Look:
    """Read one GPU. What it does not support is left out; that it is gone is in the look."""
    trouble = ""

    def read(name: str, *words: Any) -> Any:
        nonlocal trouble
        try:
            return getattr(nvml, name)(handle, *words)
        except nvml.NVMLError as error:
            trouble = trouble or LOST.get(_code(error), "")
            return None

    memory, rates = read("nvmlDeviceGetMemoryInfo"), read("nvmlDeviceGetUtilizationRates")
    clock = read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)
    reasons, processes = int(read("nvmlDeviceGetCurrentClocksThrottleReasons") or 0), read(
        "nvmlDeviceGetComputeRunningProcesses")
    return Look(rates.gpu / 100 if rates is not None else None, float(clock or 0),
                memory.used / 2**20 if memory is not None else 0.0,
                tuple(name for name, bit in SLOWING.items() if reasons & bit),
                frozenset(int(one.pid) for one in processes or ()), trouble)


def watch(device: str, jobs: Path, shared: bool) -> Watch | None:
    """A watch over a job's GPUs; None where it has none, or nobody can be asked. ``jobs``: the folder of the campaign's
    job folders."""
    cards = gpu.cards(device)
    nvml = gpu.nvml() if cards else None
    return Watch(cards, nvml, lambda pid: belongs(pid, jobs), shared) if nvml is not None else None


def ask(device: str, jobs: Path, shared: bool, nvml: Any = None) -> str:
    """What is wrong with an idle device now; empty: it may work again, as far as can be told."""
    nvml = nvml or gpu.nvml()
    if nvml is None:
        return ""
    for card in gpu.cards(device):
        try:
            seen = look(nvml, nvml.nvmlDeviceGetHandleByUUID(card.uuid))
        except nvml.NVMLError as error:
            return f"GPU {card.index}: {LOST.get(_code(error), f'NVML does not find it ({error})')}"
        told = {pid: belongs(pid, jobs) for pid in seen.pids}
        strangers = [pid for pid, mine in told.items() if mine is False or (mine is None and not shared)]
        if seen.trouble or seen.slowed or strangers:
            why = seen.trouble or (f"it is shared with a stranger ({named(strangers[0])})" if strangers else
                                   f"it is slowed down ({seen.slowed[0]})")
            return f"GPU {card.index}: {why}"
    return ""


def belongs(pid: int, jobs: Path) -> bool | None:
    """Whether a process stands below a supervisor of a job in the folder ``jobs``; None: it cannot be told here."""
    if not _initial_namespace():
        return None
    own, itself = os.fsencode(str(jobs.resolve())) + b"/", os.getpid()
    for _ in range(64):
        if pid <= 1:
            return False
        words = _words(pid)
        if any(words[i:i + 2] == [b"-m", b"sandbox.supervisor"] for i in range(len(words))):
            return any(word.startswith(own) for word in words)
        if any(word.startswith(tuple(name.encode() for name in SERVANTS)) for word in
               (part.rpartition(b"/")[2] for part in words[:1])):
            return True
        found = process.stat(pid)
        if found is None:
            return None  # gone meanwhile
        pid = found.parent
        if pid == itself:  # whoever asks is the supervisor of the job
            return True
    return False


def named(pid: int) -> str:
    """``pid 4242, python3`` as far as that is known."""
    words = _words(pid)
    name = words[0].rpartition(b"/")[2].decode(errors="replace")[:40] if words else ""
    return f"pid {pid}, {name}" if name and name.isprintable() else f"pid {pid}"


def _words(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return []


def _initial_namespace() -> bool:
    try:
        return os.stat("/proc/self/ns/pid").st_ino == INITIAL_NAMESPACE
    except OSError:
        return False


def _code(error: Any) -> int:
    return int(getattr(error, "value", 0))
