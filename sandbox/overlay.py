"""The source under test with the protected files of the base commit laid over it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def merge(source: Path, top: Path, target: Path) -> Path:
    """Copy ``source`` to ``target``, replace what ``top`` has, and return ``target``.

    Nothing is written through a link that the source may contain, and stored bytecode is dropped: an unchecked
    ``.pyc`` would be imported instead of the restored file.
    """
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    for place, _, names in os.walk(top):
        inner = target / Path(place).relative_to(top)
        if inner.is_symlink() or (inner.exists() and not inner.is_dir()):
            inner.unlink()
        inner.mkdir(exist_ok=True, mode=0o755)
        for name in names:
            file = inner / name
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            elif file.is_symlink() or file.exists():
                file.unlink()
            shutil.copyfile(Path(place, name), file, follow_symlinks=False)
    return target
