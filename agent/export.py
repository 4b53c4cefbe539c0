"""Hand the accepted history over: patch files and a bundle, a branch in the user's repository, or a push.

The default writes only to the folder that the user names. A branch adds objects and one new ref to the user's
repository; their work tree, index, HEAD and existing refs stay as they are. A push happens when asked for, never by
force.
"""

from __future__ import annotations

import datetime
import tempfile
from dataclasses import dataclass
from pathlib import Path

from agent import git
from agent.errors import UserError

BUNDLE = "accepted.bundle"


@dataclass(frozen=True, slots=True)
class Exported:
    """Files that ``export_series`` wrote. The patches apply at the root of the repository (``git am``)."""

    patches: tuple[Path, ...]
    bundle: Path


def export_series(repo: Path, start: str, folder: Path) -> Exported:
    """One mail-format patch a merge since ``start``, and ``accepted.bundle`` with the branch, in ``folder``.

    The bundle needs ``start`` on the receiving side. Files of the same name are replaced, each as a whole. Raises
    UserError when nothing was merged.
    """
    tip = _tip(repo, start)
    line = _line(repo, start, tip)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export.") as name:
        work = Path(name)
        git.run(repo, "format-patch", "-q", "-o", str(work.resolve()), "--full-index", "--binary", "--text",
                "--no-renames", "--no-ext-diff", "--no-textconv", "--no-signature", f"{start}..{line}")
        git.run(repo, "bundle", "create", "-q", str(work.resolve() / BUNDLE), git.ACCEPTED, f"^{start}")
        patches = sorted(path.name for path in work.glob("*.patch"))
        for file in (*patches, BUNDLE):
            (work / file).replace(folder / file)
    return Exported(tuple(folder / file for file in patches), folder / BUNDLE)


def _line(repo: Path, start: str, tip: str) -> str:
    """The tip of the same history with one parent a commit: a bundle's parts are in its merge, once."""
    below = start
    for commit, _, _ in git.history(repo, start, tip):
        parents = git.run(repo, "log", "-1", "--format=%P", commit).decode().split()
        if parents == [below]:
            below = commit
        else:
            text, date = git.run(repo, "log", "-1", "--format=%B%x00%aI", commit).decode("utf-8", "replace").split("\0")
            below = git.commit_tree(repo, f"{commit}^{{tree}}", (below,), text,
                                    datetime.datetime.fromisoformat(date.strip()))
    return below


def export_branch(repo: Path, toplevel: Path, start: str, branch: str) -> str:
    """Create ``branch`` at the accepted tip in the user's repository, without checking it out. Returns the tip.

    Nothing to do where it stands there already. Raises UserError when there is nothing to export, or the name is no
    branch name or is another branch's.
    """
    tip = _tip(repo, start)
    _check_name(repo, branch)
    ref = f"refs/heads/{branch}"
    there = git.resolve(toplevel, ref, bare=False)
    if there == tip:
        return tip
    if there is not None:
        raise _taken(branch, toplevel)
    known = git.resolve(toplevel, start, bare=False)
    git.copy_objects(repo, toplevel, tip, exclude=start if known else "", target_bare=False)
    try:
        git.update_ref(toplevel, ref, tip, "", bare=False)
    except git.RefMoved as error:
        raise _taken(branch, toplevel) from error
    except git.GitError as error:
        raise UserError(f"git cannot create branch {branch}: {_first_line(error)}.", "Choose another name.") from error
    return tip


def push(repo: Path, remote: str, start: str, branch: str, toplevel: Path | None = None) -> str:
    """Push the accepted tip as ``branch``, never by force; returns the tip. ``remote`` is an address, or with
    ``toplevel`` the name of one of that repository's remotes. Uses the user's own credentials. Raises UserError."""
    tip = _tip(repo, start)
    _check_name(repo, branch)
    address = _address(remote, toplevel)
    try:
        git.run(repo, "push", "--no-verify", "--", address, f"{tip}:refs/heads/{branch}", personal=True)
    except git.GitError as error:
        raise UserError(f"The push of {branch} failed: {_first_line(error)}.",
                        "Check the address, your access and the branch; the accepted branch itself is safe.") from error
    return tip


def _address(remote: str, toplevel: Path | None) -> str:
    if remote.startswith("-") or not remote.strip():
        raise UserError(f"{remote!r} is no address to push to.", "Give a URL, a path, or a remote's name.")
    if toplevel is not None:
        try:
            return git.run(toplevel, "remote", "get-url", "--push", "--", remote, bare=False).decode().strip()
        except git.GitError:
            pass  # not a remote's name: an address
    return remote


def _tip(repo: Path, start: str) -> str:
    tip = git.resolve(repo, git.ACCEPTED)
    if tip is None or tip == start:
        raise UserError("Nothing was merged, so there is nothing to export.", "See why:  ratchet log")
    return tip


def _check_name(repo: Path, branch: str) -> None:
    try:
        git.run(repo, "check-ref-format", "--branch", branch)
    except git.GitError as error:
        raise UserError(f"{branch!r} is not a branch name.", "Use letters, digits, - and /.") from error


def _first_line(error: git.GitError) -> str:
    lines = [line for line in error.stderr.splitlines() if line.startswith(("fatal", "error", " !"))]
    return (lines or error.stderr.strip().splitlines() or ["no message"])[0].strip().rstrip(".")


def _taken(branch: str, toplevel: Path) -> UserError:
    return UserError(f"{toplevel} already has a branch {branch}.", "Choose another name with --branch.")
