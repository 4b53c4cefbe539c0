"""What a measurement depends on besides the code: runs whose fingerprints differ are never compared."""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from importlib import metadata
from pathlib import Path

from sandbox import gpu

RULER = ("score.py", "serve_batches.py")
"""The files that decide what a number means: a change of one voids old scores."""


def fingerprint(device: str) -> dict[str, str]:
    """device, driver, torch, python, ruler. torch is not imported, only its installed version is read."""
    number = gpu.index(device)
    found = gpu.find(number) if number is not None else None
    return {
        "device": found.name if found is not None else _processor() if number is None else device,
        "driver": found.driver if found is not None else "",
        "torch": _version("torch"),
        "python": platform.python_version(),
        "ruler": ruler(),
    }


@functools.cache
def ruler() -> str:
    """Short hash over the contents of the files that make the number."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in RULER)).hexdigest()[:12]


def _processor() -> str:
    """Model name of the CPU, as /proc/cpuinfo gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return names[0] if names else f"{platform.machine()} {sys.platform}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
