"""The trusted scorer: bits per byte of held-out text under a model that lives in another, untrusted process.

The model server gets the weights and whole rows, and answers one negative log-likelihood (NLL) a token: *bulk*
scoring. Such a server is shown the targets with the inputs, so its answers alone prove nothing: a model that looks
ahead, carries state from row to row, or whose probabilities do not sum to one scores too well. They are good enough to
screen with; what is believed is audited (sandbox/audit.py). Units: nats inside, bits per UTF-8 byte outside.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sandbox import view
from sandbox.faults import JobFault
from sandbox.job import Batches, Evaluation, Job, Score, bulk_file
from sandbox.wire import WireError, receive, send

CHUNK = 32
"""Rows of one bulk question."""

Ids = npt.NDArray[np.uint16]
Nats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Server:
    """The model server at the other end of ``sock``."""

    sock: socket.socket
    vocab: int
    sequence: int

    def logits(self, prefixes: Ids) -> Nats:
        """n x c token ids -> n x vocab logits of the next token. Raises WireError or JobFault."""
        count, length = prefixes.shape
        send(self.sock, b"A", struct.pack("<II", count, length) + prefixes.astype("<u2").tobytes())
        return self._floats(b"A", (count, self.vocab))

    def bulk(self, rows: Ids) -> Nats:
        """n x (sequence + 1) token ids -> n x sequence NLLs. Raises WireError or JobFault."""
        send(self.sock, b"L", rows.astype("<u2").tobytes())
        answer = self._floats(b"L", (len(rows), self.sequence))
        if answer.min() < -1e-4:
            raise JobFault("crash", f"the model server answered a negative log-likelihood of {answer.min():.4g} nats, "
                                    "which no probability has")
        return answer

    def end(self) -> None:
        """All answers are here: how the server ends is of no interest."""
        with contextlib.suppress(WireError):
            send(self.sock, b"E")

    def _floats(self, kind: bytes, shape: tuple[int, int]) -> Nats:
        size = 4 * shape[0] * shape[1]
        got, payload = receive(self.sock, max(size, 1 << 16))
        if got != kind or len(payload) != size:
            raise JobFault("crash", f"the model server answered frame {got!r} of {len(payload)} bytes; "
                                    f"{kind!r} of {size} was due")
        values = np.frombuffer(payload, "<f4").reshape(shape).astype(np.float64)
        if not np.isfinite(values).all():
            raise JobFault("nan", "the model's predictions on held-out text are not finite")
        return values


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The scored rows of one split: token ids [rows, sequence + 1], and the UTF-8 bytes of each target
    [rows, sequence]. Targets of 0 bytes (special tokens) count neither as nats nor as bytes."""

    rows: Ids
    weight: Nats

    @property
    def counted(self) -> npt.NDArray[np.bool_]:
        return self.weight > 0

    def per_byte(self, nats: float) -> float:
        """Bits per byte of ``nats`` over all counted targets."""
        return nats / (math.log(2) * float(self.weight.sum()))


def greet(sock: socket.socket, job: Job, batches: Batches, weights: bytes | bytearray) -> Server:
    """Give a fresh model server its settings and weights, and wait until it is ready. Raises WireError or JobFault."""
    settings = {"rows": CHUNK, "sequence": batches.sequence, "vocab": batches.vocab, "preset": job.preset,
                "device": view.inner_device(job.device), "threads": job.threads}
    send(sock, b"S", json.dumps(settings).encode())
    send(sock, b"W", memoryview(weights))
    kind, payload = receive(sock, 1 << 16)
    if kind != b"R" or payload:
        raise JobFault("crash", f"the model server sent {kind!r} where it should have said that it is ready")
    return Server(sock, batches.vocab, batches.sequence)


def score(server: Server, texts: dict[str, HeldOut], folder: Path,
          on_split: Callable[[int, int], None]) -> dict[str, Score]:
    """Bulk score of each split. Raises WireError or JobFault.

    Every answer is kept as ``folder/bulk-SPLIT.npy``, for an audit to compare with. ``on_split(done, all)`` is for
    screens. The wall limit is the caller's: it kills the server, which ends the wait.
    """
    scores: dict[str, Score] = {}
    for done, (name, text) in enumerate(texts.items()):
        on_split(done, len(texts))
        answers = bulk(server, text.rows, random.SystemRandom())
        np.save(bulk_file(folder, name), answers.astype(np.float32))
        value = text.per_byte(float(answers[text.counted].sum()))
        scores[name] = Score(value, value)
    server.end()
    return scores


def bulk(server: Server, rows: Ids, chance: random.Random) -> Nats:
    """NLLs of whole rows, asked in an order that nobody can foresee."""
    order = np.array(chance.sample(range(len(rows)), len(rows)))
    answers = np.empty((len(rows), rows.shape[1] - 1))
    for begin in range(0, len(rows), CHUNK):
        some = order[begin:begin + CHUNK]
        answers[some] = server.bulk(rows[some])
    return answers


def held_out(evaluation: Evaluation, batches: Batches) -> dict[str, HeldOut]:
    """The scored rows of each split. Raises ValueError when a token file does not fit the vocabulary."""
    sizes = np.load(evaluation.token_bytes, allow_pickle=False).astype(np.float64)
    texts: dict[str, HeldOut] = {}
    for name, path in evaluation.splits.items():
        rows = held_out_rows(Path(path), evaluation.rows, batches.sequence)
        if rows.max() >= min(len(sizes), batches.vocab):
            raise ValueError(f"{path} holds token ids beyond the vocabulary")
        texts[name] = HeldOut(rows, sizes[rows[:, 1:]])
        if not texts[name].counted.any():
            raise ValueError(f"no token of {path} has bytes")
    return texts


def held_out_rows(path: Path, most: int, sequence: int) -> Ids:
    """Rows of sequence + 1 tokens that are scored.

    At most ``most`` rows, and at most two thirds of the split: the same in every run, spread evenly over the split,
    since neighbouring rows come from one document (the first 256 rows of 65 files would be eight files).
    """
    tokens = np.memmap(path, dtype="<u2", mode="r")
    whole = len(tokens) // (sequence + 1)
    count = min(most, whole * 2 // 3)
    if count < 2:
        raise ValueError(f"{path.name} has {len(tokens)} tokens, too few for three rows of {sequence + 1}")
    table = np.array(tokens[:whole * (sequence + 1)]).reshape(whole, sequence + 1)
    return np.asarray(table[np.arange(count) * whole // count])
