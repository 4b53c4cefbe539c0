"""A tiny world for the sandbox's tests: token files, and a bigram "trainer" that speaks the wire by the stdlib."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from sandbox.job import WEIGHTS, Batches, Evaluation, Job, Limits, Result, read_result, write_job
from sandbox.supervisor import supervise

VOCAB, SEQUENCE, ROWS = 32, 24, 4

FAKE = r'''
import json, math, os, socket, struct, sys, time
VOCAB = 32
HEADER = struct.Struct("<cQ")
def connect():
    return socket.socket(fileno=int(os.environ["HARNESS_FD"]))
def send(sock, kind, payload=b""):
    sock.sendall(HEADER.pack(kind, len(payload)) + bytes(payload))
def exactly(sock, count):
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError("harness is gone")
        data += more
    return data
def receive(sock):
    kind, length = HEADER.unpack(exactly(sock, HEADER.size))
    return kind, exactly(sock, length)
def ids(data):
    return struct.unpack(f"<{len(data) // 2}H", data)
def save(table):
    body = struct.pack(f"<{VOCAB * VOCAB}f", *[value for row in table for value in row])
    entry = {"dtype": "F32", "shape": [VOCAB, VOCAB], "data_offsets": [0, len(body)]}
    header = json.dumps({"table": entry}).encode()
    return len(header).to_bytes(8, "little") + header + body
def load(data):
    size = int.from_bytes(data[:8], "little")
    flat = struct.unpack(f"<{VOCAB * VOCAB}f", data[8 + size:])
    return [flat[i * VOCAB:(i + 1) * VOCAB] for i in range(VOCAB)]
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
def train(on_batch=lambda step: None, rows=None, loss=2.5):
    sock = connect()
    kind, payload = receive(sock)
    settings = json.loads(payload)
    counts = [[1.0] * VOCAB for _ in range(VOCAB)]
    length, step = settings["sequence"] + 1, 0
    while True:
        send(sock, b"?", struct.pack("<I", rows or settings["rows"]))
        kind, payload = receive(sock)
        if kind == b"E":
            break
        flat = ids(payload)
        for start in range(0, len(flat), length):
            row = flat[start:start + length]
            for a, b in zip(row, row[1:]):
                counts[a][b] += 1
        step += 1
        send(sock, b"P", json.dumps({"step": step, "loss": loss / step}).encode())
        on_batch(step)
    table = [[math.log(value / sum(row)) for value in row] for row in counts]
    return sock, table
def serve(logits, bulk):
    sock = connect()
    settings = json.loads(receive(sock)[1])
    table = load(receive(sock)[1])
    send(sock, b"R")
    while True:
        kind, payload = receive(sock)
        if kind == b"E":
            return
        if kind == b"A":
            count, length = struct.unpack("<II", payload[:8])
            flat = ids(payload[8:])
            answer = [logits(table, flat[i * length:(i + 1) * length]) for i in range(count)]
        else:
            flat, length = ids(payload), settings["sequence"] + 1
            answer = [bulk(table, flat[i:i + length]) for i in range(0, len(flat), length)]
        send(sock, kind, b"".join(struct.pack(f"<{len(row)}f", *row) for row in answer))
def honest_logits(table, prefix):
    return table[prefix[-1]]
def honest_bulk(table, row):
    return [-table[a][b] for a, b in zip(row, row[1:])]
'''

GOOD = "from fake import *\nsock, table = train()\nprint('val_bpb: 0.10')\nsend(sock, b'W', save(table))\n"
SERVE = "from fake import *\nserve(honest_logits, honest_bulk)\n"


class World:
    """One test's folder with data, sources and jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = np.random.default_rng(7)
        self.tokens = self._chain(generator, 20_000)
        for name, data in (("train", self.tokens), ("val", self._chain(generator, 4000)),
                           ("confirm", self._chain(generator, 4000))):
            data.tofile(folder / f"{name}.bin")
        self.sizes = np.array([0] + [1 + number % 4 for number in range(1, VOCAB)], dtype=np.uint8)
        np.save(folder / "bytes.npy", self.sizes)
        self._jobs = 0
        self.scored: Result | None = None
        self.trained = folder
        self.last = folder

    @staticmethod
    def _chain(generator: np.random.Generator, count: int) -> npt.NDArray[np.uint16]:
        """Tokens where each likes its successor: a bigram has something to learn."""
        jumps = generator.integers(0, VOCAB, count)
        stay = generator.random(count) < 0.7
        tokens = [0]
        for jump, near in zip(jumps, stay, strict=True):
            tokens.append((tokens[-1] + 1) % VOCAB if near else int(jump))
        return np.array(tokens[1:], dtype="<u2")

    def source(self, train: str = GOOD, serve: str = SERVE, **files: str) -> Path:
        """A source folder with fake.py, train.py, serve.py and ``files`` (name -> text, ``.py`` added)."""
        self._jobs += 1
        folder = self.folder / f"source{self._jobs}"
        folder.mkdir()
        for name, text in {"fake": FAKE, "train": train, "serve": serve, **files}.items():
            (folder / f"{name}.py").write_text(text, encoding="utf-8")
        return folder

    def sealed(self, **more: object) -> Evaluation:
        splits = {name: str(self.folder / f"{name}.bin") for name in ("val", "confirm")}
        return Evaluation("sealed", ("python", "serve.py"), splits, str(self.folder / "bytes.npy"), rows=64, audit=48,
                          wall_seconds=20, **more)  # type: ignore[arg-type]

    def job(self, source: Path, steps: int = 6, **more: object) -> Job:
        """A served job with small limits; ``more`` replaces fields of Job."""
        fields: dict[str, object] = {
            "command": ("python", "train.py"), "seed": 3, "steps": steps,
            "batches": Batches(str(self.folder / "train.bin"), ROWS, SEQUENCE, VOCAB),
            "limits": Limits(wall_seconds=20, memory_mb=512, processes=64, log_mb=1, scratch_mb=64, weights_mb=1)}
        return Job("job", str(source), **fields | more)  # type: ignore[arg-type]

    def job_folder(self, job: Job) -> Path:
        self._jobs += 1
        folder = self.folder / f"job{self._jobs}"
        write_job(folder, job)
        return folder

    def run(self, job: Job) -> Result:
        """Supervise the job in a process of its own, as the agent does (a fork saves the start-up), and wait for it."""
        self.last = self.job_folder(job)
        child = multiprocessing.get_context("fork").Process(target=supervise, args=(self.last,))
        child.start()
        child.join(300)
        result = read_result(self.last)
        assert result is not None
        return result

    def audited(self, source: Path, steps: int, reference: Path | None = None) -> Result:
        """Train and score ``source``, then audit the weights. The result of the audit; ``scored`` has the other, and
        ``trained`` its job folder.

        ``reference``: job folder of a run to compare with, by its place.
        """
        evaluation = self.sealed()
        self.scored = self.run(self.job(source, steps=steps, evaluation=evaluation, keep_weights=True))
        assert self.scored.fault is None, self.scored
        self.trained = self.last
        return self.run(self.job(source, steps=steps, evaluation=evaluation, kind="audit", bulk=str(self.last),
                                 weights=str(self.last / WEIGHTS), reference=str(reference or "")))

    def log(self) -> str:
        """What the last job printed."""
        return (self.last / "log.txt").read_text(encoding="utf-8")

    def expected_bpb(self, served: npt.NDArray[np.uint16], split: str, rows: int) -> float:
        """Bits per byte of the bigram trained on ``served`` rows, computed straight from the definition."""
        counts = np.ones((VOCAB, VOCAB))
        np.add.at(counts, (served[:, :-1].ravel(), served[:, 1:].ravel()), 1)
        table = np.log(counts / counts.sum(1, keepdims=True))
        tokens = np.fromfile(self.folder / f"{split}.bin", dtype="<u2")
        whole = len(tokens) // (SEQUENCE + 1)
        text = np.array([tokens[pick * (SEQUENCE + 1):][:SEQUENCE + 1] for pick in (row * whole // rows
                                                                                   for row in range(rows))])
        sizes = self.sizes[text[:, 1:]]
        nats = -table[text[:, :-1], text[:, 1:]]
        return float(nats[sizes > 0].sum() / math.log(2) / sizes.sum())


def alive(marker: str) -> list[int]:
    """Processes other than this one whose command line holds ``marker``."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if marker in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def until(condition: Callable[[], Any], seconds: float = 40.0) -> Any:
    """What ``condition`` gives once that is true of anything; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found
