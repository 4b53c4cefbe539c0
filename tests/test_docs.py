"""The documents say what the code does: commands, flags, keys, defaults, links, folders, frames, examples."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import annotated_types
import pytest
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from agent import config, ledger
from agent.cli import app
from agent.ideas import Card
from sandbox import box, wire

ROOT = Path(__file__).resolve().parent.parent
USER_DOCS = ("README.md", "docs/audit.md", "docs/calibrate.md", "docs/configuration.md", "docs/engines.md",
             "docs/isolation.md", "docs/models.md", "docs/promote.md", "docs/service.md", "docs/steering.md",
             "docs/trouble.md", "target_repo/README.md")
DOCS = tuple(name for name in (
    *USER_DOCS, "ARCHITECTURE.md", "CHANGELOG.md", "docs/LOG.md", "prompts/README.md", "runs/README.md"))
FENCE = re.compile(r"^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"(?:^|[\s/(])ratchet +(?P<name>[a-z]+)\b(?P<rest>[^\n#|;)]*)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code(text: str, kinds: tuple[str, ...] = ("", "sh")) -> Iterator[str]:
    """The text of inline code, and the lines of fences of these kinds."""
    for fence in FENCE.finditer(text):
        if fence["kind"] in kinds:
            yield from fence["body"].splitlines()
    yield from SPAN.findall(FENCE.sub("", text))


def commands() -> dict[str, Any]:
    """Name -> command, as the command line itself has them."""
    found: Any = typer.main.get_command(app)
    return dict(found.commands)


def options_of(name: str) -> set[str]:
    command = commands()[name]
    return {option for parameter in command.params for option in parameter.opts} | {"-h", "--help"}


# ------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("name", DOCS)
def test_every_command_and_flag_named_exists(name: str) -> None:
    for line in code(read(name)):
        for found in COMMAND.finditer(line):
            assert found["name"] in commands(), f"{name}: {line!r}"
            for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", found["rest"]):
                assert flag in options_of(found["name"]), f"{name}: {flag} in {line!r}"


def test_the_readme_names_every_command() -> None:
    named = {found["name"] for line in code(read("README.md")) for found in COMMAND.finditer(line)}
    assert named >= set(commands()), set(commands()) - named


@pytest.mark.parametrize("name", DOCS)
def test_every_make_target_named_exists(name: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    for line in code(read(name)):
        for target in re.findall(r"(?:^|\s)make ([a-z]+)\b", line):
            assert target in targets, f"{name}: {line!r}"


def test_flags_of_the_target_scripts_exist() -> None:
    places = {"train.py": ("train.py", "harness.py"), "prepare.py": ("prepare.py",), "evaluate.py": ("evaluate.py",)}
    for line in code(read("target_repo/README.md")):
        called = re.match(r"python (\w+\.py)(.*)", line)
        if called:
            source = "".join(read(f"target_repo/{file}") for file in places[called[1]])
            for flag in re.findall(r"--[a-z-]+", called[2]):
                assert f'"{flag}"' in source, line


# ---------------------------------------------------------------------------------------------------------- links


def slug(heading: str) -> str:
    """A heading's anchor, as the usual Markdown hosts make it."""
    plain = re.sub(r"[`*]", "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("name", DOCS)
def test_every_relative_link_resolves(name: str) -> None:
    text = FENCE.sub("", read(name))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name}: {link}"


@pytest.mark.parametrize("name", DOCS)
def test_no_path_of_a_single_machine(name: str) -> None:
    assert not re.search(r"(?<![\w.])/(?:work|root|home)/", read(name))


def test_pictures_are_well_formed_and_need_nothing_from_outside() -> None:
    pictures = [path for path in (ROOT / "docs").glob("*.svg") if path.name in read("README.md")]
    assert pictures
    for path in pictures:
        text = path.read_text(encoding="utf-8")
        assert ElementTree.fromstring(text).get("viewBox")
        assert "prefers-color-scheme: dark" in text
        assert not re.search(r"(?:href|src|url\()\s*=?\s*[\"']?https?:", text)


# -------------------------------------------------------------------------------------------------------- folders


def top_level_folders() -> set[str]:
    """Folders of the repository, or of an unpacked source archive."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    return {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}


def test_the_readme_gives_every_top_level_folder_its_job() -> None:
    text = read("README.md")
    for folder in top_level_folders():
        assert re.search(rf"^\| `{re.escape(folder)}/` \| \w.+ \|$", text, re.MULTILINE), folder


def test_the_architecture_names_every_module() -> None:
    text = read("ARCHITECTURE.md")
    for room in ("agent", "sandbox"):
        for path in (ROOT / room).glob("*.py"):
            assert path.name == "__init__.py" or f"`{path.name}`" in text, f"{room}/{path.name}"


def test_the_architecture_names_every_record_field_of_the_night() -> None:
    text = read("ARCHITECTURE.md")
    for event in typing.get_args(ledger.Event):
        assert f"`{event}`" in text, event


# -------------------------------------------------------------------------------------------------- configuration


def kind(field: FieldInfo) -> str:
    """The type column: the type in plain words, with its bounds."""
    bounds = []
    for rule in field.metadata:
        for name, sign in (("Ge", ">="), ("Gt", ">"), ("Le", "<="), ("Lt", "<")):
            if isinstance(rule, getattr(annotated_types, name)):
                bounds.append(f"{sign} {getattr(rule, name.lower()):g}")
    return " ".join([_words(field.annotation), ", ".join(bounds)]).strip()


def _words(annotation: object) -> str:
    simple = {str: "text", int: "integer", float: "number", bool: "true or false"}
    if annotation in simple:
        return simple[typing.cast(type, annotation)]
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f'`"{value}"`' for value in inside)
    if origin is list:
        return f"list of {_words(inside[0])}"
    if origin is dict:
        return "table of text" if inside[1] is str else "tables"
    assert origin is types.UnionType
    return _words(next(one for one in inside if one is not type(None)))


def default(field: FieldInfo) -> str:
    """The default column, as it would be written in the file."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return "none" if value is None else f"`{json.dumps(value)}`"


def keys() -> list[tuple[str, str, FieldInfo]]:
    """(heading of its table, key, field) of every key of the file."""
    found = []
    for name, field in config.Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found += [(f"[{name}]", key, inner) for key, inner in section.model_fields.items()]
        else:
            found.append(("Top of the file", name, field))
    return found


def written_rows() -> dict[tuple[str, str], list[str]]:
    """(heading, key) -> the cells type, default, meaning of docs/configuration.md."""
    rows, heading = {}, ""
    for line in read("docs/configuration.md").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ").replace("`", "")
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 4:
            rows[heading, cells[0].strip("`")] = cells[1:]
    return rows


@pytest.mark.parametrize(("heading", "key", "field"), keys(), ids=lambda value: str(value)[:24])
def test_the_configuration_table_has_type_and_default(heading: str, key: str, field: FieldInfo) -> None:
    assert (heading, key) in written_rows(), f"docs/configuration.md lacks {heading} {key}"
    told_kind, told_default, meaning = written_rows()[heading, key]
    assert (told_kind, told_default) == (kind(field), default(field))
    assert len(meaning) > 8


def test_the_configuration_table_has_no_other_keys() -> None:
    assert set(written_rows()) == {(heading, key) for heading, key, _ in keys()}


@pytest.mark.parametrize("name", USER_DOCS)
def test_every_example_of_a_config_is_valid(name: str) -> None:
    for fence in FENCE.finditer(read(name)):
        if fence["kind"] == "toml":
            config.parse(fence["body"], name)
            for preset in tomllib.loads(fence["body"]).get("presets", {}):
                config.parse(fence["body"], name, preset)


def test_the_documents_have_examples_of_a_config() -> None:
    assert "```toml" in read("README.md") and "```toml" in read("docs/configuration.md")


def test_the_example_card_is_a_card() -> None:
    cards = [fence["body"] for fence in FENCE.finditer(read("prompts/README.md")) if fence["kind"] == "toml"]
    assert cards
    for text in cards:
        Card.model_validate({**tomllib.loads(text), "id": "example"})


# ------------------------------------------------------------------------------------------- isolation and target


def test_the_isolation_levels_are_those_of_the_box() -> None:
    for name in ("README.md", "docs/isolation.md"):
        told = {int(number) for number in re.findall(r"^\| (\d) \|", read(name), re.MULTILINE)}
        assert told == {int(level) for level in box.Level}, name


def test_the_target_readme_has_every_frame_of_the_wire() -> None:
    frames = set(re.findall(r"^    (harness|job) -> (?:job|harness) +(\S) ", wire.__doc__ or "", re.MULTILINE))
    told = re.findall(r"^\| `(.)` \| (harness|job) \|", read("target_repo/README.md"), re.MULTILINE)
    assert frames and {(sender, letter) for letter, sender in told} == frames


def test_the_target_readme_has_the_dial() -> None:
    presets = runpy.run_path(str(ROOT / "target_repo/presets.py"))["PRESETS"]
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", read("target_repo/README.md"),
                      re.MULTILINE)
    assert {row[0]: tuple(map(int, row[1:])) for row in rows} == {
        name: (p.depth, p.width, p.vocab, p.sequence, p.steps) for name, p in presets.items()}


def test_the_target_readme_has_the_files_a_patch_may_touch() -> None:
    text = read("target_repo/README.md")
    source = tomllib.loads(read("target_repo/ratchet.toml"))["source"]
    for rule in ("editable", "protected"):
        line = next(line for line in text.splitlines() if line.startswith(f"| {rule} |"))
        assert set(SPAN.findall(line.split("|")[2])) == set(source[rule])


def test_the_planted_values_are_in_the_cpu_settings() -> None:
    """Rows `| what | `key = value` | ...` of the README are the source's own lines."""
    tree = ast.parse(read("target_repo/settings/cpu.py"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
    planted = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
    rows = re.findall(r"^\| [^|]+ \| `(\w+) = ([^`]+)` \|", read("target_repo/README.md"), re.MULTILINE)
    assert len(rows) >= 4
    for key, value in rows:
        assert planted[key] == ast.literal_eval(value), key
