"""Digests of prepared data: a file that a power cut, a full disk or a failing disk changed is found before it is used.

``seal`` writes ``sums.json`` beside the files; ``broken`` compares. Looking at sizes and times costs nothing, so it is
done at every start; the bytes are read where those differ, or when asked for (``thorough``). Folders that were prepared
before there were sums are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from sandbox.job import write_atomically

SUMS = "sums.json"


def seal(folder: Path) -> None:
    """Note size, time (ns) and SHA-256 of every file in ``folder``."""
    facts = {path.name: [path.stat().st_size, path.stat().st_mtime_ns, _digest(path)]
             for path in sorted(folder.iterdir()) if path.is_file()}
    write_atomically(folder / SUMS, json.dumps(facts).encode())


def broken(folder: Path, thorough: bool = False) -> str:
    """Name of the first file that is gone or not what was sealed; empty: none."""
    try:
        facts = json.loads((folder / SUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except ValueError:
        return SUMS
    for name, (size, time, digest) in facts.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return str(name)
        if (thorough or path.stat().st_mtime_ns != time) and _digest(path) != digest:
            return str(name)
    return ""


def discard(folder: Path) -> None:
    """Out of the way at once, also where another process looks for it; then removed."""
    aside = folder.with_name(f"old-{folder.name}-{os.getpid()}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
