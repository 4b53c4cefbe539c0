"""The trees of a git repository: what they hold is read, written and compared here, without a work tree.

Trees are written through a temporary index and read with ``cat-file``: no filter, no attribute, no checkout. What a
full object id names never changes, so it is read once and remembered: a candidate's preparation asks for the files of
its base ten times, and each answer of git costs a process.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent import git
from agent.errors import UserError
from agent.git import GitError, matches, run

IGNORED = ("__pycache__", ".git", "data", "*.pyc")
FILE_MODES = ("100644", "100755")
_ABSENT = re.compile("Not a valid object name|not a tree object")
"""What git says of a path that is no folder of a tree. Any other failure is one, and no empty folder."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One leaf of a tree."""

    mode: str
    sha: str
    path: str


@dataclass(frozen=True, slots=True)
class Change:
    """One line of ``git diff-tree --raw``. Modes are six digits, ``000000`` where the file does not exist."""

    path: str
    old_mode: str
    new_mode: str
    old_sha: str
    new_sha: str
    status: str


def entries(repo: Path, treeish: str, prefix: str = "") -> list[Entry]:
    """All leaves below ``prefix``, with paths relative to it, sorted by git. Empty when there is no such folder."""
    try:
        return list((_lasting_leaves if git.FULL_ID.match(treeish) else _leaves)(repo, treeish, prefix))
    except GitError as error:
        if not prefix or not _ABSENT.search(error.stderr) or git.resolve(repo, treeish, "tree") is None:
            raise
        return []


def _leaves(repo: Path, treeish: str, prefix: str) -> tuple[Entry, ...]:
    out = run(repo, "ls-tree", "-r", "-z", "--full-tree", f"{treeish}:{prefix}" if prefix else treeish)
    found = []
    for line in git.fields(out):
        head, path = line.split("\t", 1)
        mode, _, sha = head.split(" ")
        found.append(Entry(mode, sha, path))
    return tuple(found)


_lasting_leaves = functools.lru_cache(maxsize=8)(_leaves)


def list_files(repo: Path, commit: str, prefix: str = "") -> list[str]:
    """Paths of the regular files below ``prefix``, relative to it."""
    return [entry.path for entry in entries(repo, commit, prefix) if entry.mode in FILE_MODES]


def read_files(repo: Path, commit: str, prefix: str, patterns: Sequence[str]) -> dict[str, str]:
    """Path -> text of the matching regular files below ``prefix``, line ends kept; what is not UTF-8 is left out."""
    chosen = [entry for entry in entries(repo, commit, prefix)
              if entry.mode in FILE_MODES and matches(entry.path, patterns)]
    content = blobs(repo, (entry.sha for entry in chosen))
    texts: dict[str, str] = {}
    for entry in chosen:
        with contextlib.suppress(UnicodeDecodeError):
            texts[entry.path] = content[entry.sha].decode("utf-8")
    return texts


def blobs(repo: Path, shas: Iterable[str]) -> dict[str, bytes]:
    """Blob id -> bytes as they are stored. Raises GitError when one is missing."""
    wanted = list(dict.fromkeys(shas))
    found = _KEPT.known(repo, wanted)
    missing = [sha for sha in wanted if sha not in found]
    if missing:
        read = _read(repo, missing)
        _KEPT.keep(repo, read)
        found |= read
    return {sha: found[sha] for sha in wanted}


def _read(repo: Path, shas: Sequence[str]) -> dict[str, bytes]:
    out = run(repo, "cat-file", "--batch", stdin="".join(f"{sha}\n" for sha in shas).encode())
    found, at = {}, 0
    for sha in shas:
        end = out.index(b"\n", at)
        words = out[at:end].split(b" ")
        if len(words) != 3 or words[1] != b"blob":
            raise GitError(("cat-file", sha), 0, f"{sha} is no blob here")
        size = int(words[2])
        found[sha] = out[end + 1:end + 1 + size]
        at = end + size + 2
    return found


class _Kept:
    """Blobs that were read, by repository and id; the ones not asked for longest are dropped. For threads."""

    ROOM, LARGEST = 32 * 2**20, 2**20
    """Bytes of all, and of the largest one that is kept."""

    def __init__(self) -> None:
        self._blobs: OrderedDict[tuple[Path, str], bytes] = OrderedDict()
        self._used, self._lock = 0, threading.Lock()

    def known(self, repo: Path, shas: Iterable[str]) -> dict[str, bytes]:
        found = {}
        with self._lock:
            for sha in shas:
                if (repo, sha) in self._blobs:
                    self._blobs.move_to_end((repo, sha))
                    found[sha] = self._blobs[repo, sha]
        return found

    def keep(self, repo: Path, read: Mapping[str, bytes]) -> None:
        with self._lock:
            for sha, content in read.items():
                if len(content) <= self.LARGEST and (repo, sha) not in self._blobs:
                    self._blobs[repo, sha] = content
                    self._used += len(content)
            while self._used > self.ROOM:
                self._used -= len(self._blobs.popitem(last=False)[1])


_KEPT = _Kept()


def diff(repo: Path, a: str, b: str, prefix: str = "") -> str:
    """Unified diff of two trees or commits, paths relative to ``prefix``; renames as delete and add, never coloured."""
    scope = [f"--relative={prefix}/"] if prefix else []
    return run(repo, "diff-tree", "-r", "-p", "--text", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-color",
               *scope, a, b).decode("utf-8", "replace")


def diff_raw(repo: Path, a: str, b: str) -> list[Change]:
    """What differs between two trees or commits, paths from the root of the tree."""
    lasting = git.FULL_ID.match(a) and git.FULL_ID.match(b)
    return list((_lasting_changes if lasting else _changes)(repo, a, b))


def _changes(repo: Path, a: str, b: str) -> tuple[Change, ...]:
    fields = git.fields(run(repo, "diff-tree", "-r", "--raw", "-z", "--no-renames", "--no-abbrev", a, b))
    found = []
    for head, path in zip(fields[::2], fields[1::2], strict=True):
        old_mode, new_mode, old_sha, new_sha, status = head.removeprefix(":").split(" ")
        found.append(Change(path, old_mode, new_mode, old_sha, new_sha, status))
    return tuple(found)


_lasting_changes = functools.lru_cache(maxsize=64)(_changes)


def import_folder(folder: Path, destination: Path, ignored: Sequence[str] = IGNORED) -> str:
    """A bare repository with one commit of the files of ``folder``, which need not be in git. Returns the commit.

    Deterministic: equal bytes under equal names give the equal commit (fixed date, every mode 100644). Names that
    match a glob of ``ignored`` are left out at any depth, and so are symlinks. A destination that exists is kept.
    """
    if destination.exists():
        return git.one_line(run(destination, "rev-list", "--max-parents=0", git.ACCEPTED))
    paths = sorted(_walk(folder, ignored))
    if not paths:
        raise UserError(f"{folder} holds no files.", "Give the folder of a training repo.")
    with git.new_repository(destination, "sha1") as repo:
        shas = run(repo, "--work-tree", str(folder), "hash-object", "-w", "--no-filters", "--stdin-paths",
                   stdin="".join(f"{folder.resolve() / path}\n" for path in paths).encode()).decode().split()
        entries = [Entry("100644", sha, path) for sha, path in zip(shas, paths, strict=True)]
        commit = git.commit_tree(repo, _write_index(repo, None, entries), (), "Start\n", when=git.FIXED_DATE)
        git.update_ref(repo, git.ACCEPTED, commit, "")
    return commit


def materialise(repo: Path, tree: str, prefix: str, destination: Path) -> None:
    """Write the files below ``prefix`` of ``tree`` (or commit) to ``destination``: files 0444, folders 0755.

    Appears whole or not at all; a destination that exists is complete and is left as it is. Submodules are
    left out, and so are symlinks that are absolute or could lead out of the folder.
    """
    if destination.is_dir() and any(destination.iterdir()):
        return
    leaves = entries(repo, tree, prefix)
    if not leaves:
        raise GitError(("ls-tree", tree), 0, f"no files below {prefix!r}")
    _check_paths(leaves)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with git.whole(destination, destination.parent) as folder:
        for start in range(0, len(leaves), 256):  # bounds memory
            part = [leaf for leaf in leaves[start:start + 256] if leaf.mode in (*FILE_MODES, "120000")]
            content = blobs(repo, (leaf.sha for leaf in part))
            for leaf in part:
                _write_leaf(folder, leaf, content[leaf.sha])
        for parent, _, _ in os.walk(folder):
            Path(parent).chmod(0o755)


def write_tree(repo: Path, base: str, prefix: str, changes: Mapping[str, bytes | None]) -> str:
    """The tree of ``base`` with ``changes`` (path below ``prefix`` -> new bytes, None deletes) laid over it.

    A file that exists keeps its mode, a new one gets 100644. Returns the tree's id. Raises GitError when git refuses
    a path (``..``, ``.git``, below a file).
    """
    modes = {entry.path: entry.mode for entry in entries(repo, base, prefix)}
    nothing = "0" * len(git.resolve(repo, base, "tree") or "")  # 40 digits, or 64 in a SHA-256 repository
    names = modes.keys() | {path for path, content in changes.items() if content is not None}
    leaves = []
    for path, content in changes.items():
        if any(path[:at] in names for at, letter in enumerate(path) if letter == "/"):
            raise GitError(("write-tree",), 0, f"{path!r} lies below a file")  # update-index would drop that file
        where = f"{prefix}/{path}" if prefix else path
        if content is None:
            leaves.append(Entry("0", nothing, where))
        else:
            sha = git.one_line(run(repo, "hash-object", "-w", "-t", "blob", "--stdin", stdin=content))
            leaves.append(Entry(modes.get(path, "100644"), sha, where))
    return _write_index(repo, base, leaves)


def stays_inside(path: str, target: str) -> bool:
    """Can a symlink at ``path`` never lead out of the folder? ``..`` counts only in front: after a name it could
    climb out through another link (``d -> .`` makes ``d/../x`` leave the folder)."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    up = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    return not target.startswith("/") and bool(parts) and up <= path.count("/") and ".." not in parts[up:]


def _write_index(repo: Path, base: str | None, leaves: Iterable[Entry]) -> str:
    """Tree id of ``base`` (None: empty) with ``leaves`` laid over it, by way of a temporary index."""
    leaves = list(leaves)
    _check_paths(leaves)  # update-index drops such a path with exit status 0
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        run(repo, "read-tree", *([base] if base else ["--empty"]), environment=index)
        lines = "".join(f"{leaf.mode} {leaf.sha}\t{leaf.path}\0" for leaf in leaves)
        run(repo, "update-index", "-z", "--index-info", stdin=lines.encode(), environment=index)
        return git.one_line(run(repo, "write-tree", environment=index))


def _check_paths(leaves: Iterable[Entry]) -> None:
    for leaf in leaves:
        if any(part.casefold() in ("", ".", "..", ".git") for part in leaf.path.split("/")):
            raise GitError(("write-tree",), 0, f"unsafe path in a tree: {leaf.path!r}")


def _write_leaf(folder: Path, leaf: Entry, content: bytes) -> None:
    path = folder / leaf.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if leaf.mode != "120000":
        with path.open("xb") as file:
            file.write(content)
        path.chmod(0o555 if leaf.mode == "100755" else 0o444)
    elif stays_inside(leaf.path, os.fsdecode(content)):
        path.symlink_to(os.fsdecode(content))


def _walk(folder: Path, ignored: Sequence[str]) -> Iterator[str]:
    """Relative POSIX paths of the regular files of a folder."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not any(fnmatch.fnmatch(name, glob) for glob in ignored)]
        for name in names:
            path = Path(parent) / name
            if path.is_file() and not path.is_symlink() and not any(fnmatch.fnmatch(name, glob) for glob in ignored):
                yield path.relative_to(folder).as_posix()
