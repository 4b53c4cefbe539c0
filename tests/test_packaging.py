"""What a user installs: the lock files, the refusals of make, and the wheel with its prompts and default target."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import agent
from agent import resources
from agent.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIN = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[0-9][0-9A-Za-z.]*)( ; (?P<marker>.+))?")


def pins(name: str) -> dict[str, str]:
    """Package -> exact version of a lock file; anything else in it (an option, a host, a path) fails."""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = PIN.fullmatch(line)
            assert match, f"{name}: {line!r} is no exact pin"
            found[match["name"]] = match["version"]
    return found


@pytest.mark.parametrize(("lock", "extras"), [("requirements.lock", []), ("requirements-dev.lock", ["dev"])])
def test_lock_pins_every_direct_dependency_within_its_range(lock: str, extras: list[str]) -> None:
    locked = pins(lock)
    direct = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, direct):
        name = requirement.name.lower().replace("_", "-")
        assert name in locked, f"{name} is missing: make lock"
        assert requirement.specifier.contains(locked[name]), f"{requirement}, not {locked[name]}: make lock"


def test_development_lock_holds_the_runtime_lock() -> None:
    assert pins("requirements.lock").items() <= pins("requirements-dev.lock").items()


def test_checkout_folders_are_the_resources() -> None:
    assert resources.prompts() == ROOT / "prompts"
    assert resources.default_target() == ROOT / "target_repo"


def test_package_data_wins_over_a_folder_beside_the_package(tmp_path: Path) -> None:
    packaged = tmp_path / "agent" / "_data" / "prompts"
    packaged.mkdir(parents=True)
    (tmp_path / "prompts").mkdir()
    assert resources._folder("prompts", tmp_path / "agent") == packaged


def test_install_without_its_data_says_how_to_mend_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks the folder prompts .* pip install --force-reinstall lossratchet"):
        resources._folder("prompts", tmp_path / "agent")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One make of its own, not the child of a `make test` that runs these tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def bare_tree(tmp_path: Path) -> Path:
    """What the make targets look at before they install anything."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-dev.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["run", "test"])
def test_old_python_gets_one_line_with_the_mend(bare_tree: Path, target: str) -> None:
    old = bare_tree / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the version check of an older interpreter answers
    old.chmod(0o755)
    done = make(bare_tree, target, f"PYTHON={old}")
    assert done.returncode != 0
    assert done.stdout.splitlines() == [
        "make: Ratchet needs Python 3.11 or newer; say which: make PYTHON=python3.12 ..."]
    assert not (bare_tree / ".venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_bench_without_a_name_asks_for_one(bare_tree: Path) -> None:
    (bare_tree / ".venv").mkdir()
    (bare_tree / ".venv" / ".stamp-run").touch()
    done = make(bare_tree, "bench")
    assert done.returncode != 0
    assert "make bench NAME=" in done.stdout


def shipped(names: Iterable[str]) -> set[str]:
    """Those of a resource folder's files that matter: no data, no caches, no dot files."""
    return {
        name for name in names
        if not name.startswith("data/") and not any(part.startswith((".", "__pycache__")) for part in name.split("/"))
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as built from the source archive, so that the archive is shown to be whole too."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_wheel_carries_code_prompts_and_target_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "agent", "sandbox", f"lossratchet-{agent.__version__}.dist-info"}
    for folder in ("prompts", "target_repo"):
        prefix = f"agent/_data/{folder}/"
        carried = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        files = [path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert shipped(carried) == shipped(files)
        assert not any("__pycache__" in name or name.startswith("data/") for name in carried)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The environment has the wheel, and of ours only the dependencies.

    A .pth file names our site-packages; Python does not read the .pth files in there, so an editable install of the
    checkout is not seen.
    """
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q", str(wheel)],
                   check=True, timeout=120)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def ask(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, text=True, timeout=120,
                              stdout=subprocess.PIPE).stdout

    assert agent.__version__ in ask(str(home / "bin" / "ratchet"), "--version")
    places = ask(str(python), "-c", "from agent import config, resources; print(resources.prompts());"
                 "print(resources.default_target()); print(config.load(resources.default_target()).train.command)")
    prompts, target, command = places.splitlines()
    assert Path(prompts) == site / "agent" / "_data" / "prompts"
    assert Path(target) == site / "agent" / "_data" / "target_repo"
    assert command
