"""Edits and diffs become candidates, or say why not: tiers, policy on the resulting tree, duplicates."""

from __future__ import annotations

import base64
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import git, git_trees, matching, patch, policy
from agent.config import Source
from agent.patch import PatchRefused
from agent.records import Candidate, Edit, Proposal

TRAIN = b'''"""Train."""
import math


class Muon:
    def step(self, lr):
        # momentum first
        for p in self.params:
            p.add_(p.grad, alpha=-lr)


class AdamW:
    def step(self, lr):
        # bias correction
        for p in self.params:
            p.add_(p.grad, alpha=-lr)


LR = 0.1
WARMUP = 10
'''
CRLF = b"depth = 2\r\nwidth = 64\r\nheads = 4\r\n"
SOURCE = Source(protected=["eval.py", "frozen/"])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bare clone of a repository whose folder ``lab`` is the target, and its commit."""
    folder = tmp_path_factory.mktemp("patch")
    lab = folder / "lab"
    (lab / "frozen").mkdir(parents=True)
    for name, content in {"train.py": TRAIN, "net.py": CRLF, "eval.py": b"x = 1\n", "frozen/data.py": b"y = 1\n",
                          "run.sh": b"#!/bin/sh\n", "notes.txt": b"hi\n", "latin.py": b"# \xe9\nx = 1\n"}.items():
        (lab / name).write_bytes(content)
    (lab / "run.sh").chmod(0o755)
    (lab / "link.py").symlink_to("train.py")
    (folder / "top.py").write_text("z = 1\n")
    commit = ["-c", "user.name=A", "-c", "user.email=a@b", "commit", "-qm", "s"]
    for arguments in (["init", "-q"], ["add", "-A"], commit):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
    head = git.locate(folder).head
    git.clone_bare(folder, folder / "repo.git", head)
    return folder / "repo.git", head


def proposal(*edits: Edit, diff: str = "", name: str = "p1", title: str = "Try it") -> Proposal:
    return Proposal(name, "", title, "It may help.", "ideas", edits=edits, diff=diff)


def build(
    start: tuple[Path, str], *edits: Edit, diff: str = "", source: Source = SOURCE, name: str = "p1",
) -> Candidate:
    return patch.build(start[0], "lab", start[1], proposal(*edits, diff=diff, name=name), source)


def refused(start: tuple[Path, str], *edits: Edit, diff: str = "", source: Source = SOURCE) -> PatchRefused:
    with pytest.raises(PatchRefused) as caught:
        build(start, *edits, diff=diff, source=source)
    assert caught.value.stage == "patch"
    return caught.value


def text(start: tuple[Path, str], tree: str, path: str) -> bytes:
    entry = next(entry for entry in git_trees.entries(start[0], tree, "lab") if entry.path == path)
    return git_trees.blobs(start[0], [entry.sha])[entry.sha]


def test_a_candidate_is_a_branch_with_one_commit(start: tuple[Path, str]) -> None:
    made = build(start, Edit("train.py", "LR = 0.1", "LR = 0.2"), Edit("extra.py", "", "k = 1\n"), name="card-7")
    repo, head = start
    assert (made.id, made.branch, made.base) == ("card-7", "candidate/card-7", head)
    assert git.resolve(repo, f"refs/heads/{made.branch}") == made.head
    assert git.resolve(repo, f"{made.head}^") == head
    assert git.resolve(repo, made.head, "tree") == made.tree
    assert made.patch.files == ("extra.py", "train.py")
    assert (made.patch.added, made.patch.removed) == (2, 1)
    assert "--- a/train.py" in made.patch.diff and "+LR = 0.2" in made.patch.diff
    assert text(start, made.tree, "train.py") == TRAIN.replace(b"LR = 0.1", b"LR = 0.2")
    again = build(start, Edit("train.py", "LR = 0.1", "LR = 0.3"), name="card-7")
    assert git.resolve(repo, "refs/heads/candidate/card-7") == again.head
    assert again.patch.content_hash != made.patch.content_hash


def test_a_title_that_git_could_not_hold(start: tuple[Path, str]) -> None:
    edit = Edit("train.py", "LR = 0.1", "LR = 0.2")
    odd = Proposal("odd", "", "a\0b\ud800\nc", "\x1b[31m", "llm", edits=(edit,))
    made = patch.build(start[0], "lab", start[1], odd, SOURCE)
    assert git.run(start[0], "log", "-1", "--format=%B", made.head).decode().strip() == "a?b? c\n\n?[31m"


@pytest.mark.parametrize("name", ["../x", "a..b", "x.lock", "", "a b", "-x"])
def test_an_id_that_cannot_name_a_branch_is_the_callers_mistake(start: tuple[Path, str], name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a branch"):
        build(start, Edit("train.py", "LR = 0.1", "LR = 0.2"), name=name)


TIERS = [
    ("exact", "LR = 0.1\nWARMUP = 10", "LR = 0.2\nWARMUP = 10", b"LR = 0.1", b"LR = 0.2"),
    ("rstrip", "LR = 0.1  \nWARMUP = 10\t\n", "LR = 0.2\nWARMUP = 10\n", b"LR = 0.1", b"LR = 0.2"),
    ("reindent", "# momentum first\nfor p in self.params:\n    p.add_(p.grad, alpha=-lr)",
     "# momentum first\nfor p in self.params:\n    p.mul_(0.9)\n    p.add_(p.grad, alpha=-lr)",
     b"        # momentum first\n        for p in self.params:\n",
     b"        # momentum first\n        for p in self.params:\n            p.mul_(0.9)\n"),
    ("reindent", "            # bias correction\n            for p in self.params:",
     "            # bias correction\n            for p in self.others:",
     b"# bias correction\n        for p in self.params", b"# bias correction\n        for p in self.others"),
    ("fuzzy", "class AdamW:\n    def step(self, lr):\n        # bias corrections\n        for p in self.params:",
     "class AdamW:\n    def step(self, lr):\n        # bias corrections\n        for p in self.all:",
     b"# bias correction\n        for p in self.params", b"# bias correction\n        for p in self.all"),
]


@pytest.mark.parametrize(("tier", "search", "replacement", "before", "after"), TIERS)
def test_match_tiers(tier: str, search: str, replacement: str, before: bytes, after: bytes) -> None:
    new, used = matching.replace(TRAIN.decode(), search, replacement, "train.py")
    assert used == tier
    assert new.encode() == TRAIN.replace(before, after)


def test_several_places_are_an_error_that_names_them(start: tuple[Path, str]) -> None:
    for search in ("        for p in self.params:", "for p in self.params:  \n    p.add_(p.grad, alpha=-lr)"):
        error = refused(start, Edit("train.py", search, "pass"))
        assert error.rule == "match" and "2 places" in error.reason
        assert error.nearest == ("    8 |         for p in self.params:", "   15 |         for p in self.params:")


def test_two_like_places_are_no_fuzzy_match() -> None:
    """mpatch alone takes the first of the two, whatever line number it is given."""
    body = "    def f(self):\n        rate = self.base * 0.5  # {}\n        for p in self.params:\n            pass\n"
    search = "        rate = self.base * 0.5\n        for p in self.params:\n"
    with pytest.raises(PatchRefused, match="2 places") as caught:
        matching.replace(body.format("half") + body.format("third"), search, search.replace("0.5", "0.2"), "train.py")
    assert [line[:5] for line in caught.value.nearest] == ["    2", "    6"]
    new, tier = matching.replace(body.format("half"), search, search.replace("0.5", "0.2"), "train.py")
    assert (new, tier) == (body.replace("0.5  # {}", "0.2"), "spacing")


def test_no_place_answers_with_the_nearest_real_lines(start: tuple[Path, str]) -> None:
    error = refused(start, Edit("train.py", "LR = 0.3\nWARM = 20", "LR = 0.4"))
    assert error.rule == "match" and error.reason.startswith("edit 1: train.py has no such lines")
    assert error.nearest[:2] == ("   19 | LR = 0.1", "   20 | WARMUP = 10")
    assert "   19 | LR = 0.1" in str(error)


@pytest.mark.parametrize("search", ["LR = 0", "R = 0.1", "WARMUP = 1", "mport math"])
def test_a_search_that_cuts_a_word_or_number_is_no_match(start: tuple[Path, str], search: str) -> None:
    assert refused(start, Edit("train.py", search, "LR = 7")).rule == "match"


def test_one_bad_edit_means_no_candidate(start: tuple[Path, str]) -> None:
    error = refused(start, Edit("train.py", "LR = 0.1", "LR = 0.2"), Edit("nets.py", "depth = 2", "depth = 3"))
    assert error.reason == "edit 2: there is no file nets.py." and "net.py" in error.nearest[0]
    assert git.resolve(start[0], "refs/heads/candidate/none") is None


def test_edits_see_the_edits_before_them(start: tuple[Path, str]) -> None:
    made = build(start, Edit("train.py", "LR = 0.1", "LR = 0.2"), Edit("./train.py", "LR = 0.2", "LR = 0.3"),
                 Edit("lab/train.py", "WARMUP = 10", "WARMUP = 0"))
    assert text(start, made.tree, "train.py").endswith(b"LR = 0.3\nWARMUP = 0\n")


def test_windows_line_ends_stay(start: tuple[Path, str]) -> None:
    made = build(start, Edit("net.py", "depth = 2\nwidth = 64\n", "depth = 3\nwidth = 32\nbias = 0\n"))
    assert text(start, made.tree, "net.py") == b"depth = 3\r\nwidth = 32\r\nbias = 0\r\nheads = 4\r\n"
    assert (made.patch.added, made.patch.removed) == (3, 2)


def test_mixed_line_ends_keep_their_own() -> None:
    original = "a\r\nb\nc\r\nd"
    assert matching.with_endings(matching.plain(original), original) == original
    assert matching.with_endings("a\nnew\nb\nc\nd", original) == "a\r\nnew\r\nb\nc\r\nd"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text("ab=1 \t\x0c\u2028é", max_size=6), min_size=1, max_size=8), st.data(),
       st.text("xy\n=2 ", max_size=12), st.sampled_from(["\n", "\r\n"]))
def test_exact_edits_round_trip(lines: list[str], data: st.DataObject, replacement: str, end: str) -> None:
    """Replace any block of whole lines, and replace it back: the bytes are those from before."""
    lines = [f"{line}#{number}" for number, line in enumerate(lines)]  # every block is unique
    original = end.join(lines)
    first = data.draw(st.integers(0, len(lines) - 1))
    last = data.draw(st.integers(first, len(lines) - 1))
    search = "\n".join(lines[first:last + 1])
    replacement = f"<{replacement}>"
    new, tier = matching.replace(matching.plain(original), search, replacement, "f")
    assert tier == "exact"
    assert new == "\n".join([*lines[:first], replacement, *lines[last + 1:]])
    back, _ = matching.replace(new, replacement, search, "f")
    assert matching.with_endings(back, original) == original


DIFF = """--- a/train.py
+++ b/train.py
@@ -17,4 +17,5 @@
{blank}
{blank}
-LR = 0.1
+LR = 0.2
+DECAY = 0.0
 WARMUP = 10
""".replace("{blank}", " ")


@pytest.mark.parametrize("change", [
    ("", ""), ("-17,4 +17,5", "-1,99 +3,1"), ("-17,4 +17,5", "..."), ("@@ -17,4 +17,5 @@", "@@"),
    ("a/train.py\n+++ b/train.py", "train.py\n+++ train.py"),
    ("a/train.py\n+++ b/train.py", "a/lab/train.py\n+++ b/lab/train.py"),
    ("\n \n \n", "\n\n\n"), ("\n", "\r\n"), (" WARMUP = 10\n", " WARMUP = 10  \n"),
    ("--- a", "Some prose.\n\n```diff\ndiff --git a/train.py b/train.py\nindex 12..34 100644\n--- a"),
    (" WARMUP = 10\n", " WARMUP = 10\n-- \n2.39.5\n\n"), (" WARMUP = 10\n", " WARMUP = 10\n```\nDone.\n"),
])
def test_a_damaged_diff_is_applied(start: tuple[Path, str], change: tuple[str, str]) -> None:
    made = build(start, diff=DIFF.replace(*change))
    assert text(start, made.tree, "train.py") == TRAIN.replace(b"LR = 0.1\n", b"LR = 0.2\nDECAY = 0.0\n")


def test_the_line_number_settles_a_tie_only_when_it_is_exact(start: tuple[Path, str]) -> None:
    body = "--- a/train.py\n+++ b/train.py\n@@ -{},2 +{},2 @@\n         for p in self.params:\n" \
           "-            p.add_(p.grad, alpha=-lr)\n+            p.sub_(p.grad, alpha=lr)\n"
    made = build(start, diff=body.format(15, 15))
    head, tail = TRAIN.split(b"class AdamW")
    tail = tail.replace(b"add_(p.grad, alpha=-lr", b"sub_(p.grad, alpha=lr")
    assert text(start, made.tree, "train.py") == head + b"class AdamW" + tail
    assert "2 places" in refused(start, diff=body.format(14, 14)).reason


def test_a_diff_may_create_and_delete(start: tuple[Path, str]) -> None:
    made = build(start, diff="--- /dev/null\n+++ b/new.py\n@@ -0,0 +1,2 @@\n+a = 1\n+b = 2\n"
                             "--- a/net.py\n+++ /dev/null\n@@ -1,3 +0,0 @@\n-depth = 2\n-width = 64\n-heads = 4\n")
    assert made.patch.files == ("net.py", "new.py")
    assert text(start, made.tree, "new.py") == b"a = 1\nb = 2\n"
    error = refused(start, diff="--- a/net.py\n+++ /dev/null\n@@ -1,1 +0,0 @@\n-depth = 2\n")
    assert "not empty after its deletion" in error.reason


LINK = "diff --git a/l b/l\nnew file mode {}\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+{}\n"


@pytest.mark.parametrize(("diff", "problem"), [
    (LINK.format("120000", "/etc/passwd"), "120000"), (LINK.format("160000", "Subproject commit a"), "160000"),
    ("diff --git a/train.py b/moved.py\nsimilarity index 100%\nrename from train.py\nrename to moved.py\n", "renames"),
    ("diff --git a/train.py b/train.py\nold mode 100644\nnew mode 100755\n", "mode"),
    ("diff --git a/w.bin b/w.bin\nindex 1..2 100644\nGIT binary patch\nliteral 3\nabc\n", "binary"),
    ("--- a/train.py\n+++ b/other.py\n@@ -19 +19 @@\n-LR = 0.1\n+LR = 0.2\n", "renames"),
    ("--- a/train.py\n+++ b/train.py\n@@ -1 +1 @@\n+LR = 0.2\n", "quotes no line"),
    ("hello", "no file change"), ("--- a/train.py\n+++ b/train.py\n", "changes no line"),
    ("--- a/link.py\n+++ b/link.py\n@@ -1 +1 @@\n-train.py\n+/etc/passwd\n", "symlink"),
    ("--- /dev/null\n+++ b/train.py\n@@ -0,0 +1 @@\n+a = 1\n", "exists"),
])
def test_what_is_no_plain_change_is_refused_by_name(start: tuple[Path, str], diff: str, problem: str) -> None:
    assert problem in refused(start, diff=diff).reason


@pytest.mark.parametrize("path", [
    "eval.py", "EVAL.py", "frozen/data.py", "frozen/new.py", "ratchet.toml", "sub/Ratchet.toml", ".git/config",
    ".GIT/config", "sub/.git/hooks/x.py", ".gitattributes", "sub/.gitmodules", "conftest.py", "a/conftest.py",
    "sitecustomize.py", "x.pth", "pyproject.toml", "setup.py", "notes.txt", "../top.py", "/etc/x.py", "a//b.py",
    "a/../train.py", "a\\b.py", "c:x.py", "git~1/x.py", "a./x.py", "a /x.py", "tr\u200bain.py", "a\nb.py", "\uff41.py",
    "__pycache__/train.py", "", ".",
])
def test_paths_outside_the_allow_list(start: tuple[Path, str], path: str) -> None:
    assert refused(start, Edit(path, "", "a = 1\n")).rule == "path"


@pytest.mark.parametrize("path", ["json.py", "src/random.py", "json/__init__.py", "numpy.py"])
def test_a_new_module_takes_no_other_modules_place(tmp_path: Path, path: str) -> None:
    """It would be imported instead: not that of Python's modules, nor of what a protected file imports."""
    folder = tmp_path / "target"
    for name, text in {"eval.py": "import numpy\n", "net.py": "x = 1\n", "pkg/__init__.py": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for arguments in (["init", "-q"], ["add", "-A"],
                      ["-c", "user.name=A", "-c", "user.email=a@b", "commit", "-qm", "s"]):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
    head = git.locate(folder).head
    git.clone_bare(folder, tmp_path / "repo.git", head)

    def made(name: str) -> Candidate:
        return patch.build(tmp_path / "repo.git", "", head, proposal(Edit(name, "", "y = 2\n")), SOURCE)

    with pytest.raises(PatchRefused, match="place of the module") as caught:
        made(path)
    assert caught.value.rule == "path"
    assert made("pkg/random.py").tree and made("helper.py").tree  # in a package, and a name of its own


def test_a_protected_file_is_not_quoted_back(start: tuple[Path, str]) -> None:
    error = refused(start, Edit("eval.py", "x = 2", "x = 3"))
    assert error.reason == "edit 1: eval.py is protected." and "x = 1" not in str(error)


def test_a_path_that_differs_by_case_or_lies_below_a_file(start: tuple[Path, str]) -> None:
    assert "only by case" in refused(start, Edit("Train.py", "", "a = 1\n")).reason
    assert "file and a folder" in refused(start, Edit("train.py/x.py", "", "a = 1\n")).reason
    assert "file and a folder" in refused(start, Edit("n.py/x.py", "", "a = 1\n"), Edit("n.py", "", "a = 1\n")).reason


RAW = {
    "symlink": ("120000 {blob}\tlab/s.py", "mode", "symlink"),
    "submodule": (f"160000 {'a' * 40}\tlab/m.py", "mode", "submodule"),
    "executable": ("100755 {blob}\tlab/e.py", "mode", "changes its mode"),
    "made executable": ("100755 {train}\tlab/train.py", "mode", "changes its mode"),
    "outside": ("100644 {blob}\ttop.py", "path", "outside the target"),
    "attributes": ("100644 {blob}\tlab/.gitattributes", "path", "protected"),
    "binary": ("100644 {binary}\tlab/b.py", "binary", "binary"),
    "latin-1": ("100644 {latin}\tlab/b.py", "binary", "UTF-8"),
}


@pytest.mark.parametrize("case", RAW)
def test_the_policy_judges_the_tree_whatever_made_it(start: tuple[Path, str], tmp_path: Path, case: str) -> None:
    line, rule, problem = RAW[case]
    repo, head = start

    def blob(content: bytes) -> str:
        return git.run(repo, "hash-object", "-w", "--stdin", stdin=content).decode().strip()

    line = line.format(blob=blob(b"a = 1\n"), train=blob(TRAIN), binary=blob(b"a\0b"), latin=blob(b"# \xe9\n"))
    environment = os.environ | {"GIT_INDEX_FILE": str(tmp_path / "index"), "GIT_DIR": str(repo)}
    for arguments in (["read-tree", head], ["update-index", "--index-info"]):
        subprocess.run(["git", *arguments], input=f"{line}\n", text=True, check=True, env=environment)
    tree = subprocess.run(["git", "write-tree"], check=True, capture_output=True, text=True,
                          env=environment).stdout.strip()
    with pytest.raises(PatchRefused, match=problem) as caught:
        policy.check(repo, head, tree, "lab", SOURCE)
    assert caught.value.rule == rule


def test_an_executable_stays_one(start: tuple[Path, str]) -> None:
    made = build(start, Edit("run.sh", "#!/bin/sh", "#!/bin/bash"), source=Source(editable=["run.sh"]))
    assert next(change for change in git_trees.diff_raw(start[0], start[1], made.tree)).new_mode == "100755"


def test_size_limits(start: tuple[Path, str]) -> None:
    long = "".join(f"a{i} = {i}\n" for i in range(900))
    assert "900 lines; the limit is 800" in refused(start, Edit("new.py", "", long)).reason
    wide = "".join(f"a{i} = [{', '.join(str(j) for j in range(60))}]\n" for i in range(300))
    assert "KiB; the limit is 64" in refused(start, Edit("new.py", "", wide)).reason
    assert refused(start, Edit("train.py", "LR = 0.1", "x" * 600_000)).rule == "size"


@pytest.mark.parametrize(("line", "problem"), [
    (f"D = '{'word ' * 900}'", "more than 4096"),
    (f"D = b'{'ab cd ' * 700}'", "more than 4096"),
    ("D = (" + " ".join(f"'{'word ' * 30}'" for _ in range(30)) + ")", "more than 4096"),
    (f"D = '{base64.b64encode(bytes(range(200))).decode()}'", "encoded"),
    ("D = '" + "0123456789abcdef" * 16 + "'", "encoded"),
    ("D = 'a\u202eb'", "reverse"),
])
def test_literals_that_are_data(start: tuple[Path, str], line: str, problem: str) -> None:
    error = refused(start, Edit("new.py", "", f"import math\n{line}\n"))
    assert error.rule == "literal" and problem in error.reason


def test_a_ruled_line_is_no_data(start: tuple[Path, str]) -> None:
    assert build(start, Edit("new.py", "", f"print('{'=' * 300}')\n")).patch.added == 1


def test_a_syntax_error_names_the_line(start: tuple[Path, str]) -> None:
    error = refused(start, Edit("train.py", "LR = 0.1", "LR = (0.1"))
    assert error.rule == "syntax" and "train.py line 19" in error.reason
    assert "   19 | LR = (0.1" in error.nearest
    assert refused(start, Edit("new.py", "", "(" * 3000)).rule == "syntax"


@pytest.mark.parametrize("edits", [
    [Edit("train.py", "LR = 0.1", "LR = 0.1")], [],
    [Edit("train.py", "LR = 0.1", "LR = 0.2"), Edit("train.py", "LR = 0.2", "LR = 0.1")],
    [Edit("train.py", "# momentum first", "# momentum, then the step")],
    [Edit("train.py", "LR = 0.1", "LR = (0.1)  # x\n")],
    [Edit("train.py", '"""Train."""', '"""Train well."""')],
])
def test_what_changes_nothing_is_refused(start: tuple[Path, str], edits: list[Edit]) -> None:
    assert refused(start, *edits).rule == "no-op"


def test_duplicates_have_one_normalised_hash(start: tuple[Path, str]) -> None:
    one = build(start, Edit("train.py", "LR = 0.1", "LR = 0.2")).patch
    same = build(start, Edit("train.py", "LR = 0.1\n", "# better\nLR  =  0.20\n")).patch
    other = build(start, Edit("train.py", "LR = 0.1", "LR = 0.3")).patch
    assert one.normalised_hash == same.normalised_hash != other.normalised_hash
    assert one.content_hash != same.content_hash


def test_the_same_idea_on_another_base_is_a_duplicate_but_not_in_another_class(start: tuple[Path, str]) -> None:
    repo, _ = start
    edit = Edit("train.py", "# momentum first\n        for p in self.params:",
                "# momentum first\n        for p in self.q:")
    one = build(start, edit).patch
    moved = build(start, Edit("train.py", "import math", "import math\nimport time"))
    later = patch.build(repo, "lab", moved.head, proposal(edit, name="later"), SOURCE).patch
    elsewhere = build(start, Edit("train.py", "# bias correction\n        for p in self.params:",
                                  "# bias correction\n        for p in self.q:")).patch
    assert one.normalised_hash == later.normalised_hash != elsewhere.normalised_hash


def test_a_whole_repository_as_target(start: tuple[Path, str]) -> None:
    made = patch.build(start[0], "", start[1], proposal(Edit("top.py", "z = 1", "z = 2"), name="whole"), Source())
    assert made.patch.files == ("top.py",) and "a/top.py" in made.patch.diff


def test_a_file_that_is_not_utf8_is_refused(start: tuple[Path, str]) -> None:
    assert refused(start, Edit("latin.py", "x = 1", "x = 2")).rule == "binary"
    assert refused(start, Edit("new.py", "", "x = '\udc80'\n")).rule == "binary"


OPTIMIZER = "import math\n\nBATCH = 32\nLR = 0.002\nSTEPS = 400\nDECAY = 0.1\n\n\ndef rate(step):\n    return LR\n"


@pytest.mark.parametrize("wrong", ["BATCH_SIZE = 64", "LR = 0.5", "LR = 0.7 * base_lr"])
def test_a_line_that_the_file_does_not_have_is_not_replaced(wrong: str) -> None:
    hunk = [" BATCH = 32", f"-{wrong}", "+LR = 0.02", " STEPS = 400", " DECAY = 0.1", " ", " ", " def rate(step):"]
    with pytest.raises(PatchRefused, match="has no such lines"):
        matching.apply_hunk(OPTIMIZER, hunk, "train.py")


def test_a_comment_may_have_drifted() -> None:
    hunk = [" BATCH = 32", "-LR = 0.002  # too low", "+LR = 0.02", " STEPS = 400", " DECAY = 0.1", " ", " "]
    text, tier = matching.apply_hunk(OPTIMIZER, hunk, "train.py")
    assert (text, tier) == (OPTIMIZER.replace("0.002", "0.02"), "spacing")
