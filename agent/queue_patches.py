"""``ratchet try my.patch ...``: the user's own patches, one proposal each, judged like any other idea."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from unidiff.errors import UnidiffParseError
from unidiff.patch import PatchSet

from agent.errors import UserError
from agent.llm.quote import plain
from agent.propose import proposal_id, tidy_title
from agent.read import Briefing
from agent.records import Proposal

_MEND = "Make one with `git diff > my.patch` or `git format-patch -1`."


@dataclass(frozen=True, slots=True)
class PatchFile:
    """A patch as the user wrote it. ``diff`` starts at its first file header and ends at its last hunk."""

    source: str
    title: str
    hypothesis: str
    diff: str


class PatchQueue:
    """Proposes each patch file once, in the order given. ``done`` holds the sources already attempted."""

    name = "queue"

    def __init__(self, patches: Sequence[PatchFile], done: Collection[str] = ()) -> None:
        self._left = [patch for patch in patches if patch.source not in set(done)]
        self.ended = ""

    def left(self, preset: str) -> int:
        """Patches still to propose, whatever the preset."""
        return len(self._left)

    def next(self, briefing: Briefing) -> Proposal | None:
        if not self._left:
            self.ended = "every patch of the queue was attempted"
            return None
        patch = self._left.pop(0)
        return Proposal(
            id=proposal_id(briefing.number, patch.title), base=briefing.tip, title=patch.title,
            hypothesis=patch.hypothesis, author="human", diff=patch.diff, source=patch.source)

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        """None: the patch is the user's, and is tried as it is."""
        return None


def read_patches(paths: Sequence[Path]) -> list[PatchFile]:
    """All patch files, read before anything is run. Raises UserError on the first that is not a patch."""
    return [read_patch(path) for path in paths]


def read_patch(path: Path) -> PatchFile:
    """One file: a unified diff, with or without the mail header of ``git format-patch``.

    The title is the ``Subject:`` line without its ``[PATCH n/m]``, or the file's name. Raises UserError when the
    file cannot be read, is no diff, or holds more than one mail.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"Cannot read the patch {path}: {error.strerror}.", "Give the path of a patch file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The patch {path} is not UTF-8 text.", _MEND) from error
    head, diff = _split(text)
    mails = len(re.findall(r"^From [0-9a-f]{40} ", text, re.MULTILINE))
    if mails > 1:
        raise UserError(f"{path} holds {mails} patches.", "Give one file each; `git format-patch` writes them so.")
    if not diff or not _is_diff(diff):
        raise UserError(f"{path} is not a unified diff.", _MEND)
    subject, body = _mail(head)
    title = tidy_title(subject or path.stem.replace("_", " ").replace("-", " "))
    return PatchFile(source=str(path), title=title, hypothesis=body or title, diff=diff)


def _split(text: str) -> tuple[str, str]:
    """(what stands before the diff, the diff without the mail's signature)."""
    start = re.search(r"^(?:diff --git |--- [^\n]+\n\+\+\+ )", text, re.MULTILINE)
    if not start:
        return text, ""
    diff = re.split(r"^-- \r?\n(?=[^\n]*\r?\n*\Z)", text[start.start():], maxsplit=1, flags=re.MULTILINE)[0]
    return text[:start.start()], diff if diff.endswith("\n") else diff + "\n"


def _is_diff(diff: str) -> bool:
    """Does it parse, and does it name a file? Renames, modes and binaries pass: the patch stage judges those."""
    try:
        return len(PatchSet(diff)) > 0 or "\nGIT binary patch" in diff
    except UnidiffParseError:
        return False


def _mail(head: str) -> tuple[str, str]:
    """(subject, message) of a git format-patch header; two empty strings where there is none."""
    head = re.sub(r"\AFrom [0-9a-f]{40} [^\n]*\n", "", head)
    if not re.match(r"[A-Za-z-]+: ", head):
        return "", ""
    mail = email.message_from_string(head, policy=email.policy.default)
    subject = re.sub(r"^\s*\[[^\]]*\]\s*", "", str(mail["Subject"] or ""))
    body = re.split(r"^---\s*$", str(mail.get_payload()), maxsplit=1, flags=re.MULTILINE)[0]
    return subject, plain(body).strip()[:4000]
