"""The night of bench ``chaos``: a tiny target, a scripted model in a process of its own, and a controller that dies.

``python -m agent.bench.chaos_night serve PORT`` answers on loopback by the number of the attempt, so that a question
that is asked again gets the same answer again. ``python -m agent.bench.chaos_night die FOLDER ARGUMENT...`` is
``ratchet ARGUMENT...`` that kills itself (SIGKILL) at the first ledger event for whose label FOLDER/wanted.json has a
mode:

    before  what the event tells of is done, the line is not written
    torn    half of the line is on the disk
    after   the line is on the disk, nothing that follows from it is done

so each boundary of a ledger is reached exactly, which no watcher from outside could promise. The label says what the
event is about in every repetition of the night, whatever the ids and counters are.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from agent import tiny
from agent.llm.scripted import Fixed, Say, ScriptedModel, Status
from agent.records import Edit, to_json

MODES = ("before", "torn", "after")
WANTED, DIED = "wanted.json", "died.json"
_KNOWN = ("less smoothing", "another salt", "less back-off", "more uniform", "late crash", "early crash",
          "unused constant")
QUICK = ("less smoothing", "another salt", "more uniform")
REPEATED = "same again"
"""Title of the proposal that is an earlier one in other words."""


def write_target(folder: Path) -> None:
    """The tiny target, whose proposer asks one question at a time, so that attempts have the same numbers in every
    night."""
    tiny.write_tiny_target(folder)
    path = folder / "ratchet.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("repairs = 1", "repairs = 1\nparallel = 1"),
                    encoding="utf-8")
    tiny.commit(folder, "One question at a time")


def script(quick: bool) -> list[Fixed]:
    """What the model proposes, by the attempt's number: good, idle, harmful, broken and spoilt ones."""
    said: list[Fixed] = [_reply(title, tiny.KNOWN[title].edit) for title in (QUICK if quick else _KNOWN)]
    repeated = _reply(REPEATED, Edit("settings.py", 'SALT = "first"', "SALT = 'second'  # in other words"))
    if quick:
        return [*said, repeated]
    return [*said, Say("I cannot help with that."), repeated,
            _reply("not there", Edit("settings.py", "NO SUCH LINE = 1", "NO SUCH LINE = 2"))]


def answer(body: dict[str, Any], said: list[Fixed]) -> Fixed:
    """The reply to one question: by the attempt's number; nothing better when it is shown its own error."""
    messages = body["messages"]
    if messages[-2]["role"] == "assistant":
        return Say("I cannot mend that.")
    found = re.search(r"This is attempt (\d+)", messages[-1]["content"])
    number = int(found[1]) if found else 0
    return said[number - 1] if 0 < number <= len(said) else Status(401, {"error": {"message": "that was all"}})


def label(event: str, data: dict[str, Any], titles: dict[str, str]) -> str:
    """What an event is about, in the same words in every repetition of the night. ``titles``: of the attempts by id,
    which a ``proposal`` adds to."""
    if event == "proposal":
        titles[data["id"]] = data["title"]
    name = data.get("candidate") or (data.get("id") if event in ("proposal", "candidate") else "") or ""
    words = [event, titles.get(name, name)]
    if event == "run_started":
        words += [data["purpose"], data["seed"], data["steps"], bool(data["audits"])]
        titles[data["id"]] = " ".join(map(str, words[1:]))
    elif event == "run_finished":
        words += [titles.get(data["id"], data["id"])]
    elif event == "note":
        words += [re.sub(r"\d+", "N", data["text"])]
    return " ".join(map(str, words)).strip()


def labels(ledger: Path) -> list[str]:
    """Label of each event of a ledger, in order."""
    titles: dict[str, str] = {}
    with ledger.open(encoding="utf-8") as lines:
        return [label(entry["event"], entry["data"], titles) for entry in map(json.loads, lines)]


def _reply(title: str, *edits: Edit) -> Say:
    return Say({"title": title, "hypothesis": f"Because of {title}.", "direction": "constants", "expected_effect": None,
                "edits": [{"path": e.path, "search": e.search, "replace": e.replace} for e in edits]})


def _serve(port: int, quick: bool) -> None:
    said = script(quick)
    with ScriptedModel([], then=lambda body: answer(body, said), port=port) as model:
        print(model.base_url, flush=True)
        while os.getppid() != 1:
            time.sleep(0.2)


def _die(folder: Path, arguments: list[str]) -> None:
    """Run ratchet with a ledger that kills the process."""
    from agent import cli, ledger

    left: dict[str, str] = json.loads((folder / WANTED).read_text(encoding="utf-8"))
    titles: dict[str, str] = {}
    append = ledger.Ledger.append

    def fatal(book: ledger.Ledger, event: Any, data: Any) -> None:
        if not titles and book.path.exists():
            labels_of(book.path, titles)
        plain = data if isinstance(data, dict) else to_json(data)
        found = label(event, plain, titles)
        if found not in left:
            append(book, event, data)
            return
        mode = left[found]
        if mode == "after":
            append(book, event, data)
        elif mode == "torn":
            with book.path.open("ab") as file:
                file.write(json.dumps({"n": 0, "t": "", "event": event, "data": plain}).encode()[:-20])
        (folder / DIED).write_text(json.dumps(found), encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)

    def labels_of(path: Path, known: dict[str, str]) -> None:
        for kind, plain, _ in ledger.events(path):
            label(kind, plain, known)

    ledger.Ledger.append = fatal  # type: ignore[assignment]
    sys.exit(cli.edge(arguments))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(int(sys.argv[2]), "--quick" in sys.argv)
    else:
        _die(Path(sys.argv[2]), sys.argv[3:])
