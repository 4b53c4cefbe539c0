"""What a job needs of its caller's disk, and what it leaves: sent between machines that share no folder.

A *parcel* is a file or a folder that a Job names by its path. On the way it is named by its content (sha256), so that
a machine keeps each one once and asks only for what it lacks. ``named`` puts any other names into a Job, on both ends.

Does not cover: ``Job.data`` (a foreign repo's own data, which must lie at the same path on every machine), and links:
in a folder only plain files count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox.job import Job, write_atomically

CHUNK = 32 << 20
"""Bytes that are sent at once."""
STAYS = {"job.json", "result.json", "supervisor.pid", "progress.json"}
"""Files of a job folder that are not brought home as they are: result and progress come by themselves."""
INTERPRETER = "interpreter:"


@dataclass(frozen=True, slots=True)
class Parcel:
    """A file (``parts`` has the one name ``.``) or a folder, by the names, sizes and modes of its files."""

    name: str
    origin: Path
    parts: tuple[tuple[str, int, int], ...]

    @property
    def folder(self) -> bool:
        return self.name.startswith("folder-")


class Packer:
    """Names the parcels of jobs. A file is read again only when its size or time of change is another."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int], str] = {}

    def pack(self, job: Job) -> tuple[Job, list[Parcel]]:
        """(the job with each path replaced by its parcel's name, the parcels). Raises OSError for a missing file."""
        parcels: dict[str, Parcel] = {}

        def name(path: str, bulk: bool) -> str:
            parcel = self._parcel(Path(path), bulk)
            parcels[parcel.name] = parcel
            return parcel.name

        return named(dataclasses.replace(job, hidden=tuple(map(_portable, job.hidden))), name), list(parcels.values())

    def _parcel(self, path: Path, bulk: bool) -> Parcel:
        if not path.is_dir():
            return Parcel(f"file-{self._digest(path)}", path, ((".", path.stat().st_size, 0o644),))
        found = sorted(path.glob("bulk-*.npy")) if bulk else sorted(plain_files(path))
        whole, parts = hashlib.sha256(), []
        for file in found:
            inner, facts = str(file.relative_to(path)), file.stat()
            whole.update(f"{inner}\0{facts.st_mode & 0o111:o}\0{self._digest(file)}\0".encode())
            parts.append((inner, facts.st_size, 0o755 if facts.st_mode & 0o111 else 0o644))
        return Parcel(f"folder-{whole.hexdigest()}", path, tuple(parts))

    def _digest(self, path: Path) -> str:
        facts = path.stat()
        key = (str(path), facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if key not in self._known:
            with path.open("rb") as file:
                self._known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._known[key]


def named(job: Job, name: Callable[[str, bool], str]) -> Job:
    """``job`` with every path that is a parcel renamed. ``name`` is told whether only a folder's bulk answers count."""

    def plain(path: str) -> str:
        return name(path, False) if path else ""

    def bulk(path: str) -> str:
        return name(path, True) if path else ""

    batches, evaluation = job.batches, job.evaluation
    if batches is not None:
        batches = dataclasses.replace(batches, tokens=plain(batches.tokens))
    if evaluation is not None:
        evaluation = dataclasses.replace(
            evaluation, splits={split: plain(path) for split, path in evaluation.splits.items()},
            token_bytes=plain(evaluation.token_bytes), overlay=plain(evaluation.overlay))
    return dataclasses.replace(
        job, source=plain(job.source), twin_source=plain(job.twin_source), weights=plain(job.weights),
        bulk=bulk(job.bulk), reference=bulk(job.reference), compile_cache=plain(job.compile_cache), batches=batches,
        evaluation=evaluation)


def _portable(hidden: str) -> str:
    """A hidden file of the interpreter by its place in it: the other machine's may be installed elsewhere."""
    for root, folder in _interpreter():
        if Path(hidden).is_relative_to(folder):
            return f"{INTERPRETER}{root}:{Path(hidden).relative_to(folder)}"
    return hidden


def local(hidden: str) -> str:
    """The other way: where that file lies on this machine."""
    if not hidden.startswith(INTERPRETER):
        return hidden
    root, _, inner = hidden.removeprefix(INTERPRETER).partition(":")
    return str(Path(dict(_interpreter())[root]) / inner)


def _interpreter() -> list[tuple[str, str]]:
    paths = sysconfig.get_paths()
    return [*((root, paths[root]) for root in ("purelib", "platlib", "stdlib", "platstdlib")),
            ("prefix", sys.prefix), ("base", sys.base_prefix)]


def plain_files(folder: Path) -> Iterator[Path]:
    """Every plain file below ``folder``; links are neither followed nor told."""
    for where, _, names in os.walk(folder):
        for inner in names:
            path = Path(where, inner)
            if path.is_file() and not path.is_symlink():
                yield path


class Store:
    """Parcels on the machine that runs the jobs, each under its name. Several processes may use one folder.

    Held-out text is in it, so single files lie in a folder that only this user may enter. Folders must be readable for
    the job, which at level 1 has another user id.
    """

    def __init__(self, root: Path) -> None:
        self._files, self._folders = root / "files", root / "folders"
        self._files.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folders.mkdir(parents=True, exist_ok=True, mode=0o755)

    def place(self, name: str) -> Path:
        """Where the parcel lies, or will."""
        return (self._folders if name.startswith("folder-") else self._files) / name

    def has(self, name: str) -> bool:
        return self.place(name).exists()

    def put(self, name: str, mark: str, inner: str, mode: int, data: bytes | memoryview) -> None:
        """Append ``data`` to a file of the parcel that the sender ``mark`` is bringing."""
        path = self._coming(name, mark) / inner if inner != "." else self._coming(name, mark)
        if os.path.isabs(inner) or ".." in Path(inner).parts:
            raise ValueError(f"{inner!r} leaves its folder")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        with path.open("ab") as file:
            file.write(data)
        path.chmod(mode)

    def done(self, name: str, mark: str) -> None:
        """All of it is here: it appears whole. A parcel that another sender brought meanwhile stays."""
        coming = self._coming(name, mark)
        if name.startswith("folder-"):
            coming.mkdir(exist_ok=True, mode=0o755)  # an empty one
        else:
            with coming.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != name.removeprefix("file-"):
                coming.unlink()
                raise ValueError(f"{name} arrived as {found}")
        try:
            coming.rename(self.place(name))
        except OSError:
            if not self.has(name):
                raise
            shutil.rmtree(coming, ignore_errors=True)

    def _coming(self, name: str, mark: str) -> Path:
        return self.place(name).with_name(f".{mark}-{name}")


def leavings(folder: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, mode) of each file that an ended job leaves for its caller."""
    return [(str(path.relative_to(folder)), (facts := path.stat()).st_size, facts.st_mode & 0o777)
            for path in plain_files(folder) if path.name not in STAYS and not path.name.startswith(".")]


def bring(folder: Path, inner: str, mode: int, chunks: Iterator[bytes]) -> None:
    """Write one of an ended job's leavings into its caller's job folder, whole or not at all."""
    path = folder / inner
    if os.path.isabs(inner) or ".." in Path(inner).parts:
        raise ValueError(f"{inner!r} leaves its folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, b"".join(chunks))
    path.chmod(mode)
