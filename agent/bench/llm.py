"""Bench ``llm-faults``: whole campaigns whose model breaks in one way each (llm_faults.py). Does the night go on,
within its caps, and does the ledger say what happened?

A class is ok when the campaign, of real jobs on a target that only sleeps,

    ends by itself with code 0, before its wall cap
    tries as many candidates as it has runs for, though the first model broke after its first reply
        (where another model goes on; else it must end without)
    names the fault in its ledger
    has no question that took longer than its deadline and ``SLACK``
    and neither key is in any file of the run, in its commits, in what it printed, in a prompt, or at the other endpoint
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agent import git
from agent.bench.finding import Finding, own_environment
from agent.bench.llm_faults import FaultClass, classes
from agent.bench.pipeline import write_sleeper
from agent.errors import UserError
from agent.ground import count, scratch
from agent.ledger import replay
from agent.llm.scripted import Fixed, ScriptedModel
from agent.llm.scripted import Say as Reply

DEADLINE, TIMEOUT, SLACK = 4.0, 1.5, 2.0
"""Seconds of a proposal and of a call; seconds beyond that are allowed."""
RUNS = 9
"""Training runs of a campaign."""
CAP = 75.0
"""Wall seconds of a campaign."""
_TOOK = re.compile(r"did not answer in ([0-9.]+) s")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="A,B", help="these classes alone, by a part of their names")
    parser.add_argument("--side-by-side", type=count, default=2, help="campaigns at a time")


def llm_faults(options: argparse.Namespace, say: Callable[[str], None]) -> Finding:
    """Every class, some side by side."""
    keys = tuple(f"sk-canary-{secrets.token_hex(16)}" for _ in range(2))
    wanted = options.only.split(",") if options.only else [""]
    chosen = {name: one for name, one in classes(keys[0]).items() if any(part in name for part in wanted)}
    if not chosen:
        raise UserError(f"No class of faults is called {options.only}.", f"Known: {'; '.join(classes(''))}.")
    begun = time.monotonic()

    def one(name: str) -> dict[str, Any]:
        with scratch(options.runs, "llm-faults") as folder:
            found = measure(chosen[name], folder, options.level, keys)
        say(f"{name}: {found['detail']}")
        return found

    with concurrent.futures.ThreadPoolExecutor(options.side_by_side) as pool:
        found = dict(zip(chosen, pool.map(one, chosen), strict=True))
    rows = [(name, "ok" if case["ok"] else "FAILED", case["named"], f"{case['wall_s']:.1f}",
             f"{case['longest_s']:.1f}", str(case["candidates"])) for name, case in found.items()]
    facts = {"classes": found, "longest_s": max(case["longest_s"] for case in found.values()), "deadline_s": DEADLINE,
             "wall_s": time.monotonic() - begun}
    return Finding(f"{len(found)} classes of faults, {os.cpu_count()} cores", facts,
                   ("class", "", "named", "wall s", "longest question s", "candidates"), rows, [],
                   ok=all(case["ok"] for case in found.values()))


def measure(fault: FaultClass, folder: Path, level: int, keys: tuple[str, ...]) -> dict[str, Any]:
    """One campaign in ``folder``."""
    with _servers(fault) as (first, second):
        address = (fault.address or first.base_url).format(port=first.base_url.split(":")[2].partition("/")[0])
        write_sleeper(folder / "target", 0.05, _tables(fault, address, second.base_url))
        begun = time.monotonic()
        code, printed = _campaign(folder, level, keys)
        wall = time.monotonic() - begun
        sent = [[(request.headers, str(request.body)) for request in server.requests] for server in (first, second)]
    run = folder / "runs" / "faults"
    state = replay(run / "ledger.jsonl")[0]
    told = "\n".join([*state.notes, *(a.proposal.hypothesis for a in state.attempts.values()),
                      *(a.verdict.reason for a in state.attempts.values() if a.verdict)])
    longest = max([0.0, *(a.proposal.cost.seconds for a in state.attempts.values()),
                   *map(float, _TOOK.findall(told))])
    tried = sum(1 for a in state.attempts.values() if any(r.purpose == "pair" for r in a.runs))
    leaks = [*_leaks(run, printed, keys), *_crossed(sent, keys)]
    named = bool(re.search(rf"\b{re.escape(fault.kind.replace('no patch', 'usable patch'))}\b", told))
    last = " ".join(printed.split())[-300:]
    complaints = [text for text, wrong in (
        (f"exit code {code} ({last})", code != 0), (f"{wall:.0f} s, over the cap", wall > CAP),
        (f"the ledger does not say {fault.kind!r}", not named),
        (f"not finished, {state.phase}", state.phase != "finished"),
        (f"a question took {longest:.1f} s", longest > DEADLINE + SLACK),
        (f"only {tried} candidates were tried", not fault.alone and tried < RUNS // 2),
        (f"a key leaked: {', '.join(leaks)}", bool(leaks))) if wrong]
    detail = "; ".join(complaints) or f"named {fault.kind!r}, {tried} candidates, ended in {wall:.1f} s"
    return {"ok": not complaints, "detail": detail, "named": fault.kind if named else "", "wall_s": wall,
            "longest_s": longest, "candidates": tried, "leaks": len(leaks), "exit": code}


@contextlib.contextmanager
def _servers(fault: FaultClass) -> Iterator[tuple[ScriptedModel, ScriptedModel]]:
    """The model that breaks after its first reply, and the one that goes on."""
    numbers, lock = itertools.count(1), threading.Lock()

    def good(_: dict[str, Any]) -> Fixed:
        with lock:
            number = next(numbers)
        edit = {"path": "settings.py", "search": "WORSE = 0", "replace": f"WORSE = {number}"}
        return Reply({"title": f"Worse by {number}", "hypothesis": "It is.", "direction": "constants",
                      "expected_effect": None, "different": "another value", "edits": [edit]})

    def breaking(body: dict[str, Any]) -> Fixed:
        if len(first.requests) <= 1 or fault.item is None:
            return good(body)
        if fault.kind == "another model":
            answer = good(body)
            assert isinstance(answer, Reply)
            return Reply(answer.text, model="something-else")
        return fault.item

    with ScriptedModel([], then=breaking) as first, ScriptedModel([], then=good) as second:
        yield first, second


def _tables(fault: FaultClass, address: str, other: str) -> str:
    settings = {"base_url": address, "name": "scripted", "key_variable": "RATCHET_CANARY_1", "repairs": 1,
                "attempts": 2, "parallel": 2, "timeout_seconds": TIMEOUT, "deadline_seconds": DEADLINE} | fault.settings
    first = "".join(f"{key} = {_toml(value)}\n" for key, value in settings.items())
    second = "" if fault.alone else (f'[[models]]\nname = "scripted-2"\nbase_url = "{other}"\n'
                                     'key_variable = "RATCHET_CANARY_2"\nstream = false\n')
    return f"[model]\n{first}\n{second}"


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def _campaign(folder: Path, level: int, keys: tuple[str, ...]) -> tuple[int, str]:
    """(exit code, all that it printed) of a campaign in a process of its own; -1: it had to be killed."""
    command = [sys.executable, "-m", "agent.cli", "run", str(folder / "target"), "--name", "faults", "--slots", "1",
               "--level", str(level), "--unconfined", "--proposer", "llm", "--budget-runs", str(RUNS), "--runs",
               str(folder / "runs")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CAP + 15,
                              check=False, stdin=subprocess.DEVNULL,
                              env=own_environment(RATCHET_CANARY_1=keys[0], RATCHET_CANARY_2=keys[1]))
    except subprocess.TimeoutExpired as late:
        return -1, str(late.stdout)
    return done.returncode, done.stdout + done.stderr


def _leaks(run: Path, printed: str, keys: tuple[str, ...]) -> list[str]:
    """Where a key stands: files of the run, what it printed, commit messages and diffs."""
    found = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and not path.is_symlink()
             and any(key.encode() in path.read_bytes() for key in keys)]
    commits = git.run(run / "repo.git", "log", "--all", "-p", "--format=%B").decode("utf-8", "replace")
    return [*found, *(name for name, text in (("output", printed), ("commits", commits))
                      if any(key in text for key in keys))]


def _crossed(sent: list[list[tuple[dict[str, str], str]]], keys: tuple[str, ...]) -> list[str]:
    """Prompts with a key in them, and keys that were sent to the other endpoint."""
    found = []
    for number, requests in enumerate(sent):
        other = keys[1 - number]
        if any(key in body for _, body in requests for key in keys):
            found.append(f"prompt {number + 1}")
        if any(other in str(headers) for headers, _ in requests):
            found.append(f"headers {number + 1}")
    return found


