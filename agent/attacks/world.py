"""The world of one attack: bait to steal, to damage and to call, canaries, and the eyes that look for each harm.

An *estate* lies in a folder of the bench and is shared by all attacks: target repositories, prepared data with the
canary in the held-out split, runs. A *world* is one attack's: a home with secrets, a folder of precious files, a
process to be killed, listeners. What an attack is told of its surroundings (``@HOME@`` and so on) is bait and nothing
else, so the attacks can be run without any defence. The suite is a subreaper: whatever a run leaves behind becomes its
child, which tells it from everybody else's processes on a shared machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent import git, tiny
from agent.attacks import target
from agent.attacks.record import Attack
from sandbox import cgroup, process

SHARED = ("/tmp", "/var/tmp", "/dev/shm")
SETTLE_SECONDS = 2.0
"""After this long nothing of a run may be left."""
MARK = "ratchet-attack-"


@dataclass(frozen=True, slots=True)
class Estate:
    """What all attacks of one suite share. ``key`` stands in the tool's environment, ``canary`` in held-out text."""

    root: Path
    key: str
    canary: str

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    def repository(self, kind: str, config: tuple[tuple[str, str], ...] = ()) -> Path:
        """The target under ``config``, written once."""
        digest = hashlib.sha256(repr((kind, config)).encode()).hexdigest()[:8]
        place = self.root / "targets" / f"{kind}-{digest}"
        if not place.exists():
            if kind == "foreign":
                tiny.write_foreign_target(place)
            else:
                target.write(place, target.Ground(self.root / "canary", self.corpus), config)
        return place

    def data(self) -> Path:
        """The prepared data, for the careless tool; written by the target's own prepare.py."""
        place = self.root / "data"
        if not place.exists():
            subprocess.run([sys.executable, "prepare.py", str(place)], cwd=self.repository("served"), check=True)
        return place


def open_estate(root: Path) -> Estate:
    """A fresh estate in ``root``, with canaries of its own."""
    root.chmod(0o755)  # the job's other user id must be able to reach the text that it may read
    estate = Estate(root, f"sk-canary-{secrets.token_hex(16)}", secrets.token_hex(8))
    for folder in (estate.runs, estate.corpus, root / "targets"):
        folder.mkdir(mode=0o755)
    (root / "canary").write_text(estate.canary)
    estate.data()
    return estate


@dataclass(slots=True)
class World:
    """One attack's surroundings. Use ``open_world``."""

    estate: Estate
    mark: str
    folder: Path
    victim: subprocess.Popen[bytes]
    places: dict[str, str] = field(default_factory=dict)
    heard: list[str] = field(default_factory=list)
    mounts: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    _before: dict[str, str] = field(default_factory=dict)
    _nice: int = 0

    def fill(self, text: str) -> str:
        """``text`` with the placeholders of this world."""
        for name, value in self.places.items():
            text = text.replace(f"@{name}@", value)
        return text

    # -------------------------------------------------------------------------------------------------------- eyes

    def damage(self) -> list[str]:
        """Bait files that changed, came or went, and what befell the bait process."""
        now = _hashes(self._watched())
        found = [path for path in sorted(now.keys() | self._before.keys())
                 if now.get(path) != self._before.get(path)]
        if self.victim.poll() is not None:
            found.append("the bait process was killed")
        elif os.getpriority(os.PRIO_PROCESS, self.victim.pid) != self._nice:
            found.append("the bait process was slowed")
        return found

    def hosted(self) -> list[str]:
        """Marks that code left which ran outside its box."""
        return [path.name for path in self.folder.glob("ran-*")]

    def leaks(self, *places: Path | str) -> list[str]:
        """Where a canary stands in these files, folders and texts (digits, raw tokens, or their base64)."""
        tokens = b"".join(int(digit, 16).to_bytes(2, "little") for digit in self.estate.canary)
        wanted = [self.estate.key.encode(), self.estate.canary.encode(), tokens]
        found = []
        for place in places:
            if isinstance(place, str):
                if any(canary in place.encode("utf-8", "replace") for canary in wanted):
                    found.append("text")
                continue
            for file in [place] if place.is_file() else sorted(place.rglob("*")):
                if file.is_file() and not file.is_symlink():
                    data = file.read_bytes()
                    found += [str(file) for canary in wanted if canary in data]
        return list(dict.fromkeys(found))

    def leftovers(self) -> list[str]:
        """What is still there after the run had ``SETTLE_SECONDS`` to go: processes (killed then), files, mounts."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            process.reap({self.victim.pid})
            alive = [pid for pid in process.descendants(os.getpid()) if pid != self.victim.pid and _running(pid)]
            if not alive or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        found = [f"process {_command(pid)}" for pid in alive]
        process.kill_all(lambda: [pid for pid in process.descendants(os.getpid()) if pid != self.victim.pid])
        process.reap({self.victim.pid})
        for place in SHARED:
            for file in Path(place).glob(f"*{self.mark}*"):
                found.append(str(file))
                shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink()
        found += [f"mount {line}" for line in _mounts() - self.mounts]
        found += [f"cgroup {path}" for path in _cgroups() - self.groups]
        found += _shared_memory(int(self.places["SHMKEY"]))
        return found

    def _watched(self) -> list[Path]:
        return [self.folder / "home", self.folder / "precious", self.estate.corpus, self.estate.root / "data",
                self.estate.root / "canary", Path(self.places["TARGET"])]


@contextlib.contextmanager
def open_world(estate: Estate, attack: Attack, name: str) -> Iterator[World]:
    """The world of one run of ``attack``: bait laid out, listeners listening, sentinels hashed."""
    mark = f"{MARK}{secrets.token_hex(6)}"
    folder = estate.root / name
    _lay_bait(folder, estate)
    _checkout(estate.repository(attack.target, attack.config), folder / "target", estate.key)
    with contextlib.ExitStack() as stack:
        victim = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])
        stack.callback(_end, victim)
        world = World(estate, mark, folder, victim, mounts=frozenset(_mounts()), groups=frozenset(_cgroups()))
        world.places = {
            "MARK": mark, "ROOT": str(estate.root), "HOME": str(folder / "home"),
            "PRECIOUS": str(folder / "precious"), "RAN": str(folder / "ran-code"), "VICTIM": str(victim.pid),
            "TARGET": str(folder / "target"), "RUNS": str(estate.runs), "CORPUS": str(estate.corpus),
            "SHMKEY": str(int(mark[-7:], 16)), "KEYSTART": "sk-" + "canary-",
            "FOLDER": str(folder), "ABSTRACT": mark}
        world.places |= _listen(stack, world)
        world._before = _hashes(world._watched())
        world._nice = os.getpriority(os.PRIO_PROCESS, victim.pid)
        yield world


def _checkout(repository: Path, place: Path, key: str) -> None:
    """The user's checkout of the target; its history holds the key, as histories do."""
    shutil.copytree(repository, place)
    with tempfile.NamedTemporaryFile("w", suffix=".env") as file:
        file.write(f"KEY={key}\n")
        file.flush()
        git.run(place, "hash-object", "-w", file.name, bare=False)


def _lay_bait(folder: Path, estate: Estate) -> None:
    """A home with secrets, and precious files. World-readable where a careless machine has them so."""
    for name, text in {
        "home/.aws/credentials": f"aws_secret_access_key = {estate.key}\n", "home/.netrc": f"password {estate.key}\n",
        "home/.bashrc": "# mine\n", "precious/thesis.tex": "years of work\n", "precious/ledger.jsonl": "{}\n",
        "precious/repo/.git/config": "[core]\n\tbare = false\n", "precious/repo/.git/hooks/README": "hooks\n",
        "precious/etc/ld.so.preload": "", "precious/result.json": '{"fault": "crash"}\n',
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _listen(stack: contextlib.ExitStack, world: World) -> dict[str, str]:
    """TCP, UDP, pathname and abstract sockets that note whoever speaks to them. Returns the ports."""
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    named, hidden = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    beside = os.open(world.folder, os.O_PATH)  # the name of a socket may have 107 bytes, and a folder's is longer
    named.bind(f"/proc/self/fd/{beside}/socket")
    os.close(beside)
    (world.folder / "socket").chmod(0o777)
    hidden.bind("\0" + world.places["ABSTRACT"])
    for name, sock in (("tcp", tcp), ("udp", udp), ("unix socket", named), ("abstract socket", hidden)):
        stack.callback(sock.close)
        if name != "udp":
            sock.listen()
        sock.settimeout(0.2)
        threading.Thread(target=_hear, args=(world, name, sock), daemon=True).start()
    return {"TCP": str(tcp.getsockname()[1]), "UDP": str(udp.getsockname()[1])}


def _hear(world: World, name: str, sock: socket.socket) -> None:
    while True:
        try:
            if name == "udp":
                sock.recvfrom(4096)
            else:
                sock.accept()[0].close()
            world.heard.append(name)
        except TimeoutError:
            continue
        except OSError:  # closed: the world has ended
            return


def _hashes(places: list[Path]) -> dict[str, str]:
    """Path -> mode and hash of every file and link below ``places``."""
    found = {}
    for place in places:
        for path in [place, *place.rglob("*")]:
            with contextlib.suppress(OSError):
                link = str(path.readlink()).encode() if path.is_symlink() else b""
                body = link or (path.read_bytes() if path.is_file() else b"")
                found[str(path)] = f"{path.lstat().st_mode:o} {hashlib.sha256(body).hexdigest()}"
    return found


def _running(pid: int) -> bool:
    line = process.stat(pid)
    return line is not None and line.state not in "ZX"


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")[:80]
    except OSError:
        return str(pid)


def _mounts() -> set[str]:
    """Mount points of this process's own mount namespace."""
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def _cgroups() -> set[str]:
    """Control groups of supervisors that are gone: a group's name says whose it is."""
    found = set()
    for path in Path("/sys/fs/cgroup").rglob(f"{cgroup.PREFIX}*"):
        parts = path.name.split("-")
        if len(parts) == 5 and not process.running(int(parts[2]), int(parts[3])):
            found.add(str(path))
    return found


def _shared_memory(key: int) -> list[str]:
    """System V segments with the world's key, removed."""
    path = Path("/proc/sysvipc/shm")
    if not path.exists():
        return []
    for line in path.read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[0]) == key:
            subprocess.run(["ipcrm", "-m", fields[1]], check=False, capture_output=True)
            return [f"shared memory {fields[1]}"]
    return []


def _end(victim: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        victim.send_signal(signal.SIGKILL)
    victim.wait()
