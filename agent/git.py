"""Git as plain functions over GitPython, without a work tree: what was measured is, byte for byte, what is merged.

Every command starts from an empty environment with hooks, fsmonitor, system and user configuration, attributes and
replace refs switched off, so neither a planted file nor the caller's shell can change what git does. ``repo`` is
always the campaign's own bare clone. The user's checkout is only read, and only by the functions that say so.

What trees hold is git_trees.py's. Not covered: Windows, and partial clones whose objects are not on this machine.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from agent.errors import UserError

ACCEPTED = "refs/heads/accepted"
IDENTITY = ("Ratchet", "ratchet@localhost")
KILLED, KILLED_TRIES = (-9, 137), 3
"""Exit states of a git that SIGKILL ended, and how often a command is tried then."""
FIXED_DATE = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
"""Of commits that are to have the same id whenever they are made."""
FULL_ID = re.compile(r"(?:[0-9a-f]{40}|[0-9a-f]{64})(?:\^\{tree\})?\Z")
"""What always names the same object."""
_SETTINGS = {
    "core.hooksPath": "/dev/null", "core.fsmonitor": "false", "core.attributesFile": "/dev/null",
    "safe.bareRepository": "explicit", "safe.directory": "*", "gc.auto": "0", "maintenance.auto": "false",
    "core.quotePath": "false", "core.fsync": "committed,reference", "protocol.ext.allow": "never",
}
_ALONE = {
    "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_ATTR_NOSYSTEM": "1",
    "GIT_NO_REPLACE_OBJECTS": "1", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C", "LANGUAGE": "C",
}


class GitError(Exception):
    """Git said no where it was expected to say yes."""

    def __init__(self, arguments: Sequence[str], status: int, stderr: str, again: bool = False) -> None:
        """``again``: an earlier try of the same command was killed, and may have done its work."""
        super().__init__(f"git {' '.join(arguments)}: exit {status}: {stderr.strip() or 'no message'}")
        self.status, self.stderr, self.again = status, stderr, again


class RefMoved(Exception):
    """A compare-and-swap found another value: someone else moved the ref."""

    def __init__(self, ref: str, expected: str, actual: str) -> None:
        super().__init__(f"{ref} is {actual or 'missing'}, not {expected or 'missing'}")
        self.ref, self.expected, self.actual = ref, expected, actual


@dataclass(frozen=True, slots=True)
class Location:
    """A target: a whole repository (``prefix`` empty) or a folder of one (``prefix`` like ``packages/trainer``)."""

    toplevel: Path
    prefix: str
    head: str


def run(
    place: Path, *arguments: str, bare: bool = True, stdin: bytes | BinaryIO = b"", output: BinaryIO | None = None,
    environment: Mapping[str, str] | None = None, settings: Mapping[str, str] | None = None, personal: bool = False,
) -> bytes:
    """Standard output of one git command in ``place`` (a bare repository unless ``bare`` is False).

    ``personal`` lets the user's own configuration and agent through: for a push, which needs their credentials.
    ``output`` takes standard output instead of memory. Raises GitError, or UserError when the disk is full.
    """
    try:
        # Here and not above: GitPython refuses to be imported on a machine without git.
        import git as gitpython
    except ImportError as error:
        raise UserError("The git command is missing.", "Install git (2.38 or newer) and put it on PATH.") from error
    place = place.resolve()  # git is started in there, where a relative path would lead nowhere
    where = ["--git-dir", str(place)] if bare else []
    options = [part for key, value in (_SETTINGS | dict(settings or {})).items() for part in ("-c", f"{key}={value}")]
    # GitPython lays its environment over the caller's and cannot take a variable away; `env -i` can.
    variables = _environment(personal) | dict(environment or {})
    command = ["env", "-i", *(f"{key}={value}" for key, value in variables.items()),
               str(gitpython.Git.GIT_PYTHON_GIT_EXECUTABLE), "--no-optional-locks", *options, *where, *arguments]
    # A new session: Ctrl-C at the terminal must not kill git between two writes. A push may have to ask for a word.
    how: dict[str, Any] = {
        "with_extended_output": True, "with_exceptions": False, "stdout_as_string": False,
        "strip_newline_in_stdout": False, "output_stream": output, "start_new_session": not personal}
    with _readable(stdin) as source:
        for left in reversed(range(KILLED_TRIES)):
            answer = gitpython.Git(str(place)).execute(command, istream=source, **how)
            status, out, err = cast(tuple[int, bytes, str], answer)
            if status not in KILLED or not bare or not left:
                break
            unlock(place)  # by the kernel for lack of memory, or by a person: every command here may be done again
            source.seek(0)
            if output is not None:
                output.seek(0)
                output.truncate()
    if status != 0:
        if "No space left on device" in err:
            raise _disk_full(place)
        raise GitError(arguments, status, err, again=left < KILLED_TRIES - 1)
    return b"" if output is not None else out


def locate(path: Path) -> Location:
    """Where the target in ``path`` lives and the commit it is at. Reads the user's checkout, writes nothing.

    Raises UserError when there is no committed folder of a git repository at ``path``.
    """
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}.", "Give the folder of a git repository, or a folder inside one.")
    try:
        toplevel = Path(one_line(run(path, "rev-parse", "--show-toplevel", bare=False)))
        prefix = one_line(run(path, "rev-parse", "--show-prefix", bare=False)).rstrip("/")
    except GitError as error:
        raise _no_checkout(path, error.stderr) from error
    try:
        head = one_line(run(toplevel, "rev-parse", "--verify", "--quiet", "HEAD^{commit}", bare=False))
    except GitError as error:
        raise UserError(f"{toplevel} has no commits.", "Make one:  git add -A && git commit -m start") from error
    if prefix:
        try:
            run(toplevel, "rev-parse", "--verify", "--quiet", f"{head}:{prefix}", bare=False)
        except GitError as error:
            raise UserError(f"Nothing in {path} is committed in {toplevel}.",
                            f"Commit it:  git -C {path} add -A . && git -C {path} commit -m start") from error
    return Location(toplevel, prefix, head)


def is_dirty(location: Location) -> bool:
    """Has the target uncommitted or untracked files? For a warning: they are not part of the campaign.

    Reads the user's checkout without refreshing its index, and with its content filters switched off (they are
    commands), so files that a filter rewrites may count as changed.
    """
    top = location.toplevel
    try:
        keys = run(top, "config", "--name-only", "-z", "--get-regexp", r"^filter\.", bare=False).decode()
    except GitError:  # exit 1: no such key
        keys = ""
    off = {key: "false" if key.endswith(".required") else "" for key in keys.split("\0") if key}
    scope = f":(top,literal){location.prefix}" if location.prefix else ":(top)"
    return bool(run(top, "status", "--porcelain", "-z", "--ignore-submodules=all", "--", scope,
                    bare=False, settings=off))


def clone_bare(toplevel: Path, destination: Path, head: str, source_bare: bool = False) -> None:
    """A bare clone of ``head`` and its history with the one branch ``accepted``; appears whole or not at all.

    Objects travel as a pack: no hard links, no alternates, no hooks, no remotes, and nothing is written to the
    user's repository. A destination that exists is left as it is.
    """
    if destination.exists():
        return
    form = one_line(run(toplevel, "rev-parse", "--show-object-format", bare=source_bare))
    shallow = toplevel / one_line(run(toplevel, "rev-parse", "--git-path", "shallow", bare=source_bare))
    with new_repository(destination, form) as repo:
        if shallow.is_file():
            shutil.copyfile(shallow, repo / "shallow")
        copy_objects(toplevel, repo, head, source_bare=source_bare)
        update_ref(repo, ACCEPTED, head, "")


def copy_objects(
    source: Path, target: Path, include: str, exclude: str = "", source_bare: bool = True, target_bare: bool = True,
) -> None:
    """Copy the objects of commit ``include`` that ``exclude`` does not reach from one repository to the other."""
    revisions = f"{include}\n" + (f"^{exclude}\n" if exclude else "")
    with tempfile.TemporaryFile() as file:
        pack = cast(BinaryIO, file)
        run(source, "pack-objects", "--revs", "--stdout", "--delta-base-offset", "-q", bare=source_bare,
            stdin=revisions.encode(), output=pack)
        pack.seek(0)
        run(target, "index-pack", "--stdin", bare=target_bare, stdin=pack)


def commit_tree(
    repo: Path, tree: str, parents: Sequence[str], message: str, when: datetime.datetime | None = None,
    identity: tuple[str, str] = IDENTITY,
) -> str:
    """Id of a new commit object; no ref moves. ``when`` is the date of author and committer (None: now)."""
    name, email = identity
    variables = {"GIT_AUTHOR_NAME": name, "GIT_AUTHOR_EMAIL": email,
                 "GIT_COMMITTER_NAME": name, "GIT_COMMITTER_EMAIL": email}
    if when is not None:
        date = f"{int(when.timestamp())} {when.strftime('%z') or '+0000'}"
        variables |= {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    above = [part for parent in parents for part in ("-p", parent)]
    return one_line(run(repo, "commit-tree", tree, *above, stdin=message.encode("utf-8"), environment=variables))


def history(repo: Path, start: str, tip: str) -> list[tuple[str, str, str]]:
    """(commit, its first parent, subject) from after ``start`` to ``tip`` along first parents, oldest first.

    Raises GitError when ``start`` is not on that line.
    """
    out = run(repo, "log", "--first-parent", "--reverse", "-z", "--format=%H%x09%P%x09%s", f"{start}..{tip}")
    found = []
    for line in fields(out):
        commit, parents, subject = line.split("\t", 2)
        found.append((commit, parents.split(" ")[0], subject))
    below = found[0][1] if found else tip
    if below != start:
        raise GitError(("log", f"{start}..{tip}"), 0, f"{start[:12]} is not below {tip[:12]}")
    return found


def without(repo: Path, tip: str, commits: Iterable[str]) -> str | None:
    """The tree of ``tip`` with the changes of ``commits`` (each on its first-parent line) taken out; None where later
    changes touch the same lines.

    A three-way merge for each: the commit is the base, its parent's tree the other side. That side is made a commit on
    top of the base, so that git finds this very base (``merge-tree --merge-base`` needs git 2.40).
    """
    tree = resolve(repo, tip, "tree")
    for commit in commits:
        undone = commit_tree(repo, f"{commit}~1^{{tree}}", (commit,), "undone", FIXED_DATE)
        ours = commit_tree(repo, str(tree), (tip,), "ours", FIXED_DATE)
        try:
            tree = one_line(run(repo, "merge-tree", "--write-tree", "--no-messages", ours, undone,
                             settings={"merge.renames": "false"}))
        except GitError as error:
            if error.status != 1:  # 1: conflicts
                raise
            return None
    return tree


def resolve(repo: Path, name: str, kind: str = "commit", bare: bool = True) -> str | None:
    """Full id of a ref, commit or tree, or None when there is none. What a full id stands for in one of our own
    repositories is asked once. Raises GitError when git was killed."""
    try:
        if bare and FULL_ID.match(name):
            found = _lasting(repo, name, kind, bare)
            if len(found) == len(name.partition("^")[0]):  # or it is a branch with such a name, which may move
                return found
        return _named(repo, name, kind, bare)
    except GitError as error:
        if error.status not in (1, 128):
            raise
        return None


def _named(repo: Path, name: str, kind: str, bare: bool) -> str:
    return one_line(run(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{{kind}}}", bare=bare))


_lasting = functools.lru_cache(maxsize=1024)(_named)


def refs(repo: Path) -> set[str]:
    """Full names of all refs."""
    return set(run(repo, "for-each-ref", "--format=%(refname)").decode().split())


def update_ref(repo: Path, ref: str, new: str, old: str | None, bare: bool = True) -> None:
    """Move ``ref`` from ``old`` to ``new`` in one step. Empty ``new`` deletes, empty ``old``: must not exist yet,
    None: whatever it is. Raises RefMoved when the ref is not at ``old``."""
    expected = [] if old is None else [old or "0" * len(new or "0" * 40)]
    change = ["-d", ref] if not new else [ref, new]
    try:
        run(repo, "update-ref", "--no-deref", *change, *expected, bare=bare)
    except GitError as error:
        actual = resolve(repo, ref, bare=bare) or ""
        if error.again and actual == new:
            return  # moved by the try that was killed right after
        if old is not None and actual != old:
            raise RefMoved(ref, old, actual) from error
        raise


def stale_locks(repo: Path) -> list[Path]:
    """Lock files in a bare repository. Whoever holds the run's lock and runs no git knows that they are stale: git
    leaves them behind when it is killed, and refuses to move the ref for ever after."""
    named = [repo / name for name in ("HEAD.lock", "config.lock", "packed-refs.lock", "shallow.lock")]
    return sorted([path for path in named if path.exists()] + list((repo / "refs").rglob("*.lock")))


def unlock(repo: Path, patience: float = 5.0) -> list[Path]:
    """Remove stale locks, once no git of a killed process works on ``repo`` any more. Returns what was removed."""
    deadline = time.monotonic() + patience
    while stale_locks(repo) and _in_use(repo) and time.monotonic() < deadline:
        time.sleep(0.02)
    found = stale_locks(repo)
    for path in found:
        path.unlink(missing_ok=True)
    return found


def _in_use(repo: Path) -> bool:
    """Whether a git process was started on ``repo`` and lives."""
    own = os.fsencode(str(repo))
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            if b"--git-dir" in words and own in words:
                return True
    return False


def matches(path: str, patterns: Iterable[str], fold: bool = False) -> bool:
    """Does a path match any glob? Globs are relative to the target: ``*`` stays inside one folder, ``**`` crosses
    folders, and a plain name or a trailing ``/`` also covers all below it. ``fold`` ignores case."""
    if fold:
        return any(_glob(pattern.casefold()).fullmatch(path.casefold()) for pattern in patterns)
    return any(_glob(pattern).fullmatch(path) for pattern in patterns)


def _glob(pattern: str) -> re.Pattern[str]:
    """Regular expression of one glob (``re`` caches it)."""
    text = pattern.removeprefix("./").removeprefix("/")
    below = text.endswith("/") or not re.search(r"[*?\[]", text.rsplit("/", 1)[-1])
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]/]+\]|.", text.rstrip("/"), re.DOTALL):
        out += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token) or (
            "[" + token[1:-1].replace("!", "^", 1).replace("\\", "\\\\") + "]" if len(token) > 2 else re.escape(token))
    return re.compile(out + ("(?:/.*)?" if below else ""), re.DOTALL)


def _environment(personal: bool) -> dict[str, str]:
    """All that git gets to see. Nothing named GIT_* comes from outside."""
    kept = {"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": tempfile.gettempdir()}
    if not personal:
        return kept | _ALONE
    names = ("HOME", "XDG_CONFIG_HOME", "SSH_AUTH_SOCK", "SSH_ASKPASS", "DISPLAY", "TERM", "USER", "LOGNAME")
    return kept | {name: os.environ[name] for name in names if name in os.environ} | {"LC_ALL": "C"}


@contextlib.contextmanager
def _readable(data: bytes | BinaryIO) -> Iterator[BinaryIO]:
    """A real file for git's standard input: a pipe would need a thread to feed it."""
    if not isinstance(data, bytes):
        yield data
        return
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield cast(BinaryIO, file)


@contextlib.contextmanager
def whole(destination: Path, beside: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``destination`` by rename when the block succeeds, and vanishes when not."""
    folder = Path(tempfile.mkdtemp(dir=beside, prefix=f".{destination.name}."))
    try:
        yield folder
        folder.rename(destination)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(destination) from error
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not destination.is_dir():
            raise
        # Someone else finished the same folder first.
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_repository(destination: Path, object_format: str) -> Iterator[Path]:
    """An empty bare repository (no template, so no hooks) on branch ``accepted`` that appears when filled."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with whole(destination, destination.parent) as repo:
        run(repo, "init", "--bare", "-q", "--template=", f"--object-format={object_format}",
            f"--initial-branch={ACCEPTED.removeprefix('refs/heads/')}")
        yield repo


def fields(out: bytes) -> list[str]:
    return [os.fsdecode(part) for part in out.split(b"\0") if part]


def one_line(out: bytes) -> str:
    return os.fsdecode(out).rstrip("\n")


def _disk_full(place: Path) -> UserError:
    return UserError(f"The disk is full at {place}.", "Free some disk (`ratchet gc` removes old runs), then go on.")


def _no_checkout(path: Path, stderr: str) -> UserError:
    """Why ``path`` is not in a usable checkout."""
    if "not a git repository" in stderr:
        return UserError(f"{path} is not in a git repository.",
                         f"Make it one:  git -C {path} init && git -C {path} add -A && git -C {path} commit -m start")
    if "bare repository" in stderr or "must be run in a work tree" in stderr:
        return UserError(f"{path} is a bare repository or git's own folder.", "Give a checkout (git clone it first).")
    return UserError(f"git cannot read {path}: {stderr.strip().splitlines()[0] if stderr.strip() else 'no message'}.",
                     "Mend the repository; `git -C DIR status` must work there.")
