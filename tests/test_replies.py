"""Malformed replies of models, from the text to the commit: what is clear applies as meant, what is not never does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
import reply_corpus
from reply_corpus import FOLDER, Came, Case

from agent import matching
from agent.llm.loose_json import values
from agent.llm.parse_reply import Parsed, Problem, parse_reply
from agent.policy import PatchRefused

CASES = reply_corpus.cases()
DEFECTS = {
    "white space", "indentation", "tabs", "CRLF", "unicode quotes", "stale context", "fenced in prose", "wrong path",
    "partial JSON", "mixed formats", "several edits in one block", "multi-file", "part of a line", "elision"}


@pytest.fixture(scope="module")
def came(tmp_path_factory: pytest.TempPathFactory) -> list[Came]:
    return list(reply_corpus.results(tmp_path_factory.mktemp("replies")))


def test_the_corpus_is_what_it_says() -> None:
    written = [case for case in CASES if case.id.startswith("model-")]
    assert len(CASES) >= 120 and len(written) >= 40
    assert {case.defect for case in CASES} >= DEFECTS
    assert len({case.id for case in CASES}) == len(CASES)
    assert len({(case.source, case.reply, case.cut) for case in CASES}) == len(CASES)
    assert all(case.origin and case.defect for case in CASES)
    listed = (FOLDER / "README.md").read_text()
    for case in CASES:
        named = case.origin.split("imitates ")[-1] if case.id.startswith("imitated-") else case.origin.split(",")[0]
        assert named in listed, f"{case.id}: {named} is not in README.md"


def test_every_label_is_possible() -> None:
    """Each wanted change stands in its source exactly once, and changes it."""
    for case in CASES:
        files = {path.relative_to(FOLDER / "sources" / case.source).as_posix(): path.read_bytes().decode()
                 for path in (FOLDER / "sources" / case.source).rglob("*.py")}
        if case.want is not None:
            assert reply_corpus.expected(files, case.want) != files, case.id


def test_what_is_clear_applies_and_nothing_applies_wrongly(
    came: list[Came], capsys: pytest.CaptureFixture[str],
) -> None:
    counted = reply_corpus.table(came)
    with capsys.disabled():
        print("\n" + json.dumps({name: counted[name] for name in ("all", "by_a_model", "form")}))
    wrong = [(one.case.id, one.said) for one in came if one.verdict == "wrong"]
    assert not wrong
    lost = [one.case.id for one in came if one.verdict == "lost"]
    assert counted["all"]["applied"] >= 0.95 * counted["all"]["clear"], lost
    assert counted["by_a_model"]["applied"] >= 0.95 * counted["by_a_model"]["clear"], lost


def test_a_refusal_tells_the_model_what_to_mend(came: list[Came]) -> None:
    for one in came:
        if one.case.want is None:
            assert len(one.said) > 20, one.case.id
        if "has no such lines" in one.said:
            assert " | " in one.said, one.case.id  # the nearest real lines


# --- damage to edits whose place is known -------------------------------------------------------------------------


def indented(chance: random.Random, lines: list[str]) -> list[str]:
    by = chance.choice((2, 4))
    return [" " * by + line if line.strip() else line for line in lines]


def dedented(chance: random.Random, lines: list[str]) -> list[str]:
    least = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return [line[least:] for line in lines]


def spaced(chance: random.Random, lines: list[str]) -> list[str]:
    return [line.replace(" = ", "=").replace(", ", ",") + " " * chance.randint(0, 2) for line in lines]


def gapped(chance: random.Random, lines: list[str]) -> list[str]:
    return [line for line in lines if line.strip()]


def dropped(chance: random.Random, lines: list[str]) -> list[str]:
    """Without one of the lines."""
    gone = chance.randrange(len(lines)) if len(lines) > 1 else -1
    return [line for number, line in enumerate(lines) if number != gone]


def stale(chance: random.Random, lines: list[str]) -> list[str]:
    """With one line as it may have been in another version."""
    other = chance.randrange(len(lines)) if len(lines) > 1 else -1
    return [f"{line}  # as it was" if number == other else line for number, line in enumerate(lines)]


DAMAGE: list[Callable[[random.Random, list[str]], list[str]]] = [indented, dedented, spaced, gapped]
CONTEXT = [dropped, stale]
"""Damage that only lines beside the changed one can have."""


@pytest.mark.parametrize("seed", range(8))
def test_damaged_quotes_find_their_own_place_or_none(seed: int) -> None:
    """A line of a file is replaced, deleted or followed by a new one, by an edit that quotes it with its neighbours,
    damaged; the change must be made at that line and nowhere else, or be refused."""
    chance, applied = random.Random(seed), 0
    texts = [path.read_bytes().decode().replace("\r\n", "\n") for path in sorted((FOLDER / "sources").rglob("*.py"))]
    for _ in range(60):
        lines = chance.choice(texts).split("\n")
        at = chance.choice([n for n, line in enumerate(lines) if len(line.strip()) > 6])
        first, last = max(0, at - chance.randint(0, 4)), min(len(lines), at + 1 + chance.randint(1, 4))
        before, after = lines[first:at], lines[at + 1:last]
        indent = lines[at][:len(lines[at]) - len(lines[at].lstrip())]
        new = chance.choice(([f"{indent}CHANGED = 1"], [lines[at], f"{indent}CHANGED = 1"], []))
        damage = chance.choice([*DAMAGE, *CONTEXT])
        if damage in CONTEXT:
            if chance.random() < 0.5:
                before = damage(chance, before)
            else:
                after = damage(chance, after)
            old, now = [*before, lines[at], *after], [*before, *new, *after]
        else:
            both = damage(chance, [*before, lines[at], *after, " " * 40 + "#", *before, *new, *after])
            cut = next(number for number, line in enumerate(both) if line.strip() == "#")
            old, now = both[:cut], both[cut + 1:]
        try:
            text, _ = matching.replace("\n".join(lines), "\n".join(old), "\n".join(now), "a.py")
        except PatchRefused:
            continue
        applied += 1
        assert codes(text.split("\n")) == codes([*lines[:at], *new, *lines[at + 1:]]), (damage.__name__, old, now)
        made = [line for line in text.split("\n") if "CHANGED" in line]
        assert all(line.startswith(f"{indent}CHANGED") for line in made), (damage.__name__, old, now, made)
    assert applied >= 40


def codes(lines: list[str]) -> list[str]:
    return [matching.code(line) for line in lines if line.strip()]


@pytest.mark.parametrize("seed", range(4))
def test_a_quote_from_another_file_is_refused(seed: int) -> None:
    chance = random.Random(seed)
    texts = {path: path.read_bytes().decode().replace("\r\n", "\n")
             for path in sorted((FOLDER / "sources").rglob("*.py"))}
    for _ in range(40):
        here, there = chance.sample(sorted(texts), 2)
        lines = texts[there].split("\n")
        first = chance.randrange(len(lines) - 3)
        quoted = lines[first:first + 4]
        if not quoted[0].strip() or matching.code(quoted[0]) in map(matching.code, texts[here].split("\n")):
            continue  # the line that is taken out stands here too
        with pytest.raises(PatchRefused):
            matching.replace(texts[here], "\n".join(quoted), "\n".join(["gone = 1", *quoted[1:]]), "a.py")


# --- cut replies --------------------------------------------------------------------------------------------------


def test_no_cut_reply_applies_in_part() -> None:
    """Replies with two edits, cut anywhere: both edits or none."""
    two = json.dumps({"title": "Two", "edits": [
        {"path": "train.py", "search": "HIDDEN = 32", "replace": "HIDDEN = 64"},
        {"path": "train.py", "search": "STEPS = 200", "replace": "STEPS = 100"}]})
    block = "train.py\n<<<<<<< SEARCH\n{}\n=======\n{}\n>>>>>>> REPLACE\n"
    blocks = f"{block.format('HIDDEN = 32', 'HIDDEN = 64')}{block.format('STEPS = 200', 'STEPS = 100')}\nTitle: Two\n"
    diff = ("```diff\n--- a/train.py\n+++ b/train.py\n@@\n-HIDDEN = 32\n+HIDDEN = 64\n-STEPS = 200\n+STEPS = 100\n```\n"
            "\nTitle: Two\n")
    text = (FOLDER / "sources" / "regression" / "train.py").read_text()
    whole = f"train.py\n```python\n{text.replace('= 32', '= 64').replace('= 200', '= 100')}```\n\nTitle: Two\n"
    for reply in (two, blocks, diff, whole):
        for end in range(0, len(reply), 3):
            found = parse_reply(reply[:end], {"train.py": text}, cut=True)
            if isinstance(found, Parsed):
                told = found.diff or "".join(edit.replace for edit in found.edits)
                assert "HIDDEN = 64" in told and "STEPS = 100" in told, reply[:end]
        found = parse_reply(reply, {"train.py": text}, cut=True)
        assert isinstance(found, Parsed) and found.title == "Two"


def test_protected_files_stay_what_they_are() -> None:
    """An edit of a protected file is never turned into one of an editable file, whatever it quotes."""
    files = {"train.py": "rate = 0.1\nsteps = 300\n"}
    for path in ("score.py", "./score.py"):
        found = parse_reply(json.dumps({"edits": [{"path": path, "search": "steps = 300", "replace": "steps = 900"}]}),
                            files, hidden=["score.py"])
        assert isinstance(found, Parsed) and found.edits[0].path == "score.py"
    found = parse_reply("score.py\n```python\nrate = 0.1\nsteps = 900\n```", files, hidden=["score.py"])
    assert isinstance(found, Parsed) and found.edits[0].path == "score.py"
    found = parse_reply("--- a/score.py\n+++ b/score.py\n@@\n-steps = 300\n+steps = 900\n", files, hidden=["score.py"])
    assert isinstance(found, Parsed) and "b/score.py" in found.diff


# --- loose JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [
    ("{'a': True, 'b': None,}", {"a": True, "b": None}),
    ('{"a": "x = ["1", "2"]", "b": 1}', {"a": 'x = ["1", "2"]', "b": 1.0}),
    ('{"a": "say "hi", then go", "b": "c"}', {"a": 'say "hi", then go', "b": "c"}),
    ('{"a": "\\d+\\n"}', {"a": "\\d+\n"}),
    ('{a: "b" /* why */ // so\n, c: [1 2]}', {"a": "b", "c": [1.0, 2.0]}),
])
def test_what_loose_json_reads(text: str, value: object) -> None:
    assert next(values(text, iter(()))).value == value


@pytest.mark.parametrize("text", ['{"a": "never closed', "{a}", '{"a": 1, "a": 2, ]}', "{'a': }", "[" * 500])
def test_what_loose_json_refuses(text: str) -> None:
    assert not list(values(text, iter(())))


def test_a_case_of_the_corpus_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    reply_corpus.main([CASES[0].id])
    assert CASES[0].id in capsys.readouterr().out


def test_the_table_counts() -> None:
    case = Case("x", "s", "json", "d", "o", "r", (("a", "b", "c"),))
    refused = Case("y", "s", "diff", "d", "o", "r", None)
    counted = reply_corpus.table([Came(case, "right", ""), Came(case, "lost", ""), Came(refused, "wrong", "")])
    assert counted["all"] == {"cases": 3, "clear": 2, "applied": 1, "must_not_apply": 1, "wrong": 1}
    assert isinstance(parse_reply("", {}), Problem)
