"""What each level claims to stop, and the attempt that puts the claim to the test before it is believed.

``CLAIMS`` is the one table: `ratchet doctor` prints it, docs/isolation.md shows it, and ``judge`` refuses a level in
which an attempt got through that a claim of the level names. The attempts run in a box like any job's, against bait
that is laid out for them: a secret, a held-out file, listening sockets, and a process with a canary in its environment.
Whether a signal, a datagram or a file got out is looked at from outside, since the inside may be shown a copy.

Does not cover: limits (memory, processes, time), which need seconds to try and are tested elsewhere, and escapes that
nobody has thought of here. That nothing in this list works is necessary for a level, not sufficient.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sandbox import seccomp

SCRATCH_MB = 16


@dataclass(frozen=True, slots=True)
class Claim:
    """What ``text`` names is stopped at ``levels``; each of ``attempts`` that gets through would refute it."""

    text: str
    levels: frozenset[int]
    attempts: tuple[str, ...]


def _claim(text: str, levels: tuple[int, ...], *attempts: str) -> Claim:
    return Claim(text, frozenset(levels), attempts)


CLAIMS = (
    _claim("reading your files and the machine's", (3, 2, 1), "secret", "shadow"),
    _claim("reading held-out text on the disk", (3, 2, 1), "hidden", "hidden by symlink", "hidden by hard link"),
    _claim("writing outside its own folders", (3, 2, 1), "write source", "write secret", "mount", "left in /etc",
           "left in /usr", "left in /tmp", "left in /var/tmp", "left in /dev/shm", "left in the interpreter"),
    _claim("the network, and sockets of other programs", (3, 2, 1), "tcp", "udp", "vsock", "abstract socket",
           "pathname socket", "datagram to a path"),
    _claim("signals to other processes, and their memory, environment and command lines", (3, 2, 1), "signal", "trace",
           "environment", "process"),
    _claim("new privileges, capabilities and namespaces", (3, 2, 1), "capabilities", "new privileges",
           "user namespace"),
    _claim("system calls that exploits begin with (seccomp)", (3, 2, 1), "ptrace call", "keyctl call", "io_uring call"),
    _claim("filling the disk faster than it is measured", (3, 2), "disk", "shared memory"),
    _claim("background processes after a SIGKILL of the supervisor", (3, 2)),
    _claim("sharing your user id", (3,)),
)
"""What is stopped, at which levels, and by which attempts that is tried. At level 1 a job of root has its own user id
too; an ordinary user's has not, so the level does not claim it."""

LIMITS = "more time, memory, processes, log and disk than the limits"
ALWAYS_OPEN = "exploits of the kernel and of a GPU's driver"
GAPS: dict[int, tuple[str, ...]] = {
    3: (ALWAYS_OPEN,), 2: (ALWAYS_OPEN,), 0: (ALWAYS_OPEN,),
    1: ("seeing that a process or a file is there, its size and mode", ALWAYS_OPEN),
}

SCRIPT = r"""
import ctypes, errno, json, os, socket, sys
bait = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
temporary = os.environ["TMPDIR"]
found = {}
def attempt(name, action):
    try:
        found[name] = bool(action())
    except (OSError, EOFError):
        found[name] = False
def read(path):
    with open(path, errors="replace") as file:
        return file.read()
def write(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.unlink(path)
    return True
def append(path):
    os.close(os.open(path, os.O_WRONLY))
    return True
def leave(folder):
    os.close(os.open(folder + "/" + bait["name"], os.O_WRONLY | os.O_CREAT))
def hidden(path):
    return bait["mark"] in read(path)
def linked(make):
    path = temporary + "/" + make.__name__
    make(os.path.abspath("hidden"), path)
    return hidden(path)
def connect(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as made:
        made.settimeout(2)
        made.connect(address)
    return True
def send():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.sendto(bait["mark"].encode(), ("127.0.0.1", bait["udp"]))
def mount():
    place = (temporary + "/mounted").encode()
    os.mkdir(place)
    return libc.mount(b"none", place, b"tmpfs", 0, None) == 0 and libc.umount2(place, 2) == 0
def datagram():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.sendto(bait["mark"].encode(), bait["socket"] + "s")
def environments():
    for name in ("self", *(name for name in os.listdir("/proc") if name.isdigit())):
        try:
            if bait["mark"] in read("/proc/" + name + "/environ"):
                return True
        except OSError:
            pass
    return bait["mark"] in read("/proc/%d/environ" % bait["pid"])
def either(*actions):
    for action in actions:
        try:
            if action():
                return True
        except OSError:
            pass
    return False
def call(name, *arguments):
    ctypes.set_errno(0)
    done = libc.syscall(bait["calls"][name], *map(ctypes.c_long, arguments))
    return done >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS)
def allocate(folder):
    path = folder + "/filling"
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, bait["megabytes"] << 20)
        finally:
            os.unlink(path)
    return True
attempt("secret", lambda: read(bait["secret"]))
attempt("shadow", lambda: read("/etc/shadow"))
attempt("hidden", lambda: hidden("hidden"))
attempt("hidden by symlink", lambda: linked(os.symlink))
attempt("hidden by hard link", lambda: linked(os.link))
attempt("mount", mount)
attempt("write source", lambda: either(lambda: write("planted"), lambda: append("hidden")))
attempt("write secret", lambda: append(bait["secret"]))
for folder in bait["places"].values():
    attempt("", lambda: leave(folder))
attempt("tcp", lambda: connect(socket.AF_INET, ("127.0.0.1", bait["tcp"])))
attempt("udp", send)
attempt("datagram to a path", datagram)
attempt("vsock", lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
attempt("abstract socket", lambda: connect(socket.AF_UNIX, "\0" + bait["name"]))
attempt("pathname socket", lambda: connect(socket.AF_UNIX, bait["socket"]))
attempt("process", lambda: bait["mark"] in read("/proc/%d/cmdline" % bait["pid"]))
attempt("environment", environments)
attempt("trace", lambda: libc.ptrace(0x4206, bait["pid"], None, None) == 0)
attempt("signal", lambda: os.kill(bait["pid"], 9))
attempt("user namespace", lambda: libc.unshare(0x10000000) == 0)
attempt("ptrace call", lambda: call("ptrace", 2, 0, 0, 0))
attempt("keyctl call", lambda: call("keyctl", 0, -3, 0))
attempt("io_uring call", lambda: call("io_uring_setup", 1, 0))
attempt("disk", lambda: either(*(lambda place=place: allocate(place)
                                 for place in (temporary, "/", "/etc", "/dev", "/var", "/home", "/root"))))
attempt("shared memory", lambda: allocate("/dev/shm"))
with open("/proc/self/status") as file:
    lines = dict(line.split(":", 1) for line in file)
held = 0
for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):  # the bounding set grants nothing without new privileges
    held |= int(lines[name].strip(), 16)
found["capabilities"] = held & ~bait["allowed"]
found["new privileges"] = lines["NoNewPrivs"].strip() != "1"
found["uid"] = os.getuid()
print(json.dumps(found))
"""
"""Names of attempts are those of ``CLAIMS``. What it leaves behind, where it can, is empty and removed outside."""

PLACES = {"left in /etc": "/etc", "left in /usr": "/usr", "left in /tmp": "/tmp", "left in /var/tmp": "/var/tmp",
          "left in /dev/shm": "/dev/shm", "left in the interpreter": sys.prefix}


def covers(level: int) -> list[str]:
    """What ``level`` stops, for a person."""
    return [*(claim.text for claim in CLAIMS if level in claim.levels), LIMITS]


def gaps(level: int) -> list[str]:
    """What ``level`` does not stop, for a person."""
    return [*(claim.text for claim in CLAIMS if level not in claim.levels), *GAPS[int(level)]]


def judge(found: dict[str, int], level: int, uid: int) -> str:
    """Empty when nothing got through that ``level`` claims to stop, else what did. ``uid``: the one it should have.

    An attempt without an answer counts as one that got through.
    """
    through = [name for claim in CLAIMS if level in claim.levels for name in claim.attempts if found.get(name, 1)]
    if found.get("uid") != uid:
        through.append("user id")
    return f"a test job got through: {', '.join(through)}" if through else ""


@dataclass(frozen=True, slots=True)
class Bait:
    """What the attempt is set on. ``source`` and ``box`` are the test job's own folders."""

    source: Path
    box: Path
    hidden: Path
    facts: dict[str, object]
    name: str
    process: subprocess.Popen[bytes]
    receivers: dict[str, socket.socket]

    def command(self, allowed: int) -> tuple[str, ...]:
        """The test job. ``allowed``: mask of the capabilities that the level leaves to it."""
        return ("python", "-S", "-E", "-c", SCRIPT, json.dumps(self.facts | {"allowed": allowed}))

    def outcome(self, printed: str) -> dict[str, int]:
        """What got through: as printed by the test job, and as it shows outside. Raises ValueError."""
        found: dict[str, int] = json.loads(printed)
        for key, receiver in self.receivers.items():
            receiver.setblocking(False)
            try:
                found[key] = bool(receiver.recv(100))
            except BlockingIOError:
                found[key] = False
        found["signal"] = self.process.poll() is not None
        for key, folder in PLACES.items():
            found[key] = os.path.lexists(f"{folder}/{self.name}")
            with suppress(OSError):
                os.unlink(f"{folder}/{self.name}")
        return found


@contextmanager
def bait() -> Iterator[Bait]:
    """Bait in a temporary folder, listening sockets and a process, all gone afterwards."""
    mark, name = f"canary-{secrets.token_hex(8)}", f"ratchet-escape-{secrets.token_hex(8)}"
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="probe-")))
        folder.chmod(0o755)
        source, box = folder / "source", folder / "box"
        for place in (source, box):
            place.mkdir()
            place.chmod(0o755)
        secret, hidden = folder / "secret", source / "hidden"
        for file in (secret, hidden):
            file.write_text(mark, encoding="ascii")
            file.chmod(0o666)
        tcp = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        datagrams = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        datagrams.bind(("127.0.0.1", 0))
        for address in (f"\0{name}", str(folder / "socket")):
            server = held.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(address)
            server.listen()
        local = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        local.bind(str(folder / "sockets"))
        for path in (folder / "socket", folder / "sockets"):
            path.chmod(0o777)
        process = subprocess.Popen(["/bin/sh", "-c", "read line", mark], env={"CANARY": mark}, stdin=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        held.enter_context(process)
        held.callback(process.kill)
        column = tuple(seccomp.ARCHITECTURES).index(os.uname().machine)
        yield Bait(source, box, hidden, {
            "mark": mark, "name": name, "secret": str(secret), "socket": str(folder / "socket"), "pid": process.pid,
            "tcp": tcp.getsockname()[1], "udp": datagrams.getsockname()[1], "megabytes": 2 * SCRATCH_MB,
            "places": PLACES,
            "calls": {call: seccomp.NUMBERS[call][column] for call in ("ptrace", "keyctl", "io_uring_setup")},
        }, name, process, {"udp": datagrams, "datagram to a path": local})
