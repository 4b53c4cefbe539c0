"""What a measurement depends on besides the code: runs whose fingerprints differ are never compared."""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

from sandbox import gpu

RULER = ("score.py", "serve_batches.py")
"""The files that decide what a number means: a change of one voids old scores."""


def fingerprint(device: str) -> dict[str, str]:
    """device, driver, torch, python, ruler. torch is not imported, only its installed version is read."""
    cards = gpu.cards(device)
    return {
        "device": _names(cards) if cards else _processor() if gpu.index(device) is None else device,
        "driver": cards[0].driver if cards else "",
        "torch": _version("torch"),
        "python": platform.python_version(),
        "ruler": ruler(),
    }


def _names(cards: tuple[gpu.Gpu, ...]) -> str:
    """``NVIDIA H100``, ``2 x NVIDIA H100``, or both kinds of a mixed group."""
    counts = Counter(card.name for card in cards)
    return " + ".join(name if len(cards) == 1 else f"{number} x {name}" for name, number in sorted(counts.items()))


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
