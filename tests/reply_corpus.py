"""The corpus of malformed replies in tests/data/replies, and what the parser and the patch stage make of it.

    python -m tests.reply_corpus           apply rate by form and by defect, as JSON
    python -m tests.reply_corpus ID ...    one case: its reply, its label, and what came of it

A case is a reply, the source that it answers to (a folder of tests/data/replies/sources), and its label: ``want`` is a
list of [path, old, new], each to be replaced literally once, or null where nothing may be applied (the intent is
ambiguous, there is none, or the edit breaks a rule). tests/data/replies/README.md says where each case comes from.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import config, git, git_trees, patch
from agent.llm.parse_reply import Problem, parse_reply
from agent.patch import PatchRefused
from agent.records import Proposal

FOLDER = Path(__file__).parent / "data" / "replies"
PROTECTED = ["data.py", "wire.py"]
WHEN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Case:
    """One reply with its label."""

    id: str
    source: str
    form: str
    defect: str
    origin: str
    reply: str
    want: tuple[tuple[str, str, str], ...] | None
    why: str = ""
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Came:
    """What became of a case."""

    case: Case
    verdict: str
    """``right``: applied as wanted, or refused where nothing may be applied; ``lost``: refused in spite of a clear
    intent; ``wrong``: applied as nobody wanted."""
    said: str
    form: str = ""


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def cases() -> list[Case]:
    """Every labelled case."""
    labels = json.loads((FOLDER / "labels.json").read_text(encoding="utf-8"))
    found = []
    for raw in lines_of(FOLDER / "model.jsonl"):
        label = labels[raw["id"]]
        origin = f"{raw['model']}, asked for {raw['asked']}, temperature {raw['temperature']}, prompt {raw['prompt']}"
        found.append(Case(raw["id"], raw["source"], raw["asked"].split(",")[0], label["defect"], origin, raw["reply"],
                          _wanted(label["want"]), label.get("why", ""), raw["cut"]))
    for raw in lines_of(FOLDER / "imitated.jsonl"):
        found.append(Case(raw["id"], raw["source"], raw["form"], raw["defect"], raw["origin"], raw["reply"],
                          _wanted(raw["want"]), raw.get("why", ""), raw.get("cut", False)))
    return found


def _wanted(want: Any) -> tuple[tuple[str, str, str], ...] | None:
    return None if want is None else tuple((path, old, new) for path, old, new in want)


class Bench:
    """A real repository for each source, and the stages that a reply goes through."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts: dict[str, dict[str, str]] = {}
        self.bases: dict[str, str] = {}

    def run(self, case: Case) -> Came:
        """Parse, build, compare."""
        files = self.source(case.source)
        editable = {path: text for path, text in files.items() if path not in PROTECTED}
        found = parse_reply(case.reply, editable, case.cut, [path for path in files if path in PROTECTED])
        if isinstance(found, Problem):
            return Came(case, "right" if case.want is None else "lost", f"unusable: {found.text}")
        proposal = Proposal("001-x", self.bases[case.source], found.title, found.hypothesis, "llm", edits=found.edits,
                            diff=found.diff)
        source = config.Source(editable=[*editable, "*.py"], protected=PROTECTED, max_patch_lines=400)
        repo = self.folder / case.source / ".git"
        try:
            made = patch.build(repo, "", self.bases[case.source], proposal, source, WHEN)
        except PatchRefused as refused:
            return Came(case, "right" if case.want is None else "lost", f"refused ({refused.rule}): {refused}",
                        found.form)
        entries = git_trees.entries(repo, made.tree, "")
        blobs = git_trees.blobs(repo, {entry.sha for entry in entries})
        now = {entry.path: blobs[entry.sha].decode() for entry in entries}
        if case.want is None:
            return Came(case, "wrong", f"applied, though nothing may be: {made.patch.diff}", found.form)
        same = {path: _loose(text) for path, text in now.items()} == {
            path: _loose(text) for path, text in expected(files, case.want).items()}
        return Came(case, "right" if same else "wrong", made.patch.diff, found.form)

    def source(self, name: str) -> dict[str, str]:
        """The files of a source, with its repository made."""
        if name not in self.texts:
            folder, origin = self.folder / name, FOLDER / "sources" / name
            self.texts[name] = {path.relative_to(origin).as_posix(): path.read_bytes().decode()
                                for path in sorted(origin.rglob("*.py"))}
            for path, text in self.texts[name].items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(text.encode())
            for words in (["init", "-q"], ["add", "."], ["-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "-qm",
                                                        "start"]):
                subprocess.run(["git", "-c", "core.autocrlf=false", "-C", str(folder), *words], check=True)
            self.bases[name] = git.run(folder / ".git", "rev-parse", "HEAD").decode().strip()
        return self.texts[name]


def expected(files: dict[str, str], want: tuple[tuple[str, str, str], ...]) -> dict[str, str]:
    """The files as the label says: each old text must stand there once, an empty one makes a new file."""
    made = dict(files)
    for path, old, new in want:
        if not old:
            assert path not in made
            made[path] = new
            continue
        if "\r\n" in made[path]:
            old, new = old.replace("\n", "\r\n"), new.replace("\n", "\r\n")
        assert made[path].count(old) == 1, (path, old, made[path].count(old))
        made[path] = made[path].replace(old, new)
    return made


def _loose(text: str) -> str:
    """Line ends count; white space before them, and blank lines at the end, do not."""
    ends = "\r\n" if "\r\n" in text else "\n"
    return ends.join(line.rstrip(" \t") for line in text.rstrip().split(ends))


def results(folder: Path, names: Collection[str] = ()) -> Iterator[Came]:
    """What becomes of every case, or of those with these ids."""
    bench = Bench(folder)
    for case in cases():
        if not names or case.id in names:
            yield bench.run(case)


def table(came: list[Came]) -> dict[str, Any]:
    """Counts of all cases, and by form and defect: how many have a clear intent, how many of those apply correctly,
    how many may not be applied, and how many were applied wrongly."""
    def counts(some: list[Came]) -> dict[str, int]:
        clear = [one for one in some if one.case.want is not None]
        return {"cases": len(some), "clear": len(clear), "applied": sum(one.verdict == "right" for one in clear),
                "must_not_apply": len(some) - len(clear), "wrong": sum(one.verdict == "wrong" for one in some)}

    def grouped(by: str) -> dict[str, dict[str, int]]:
        groups: dict[str, list[Came]] = collections.defaultdict(list)
        for one in came:
            groups[getattr(one.case, by)].append(one)
        return {name: counts(groups[name]) for name in sorted(groups)}

    written = [one for one in came if one.case.id.startswith("model-")]
    return {"all": counts(came), "by_a_model": counts(written), "form": grouped("form"), "defect": grouped("defect")}


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        came = list(results(Path(scratch), names))
    if not names:
        print(json.dumps(table(came), indent=1))
        for one in came:
            if one.verdict != "right":
                print(f"{one.case.id} {one.case.form}, {one.case.defect}: {one.verdict}", file=sys.stderr)
    for one in came:
        if one.case.id in names:
            print(json.dumps(dataclasses.asdict(one), indent=1, ensure_ascii=False))
            print(f"{one.case.reply}\n--- {one.verdict}:\n{one.said}")


if __name__ == "__main__":
    main(sys.argv[1:])
