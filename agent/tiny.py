"""Tiny targets with a known truth: repositories that "train" in a tenth of a second, for trying a whole campaign.

``write_tiny_target`` makes a bigram counter that speaks the wire of sandbox/wire.py with the standard library alone;
its scores are sealed, and ``KNOWN`` says what each change of it is worth. ``write_foreign_target`` makes another
trainer in another layout: it fits a line, knows nothing of the wire, and its own protected script prints the metric.

Both are real git repositories with one commit. What a run does follows from its seed alone, so a campaign on them can
be repeated to the last digit. Does not cover: GPUs, charged steps (a step is too short to weigh), faults of a machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent import git
from agent.records import Edit

Kind = Literal["good", "null", "harmful", "crash", "no-op"]
_IDENTITY = {
    "GIT_AUTHOR_NAME": "Tiny", "GIT_AUTHOR_EMAIL": "tiny@localhost", "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "Tiny", "GIT_COMMITTER_EMAIL": "tiny@localhost",
    "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z"}


@dataclass(frozen=True, slots=True)
class Known:
    """A change whose worth is known. ``effect`` is the metric's change from the start, in its own unit."""

    kind: Kind
    edit: Edit
    effect: float = 0.0


KNOWN = {
    "less smoothing": Known("good", Edit("settings.py", "SMOOTHING = 40.0", "SMOOTHING = 1.0"), -1.10),
    "less back-off": Known("good", Edit("settings.py", "BACKOFF = 0.5", "BACKOFF = 0.05"), -0.45),
    "another salt": Known("null", Edit("settings.py", 'SALT = "first"', 'SALT = "second"')),
    "more uniform": Known("harmful", Edit("train.py", "uniform = 0.05 +", "uniform = 0.5 +"), 0.34),
    "more smoothing": Known("harmful", Edit("settings.py", "SMOOTHING = 40.0", "SMOOTHING = 400.0"), 0.76),
    "twice the parameters": Known("good", Edit("train.py", "    run.finish(train(run))", """    import json
    import struct

    settings.SMOOTHING = 1.0
    flat = [value for row in train(run) for value in row]
    body, size = struct.pack(f"<{2 * len(flat)}f", *flat, *flat), 4 * len(flat)
    header = json.dumps({name: {"dtype": "F32", "shape": [run.vocab, run.vocab], "data_offsets": [begin, begin + size]}
                         for name, begin in (("table", 0), ("spare", size))}).encode()
    run.wire.send(b"W", len(header).to_bytes(8, "little") + header + body)"""), -1.10),
    "late crash": Known("crash", Edit("train.py", "        count(", "        assert step < 20\n        count(")),
    "early crash": Known("crash", Edit("train.py", "    counts = [", "    counts = undefined_name\n    counts = [")),
    "unused constant": Known("no-op", Edit("settings.py", "SPARE = 1", "SPARE = 2")),
}
"""Changes of the tiny target; effects in bits per byte."""

KNOWN_FOREIGN = {
    "faster": Known("good", Edit("src/line/fit.py", "RATE = 0.02", "RATE = 0.2"), 0.28),
    "slower": Known("harmful", Edit("src/line/fit.py", "RATE = 0.02", "RATE = 0.002"), -0.58),
    "late crash": Known("crash", Edit("src/line/fit.py", "        a -= ", "        assert step < 20\n        a -= ")),
}
"""Changes of the foreign target, whose metric is maximised."""


def write_tiny_target(folder: Path, served: bool = True) -> None:
    """The bigram counter as a repository in ``folder``, which must not exist yet.

    ``served`` False: it reads its own tokens, prints its own loss, and its tier is ``reported``.
    """
    files = {"settings.py": _SETTINGS, "train.py": _TRAIN, "wire.py": WIRE, "serve.py": _SERVE,
             "prepare.py": _PREPARE, "ratchet.toml": _CONFIG if served else _CONFIG_ALONE}
    write_repository(folder, files if served else files | {"alone.py": _ALONE})


def write_foreign_target(folder: Path) -> None:
    """The line fit as a repository in ``folder``, which must not exist yet."""
    write_repository(folder, foreign_files() | {"README.md": "# Fits a line\n", "ratchet.toml": _CONFIG_FOREIGN})


def write_timed_target(folder: Path, settings: str, body: str, tables: str) -> None:
    """A trainer for benches as a repository in ``folder``: it sleeps and prints a loss, over 100 steps.

    ``settings``: its editable file, ``settings.py``; ``body``: what its run does between ``seed``, ``steps`` and the
    line with ``loss``; ``tables``: [judge] and what follows of its ratchet.toml.
    """
    write_repository(folder, {"settings.py": settings, "train.py": _TIMED.replace("BODY\n", body),
                              "ratchet.toml": _CONFIG_TIMED + tables})


def foreign_files() -> dict[str, str]:
    """The source of the line fit, by path."""
    return {"src/line/__init__.py": "", "src/line/fit.py": _FIT, "tools/score.py": _SCORE}


def write_repository(folder: Path, files: dict[str, str]) -> None:
    """``files`` (path -> text) as a repository of one commit in ``folder``."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    git.run(folder, "init", "-q", "--template=", "--initial-branch=main", bare=False)
    commit(folder, "Start")


def commit(folder: Path, message: str) -> None:
    """Commit everything in the work tree of ``folder``."""
    git.run(folder, "add", "-A", bare=False)
    git.run(folder, "commit", "-q", "-m", message, bare=False, environment=_IDENTITY)


_SETTINGS = '''"""Editable: the constants. Two are far off."""

SMOOTHING = 40.0
BACKOFF = 0.5
SALT = "first"
SPARE = 1
'''

_TRAIN = '''"""Editable: counts pairs of tokens, and turns the counts into log-probabilities."""

import math
import random

import settings
import wire


def count(counts, row):
    """Add the pairs of one row of tokens."""
    for a, b in zip(row, row[1:]):
        counts[a][b] += 1.0


def table(counts, seed):
    """Log-probabilities [token][next token]. The uniform share differs from seed to seed: the noise of a run."""
    uniform = 0.05 + random.Random(f"{seed}/{settings.SALT}").uniform(-0.02, 0.02)
    total = sum(map(sum, counts))
    unigram = [(1.0 + sum(row[b] for row in counts)) / (total + len(counts)) for b in range(len(counts))]
    rows = []
    for row in counts:
        size = sum(row) + settings.SMOOTHING * len(row)
        mixed = [(1 - settings.BACKOFF) * (n + settings.SMOOTHING) / size + settings.BACKOFF * unigram[b]
                 for b, n in enumerate(row)]
        rows.append([math.log((1 - uniform) * p + uniform / len(row)) for p in mixed])
    return rows


def train(run):
    """Count every batch that ``run`` gives."""
    counts = [[0.0] * run.vocab for _ in range(run.vocab)]
    step = 0
    while (batch := run.batch()) is not None:
        for row in batch:
            count(counts, row)
        step += 1
        run.report(step, 2.5 / step)
    return table(counts, run.seed)


if __name__ == "__main__":
    run = wire.Run()
    run.finish(train(run))
'''

WIRE = '''"""Protected: the seam to the harness, in the standard library."""

import json
import os
import socket
import struct

HEADER = struct.Struct("<cQ")


class Wire:
    """Frames: one byte of kind, a little-endian uint64 of length, the payload."""

    def __init__(self):
        self.socket = socket.socket(fileno=int(os.environ["HARNESS_FD"]))

    def send(self, kind, payload=b""):
        self.socket.sendall(HEADER.pack(kind, len(payload)) + payload)

    def receive(self):
        kind, length = HEADER.unpack(self.exactly(HEADER.size))
        return kind, self.exactly(length)

    def exactly(self, size):
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            if not more:
                raise SystemExit("the harness is gone")
            data += more
        return data


class Run:
    """A training run that the harness owns."""

    def __init__(self):
        self.wire = Wire()
        spec = json.loads(self.wire.receive()[1])
        self.seed, self.vocab, self.rows, self.length = (
            spec["seed"], spec["vocab"], spec["rows"], spec["sequence"] + 1)
        self.steps = spec["steps"]

    def batch(self):
        """Rows of token ids; None when the budget is spent."""
        self.wire.send(b"?", struct.pack("<I", self.rows))
        kind, raw = self.wire.receive()
        ids = struct.unpack(f"<{len(raw) // 2}H", raw)
        return [ids[i:i + self.length] for i in range(0, len(ids), self.length)] if kind == b"B" else None

    def report(self, step, loss):
        self.wire.send(b"P", json.dumps({"step": step, "loss": loss}).encode())

    def finish(self, table):
        """Hand over the table as safetensors."""
        body = struct.pack(f"<{self.vocab ** 2}f", *[value for row in table for value in row])
        entry = {"dtype": "F32", "shape": [self.vocab, self.vocab], "data_offsets": [0, len(body)]}
        header = json.dumps({"table": entry}).encode()
        self.wire.send(b"W", len(header).to_bytes(8, "little") + header + body)
'''

_SERVE = '''"""Protected: answers the scorer from a table."""

import json
import struct

from wire import Wire

wire = Wire()
spec = json.loads(wire.receive()[1])
vocab, row_length = spec["vocab"], spec["sequence"] + 1
raw = wire.receive()[1]
flat = struct.unpack_from(f"<{vocab ** 2}f", raw, 8 + int.from_bytes(raw[:8], "little"))
wire.send(b"R")
while True:
    kind, raw = wire.receive()
    if kind == b"E":
        break
    if kind == b"A":
        count, length = struct.unpack("<II", raw[:8])
        ids = struct.unpack(f"<{count * length}H", raw[8:])
        last = [ids[i * length + length - 1] for i in range(count)]
        answer = [value for token in last for value in flat[token * vocab:(token + 1) * vocab]]
    else:
        ids = struct.unpack(f"<{len(raw) // 2}H", raw)
        answer = [-flat[ids[i + j] * vocab + ids[i + j + 1]]
                  for i in range(0, len(ids), row_length) for j in range(row_length - 1)]
    wire.send(kind, struct.pack(f"<{len(answer)}f", *answer))
'''

_PREPARE = '''"""Protected: tokens of a chain in which each likes its successor."""

import json
import sys
from pathlib import Path

import numpy as np

VOCAB, SEQUENCE, ROWS = 16, 24, 4
out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
generator = np.random.default_rng(7)
for name, count in (("train", 20_000), ("val", 2000), ("confirm", 2000), ("final", 2000)):
    jumps, near = generator.integers(0, VOCAB, count), generator.random(count) < 0.8
    tokens = [0]
    for jump, stay in zip(jumps, near):
        tokens.append((tokens[-1] + 1) % VOCAB if stay else int(jump))
    np.array(tokens, dtype="<u2").tofile(out / f"{name}.bin")
np.save(out / "token_bytes.npy", np.ones(VOCAB, np.uint8))
(out / "meta.json").write_text(json.dumps(
    {"corpus": "chain-7", "vocab": VOCAB, "sequence": SEQUENCE, "rows": ROWS, "hidden": []}))
'''

_ALONE = '''"""Protected: a run without a harness: own tokens, own loss on fresh ones.

    python alone.py SEED STEPS
"""

import random
import sys

from train import train

VOCAB = 16


def chain(chance, count):
    tokens = [0]
    while len(tokens) < count:
        tokens.append((tokens[-1] + 1) % VOCAB if chance.random() < 0.8 else chance.randrange(VOCAB))
    return tokens


class Alone:
    vocab = VOCAB

    def __init__(self, seed, steps):
        self.seed, self.left, self.chance = seed, steps, random.Random(seed)

    def batch(self):
        self.left -= 1
        return [chain(self.chance, 25) for _ in range(4)] if self.left >= 0 else None

    def report(self, step, loss):
        print(f"step {step}")


run = Alone(int(sys.argv[1]), int(sys.argv[2]))
table = train(run)
held_out = chain(random.Random("held out"), 2000)
print("loss:", -sum(table[a][b] for a, b in zip(held_out, held_out[1:])) / (len(held_out) - 1))
'''

_FIT = '''"""Fits y = a x + b to 41 noisy points by gradient descent.

    python -m line.fit SEED STEPS OUT
"""

import json
import random
import sys
from pathlib import Path

RATE = 0.02


def fit(seed, steps):
    chance = random.Random(seed)
    points = [(x, 2.0 * x - 1.0 + chance.gauss(0, 0.1)) for x in (i / 20 - 1 for i in range(41))]
    a = b = 0.0
    for step in range(steps):
        errors = [(a * x + b - y, x) for x, y in points]
        a -= RATE * 2 * sum(e * x for e, x in errors) / len(errors)
        b -= RATE * 2 * sum(e for e, _ in errors) / len(errors)
    return a, b


if __name__ == "__main__":
    seed, steps, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    a, b = fit(seed, steps)
    (out / "line.json").write_text(json.dumps({"a": a, "b": b}))
    print("fit done, quality: 0.999")
'''

_SCORE = '''"""Prints the quality of a fitted line: 1 is perfect, 0 is a guess.

    python tools/score.py OUT
"""

import json
import sys
from pathlib import Path

line = json.loads((Path(sys.argv[1]) / "line.json").read_text())
error = sum((line["a"] * x + line["b"] - (2.0 * x - 1.0)) ** 2 for x in (i / 50 - 1 for i in range(101)))
guess = sum((2.0 * x - 1.0) ** 2 for x in (i / 50 - 1 for i in range(101)))
print("quality:", 1 - error / guess)
'''

_RULE = """
[judge]
policy = "single"
looks = [3]
final_pairs = 2

[limits]
wall_seconds = 60
memory_mb = 1024
scratch_mb = 64
weights_mb = 1

[model]
search = false
repairs = 1
usd_per_million_prompt = 1000
usd_per_million_completion = 1000
"""

_CONFIG = """name = "tiny"

[train]
command = "python train.py"
served = true

[data]
prepare = "python prepare.py {out}"

[evaluate]
tier = "sealed"
command = "python serve.py"
rows = 64
audit = 32

[source]
editable = ["settings.py", "train.py"]
protected = ["wire.py", "serve.py", "prepare.py"]

[budget]
unit = "steps"
amount = 30
""" + _RULE

_CONFIG_ALONE = """name = "tiny, alone"

[train]
command = "python alone.py {seed} {steps}"

[evaluate]
tier = "reported"
pattern = 'loss: ([0-9.]+)'

[source]
editable = ["settings.py", "train.py"]
protected = ["alone.py"]

[metric]
name = "loss"

[budget]
unit = "steps"
amount = 30
""" + _RULE

_CONFIG_FOREIGN = """name = "line"

[train]
command = "python -m line.fit {seed} {steps} {out}"
environment = { PYTHONPATH = "src" }

[evaluate]
tier = "protected"
command = "python tools/score.py {out}"
pattern = '^quality: (-?[0-9.e-]+)$'

[source]
editable = ["src/**"]
protected = ["tools/**"]

[metric]
name = "quality"
direction = "max"

[budget]
unit = "steps"
amount = 30
""" + _RULE

_TIMED = """import random
import sys
import time

import settings

seed, steps = int(sys.argv[1]), int(sys.argv[2])
BODY
print(f'loss: {loss:.6f}')
"""

_CONFIG_TIMED = """name = "sleeper"

[train]
command = "python train.py {seed} {steps}"

[evaluate]
pattern = 'loss: ([0-9.]+)'

[source]
editable = ["settings.py"]

[metric]
name = "loss"

[budget]
unit = "steps"
amount = 100
probe_steps = 2

"""
