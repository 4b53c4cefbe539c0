"""What the box needs to know of an NVIDIA GPU, without importing torch: its node, its libraries, its memory.

``cuda:N`` counts as nvidia-smi does; ``cuda:N+M`` is a group of GPUs that one job uses together. The device node's
number (``/dev/nvidiaM``) is the driver's minor number, which differs from N in a container that was given some of a
host's GPUs.
"""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIBRARY_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib64", "/usr/lib/x86_64-linux-gnu",
                   "/usr/lib/aarch64-linux-gnu", "/usr/lib/wsl/lib", "/run/opengl-driver/lib")
SHARED_NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-caps")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the driver describes it."""

    index: int
    uuid: str
    minor: int
    name: str
    driver: str


def indices(device: str) -> tuple[int, ...]:
    """N, M, ... of ``cuda:N+M+...`` (0 for ``cuda``), also of ``ENGINE:MACHINE:cuda:N``; empty for any other device."""
    found = re.fullmatch(r"(?:.*:)?cuda(?::(\d+(?:\+\d+)*))?", device)
    return tuple(int(word) for word in (found.group(1) or "0").split("+")) if found else ()


def index(device: str) -> int | None:
    """The first GPU of ``device``; None where it has none."""
    return next(iter(indices(device)), None)


def count(device: str) -> int:
    """GPUs of ``device``; 1 for any other device."""
    return len(indices(device)) or 1


def cards(device: str) -> tuple[Gpu, ...]:
    """The GPUs of ``device`` that nvidia-smi finds."""
    return tuple(card for number in indices(device) if (card := find(number)) is not None)


@functools.cache
def find(number: int) -> Gpu | None:
    """GPU ``number`` by nvidia-smi, or None when there is none. Cached: the hardware does not change under a job."""
    try:
        text = subprocess.run(["nvidia-smi", "-q", "-i", str(number)], capture_output=True, text=True, timeout=60,
                              check=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.SubprocessError):
        return None

    def field(name: str, otherwise: str) -> str:
        found = re.search(rf"^\s*{name}\s*:\s*(.+?)\s*$", text, re.MULTILINE)
        return found.group(1) if found else otherwise

    minor = field("Minor Number", str(number))
    return Gpu(number, field("GPU UUID", ""), int(minor) if minor.isdigit() else number,
               field("Product Name", "unknown"), field("Driver Version", "unknown"))


MOST = 64
"""GPUs of one machine at most."""


def found() -> tuple[list[Gpu], int]:
    """(the GPUs that answer nvidia-smi, how many more the driver lists). One that has fallen off the bus is still
    listed; without NVML the first that does not answer is taken for the end of them."""
    module = nvml()
    if module is None:
        answering: list[Gpu] = []
        while len(answering) < MOST and (card := find(len(answering))) is not None:
            answering.append(card)
        return answering, 0
    listed = int(module.nvmlDeviceGetCount())
    answering = [card for number in range(listed) if (card := find(number)) is not None]
    return answering, listed - len(answering)


def nodes(gpus: Iterable[Gpu]) -> tuple[str, ...]:
    """Device nodes of exactly these GPUs, and those that all share; none without a GPU."""
    own = tuple(f"/dev/nvidia{gpu.minor}" for gpu in gpus)
    return (*SHARED_NODES, *own) if own else ()


def library_folders(hints: Iterable[str]) -> tuple[tuple[str, ...], bool]:
    """(folders of the driver's libraries, whether the loader's cache already lists libcuda).

    ``hints`` are the caller's LD_LIBRARY_PATH entries: in containers the driver is often mounted beside the system.
    """
    try:
        cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        cache = ""
    cached = re.findall(r"libcuda\.so\.1 .*=> (\S+)", cache)
    if cached:
        return tuple(dict.fromkeys(str(Path(path).parent) for path in cached)), True
    places = [folder for folder in (*hints, *LIBRARY_FOLDERS) if (Path(folder) / "libcuda.so.1").exists()]
    return tuple(dict.fromkeys(places)), False


def nvml() -> Any:
    """The module ``pynvml``, ready to be asked; None where there is no driver. The only place that opens NVML."""
    try:
        module = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        module.nvmlInit()
    except module.NVMLError:
        return None
    return module


def memory_reader(gpu: Gpu) -> Callable[[], float]:
    """A function that tells the MiB in use on the GPU: through NVML where it is there, else nvidia-smi."""
    module = nvml()
    if module is None:
        return lambda: _smi_memory_mb(gpu)
    try:
        handle = module.nvmlDeviceGetHandleByUUID(gpu.uuid)
    except module.NVMLError:
        return lambda: _smi_memory_mb(gpu)
    return lambda: float(module.nvmlDeviceGetMemoryInfo(handle).used) / 2**20


def _smi_memory_mb(gpu: Gpu) -> float:
    try:
        text = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i",
                               str(gpu.index)], capture_output=True, text=True, timeout=20, check=True).stdout
        return float(text.strip().splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0.0
