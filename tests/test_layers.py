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


def name_of(path: Path, package: str) -> str:
    """``llm.relay`` for agent/llm/relay.py, ``records`` for agent/records.py."""
    return ".".join(path.relative_to(ROOT / package).with_suffix("").parts)


def rooms(path: Path, package: str) -> set[str]:
    """Modules of ``package`` that a file imports, as ``name_of`` has them."""
    known = {name_of(module, package) for module in modules(package)}
    return {name.removeprefix(f"{package}.") for name in imports(path) if name.startswith(f"{package}.")} & known


def users_of(room: str) -> set[str]:
    """Modules of ``agent`` outside a room that import one of it."""
    return {name for path in modules("agent") if not (name := name_of(path, "agent")).startswith(f"{room}.")
            and any(used == room or used.startswith(f"{room}.") for used in rooms(path, "agent"))}


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
    assert users_of("campaign") == {"cli"}


def test_no_part_of_a_campaign_uses_a_bench_or_the_doctor() -> None:
    assert users_of("bench") == {"cli", "attacks.suite"}
    assert users_of("doctor") == {"cli", "bench.chaos", "bench.soak"}
    assert users_of("attacks") == {"bench.command"}


@pytest.mark.parametrize("path", [*modules("agent/llm"), *modules("agent/briefing")], ids=lambda path: path.stem)
def test_a_model_and_its_briefing_decide_nothing(path: Path) -> None:
    deciding = {"audits", "bundles", "campaign", "court", "intake", "judge", "measure", "merge", "single"}
    used = rooms(path, "agent")
    assert not used & deciding
    assert not any(name.startswith("gate.") for name in used)


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
                readers.add(name_of(path, "agent"))
    assert readers == {"config", "git", "site", "bench.finding", "bench.soak"}


def test_there_are_two_broad_handlers() -> None:
    broad = []
    for path in [*modules("agent"), *modules("sandbox")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or (
                    isinstance(node.type, ast.Name) and node.type.id == "Exception")):
                broad.append(path.stem)
    assert sorted(set(broad)) == ["cli", "supervisor"]
