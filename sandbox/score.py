"""The trusted scorer: bits per byte of held-out text under a model that lives in another, untrusted process.

The model server gets the weights and is asked in two ways. *Audit*: prefixes of held-out rows, answered by logits of
the next token, which that process was never shown; the log-softmax is computed here. *Bulk*: whole rows, answered by
one negative log-likelihood (NLL) a token. A model that looks ahead, or whose probabilities do not sum to one, gains in
bulk and not in the audit. With d = NLL_prefix - NLL_bulk at the audited positions,

    corrected = mean(bulk) + mean(d)

is a control variate: unbiased for the honest loss of a model that treats audited rows like the others, even if its
bulk answers lie, and nearly free of noise if they do not. A significant d is the fault ``non_causal``. Units: nats
inside, bits per UTF-8 byte outside.

Covers: targets seen in attention or state, unnormalised probabilities, state carried between rows. Does not cover: a
leak at so few positions that the random cuts miss it (chance (1 - share) ** audits a split), or a server that
remembers which rows were audited: one process answers both.
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
from sandbox.job import Batches, Evaluation, Job, Score
from sandbox.wire import WireError, receive, send

CHUNK = 32
"""Rows of one bulk question."""
CUTS = 8
"""Different prefix lengths a split, one drawn from each eighth of the row."""
LARGEST = {"cpu": 0.1, "cuda": 0.5}
"""Largest |d| in nats. bf16 kernels answer differently at different shapes, hence more on a GPU."""
MEAN = {"cpu": 1e-3, "cuda": 5e-3}
"""Smallest |mean d| in nats that is ever held against a model."""

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


def score(sock: socket.socket, job: Job, evaluation: Evaluation, batches: Batches, weights: bytes | bytearray,
          on_split: Callable[[int, int], None]) -> tuple[dict[str, Score], str]:
    """(score of each split, complaint about a non-causal model or ""). Raises WireError or JobFault.

    ``on_split(done, all)`` is for screens. The wall limit is the caller's: it kills the server, which ends the wait.
    """
    settings = {"rows": CHUNK, "sequence": batches.sequence, "vocab": batches.vocab, "preset": job.preset,
                "device": view.inner_device(job.device), "threads": job.threads}
    send(sock, b"S", json.dumps(settings).encode())
    send(sock, b"W", memoryview(weights))
    kind, payload = receive(sock, 1 << 16)
    if kind != b"R" or payload:
        raise JobFault("crash", f"the model server sent {kind!r} where it should have said that it is ready")
    server = Server(sock, batches.vocab, batches.sequence)
    sizes = np.load(evaluation.token_bytes, allow_pickle=False).astype(np.float64)
    device = job.device.partition(":")[0]
    scores: dict[str, Score] = {}
    complaints: list[str] = []
    for done, (name, path) in enumerate(evaluation.splits.items()):
        on_split(done, len(evaluation.splits))
        rows, spare = held_out_rows(Path(path), evaluation.rows, batches.sequence)
        if max(rows.max(), spare.max()) >= min(len(sizes), batches.vocab):
            raise ValueError(f"{path} holds token ids beyond the vocabulary")
        scores[name], complaint = score_split(server, rows, spare, evaluation.audit, sizes, device,
                                              random.SystemRandom())
        if complaint:
            complaints.append(f"{name}: {complaint}")
    with contextlib.suppress(WireError):  # all answers are here: how the server ends is of no interest
        send(sock, b"E")
    return scores, "; ".join(complaints)


def held_out_rows(path: Path, most: int, sequence: int) -> tuple[Ids, Ids]:
    """(scored rows, spare rows) of sequence + 1 tokens, not overlapping; the spare ones are for audits.

    At most ``most`` rows, and at most two thirds of the split, are scored: the same in every run, spread evenly over
    the split, since neighbouring rows come from one document (the first 256 rows of 65 files would be eight files).
    """
    tokens = np.memmap(path, dtype="<u2", mode="r")
    whole = len(tokens) // (sequence + 1)
    count = min(most, whole * 2 // 3)
    if count < 2:
        raise ValueError(f"{path.name} has {len(tokens)} tokens, too few for three rows of {sequence + 1}")
    table = np.array(tokens[:whole * (sequence + 1)]).reshape(whole, sequence + 1)
    scored = np.arange(count) * whole // count
    return table[scored], np.delete(table, scored, axis=0)


def score_split(server: Server, rows: Ids, spare: Ids, audit: int, sizes: Nats, device: str,
                chance: random.Random) -> tuple[Score, str]:
    """Audit, then bulk, on one split: the score and a complaint, or "". Raises WireError or JobFault.

    ``sizes``: UTF-8 bytes of each token id. Targets of 0 bytes (special tokens) count neither as nats nor as bytes.
    The audit comes first, so that at that time the process has seen nothing that follows a prefix. It is made on
    ``spare`` rows, which are no part of the score: a model that remembers their prefixes knows nothing of the scored
    rows. In bulk both kinds come in one random order, so that whatever else a model gains from memory it also gains
    at the audited positions, where it shows in the difference and is taken off the score.
    """
    picks = chance.sample(range(len(spare)), min(audit, len(spare)))
    audited = spare[picks]
    where = cut(len(audited), rows.shape[1] - 1, chance)
    prefix = np.concatenate([
        nll(server.logits(audited[picked, :length]), audited[picked, length]) for length, picked in where])
    every = np.concatenate([rows, audited])
    order = np.array(chance.sample(range(len(every)), len(every)))
    answers = np.empty((len(every), rows.shape[1] - 1))
    for begin in range(0, len(every), CHUNK):
        some = order[begin:begin + CHUNK]
        answers[some] = server.bulk(every[some])
    bulk, again = answers[:len(rows)], answers[len(rows):]
    same = np.concatenate([again[picked, length - 1] for length, picked in where])
    weight = sizes[rows[:, 1:]]
    counted = weight > 0
    if not counted.any():
        raise ValueError("no token of the held-out rows has bytes")
    held = np.concatenate([sizes[audited[picked, length]] > 0 for length, picked in where])
    difference = (prefix - same)[held]
    mean, error, largest = _summary(difference)
    total, size = float(bulk[counted].sum()), float(weight.sum())
    per_byte = 1 / (math.log(2) * size)
    result = Score((total + mean * int(counted.sum())) * per_byte, total * per_byte, mean, largest, error)
    return result, _complaint(mean, error, largest, len(difference), device)


def cut(rows: int, sequence: int, chance: random.Random) -> list[tuple[int, list[int]]]:
    """(prefix length, rows) groups: all rows in random order, lengths from 1 to ``sequence`` evenly covered."""
    order = chance.sample(range(rows), rows)
    groups = min(CUTS, sequence, len(order))
    lengths = [1 + chance.randrange(sequence * group // groups, sequence * (group + 1) // groups)
               for group in range(groups)]
    chance.shuffle(lengths)
    return [(length, order[group::groups]) for group, length in enumerate(lengths)]


def nll(logits: Nats, targets: Ids) -> Nats:
    """Own log-softmax in float64: n x vocab logits, n targets -> n NLLs in nats."""
    top = logits.max(axis=1, keepdims=True)
    normaliser = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    answer: Nats = normaliser - logits[np.arange(len(targets)), targets]
    return answer


def _summary(difference: Nats) -> tuple[float, float, float]:
    """(mean, standard error of the mean, largest absolute value) of d; zeros when nothing was audited."""
    if len(difference) < 2:
        return 0.0, 0.0, float(np.abs(difference).max(initial=0.0))
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return float(difference.mean()), error, float(np.abs(difference).max())


def _complaint(mean: float, error: float, largest: float, count: int, device: str) -> str:
    """The facts when prefix and bulk answers differ by more than arithmetic does; most such models are innocent."""
    if largest <= LARGEST[device] and abs(mean) <= max(4 * error, MEAN[device]):
        return ""
    return (f"predictions change when later tokens are hidden: over {count} positions by {mean:+.4f} nats on average "
            f"(SE {error:.4f}), at most {largest:.3f}; the model is not causal or not deterministic")
