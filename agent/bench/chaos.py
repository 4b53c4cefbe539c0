"""Bench ``chaos``: kill a campaign anywhere, and compare the morning with that of a night in which nothing happened.

Whole campaigns on the tiny target with a scripted model, one slot and one processor, each in processes of their own,
killed by SIGKILL and started again with the same command until they end:

    boundaries  the controller dies at every event of the ledger, once before the line is written, once with half of
                it on the disk, once right after (chaos_night.py)
    moments     the controller dies at random instants
    world       the supervisor, a process of the job, the model's server and the campaign's git are killed instead

and at the end every one must show what the undisturbed night shows: ``verdicts_equal`` compares outcome, stage, fault,
pairs and effect of each proposal, and the tree of the tip. doctor/run_folder.py counts ``lost_results``,
``double_counted`` and ``wrong_tip``; ``orphans`` are processes that outlive a finished campaign, found by
adopting every process of it.

Does not cover: a power cut, which also loses bytes that were not synced, and other engines than this machine's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import git
from agent.bench import chaos_night
from agent.bench.blows import add_shim, ask_git, strike_run
from agent.bench.finding import Finding, own_environment
from agent.doctor import run_folder
from agent.errors import UserError
from agent.ground import Say, count, scratch
from agent.ledger import State, replay
from sandbox import process

Disturb = Callable[["subprocess.Popen[bytes]"], None]
NAME = "night"
PATIENCE = 60.0
"""Seconds after which a process of a campaign that shows no new event counts as hung."""
KINDS = ("supervisor", "job", "git", "model")
MOMENTS, LEAST_MOMENTS = 30, 60
"""Kills at random instants: most in one campaign, least in all."""
IN_VAIN = 12
"""Processes that end by themselves, one after the other and without a new event, before a campaign is given up."""
SAME = 1e-6
"""Scores closer than this are the same: an audit draws the positions that it asks again anew each time, and corrects by
what it finds, which is 1e-8 for an honest model."""
QUICK_KILLS = 12
COLUMNS = ("lost_results", "double_counted", "wrong_tip", "orphans")


@dataclass(slots=True)
class Night:
    """One campaign and what was done to it."""

    name: str
    folder: Path
    core: int = 0
    """Which processor it has for itself: with a second one a campaign also does light jobs beside its slot, and then
    chance decides what is measured first, kills or no kills."""
    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    errors: list[str] = field(default_factory=list)
    """Last lines of processes that ended with an error by themselves."""
    gave_up: str = ""
    reached: list[tuple[str, str]] = field(default_factory=list)
    """Boundaries at which it was killed, each a mode and a label."""
    restart_seconds: list[float] = field(default_factory=list)
    """From the start of a process to its first event."""

    @property
    def run(self) -> Path:
        return self.folder / "runs" / NAME

    @property
    def ledger(self) -> Path:
        return self.run / "ledger.jsonl"


@dataclass(frozen=True, slots=True)
class Plan:
    """What all nights of one bench share."""

    level: int
    quick: bool
    seed: int
    say: Say


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=count, default=300, help="SIGKILLs of the controller at least (300)")
    parser.add_argument("--quick", action="store_true", help=f"a shorter night and {QUICK_KILLS} kills, for the tests")
    parser.add_argument("--side", type=count, default=2, help="campaigns side by side (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random instants")
    parser.add_argument("--keep", type=Path, help="copy the run folders of nights that went wrong here")


def chaos(options: argparse.Namespace, say: Say) -> Finding:
    """The undisturbed night, then the others. Raises UserError when the undisturbed one does not end well."""
    plan = Plan(options.level, options.quick, options.seed, say)
    process.become_subreaper()
    began = time.monotonic()
    try:
        with scratch(options.runs, "chaos") as folder:
            quiet = Night("undisturbed", folder / "quiet")
            _spend(quiet, plan, lambda night: None)
            if quiet.gave_up:
                raise UserError(f"The undisturbed night does not end: {quiet.gave_up}.", "`ratchet doctor` looks why.")
            nights = _disturbed(folder, quiet, plan, options)
            orphans = _orphans()
            facts = _facts(quiet, nights, orphans) | {"wall_s": round(time.monotonic() - began, 1)}
            if options.keep is not None:
                for night in nights:
                    if not _sound(quiet, night):
                        shutil.copytree(night.run, options.keep / night.name, dirs_exist_ok=True, symlinks=True)
    finally:
        process.become_subreaper(False)
    rows = [(night["name"], str(night["starts"]), str(night["kills"]), *(str(night[name]) for name in COLUMNS[:3]),
             str(night["verdicts_equal"])) for night in facts["nights"]]
    return Finding(f"{facts['kills']} kills of the controller and {facts['other_kills']} of others in "
                   f"{len(nights)} campaigns, {facts['orphans']} orphans", facts,
                   ("campaign", "starts", "kills", "lost", "double", "wrong tip", "verdicts equal"), rows,
                   facts["problems"], ok=facts["ok"])


# ----------------------------------------------------------------------------------------------------------- campaigns

def _disturbed(folder: Path, quiet: Night, plan: Plan, options: argparse.Namespace) -> list[Night]:
    """All other nights, some side by side."""
    chance = random.Random(plan.seed)
    boundaries = list(dict.fromkeys(chaos_night.labels(quiet.ledger)))
    nights: list[tuple[Night, Callable[[Night], None]]] = []

    def add(name: str, work: Callable[[Night], None]) -> None:
        nights.append((Night(name, folder / name.replace(" ", "-"), len(nights)), work))

    if plan.quick:
        modes = [mode for mode in chaos_night.MODES for _ in range(QUICK_KILLS // 4)]
        chosen = dict(zip(chance.sample(boundaries[1:], len(modes)), modes, strict=True))
        # between a candidate and the verdict that refuses it unseen nothing else happens
        chosen |= {label: "after" for label in boundaries
                   if label.startswith("candidate") and chaos_night.REPEATED in label}
        add("boundaries", functools.partial(_at_boundaries, plan, chosen))
        add("moments and world", functools.partial(_world, plan, 4, QUICK_KILLS // 4))
    else:
        for mode in chaos_night.MODES:
            chosen = dict.fromkeys(boundaries, mode)
            add(f"{mode} each event", functools.partial(_at_boundaries, plan, chosen))
        left = max(options.kills - len(boundaries) * len(chaos_night.MODES), LEAST_MOMENTS)
        for number in range(-(-left // MOMENTS)):
            wanted = min(MOMENTS, left - number * MOMENTS)
            add(f"moments {number + 1}", functools.partial(_at_moments, plan, wanted))
        for number in range(4):
            add(f"world {number + 1}", functools.partial(_world, plan, 20, 0))
    with concurrent.futures.ThreadPoolExecutor(options.side) as pool:
        list(pool.map(lambda task: task[1](task[0]), nights))
    return [night for night, _ in nights]


def _spend(night: Night, plan: Plan, disturb: Disturb, git_first: Path | None = None,
           ended: Callable[[], None] = lambda: None) -> None:
    """Start the night's command again and again until it ends well. ``disturb(controller)`` is called while one runs,
    every few milliseconds; it may kill. ``ended`` is called after each process."""
    night.folder.mkdir(parents=True, exist_ok=True)
    chaos_night.write_target(night.folder / "target")
    with _model(night, plan) as server:
        vain, events = 0, 0
        while True:
            died, line = _process(night, plan, server, disturb, git_first)
            ended()
            if died == 0 or _ended(night):
                return
            now = _events(night.ledger)
            if died != -signal.SIGKILL:
                night.errors.append(line)
                vain = 0 if now > events + 1 else vain + 1
            events = now
            if vain >= IN_VAIN or died == -signal.SIGALRM:
                night.gave_up = f"no event in {vain} starts; the last ended with {died}: {line}"
                return


def _process(night: Night, plan: Plan, server: Server, disturb: Disturb, git_first: Path | None) -> tuple[int, str]:
    """One process of the campaign: (exit code, its last line). A hung one is killed and counts as SIGALRM."""
    command = [sys.executable, "-m", "agent.cli"]
    if (night.folder / chaos_night.WANTED).exists():
        command = [sys.executable, "-m", "agent.bench.chaos_night", "die", str(night.folder)]
    command += ["run", str(night.folder / "target"), "--name", NAME, "--slots", "1", "--level", str(plan.level),
                "--unconfined", "--proposer", "llm", "--runs", str(night.folder / "runs")]
    night.starts += 1
    began, before, seen = time.monotonic(), _size(night.ledger), 0.0
    with (night.folder / "said.txt").open("wb") as said:
        controller = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                      env=_environment(server, git_first))
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(controller.pid, {cores[night.core % len(cores)]})
    last, size = began, before
    try:
        while controller.poll() is None:
            if (now := _size(night.ledger)) != size:
                last, size = time.monotonic(), now
                if not seen:
                    seen = last - began
                    night.restart_seconds.append(seen)
            if time.monotonic() - last > PATIENCE:
                return -signal.SIGALRM, f"no event in {PATIENCE:g} s"
            disturb(controller)
            time.sleep(0.005)
    finally:
        controller.kill()
        controller.wait()
    text = (night.folder / "said.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return controller.returncode, text[-1] if text else ""


def _at_boundaries(plan: Plan, chosen: dict[str, str], night: Night) -> None:
    """The controller dies once at each of these boundaries (label -> mode)."""
    left = dict(chosen)
    night.folder.mkdir(parents=True)
    wanted, died = night.folder / chaos_night.WANTED, night.folder / chaos_night.DIED

    def ended() -> None:
        if died.exists():
            label = json.loads(died.read_text(encoding="utf-8"))
            died.unlink()
            night.reached.append((left.pop(label), label))
            night.kills["controller"] += 1
        wanted.write_text(json.dumps(left), encoding="utf-8")

    ended()
    _spend(night, plan, lambda controller: None, ended=ended)
    _tell(night, plan)


def _at_moments(plan: Plan, wanted: int, night: Night) -> None:
    """The controller dies ``wanted`` times, a random time after its start: while it starts, or much later."""
    _spend(night, plan, _moments(night, plan, wanted))
    _tell(night, plan)


def _moments(night: Night, plan: Plan, wanted: int) -> Disturb:
    chance = random.Random(f"{plan.seed}/{night.name}")
    due: dict[int, float] = {}

    def disturb(controller: subprocess.Popen[bytes]) -> None:
        if night.kills["controller"] >= wanted:
            return
        if controller.pid not in due:
            due[controller.pid] = time.monotonic() + chance.choice((chance.uniform(0, 1.5), chance.uniform(0.6, 6.0)))
        if time.monotonic() >= due[controller.pid] and controller.poll() is None:
            due[controller.pid] = math.inf
            controller.kill()
            night.kills["controller"] += 1

    return disturb


def _world(plan: Plan, wanted: int, moments: int, night: Night) -> None:
    """Kill what belongs to the campaign but is not its controller: each kind in turn, a run at most once; and before
    that the controller at ``moments``."""
    chance = random.Random(f"{plan.seed}/{night.name}")
    shims = add_shim(night.folder / "bin")
    struck: set[str] = set()
    turn, due = 0, time.monotonic() + 1.0
    first = _moments(night, plan, moments)

    def disturb(controller: subprocess.Popen[bytes]) -> None:
        nonlocal turn, due
        first(controller)
        if (shims / "killed").exists():
            (shims / "killed").unlink()
            night.kills["git"] += 1
        others = sum(night.kills.values()) - night.kills["controller"]
        if night.kills["controller"] < moments or time.monotonic() < due or others >= wanted:
            return
        if _strike(KINDS[turn % len(KINDS)], night, struck, shims, chance):
            turn, due = turn + 1, time.monotonic() + chance.uniform(0.05, 1.0)

    _spend(night, plan, disturb, shims)
    _tell(night, plan)


def _tell(night: Night, plan: Plan) -> None:
    plan.say(f"{night.name}: {', '.join(f'{count} x {kind}' for kind, count in night.kills.items())} killed, "
             f"{night.starts} starts{f', given up: {night.gave_up}' if night.gave_up else ''}")


def _strike(kind: str, night: Night, struck: set[str], shims: Path, chance: random.Random) -> bool:
    """Kill one of ``kind`` if there is one."""
    if kind == "git":
        ask_git(shims, chance)  # counted when it happened
        return True
    if kind == "model":
        server = SERVERS.get(night.name)
        if server is None:
            return False
        server.kill()
    elif not strike_run(kind, night.run / "jobs", struck, chance):
        return False
    night.kills[kind] += 1
    return True


# --------------------------------------------------------------------------------------------------- the model's server

class Server:
    """The scripted model in a process of its own, on the same port whenever it is started."""

    def __init__(self, quick: bool) -> None:
        self._quick, self._port = quick, 0
        self._popen: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self.start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def pid(self) -> int:
        return self._popen.pid if self._popen else 0

    def start(self) -> None:
        command = [sys.executable, "-m", "agent.bench.chaos_night", "serve", str(self._port),
                   *(["--quick"] if self._quick else [])]
        popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_paths())
        assert popen.stdout is not None
        line = popen.stdout.readline().strip()
        if not line:
            raise UserError("The scripted model does not start.", "Is the loopback interface up?")
        self._port = int(line.rsplit(":", 1)[1].partition("/")[0])
        self._popen = popen

    def kill(self) -> None:
        """SIGKILL, and a new one in its place."""
        with self._lock:
            self.close()
            self.start()

    def close(self) -> None:
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
            if self._popen.stdout is not None:
                self._popen.stdout.close()


SERVERS: dict[str, Server] = {}
"""Of the nights that are on, by their names."""


@contextlib.contextmanager
def _model(night: Night, plan: Plan) -> Iterator[Server]:
    server = SERVERS[night.name] = Server(plan.quick)
    try:
        yield server
    finally:
        server.close()
        del SERVERS[night.name]


def _paths() -> dict[str, str]:
    """The environment of every process here: this package in reach, and not compiled anew by each."""
    return {name: value for name, value in own_environment().items() if name != "PYTHONDONTWRITEBYTECODE"}


def _environment(server: Server, git_first: Path | None) -> dict[str, str]:
    found = _paths() | {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": server.base_url, "RATCHET_MODEL": "scripted"}
    return found | ({"PATH": f"{git_first}{os.pathsep}{found['PATH']}"} if git_first else {})


# --------------------------------------------------------------------------------------------------------- the morning

def _facts(quiet: Night, nights: list[Night], orphans: list[str]) -> dict[str, Any]:
    """The JSON of the bench."""
    told, problems = [], []
    for night in nights:
        one: dict[str, Any] = {"name": night.name, "starts": night.starts, "kills": sum(night.kills.values()),
                               "by_kind": dict(night.kills), "errors": len(night.errors)}
        if night.gave_up or not night.ledger.exists():
            problems.append(f"{night.name}: {night.gave_up}")
            told.append(one | {"lost_results": 0, "double_counted": 0, "wrong_tip": 0, "verdicts_equal": False})
            continue
        found = run_folder.tally(night.run)
        differ = _differences(quiet, night)
        problems += [f"{night.name}: {line}" for line in (*found.problems, *differ)]
        told.append(one | {"lost_results": len(found.lost), "double_counted": len(found.doubled),
                           "wrong_tip": len(found.tip), "verdicts_equal": not differ})
    wanted = set(chaos_night.labels(quiet.ledger))
    reached = Counter(mode for night in nights for mode, label in set(night.reached) if label in wanted)
    seconds = sorted(second for night in nights for second in night.restart_seconds)
    controller = sum(night.kills["controller"] for night in nights)
    facts: dict[str, Any] = {
        "kills": controller, "other_kills": sum(sum(night.kills.values()) for night in nights) - controller,
        "by_kind": dict(sum((night.kills for night in nights), Counter[str]())),
        "boundaries": len(wanted), "boundaries_reached": dict(reached),
        **{name: sum(one[name] for one in told) for name in COLUMNS[:3]}, "orphans": len(orphans),
        "verdicts_equal": all(one["verdicts_equal"] for one in told),
        "restart_s": round(seconds[len(seconds) // 2], 2) if seconds else None,
        "errors": sorted(Counter(line for night in nights for line in night.errors).items()),
        "nights": told, "problems": [*problems, *(f"orphan: {line}" for line in orphans)]}
    return facts | {"ok": facts["verdicts_equal"] and not any(facts[name] for name in COLUMNS)}


def _sound(quiet: Night, night: Night) -> bool:
    return not night.gave_up and not run_folder.tally(night.run).problems and not _differences(quiet, night)


def verdicts(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What became of each proposal by its title: outcome, stage, fault, and of those that were judged the scores of
    each pair by seed. Attempts that came to nothing for lack of a reply are left out."""
    state, _ = replay(folder / "ledger.jsonl")
    found: dict[str, tuple[Any, ...]] = {}
    for attempt in state.attempts.values():
        verdict = attempt.verdict
        if verdict is None or attempt.proposal.title == "no usable proposal":
            continue
        pairs = tuple((pair.seed, pair.fault, tuple(sorted(pair.incumbent.items())),
                       tuple(sorted(pair.candidate.items()))) for pair in verdict.pairs)
        found[attempt.proposal.title] = (verdict.outcome, verdict.stage, verdict.fault, pairs)
    return found


def _differences(quiet: Night, night: Night) -> list[str]:
    """Where the morning is not that of the undisturbed night."""
    wanted, found = verdicts(quiet.run), verdicts(night.run)
    lines = []
    for title in sorted(wanted.keys() | found.keys()):
        one, other = wanted.get(title), found.get(title)
        if one is None or other is None or one[:3] != other[:3]:
            lines.append(f"{title}: {other[:3] if other else 'no verdict'} instead of {one[:3] if one else 'none'}")
        elif not alike(one[3], other[3]):
            lines.append(f"{title}: other pairs")
    ours, theirs = _state(quiet), _state(night)
    if theirs.phase != "finished":
        lines.append(f"it is {theirs.phase}")
    if _tree(quiet, ours) != _tree(night, theirs):
        lines.append("the tip holds another tree")
    if (ours.gain is None) != (theirs.gain is None) or (
            ours.gain and theirs.gain and not alike(ours.gain.effect, theirs.gain.effect)):
        lines.append("the gain is another")
    return lines


def alike(one: Any, other: Any) -> bool:
    """Equal, numbers to ``SAME``."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < SAME
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def _tree(night: Night, state: State) -> str | None:
    return git.resolve(night.run / "repo.git", state.tip, "tree")


def _state(night: Night) -> State:
    return replay(night.ledger)[0]


def _orphans(patience: float = 10.0) -> list[str]:
    """Processes that the campaigns left behind: all of them were adopted by this one. Helpers that wait for a job of
    a killed controller end by themselves; they get ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while True:
        process.reap(keep=set())
        left = [pid for pid in process.descendants(os.getpid()) if (found := process.stat(pid)) and found.state != "Z"]
        if not left or time.monotonic() > deadline:
            return [_command(pid) for pid in left]
        time.sleep(0.1)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    return str(pid)


def _ended(night: Night) -> bool:
    """Whether the last event was written before the process died."""
    return night.ledger.exists() and _state(night).phase == "finished"


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _events(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.read_bytes().count(b"\n")
    return 0
