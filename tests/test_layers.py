"""Imports point one way. Read from the syntax trees, so that nothing has to be imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"read", "propose", "patch", "preflight", "measure", "judge", "merge", "report"}
ORDER = {"campaign", "cli", "opening"}
"""They call the stages in the order of the night; no stage calls them."""
RECORD_OF = {"propose": {"read"}}
"""A Briefing is declared by the stage that makes it."""


def imports(path: Path) -> set[str]:
    """Dotted modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def modules(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py") if "_data" not in path.parts)


def rooms(path: Path, package: str) -> set[str]:
    """Modules of ``package`` that a file imports."""
    known = {module.stem for module in modules(package)}
    return {name.split(".")[1] for name in imports(path) if name.startswith(f"{package}.")} & known


@pytest.mark.parametrize("path", modules("sandbox"), ids=lambda path: path.stem)
def test_the_sandbox_knows_nothing_of_the_agent(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"agent", "tests", "target_repo", "torch"}


@pytest.mark.parametrize("path", modules("agent"), ids=lambda path: path.stem)
def test_the_agent_runs_no_torch_and_no_target(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "tests", "target_repo"}


@pytest.mark.parametrize("path", [p for p in modules("agent") if p.stem in STAGES], ids=lambda path: path.stem)
def test_stages_do_not_import_each_other(path: Path) -> None:
    assert not rooms(path, "agent") & (STAGES | ORDER) - {path.stem} - RECORD_OF.get(path.stem, set())


def test_nothing_but_the_command_line_starts_a_campaign() -> None:
    users = {path.stem for path in modules("agent") if "campaign" in rooms(path, "agent")}
    assert users <= {"cli", "bench", "bench_ground", "bench_training", "bench_machine"}


def test_records_and_errors_stand_below_everything() -> None:
    assert rooms(ROOT / "agent/errors.py", "agent") == set()
    assert rooms(ROOT / "agent/records.py", "agent") == set()
    assert rooms(ROOT / "agent/ledger.py", "agent") == {"errors", "records"}
    assert rooms(ROOT / "agent/evidence.py", "agent") == set()
    assert rooms(ROOT / "agent/judge.py", "agent") == {"config", "evidence", "records"}


def test_the_environment_is_read_in_config_and_where_a_process_is_started() -> None:
    readers = set()
    for path in modules("agent"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and (
                    isinstance(node.value, ast.Name) and node.value.id == "os"):
                readers.add(path.stem)
    assert {"config"} <= readers <= {"config", "git", "site", "bench_machine", "bench_training", "bench_ground",
                                        "bench_pipeline", "bench_caps", "bench_llm", "bench_chaos", "bench_soak"}


def test_there_are_two_broad_handlers() -> None:
    broad = []
    for path in [*modules("agent"), *modules("sandbox")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or (
                    isinstance(node.type, ast.Name) and node.type.id == "Exception")):
                broad.append(path.stem)
    assert sorted(set(broad)) == ["cli", "supervisor"]
