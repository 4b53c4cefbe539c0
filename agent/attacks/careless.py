"""The careless tool: how an agent that trusts its patches would run one. The attacks must succeed here.

    python -m agent.attacks.careless TASK.json      (writes ANSWER.json beside it)

It applies the patch with plain ``git apply`` in a work tree, trains there with its own environment, serves whatever is
asked for, loads what it is handed, scores in bulk with the patched code, believes a printed number, keeps no limit and
afterwards runs host tools in the work tree. It is a process of its own, since some attacks bring it down. All it can
reach of value is bait; what an attack may take is bounded in the attack's own code, and the suite kills it at the end.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from sandbox import process
from sandbox.serve_batches import Rows
from sandbox.wire import WireError, receive, send

CLAIM = re.compile(r"^(?:val_bpb|quality): (-?[0-9.e-]+)$", re.MULTILINE)
LOADER = """
import json, pickle, sys
import numpy as np
file = open(sys.argv[1], "rb")
if file.peek(1)[:1] == b"\\x80":
    pickle.load(file)
    sys.exit()
header = bytearray(int.from_bytes(file.read(8), "little"))
file.readinto(header)
last = json.loads(header)
for entry in last.values():
    np.empty(entry["shape"], "f4")
if last != json.loads(header, object_pairs_hook=lambda pairs: dict(reversed(pairs))):
    print("two readers see two models")
"""
"""Loads weights as ``torch.load`` did for years, or as a reader of safetensors in ten lines does."""
WORKER = """# waits for a job, becomes it, and waits for the next, all in one interpreter
import json, os, random, runpy, struct, sys
for line in sys.stdin:
    os.environ["HARNESS_FD"], folder, script = line.split()
    os.chdir(folder)
    before, sys.path[0], sys.argv = set(sys.modules), folder, [script]
    try:
        runpy.run_path(script, run_name="__main__")
    except (Exception, SystemExit) as error:
        print(repr(error), flush=True)
    for name in set(sys.modules) - before:
        del sys.modules[name]
"""
"""What people make who start warm: nothing stands between two jobs but that the first one's modules are forgotten."""
REVERSING = re.compile("[\u202a-\u202e\u2066-\u2069]")
PATIENCE = 2.0
"""It gives up at this many times the wall limit."""


class Careless:
    """One task: {work, patch, data, seed, wall, scoring, twice, foreign, warm}."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task, self.work = task, Path(task["work"])
        self.seen: dict[str, Any] = {"processes": 0, "memory_mb": 0.0, "seconds": 0.0, "log": "", "claimed": None,
                                     "bulk": None, "prefix": None, "weights_mb": 0.0, "loader": [], "disguised": []}
        self.log = self.work.parent / "careless.log"
        self._done = threading.Event()
        self._wires = [socket.socketpair() for _ in range(2)] if task["warm"] else []
        self._worker: subprocess.Popen[bytes] | None = None
        self._next = self.work.parent / ".ahead-0" / "box0" / "source"

    def run(self) -> dict[str, Any]:
        patch = Path(self.task["patch"])
        if patch.stat().st_size:
            self._git("apply", "--unsafe-paths", "--whitespace=nowarn", str(patch))
        self.task["steps"] = int(re.findall(r"^amount = (\d+)$", (self.work / "ratchet.toml").read_text(), re.M)[0])
        if self.task["warm"]:
            self._wait_for_jobs()
        sampler = threading.Thread(target=self._sample, daemon=True)
        sampler.start()
        began = time.monotonic()
        for _ in range(2 if self.task["twice"] else 1):
            if self.task["foreign"]:
                self._foreign()
            elif (weights := self._train()) is not None:
                self._score(weights)
        self.seen["seconds"] = time.monotonic() - began
        self._done.set()
        self.seen["log"] = self.log.read_bytes().decode("utf-8", "replace")
        claims = CLAIM.findall(self.seen["log"])
        self.seen["claimed"] = float(claims[-1]) if claims else None
        self._host_tools()
        return self.seen

    def _git(self, *arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=careless", "-c", "user.email=careless@localhost", *arguments],
                       cwd=self.work, check=True, capture_output=True)

    def _host_tools(self) -> None:
        """What tools do in a work tree as a matter of course: list it, ask a build backend for its name, commit."""
        names = [path.name for path in self.work.rglob("*") if ".git" not in path.parts]
        self.seen["disguised"] += [ascii(name) for name in names if not name.isprintable()]
        folded = [name.casefold() for name in set(names)]
        self.seen["disguised"] += [name for name in set(names) if folded.count(name.casefold()) > 1]
        self.seen["disguised"] += [path.name for path in self.work.rglob("*.py")
                                   if REVERSING.search(path.read_text("utf-8", "replace"))]
        if (self.work / "setup.py").exists():
            subprocess.run([sys.executable, "setup.py", "--name"], cwd=self.work, capture_output=True, timeout=30)
        self._git("add", "-A")
        self._git("commit", "-q", "--allow-empty", "-m", "keep")
        fresh = self.work.parent / "fresh"
        self._git("clone", "-q", str(self.work), str(fresh))
        self.seen["disguised"] += [path.name for path in self.work.glob("*.py")
                                   if path.read_bytes() != (fresh / path.name).read_bytes()]

    def _wait_for_jobs(self) -> None:
        """A worker for both jobs, and the folder of the second, which is ready before the first one runs."""
        shutil.copytree(self.work, self._next, ignore=shutil.ignore_patterns(".git"))
        with self.log.open("ab") as log:
            self._worker = subprocess.Popen(
                [sys.executable, "-c", WORKER], cwd=self.work, stdin=subprocess.PIPE, stdout=log, stderr=log,
                pass_fds=[theirs.fileno() for _, theirs in self._wires])

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            pids = list(process.descendants(os.getpid()))
            self.seen["processes"] = max(self.seen["processes"], len(pids))
            self.seen["memory_mb"] = max(self.seen["memory_mb"], process.memory_mb(pids))

    def _start(self, command: list[str], sock: socket.socket | None, **environment: str) -> subprocess.Popen[bytes]:
        """A process that inherits the whole environment, as a careless tool's jobs do."""
        more = environment if sock is None else environment | {"HARNESS_FD": str(sock.fileno())}
        with self.log.open("ab") as log:
            return subprocess.Popen(["env", *(f"{key}={value}" for key, value in more.items()), sys.executable,
                                     *command], cwd=self.work, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                    pass_fds=[] if sock is None else [sock.fileno()])

    def _ask(self, script: str) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        """(own end of the wire, process) of a job that runs ``script``."""
        if self._worker is not None and self._worker.stdin is not None:
            (ours, theirs), folder = self._wires.pop(0), self.work if script == "train.py" else self._next
            self._worker.stdin.write(f"{theirs.fileno()} {folder} {script}\n".encode())
            self._worker.stdin.flush()
            if not self._wires:
                self._worker.stdin.close()
            job = self._worker
        else:
            ours, theirs = socket.socketpair()
            job = self._start([script], theirs)
        theirs.close()
        ours.settimeout(self.task["wall"] * PATIENCE)
        return ours, job

    def _end(self, job: subprocess.Popen[bytes]) -> None:
        """It asks nicely, and does not look after children."""
        if job is self._worker and self._wires:
            return  # it waits for the next
        try:
            job.wait(self.task["wall"] * PATIENCE)
        except subprocess.TimeoutExpired:
            job.terminate()

    def _train(self) -> bytes | None:
        """Serve whatever is asked for until there are weights. It takes a job's silence for work."""
        data = self.task["data"]
        meta = json.loads(Path(data, "meta.json").read_text())
        rows = Rows(Path(data, "train.bin"), meta["sequence"] + 1, self.task["seed"])
        ours, job = self._ask("train.py")
        with ours:
            try:
                send(ours, b"S", json.dumps(meta | {"seed": self.task["seed"], "steps": self.task["steps"]}).encode())
                while True:
                    kind, payload = receive(ours, 1 << 62)
                    if kind == b"?":
                        send(ours, b"B", rows.take(struct.unpack("<I", payload)[0]))
                    elif kind == b"W":
                        return bytes(payload)
            except WireError:
                return None
            finally:
                self._end(job)

    def _foreign(self) -> None:
        """A trainer that is not served, and the repo's own evaluation, both in the work tree."""
        out = self.work.parent / "out"
        out.mkdir(exist_ok=True)
        self._end(self._start(["-m", "line.fit", str(self.task["seed"]), str(self.task["steps"]), str(out)], None,
                              PYTHONPATH="src"))
        self._end(self._start(["tools/score.py", str(out)], None, PYTHONPATH="src"))

    def _score(self, weights: bytes) -> None:
        """Load the weights as ``torch.load`` did, then ask the patched server, in bulk and blind."""
        place = self.work.parent / "weights"
        place.write_bytes(weights)
        self.seen["weights_mb"] = len(weights) / 2**20
        loaded = subprocess.run([sys.executable, "-c", LOADER, str(place)], capture_output=True, text=True, timeout=30)
        self.seen["disguised"] += loaded.stdout.splitlines()
        self.seen["loader"] += loaded.stderr.splitlines()[-1:]
        meta = json.loads(Path(self.task["data"], "meta.json").read_text())
        vocab, length = meta["vocab"], meta["sequence"] + 1
        table = np.fromfile(Path(self.task["data"], "val.bin"), "<u2").reshape(-1, length)
        ours, job = self._ask("serve.py")
        with ours:
            try:
                send(ours, b"S", json.dumps(meta).encode())
                send(ours, b"W", weights)
                receive(ours, 1 << 62)
                if self.task["scoring"] == "prefix":
                    self.seen["prefix"] = self._prefix(ours, table, vocab)
                losses: list[float] = []
                for begin in range(0, len(table), 32):
                    send(ours, b"L", table[begin:begin + 32].tobytes())
                    losses += np.frombuffer(receive(ours, 1 << 62)[1], "<f4").tolist()
                self.seen["bulk"] = sum(losses) / len(losses) / math.log(2)
                send(ours, b"E")
            except WireError:
                return
            finally:
                self._end(job)

    def _prefix(self, sock: socket.socket, table: Any, vocab: int) -> float:
        """Bits a token of the last token of every row, shown all that stands before it."""
        seen = table[:, :-1]
        send(sock, b"A", struct.pack("<II", *seen.shape) + seen.tobytes())
        logits = np.frombuffer(receive(sock, 1 << 62)[1], "<f4").reshape(-1, vocab).astype(float)
        top = logits.max(axis=1)
        nats = top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - logits[np.arange(len(table)), table[:, -1]]
        return float(nats.mean()) / math.log(2)


def main(argv: list[str]) -> int:
    task = Path(argv[0])
    answer = Careless(json.loads(task.read_text())).run()
    task.with_name("ANSWER.json").write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
