"""Git on real repositories: nothing of the user's is touched, and a tree is written and read byte for byte."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from agent import export, git, git_trees
from agent.errors import UserError

FILES = {
    "README.md": b"read me\n",
    "trainer/train.py": b"lr = 0.1\n",
    "trainer/model/net.py": b"width = 64\r\ndepth = 2\r\n",
    "trainer/run.sh": b"#!/bin/sh\n",
}


def sh(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a trainer in a subfolder."""
    top = tmp_path / "checkout"
    top.mkdir()
    sh(top, "init", "-q", "-b", "main")
    sh(top, "config", "user.name", "Ada")
    sh(top, "config", "user.email", "ada@example.org")
    for name, content in FILES.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(content)
    (top / "trainer/run.sh").chmod(0o755)
    sh(top, "add", "-A")
    sh(top, "commit", "-q", "-m", "start")
    return top


@pytest.fixture
def clone(checkout: Path, tmp_path: Path) -> Path:
    repo = tmp_path / "campaign" / "repo.git"
    git.clone_bare(checkout, repo, git.locate(checkout).head)
    return repo


def snapshot(folder: Path) -> dict[str, str]:
    """Hash and mode of every file, .git and its index included."""
    return {str(path.relative_to(folder)): f"{path.lstat().st_mode:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
            for path in sorted(folder.rglob("*")) if path.is_file()}


def merged(repo: Path, head: str) -> str:
    tree = git_trees.write_tree(repo, head, "trainer", {"train.py": b"lr = 0.2\n"})
    tip = git.commit_tree(repo, tree, (head,), "Double the learning rate\n\nIt was low.\n")
    git.update_ref(repo, git.ACCEPTED, tip, head)
    return tip


def test_locate_finds_a_whole_repository_and_a_folder_of_one(checkout: Path) -> None:
    head = sh(checkout, "rev-parse", "HEAD").strip()
    assert git.locate(checkout) == git.Location(checkout.resolve(), "", head)
    assert git.locate(checkout / "trainer" / "model") == git.Location(checkout.resolve(), "trainer/model", head)


def test_locate_says_what_to_mend(tmp_path: Path, checkout: Path, clone: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    sh(fresh, "init", "-q")
    (checkout / "new").mkdir()
    cases = {
        tmp_path / "nowhere": "does not exist", checkout / "README.md": "is not a folder",
        empty: "is not in a git repository", fresh: "has no commits", clone: "bare repository",
        checkout / ".git": "bare repository", checkout / "new": "is committed",
    }
    for path, problem in cases.items():
        with pytest.raises(UserError, match=problem) as caught:
            git.locate(path)
        assert caught.value.mend and "\n" not in str(caught.value)


def test_variables_of_the_callers_shell_change_nothing(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = git.locate(checkout)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_CONFIG_PARAMETERS"):
        monkeypatch.setenv(name, "/nonexistent")
    assert git.locate(checkout) == before


def test_a_dirty_checkout_stays_byte_identical_through_clone_and_export(checkout: Path, tmp_path: Path) -> None:
    (checkout / "README.md").write_text("changed, not staged\n")
    (checkout / "trainer/train.py").write_text("lr = 0.7  # staged\n")
    sh(checkout, "add", "trainer/train.py")
    (checkout / "untracked.txt").write_text("mine\n")
    os.utime(checkout / "trainer/run.sh")  # a stale stat that `git status` would write back to the index
    before = snapshot(checkout)
    location = git.locate(checkout / "trainer")
    assert git.is_dirty(location)
    repo = tmp_path / "repo.git"
    git.clone_bare(location.toplevel, repo, location.head)
    merged(repo, location.head)
    exported = export.export_series(repo, location.head, tmp_path / "out")
    assert snapshot(checkout) == before
    assert [path.name for path in exported.patches] == ["0001-Double-the-learning-rate.patch"]
    export.export_branch(repo, location.toplevel, location.head, "ratchet/night")
    after = snapshot(checkout)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith((".git/objects/", ".git/refs/heads/ratchet/", ".git/logs/refs/heads/ratchet/"))
               for name in after.keys() - before.keys())


def test_is_dirty_runs_no_planted_command(checkout: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    sh(checkout, "config", "filter.spy.clean", f"touch {marker}; cat")
    sh(checkout, "config", "filter.spy.required", "true")
    sh(checkout, "config", "core.fsmonitor", f"touch {marker}; false")
    (checkout / ".gitattributes").write_text("*.py filter=spy\n")
    (checkout / "trainer/train.py").write_text("lr = 0.5\n")
    assert git.is_dirty(git.locate(checkout / "trainer"))
    assert not marker.exists()


def test_is_dirty_asks_about_the_target_only(checkout: Path) -> None:
    assert not git.is_dirty(git.locate(checkout))
    (checkout / "README.md").write_text("changed\n")
    assert git.is_dirty(git.locate(checkout))
    assert not git.is_dirty(git.locate(checkout / "trainer"))


def test_the_clone_stands_alone(checkout: Path, clone: Path) -> None:
    assert sh(clone, "for-each-ref", "--format=%(refname)").split() == [git.ACCEPTED]
    assert not (clone / "objects/info/alternates").exists() and not (clone / "hooks").exists()
    assert "remote" not in (clone / "config").read_text()
    assert all(path.stat().st_nlink == 1 for path in clone.rglob("*") if path.is_file())
    before = snapshot(clone)
    git.clone_bare(checkout, clone, "0" * 40)  # it exists: left as it is
    assert snapshot(clone) == before
    sh(clone, "fsck", "--full", "--strict")


def test_a_shallow_checkout_can_be_cloned(checkout: Path, tmp_path: Path) -> None:
    (checkout / "README.md").write_text("two\n")
    sh(checkout, "commit", "-q", "-a", "-m", "two")
    shallow = tmp_path / "shallow"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{checkout}", str(shallow)], check=True)
    repo = tmp_path / "from-shallow.git"
    git.clone_bare(shallow, repo, git.locate(shallow).head)
    sh(repo, "fsck", "--full")
    assert sh(repo, "rev-list", "--count", git.ACCEPTED).strip() == "1"


def test_a_failed_clone_leaves_nothing(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(git.GitError):
        git.clone_bare(checkout, tmp_path / "runs" / "repo.git", "1" * 40)
    assert list((tmp_path / "runs").iterdir()) == []


def test_import_folder_is_deterministic_and_skips_what_is_not_source(tmp_path: Path) -> None:
    commits = []
    for name in ("one", "two"):
        folder = tmp_path / name
        (folder / "__pycache__").mkdir(parents=True)
        (folder / "data").mkdir()
        (folder / "sub").mkdir()
        (folder / "train.py").write_bytes(b"lr = 1\r\n")
        (folder / "sub/x y.py").write_bytes(b"")
        (folder / "__pycache__/train.pyc").write_bytes(name.encode())
        (folder / "data/train.bin").write_bytes(name.encode())
        (folder / "old.pyc").write_bytes(b"1")
        (folder / "link").symlink_to("/etc/passwd")
        (folder / "train.py").chmod(0o755 if name == "one" else 0o644)
        repo = tmp_path / f"{name}.git"
        commits += [git_trees.import_folder(folder, repo), git_trees.import_folder(folder, repo)]
        assert git_trees.list_files(repo, git.ACCEPTED) == ["sub/x y.py", "train.py"]
        assert git_trees.read_files(repo, commits[0], "", ["train.py"]) == {"train.py": "lr = 1\r\n"}
    assert len(set(commits)) == 1
    with pytest.raises(UserError, match="holds no files"):
        git_trees.import_folder(tmp_path / "one" / "__pycache__", tmp_path / "none.git")


def test_materialise_writes_the_blobs_and_ignores_attributes(clone: Path, tmp_path: Path) -> None:
    tree = git_trees.write_tree(clone, git.ACCEPTED, "trainer", {
        ".gitattributes": b"*.py text eol=crlf working-tree-encoding=UTF-16\n", "bom.py": b"\xef\xbb\xbfx = 1\n"})
    folder = tmp_path / "src" / "tree"
    git_trees.materialise(clone, tree, "trainer", folder)
    assert (folder / "model/net.py").read_bytes() == FILES["trainer/model/net.py"]
    assert (folder / "train.py").read_bytes() == FILES["trainer/train.py"]
    assert (folder / "bom.py").read_bytes() == b"\xef\xbb\xbfx = 1\n"
    assert [oct((folder / name).stat().st_mode & 0o777) for name in ("train.py", "run.sh", "model", ".")] == \
        ["0o444", "0o555", "0o755", "0o755"]
    with pytest.raises(git.GitError):
        git_trees.materialise(clone, tree, "nowhere", folder.parent / "none")
    before = snapshot(folder)
    git_trees.materialise(clone, tree, "trainer", folder)
    assert snapshot(folder) == before and [path.name for path in folder.parent.iterdir()] == ["tree"]


@pytest.mark.parametrize(("path", "target", "kept"), [
    ("link", "train.py", True), ("model/link", "../train.py", True), ("link", "./model/net.py", True),
    ("link", "/etc/passwd", False), ("link", "../outside", False), ("model/link", "../../outside", False),
    ("link", "model/../../outside", False), ("model/link", "..", True), ("link", "", False),
])
def test_symlinks_that_could_lead_out_are_left_out(path: str, target: str, kept: bool) -> None:
    assert git_trees.stays_inside(path, target) is kept


def test_materialise_keeps_inner_links_and_drops_submodules(clone: Path, checkout: Path, tmp_path: Path) -> None:
    target = {"good": "train.py", "bad": "../../secret"}
    lines = [f"120000 {_blob(clone, text.encode())}\ttrainer/{name}" for name, text in target.items()]
    tree = _tree(clone, [*lines, f"160000 {'a' * 40}\ttrainer/module"])
    folder = tmp_path / "mat"
    git_trees.materialise(clone, tree, "trainer", folder)
    assert (folder / "good").readlink() == Path("train.py")
    assert not (folder / "bad").is_symlink() and not (folder / "module").exists()
    assert "good" not in git_trees.list_files(clone, tree, "trainer")


def test_write_tree_lays_changes_over_the_base(clone: Path) -> None:
    base = git.resolve(clone, git.ACCEPTED)
    assert base is not None
    tree = git_trees.write_tree(clone, base, "trainer",
                                {"run.sh": b"#!/bin/bash\n", "new/a.py": b"1\n", "train.py": None})
    changes = {change.path: (change.status, change.old_mode, change.new_mode)
               for change in git_trees.diff_raw(clone, base, tree)}
    assert changes == {"trainer/new/a.py": ("A", "000000", "100644"), "trainer/run.sh": ("M", "100755", "100755"),
                       "trainer/train.py": ("D", "100644", "000000")}
    assert "a/new/a.py" in git_trees.diff(clone, base, tree, "trainer")
    assert "b/trainer/new/a.py" in git_trees.diff(clone, base, tree)
    assert git_trees.write_tree(clone, base, "trainer", {}) == git.resolve(clone, base, "tree")
    for path in ("../.git/config", ".GIT/config", "/abs", "a//b", "train.py/below"):
        with pytest.raises(git.GitError):
            git_trees.write_tree(clone, base, "trainer", {path: b""})


def test_update_ref_is_compare_and_swap(clone: Path) -> None:
    head = git.resolve(clone, git.ACCEPTED)
    assert head is not None
    tip = merged(clone, head)
    with pytest.raises(git.RefMoved) as caught:
        git.update_ref(clone, git.ACCEPTED, head, head)
    assert (caught.value.expected, caught.value.actual) == (head, tip)
    with pytest.raises(git.RefMoved):
        git.update_ref(clone, git.ACCEPTED, tip, "")
    git.update_ref(clone, "refs/heads/side", tip, "")
    git.update_ref(clone, "refs/heads/side", "", tip)
    assert git.resolve(clone, "refs/heads/side") is None
    assert sh(clone, "log", "-1", "--format=%an <%ae>", git.ACCEPTED).strip() == "Ratchet <ratchet@localhost>"


def test_a_full_disk_is_the_users_to_mend(clone: Path) -> None:
    """A real ENOSPC under git: an alias sends its output to /dev/full."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(UserError, match=r"disk is full.*ratchet gc"):
        git.run(clone, "fill", settings={"alias.fill": f"!git rev-list --objects {git.ACCEPTED} >/dev/full"})


def test_a_sha256_repository(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    sh(top, "init", "-q", "--object-format=sha256")
    (top / "train.py").write_text("lr = 1\n")
    sh(top, "add", "-A")
    sh(top, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-qm", "start")
    head = git.locate(top).head
    repo = tmp_path / "repo.git"
    git.clone_bare(top, repo, head)
    tree = git_trees.write_tree(repo, head, "", {"train.py": None, "new.py": b"1\n"})
    assert len(tree) == 64 and git_trees.list_files(repo, tree) == ["new.py"]
    git.update_ref(repo, git.ACCEPTED, git.commit_tree(repo, tree, (head,), "New\n"), head)
    export.export_branch(repo, top, head, "night")
    assert sh(top, "rev-parse", "night^{tree}").strip() == tree


def test_globs() -> None:
    names = ["a.py", "a/b.py", "a/b/c.py", "src/x.py", "src/u/v/x.py"]
    table = {"*.py": ["a.py"], "**/*.py": names, "a/": names[1:3], "a": names[1:3], "src/**/x.py": names[3:],
             "[ab]/?.py": ["a/b.py"], "[!a]*/x.py": ["src/x.py"], "./a.py": ["a.py"]}
    for pattern, wanted in table.items():
        assert [name for name in names if git.matches(name, [pattern])] == wanted, pattern
    assert git.matches("Sub/.GitAttributes", ["**/.git*"], fold=True)


def test_exported_patches_apply_at_the_root_and_the_bundle_holds_the_branch(
        checkout: Path, clone: Path, tmp_path: Path) -> None:
    head = git.locate(checkout).head
    tip = merged(clone, head)
    exported = export.export_series(clone, head, tmp_path / "out")
    receiver = tmp_path / "receiver"
    subprocess.run(["git", "clone", "-q", str(checkout), str(receiver)], check=True)
    sh(receiver, "fetch", "-q", str(exported.bundle), "accepted:night")
    assert sh(receiver, "rev-parse", "night").strip() == tip
    subprocess.run(["git", "-C", str(receiver), "-c", "user.name=B", "-c", "user.email=b@example.org", "am", "-q",
                    *map(str, exported.patches)], check=True)
    assert sh(receiver, "rev-parse", "HEAD^{tree}") == sh(clone, "rev-parse", f"{tip}^{{tree}}")
    assert export.export_series(clone, head, tmp_path / "out") == exported
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == \
        ["0001-Double-the-learning-rate.patch", "accepted.bundle"]


def test_export_refuses_a_taken_or_bad_name_and_an_empty_history(checkout: Path, clone: Path, tmp_path: Path) -> None:
    head = git.locate(checkout).head
    with pytest.raises(UserError, match="Nothing was merged"):
        export.export_series(clone, head, tmp_path / "out")
    tip = merged(clone, head)
    for name, problem in {"main": "already has", "main/sub": "cannot create", "a..b": "not a branch name"}.items():
        with pytest.raises(UserError, match=problem):
            export.export_branch(clone, checkout, head, name)
    assert export.export_branch(clone, checkout, head, "night") == tip
    sh(checkout, "fsck", "--full")
    assert sh(checkout, "rev-parse", "night").strip() == tip
    assert sh(checkout, "status", "--porcelain") == ""


def test_push_goes_to_a_named_remote_and_never_forces(checkout: Path, clone: Path, tmp_path: Path) -> None:
    head = git.locate(checkout).head
    tip = merged(clone, head)
    server = tmp_path / "server.git"
    subprocess.run(["git", "init", "-q", "--bare", str(server)], check=True)
    sh(checkout, "remote", "add", "origin", str(server))
    assert export.push(clone, "origin", head, "night", toplevel=checkout) == tip
    assert sh(server, "rev-parse", "refs/heads/night").strip() == tip
    other = git.commit_tree(clone, git.resolve(clone, head, "tree") or "", (head,), "Elsewhere\n")
    git.update_ref(clone, git.ACCEPTED, other, tip)
    with pytest.raises(UserError, match="push of night failed"):
        export.push(clone, str(server), head, "night")
    assert sh(server, "rev-parse", "refs/heads/night").strip() == tip


def _blob(repo: Path, content: bytes) -> str:
    return subprocess.run(["git", "-C", str(repo), "hash-object", "-w", "--stdin"], input=content, check=True,
                          capture_output=True).stdout.decode().strip()


def _tree(repo: Path, lines: list[str]) -> str:
    """The accepted tree with raw index lines laid over it: what no function of the product would write."""
    environment = os.environ | {"GIT_INDEX_FILE": str(repo / "test-index")}
    for arguments, stdin in ((["read-tree", git.ACCEPTED], ""), (["update-index", "--index-info"], "\n".join(lines))):
        subprocess.run(["git", "-C", str(repo), *arguments], input=f"{stdin}\n" if stdin else "", text=True, check=True,
                       env=environment)
    return subprocess.run(["git", "-C", str(repo), "write-tree"], check=True, capture_output=True, text=True,
                          env=environment).stdout.strip()


def test_what_a_full_id_names_is_asked_once_and_what_a_ref_names_each_time(
        clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = str(git.resolve(clone, git.ACCEPTED))
    tree = git_trees.write_tree(clone, base, "trainer", {"train.py": b"lr = 9\n"})
    commit = git.commit_tree(clone, tree, (base,), "Change\n")
    before = git_trees.read_files(clone, git.ACCEPTED, "trainer", ["train.py"])

    def asked() -> tuple[object, ...]:
        return (git_trees.read_files(clone, commit, "trainer", ["train.py"]), git_trees.entries(clone, commit),
                git_trees.diff_raw(clone, base, commit),
                git.resolve(clone, commit, "tree"), git.resolve(clone, f"{commit}^{{tree}}", "tree"))

    first, real, count = asked(), git.run, []
    with monkeypatch.context() as patched:
        for module in (git, git_trees):
            patched.setattr(module, "run", lambda *words, **options: count.append(words) or real(*words, **options))
        assert asked() == first and first[0] == {"train.py": "lr = 9\n"} and not count
        first[1].clear()  # type: ignore[attr-defined]  # a caller's own list
        assert git_trees.entries(clone, commit) and not count
        assert git.resolve(clone, "0" * 40) is git.resolve(clone, "0" * 40) is None and len(count) == 2
    git.update_ref(clone, git.ACCEPTED, commit, base)
    assert git.resolve(clone, git.ACCEPTED) == commit
    assert git_trees.read_files(clone, git.ACCEPTED, "trainer", ["train.py"]) == first[0] != before


def test_blobs_are_kept_within_their_room(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = git_trees._Kept()
    monkeypatch.setattr(git_trees, "_KEPT", kept)
    monkeypatch.setattr(git_trees._Kept, "ROOM", 250)
    monkeypatch.setattr(git_trees._Kept, "LARGEST", 100)
    texts = [bytes([65 + number]) * 100 for number in range(4)] + [b"large" * 30]
    tree = git_trees.write_tree(clone, git.ACCEPTED, "", {f"{number}": text for number, text in enumerate(texts)})
    shas = {text: entry.sha for text, entry in zip(texts, git_trees.entries(clone, tree), strict=False)}
    for text in (*texts, texts[3]):
        assert git_trees.blobs(clone, [shas[text]]) == {shas[text]: text}
    assert [sha for _, sha in kept._blobs] == [shas[texts[2]], shas[texts[3]]]
    assert git_trees.blobs(clone, shas.values()) == {sha: text for text, sha in shas.items()}
    assert sum(map(len, kept._blobs.values())) == kept._used <= 250


@pytest.mark.parametrize("failure", ["kill -TERM $$", "echo 'fatal: Out of memory, malloc failed' >&2; exit 128"])
def test_a_git_that_fails_once_leaves_no_empty_folder_behind(
        clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    commit = str(git.resolve(clone, git.ACCEPTED))
    shim = tmp_path / "bin" / "git"
    shim.parent.mkdir()
    once = tmp_path / "once"
    shim.write_text(f"#!/bin/sh\ncase \"$*\" in *ls-tree*) [ -e {once} ] || {{ : > {once}; {failure}; }};; esac\n"
                    f"exec {shutil.which('git')} \"$@\"\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    with pytest.raises(git.GitError):
        git_trees.entries(clone, commit, "trainer")
    assert once.exists() and "train.py" in git_trees.list_files(clone, commit, "trainer")
    assert git_trees.entries(clone, commit, "nowhere") == []


def test_a_branch_that_is_named_like_an_object_may_move(clone: Path) -> None:
    first = str(git.resolve(clone, git.ACCEPTED))
    second = git.commit_tree(clone, str(git.resolve(clone, first, "tree")), (first,), "Next\n")
    name = "a" * 64
    for commit, before in ((first, ""), (second, first)):
        git.update_ref(clone, f"refs/heads/{name}", commit, before)
        assert git.resolve(clone, name) == commit
