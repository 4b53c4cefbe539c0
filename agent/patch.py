"""Proposal -> Candidate: apply the edits in memory, write the tree, check the policy on it, make the branch.

All edits apply or none. A failed edit answers with the nearest real lines, so that a model can repair it. Nothing
here runs the code: that it parses is all that is known of it afterwards.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unidiff.patch import PatchSet

from agent import git, git_trees, matching
from agent.config import Source
from agent.policy import Changed, PatchRefused, check, check_effect, check_path, check_size, normalised_hash
from agent.records import Candidate, Edit, Patch, Proposal

__all__ = ["BRANCH", "PatchRefused", "applied", "build", "chain", "combine", "read_diff"]

BRANCH = "candidate/"
_HUNK = re.compile(r"@@(?:\s*-(\d+)(?:,\d+)?\s+\+\d+(?:,\d+)?\s*@@|.*)")
_ODD = {
    "rename from ": "renames a file", "rename to ": "renames a file", "copy from ": "copies a file",
    "copy to ": "copies a file", "old mode ": "changes a file's mode", "new mode ": "changes a file's mode",
    "GIT binary patch": "holds binary data", "Binary files ": "holds binary data",
    "similarity index ": "renames a file",
}
_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.|lock\b|$))*")


def build(
    repo: Path, prefix: str, base: str, proposal: Proposal, source: Source, when: datetime.datetime | None = None,
) -> Candidate:
    """A candidate on branch ``candidate/<id>``: one commit on ``base`` that holds the proposal's edits.

    ``prefix`` is the target's folder in the tree (empty: all of it). ``when`` dates the commit (None: now).
    Building the same proposal again replaces its branch. Raises PatchRefused, which is the proposal's fault.
    """
    if not _ID.fullmatch(proposal.id):
        raise ValueError(f"proposal id {proposal.id!r} cannot name a branch")
    weight = len(proposal.diff) + sum(len(edit.search) + len(edit.replace) for edit in proposal.edits)
    if weight > 8 * source.max_patch_kb * 1024:
        raise PatchRefused("size", f"the edits are {weight // 1024} KiB; the limit is {source.max_patch_kb}.")
    tree = applied(repo, prefix, base, proposal, source)
    changed = check(repo, base, tree, prefix, source)
    patch = _describe(repo, base, tree, prefix, changed)
    check_size(patch.added, patch.removed, patch.diff, source)
    check_effect(changed)
    message = f"{_printable(proposal.title)}\n\n{_printable(proposal.hypothesis)}\n"
    head = git.commit_tree(repo, tree, (base,), message, when)
    git.update_ref(repo, f"refs/heads/{BRANCH}{proposal.id}", head, None)
    return Candidate(proposal.id, f"{BRANCH}{proposal.id}", base, head, tree, patch)


def applied(repo: Path, prefix: str, base: str, proposal: Proposal, source: Source) -> str:
    """The tree of ``base`` with the proposal's edits made. Raises PatchRefused where they do not fit there."""
    files = Files(repo, base, prefix, source)
    if proposal.diff:
        apply_diff(files, proposal.diff)
    else:
        apply_edits(files, proposal.edits)
    return git_trees.write_tree(repo, base, prefix, files.changes())


def chain(
    repo: Path, prefix: str, base: str, parts: Sequence[Proposal], source: Source,
    when: datetime.datetime | None = None,
) -> str:
    """The last of a chain of commits on ``base``, one a part in the order given: each part's edits are made again on
    what the ones before it left. Raises PatchRefused where they do not fit there."""
    head = base
    for part in parts:
        text = (f"{_printable(part.title)}\n\n{_printable(part.hypothesis)}\n\nPart of a bundle: not certified alone."
                f"\n\nCandidate: {part.id}\n")
        head = git.commit_tree(repo, applied(repo, prefix, head, part, source), (head,), text, when)
    return head


def combine(
    repo: Path, prefix: str, base: str, proposal: Proposal, parts: Sequence[Proposal], source: Source,
    when: datetime.datetime | None = None,
) -> Candidate:
    """A candidate of several others' edits: ``chain`` of them. Raises PatchRefused, also where the whole breaks a rule
    that its parts keep."""
    head = chain(repo, prefix, base, parts, source, when)
    tree = git.resolve(repo, head, "tree") or ""
    changed = check(repo, base, tree, prefix, source)
    patch = _describe(repo, base, tree, prefix, changed)
    git.update_ref(repo, f"refs/heads/{BRANCH}{proposal.id}", head, None)
    return Candidate(proposal.id, f"{BRANCH}{proposal.id}", base, head, tree, patch)


class Files:
    """The target's files at the base with the edits so far laid over them. Text has LF ends here."""

    def __init__(self, repo: Path, base: str, prefix: str, source: Source) -> None:
        self._repo, self._prefix, self._source = repo, prefix, source
        self._entries = {entry.path: entry for entry in git_trees.entries(repo, base, prefix)}
        self._original: dict[str, str] = {}
        self._now: dict[str, str | None] = {}

    def name(self, path: str) -> str:
        """Path relative to the target: a leading ``./`` goes, and the target's own folder where someone wrote it."""
        path = path.strip().removeprefix("./")
        inner = path.removeprefix(f"{self._prefix}/") if self._prefix else path
        path = inner if path not in self._entries else path
        check_path(path, self._source)
        return path

    def has(self, path: str) -> bool:
        return path in self._entries

    def read(self, path: str) -> str | None:
        """Text now, or None when there is no such file. Raises PatchRefused for what is not a text file."""
        if path in self._now:
            return self._now[path]
        entry = self._entries.get(path)
        if entry is None:
            return None
        if entry.mode not in git_trees.FILE_MODES:
            raise PatchRefused("mode", f"{path} is a symlink or a submodule; only plain files may change.")
        try:
            self._original[path] = git_trees.blobs(self._repo, [entry.sha])[entry.sha].decode("utf-8")
        except UnicodeDecodeError as error:
            raise PatchRefused("binary", f"{path} is not UTF-8 text.") from error
        return matching.plain(self._original[path])

    def write(self, path: str, text: str | None) -> None:
        known = self._entries.keys() | self._now.keys()
        above = any(path[:at] in known for at, letter in enumerate(path) if letter == "/")
        if above or any(name.startswith(f"{path}/") for name in known):
            raise PatchRefused("path", f"{path} would be a file and a folder at once.")
        self._now[path] = None if text is None else matching.plain(text)

    def near(self, path: str) -> tuple[str, ...]:
        """Editable files with a like name, for a repair round."""
        names = [name for name in self._entries if git.matches(name, self._source.editable)]
        close = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or names[:8]
        return (f"Files there are: {', '.join(close) or 'none'}.",)

    def changes(self) -> dict[str, bytes | None]:
        """Path -> bytes of every file written, with its old line ends; None where it was deleted."""
        return {path: None if text is None else _bytes(path, matching.with_endings(text, self._original.get(path, "")))
                for path, text in self._now.items()}


def apply_edits(files: Files, edits: Iterable[Edit]) -> None:
    """Search/replace edits in order, each on what the ones before left. Raises PatchRefused at the first that fails."""
    for number, edit in enumerate(edits, start=1):
        try:
            _apply_edit(files, edit)
        except PatchRefused as error:
            raise PatchRefused(error.rule, f"edit {number}: {error.reason}", error.nearest) from error


def _apply_edit(files: Files, edit: Edit) -> None:
    path = files.name(edit.path)
    text = files.read(path)
    search, replacement = matching.plain(edit.search), matching.plain(edit.replace)
    if not search.strip():
        if text and text.strip():
            raise PatchRefused("match", f"{path} exists; quote the lines to replace.", ())
        files.write(path, replacement)
    elif text is None:
        raise PatchRefused("match", f"there is no file {path}.", files.near(path))
    else:
        files.write(path, matching.replace(text, search, replacement, path)[0])


def apply_diff(files: Files, diff: str) -> None:
    """A unified diff, however wrong its counts and line numbers. Raises PatchRefused at the first hunk that fails."""
    parts = read_diff(diff)
    if not parts:
        raise PatchRefused("match", "there is no file change in the patch.")
    for part in parts:
        _apply_file(files, part)


def _apply_file(files: Files, part: FileDiff) -> None:
    path = files.name(_existing(files, part))
    text = files.read(path)
    if part.creates:
        if text is not None:
            raise PatchRefused("match", f"{path} exists; the patch would create it.")
        lines = [line[1:] for hunk in part.hunks for line in hunk.lines if line.startswith("+")]
        files.write(path, "".join(f"{line}\n" for line in lines))
        return
    if text is None:
        raise PatchRefused("match", f"there is no file {path}.", files.near(path))
    drift = 0
    for number, hunk in enumerate(part.hunks, start=1):
        hint = None if hunk.start is None else hunk.start - 1 + drift
        try:
            new, _ = matching.apply_hunk(text, hunk.lines, path, hint)
        except PatchRefused as error:
            raise PatchRefused(error.rule, f"hunk {number}: {error.reason}", error.nearest) from error
        drift += new.count("\n") - text.count("\n")
        text = new
    if part.deletes and text.strip():
        raise PatchRefused("match", f"{path} is not empty after its deletion; the patch is for another version.")
    files.write(path, None if part.deletes else text)


def _existing(files: Files, part: FileDiff) -> str:
    """The file's name: git's ``a/`` and ``b/`` go, unless there is really such a folder."""
    name = part.path
    with_prefix = re.match(r"[abciow]/", name)
    return name[2:] if with_prefix and not files.has(name) else name


def _describe(repo: Path, base: str, tree: str, prefix: str, changed: tuple[Changed, ...]) -> Patch:
    """The Patch record: git's own diff of the two trees, counted by unidiff."""
    diff = git_trees.diff(repo, base, tree, prefix)
    counted = PatchSet.from_string(diff)
    leaves = "".join(f"{entry.mode} {entry.sha} {entry.path}\n" for entry in git_trees.entries(repo, tree, prefix))
    return Patch(
        diff=diff, files=tuple(file.path for file in changed), added=counted.added, removed=counted.removed,
        content_hash=hashlib.sha256(leaves.encode("utf-8", "surrogateescape")).hexdigest(),
        normalised_hash=normalised_hash(changed))


def _bytes(path: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PatchRefused("binary", f"{path} would hold text that UTF-8 cannot write.") from error


def _printable(text: str) -> str:
    """One line that git can hold, whatever a model wrote (NUL, lone surrogates, escapes)."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split())) or "Candidate"


@dataclass(slots=True)
class Hunk:
    """Lines headed by space, minus or plus. ``start`` is the line number in the old file, None when not given."""

    start: int | None
    lines: list[str] = field(default_factory=list)


@dataclass(slots=True)
class FileDiff:
    """What a diff says of one file; ``path`` as it stands there."""

    path: str
    creates: bool = False
    deletes: bool = False
    hunks: list[Hunk] = field(default_factory=list)


def read_diff(text: str) -> list[FileDiff]:
    """The files of a unified diff as people and models write it, in order.

    Counts in ``@@`` headers are not believed: a hunk ends where the next header starts. Raises PatchRefused for what is
    not a plain change of text files (renames, modes, binary): dropping it would build another patch.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    files: list[FileDiff] = []
    hunk: Hunk | None = None
    at = 0
    while at < len(lines):
        line = lines[at]
        following = lines[at + 1] if at + 1 < len(lines) else ""
        if line.startswith("--- ") and following.startswith("+++ "):
            files.append(_file(line[4:], following[4:]))
            hunk, at = None, at + 2
            continue
        if line.startswith("@@") and files:
            match = _HUNK.match(line)
            hunk = Hunk(int(match[1]) if match and match[1] else None)
            files[-1].hunks.append(hunk)
        elif line.startswith("diff --git ") or (line == "-- " and _only_signature(lines[at + 1:])):
            hunk = None
        elif hunk is not None and not line.startswith("```"):
            _take(hunk, line)
        elif hunk is None:
            _check_header(line)
        else:
            hunk = None
        at += 1
    for file in files:
        _trim(file)
    return files


def _take(hunk: Hunk, line: str) -> None:
    """One body line; an empty one is a context line whose space was lost on the way."""
    if line[:1] in (" ", "-", "+"):
        hunk.lines.append(line)
    elif not line:
        hunk.lines.append("")
    elif not line.startswith("\\"):  # a line to keep whose space was lost: it has to be in the file all the same
        hunk.lines.append(f" {line}")


def _trim(file: FileDiff) -> None:
    """Empty lines at the end of the text belong to the message, not to the hunk."""
    for hunk in file.hunks:
        while hunk.lines and not hunk.lines[-1]:
            hunk.lines.pop()
        hunk.lines = [line or " " for line in hunk.lines]
    file.hunks = [hunk for hunk in file.hunks if any(line[0] in "+-" for line in hunk.lines)]
    if not file.hunks:
        raise PatchRefused("match", f"the patch changes no line of {file.path}.")


def _file(old: str, new: str) -> FileDiff:
    before, after = _name(old), _name(new)
    if before == after == "/dev/null":
        raise PatchRefused("match", "the patch names no file.")
    if after == "/dev/null":
        return FileDiff(before, deletes=True)
    if before != "/dev/null" and re.sub(r"^[a-z]/", "", before) != re.sub(r"^[a-z]/", "", after):
        raise PatchRefused("mode", f"the patch renames {before} to {after}; only plain changes of files may be made.")
    return FileDiff(after, creates=before == "/dev/null")


def _name(text: str) -> str:
    name = text.split("\t", 1)[0].strip()
    if name.startswith('"'):
        raise PatchRefused("path", f"the path {name} has characters that git must quote.")
    return name


def _check_header(line: str) -> None:
    for start, what in _ODD.items():
        if line.startswith(start):
            raise PatchRefused("mode", f"the patch {what}; only plain changes of text files may be made.")
    if line.startswith("new file mode ") and line.strip() != "new file mode 100644":
        raise PatchRefused("mode", f"the patch makes a file of {line.strip()[9:]}; only plain files (100644) may be.")


def _only_signature(rest: list[str]) -> bool:
    """The version line that ``git format-patch`` puts under a patch."""
    return sum(1 for line in rest if line.strip()) <= 1


def rebuilt(repo: Path, prefix: str, start: str, proposals: Sequence[Proposal], source: Source) -> str | None:
    """Tree of ``start`` with the edits of ``proposals`` made again, one after the other; None where one does not fit.

    For a tip without one of its merges: git's merge refuses neighbouring lines, on which edits by search and replace
    may well agree.
    """
    base = start
    for proposal in proposals:
        try:
            made = build(repo, prefix, base, dataclasses.replace(proposal, id="rebuilt"), source)
        except PatchRefused:
            return None
        git.update_ref(repo, f"refs/heads/{made.branch}", "", None)
        base = made.head
    return git.resolve(repo, base, "tree")
