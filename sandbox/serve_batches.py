"""The training data's order, and the harness's end of the wire while a job trains.

The harness owns the order of the data: fixed by the seed alone, the same for incumbent and candidate, whatever the
number of rows that a job asks for at a time. It counts every batch, since a job cannot be trusted to count its own.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sandbox import early, view
from sandbox.faults import JobFault
from sandbox.job import Batches, Job
from sandbox.wire import receive, send

MOST_ROWS = 4
"""A request may ask for up to this many times the configured rows."""
MOST_REPORT = 1 << 16
MOST_CURVE = 200


class Rows:
    """Rows of ``length`` tokens from a token file, in an order fixed by ``seed``.

    Every epoch has a phase of its own (where the first row begins) and a permutation of its own of the rows that do
    not overlap at that phase. Draws come from Philox keyed by (seed, epoch), so an epoch needs none before it.
    """

    def __init__(self, path: Path, length: int, seed: int) -> None:
        self._tokens = np.memmap(path, dtype="<u2", mode="r")
        self._length, self._seed = length, seed
        self._count = (len(self._tokens) - length + 1) // length
        if self._count < 1:
            raise ValueError(f"{path.name} has {len(self._tokens)} tokens, fewer than two rows of {length}")
        self._given, self._epoch, self._phase = 0, -1, 0
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def take(self, count: int) -> bytes:
        """The next ``count`` rows as count x length little-endian uint16."""
        return b"".join(self._next() for _ in range(count))

    def _next(self) -> bytes:
        epoch, place = divmod(self._given, self._count)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, epoch))))
            self._phase = int(generator.integers(0, self._length))
            self._order, self._epoch = generator.permutation(self._count), epoch
        self._given += 1
        begin = self._phase + int(self._order[place]) * self._length
        return self._tokens[begin:begin + self._length].tobytes()


@dataclass(slots=True)
class Trainee:
    """One job under training, seen through its socket: serves batches, counts them, keeps what it reports."""

    sock: socket.socket
    job: Job
    batches: Batches
    rows: Rows
    on_step: Callable[[int, float | None], None]
    served: int = 0
    tokens: int = 0
    loss: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    _stride: int = 1
    _reports: int = 0

    def begin(self) -> None:
        """Send the settings. Raises WireError."""
        settings = {"seed": self.job.seed, "steps": self.job.steps, "rows": self.batches.rows,
                    "sequence": self.batches.sequence, "vocab": self.batches.vocab, "preset": self.job.preset,
                    "device": view.inner_device(self.job.device), "threads": self.job.threads,
                    "check": self.job.check}
        send(self.sock, b"S", json.dumps(settings).encode())

    def listen(self) -> int | bytearray:
        """Wait for what matters next: rows of a request, or the final weights. Raises WireError or JobFault."""
        while True:
            kind, payload = receive(self.sock, self.job.limits.weights_mb << 20)
            if kind == b"W":
                return payload
            if kind == b"P" and len(payload) <= MOST_REPORT:
                self._report(payload)
            elif kind == b"?" and len(payload) == 4:
                rows = int(struct.unpack("<I", payload)[0])
                if not 1 <= rows <= MOST_ROWS * self.batches.rows:
                    raise JobFault("crash", f"asked for {rows} rows at once; 1 to {MOST_ROWS * self.batches.rows} "
                                            "are allowed")
                return rows
            else:
                raise JobFault("crash", f"sent a frame {kind!r} of {len(payload)} bytes that the protocol lacks")

    def answer(self, rows: int) -> bool:
        """Serve ``rows`` rows, or say that the budget is spent (and return False). Raises WireError, or JobFault for a
        run that is stopped early."""
        if self.job.rival and self.served == self.job.stop_at and early.behind(self.curve, self.job.rival, self.served):
            raise JobFault("behind", f"after {self.served} of {self.job.steps} steps its training loss was not ahead "
                                     f"of the incumbent's at any of the last {early.POINTS} points")
        if self.served >= self.job.steps:
            send(self.sock, b"E")
            return False
        send(self.sock, b"B", self.rows.take(rows))
        self.served += 1
        self.tokens += rows * self.batches.sequence
        self.on_step(self.served, self.loss)
        return True

    def _report(self, payload: bytearray) -> None:
        """Keep (step, loss) for screens: at most 200 points, thinned evenly; nonsense is dropped."""
        try:
            report = json.loads(payload)
            step, loss = int(report["step"]), float(report["loss"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return
        self.loss = loss
        self.on_step(self.served, loss)
        if self._reports % self._stride == 0 and math.isfinite(loss):
            self.curve.append((step, loss))
        self._reports += 1
        if len(self.curve) > MOST_CURVE:
            self.curve, self._stride = self.curve[::2], self._stride * 2


def trainee(sock: socket.socket, job: Job, batches: Batches, on_step: Callable[[int, float | None], None]) -> Trainee:
    """A Trainee on its own fresh data order."""
    return Trainee(sock, job, batches, Rows(Path(batches.tokens), batches.sequence + 1, job.seed), on_step)
