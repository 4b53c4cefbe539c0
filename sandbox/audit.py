"""The audit: does a model predict as well when it is not shown what follows?

Bulk scoring (sandbox/score.py) shows a model server whole rows. The audit asks *another process* with the same weights
for the next token after prefixes of those rows, and computes the log-softmax here. With d = NLL_prefix - NLL_bulk at
the same positions,

    corrected = mean(bulk) + mean(d),   standard error SE(d)

is a control variate: unbiased for the honest loss even if the bulk answers lie, since these were given before the
positions were drawn and by a process that cannot tell which they would be; and nearly free of noise if they do not.

    uniform   one prefix a row, its length drawn evenly: gives ``corrected``, and finds what leaks often
    targeted  the positions where the model beats the incumbent's run most, in a further process: finds what leaks
              seldom. A leak that is worth anything gains most where it leaks

A model whose answers differ is reported as ``non_causal``: it looks ahead, carries state from row to row or from
question to question, depends on the batch, or is not deterministic. That is a fact and no accusation; most such models
are innocent. Units: nats.

Covers: targets seen in attention or state, unnormalised probabilities, state carried between rows, servers that tell
an audit by its shape. Does not cover: gains from rows of the same document in one process, as far as they are the same
in both; a leak below the thresholds at every position.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from sandbox.job import Evaluation, Job, Score, bulk_file
from sandbox.score import HeldOut, Ids, Nats, Server

CUTS = 8
"""Different prefix lengths of a uniform audit, one drawn from each eighth of the row."""
TARGETED = 64
"""Positions of a targeted audit."""
LARGEST = {"cpu": 0.1, "cuda": 0.5}
"""Largest |d| in nats. bf16 kernels answer differently at different shapes, hence more on a GPU."""
MEAN = {"cpu": 1e-3, "cuda": 5e-3}
"""Smallest |mean d| in nats that is ever held against a model."""

T = TypeVar("T")
Spot = tuple[int, int]
"""(row, prefix length): the target is the token at that place of the row."""


class Ask(Protocol):
    """Puts a question to a model server in a fresh box called ``name``."""

    def __call__(self, name: str, question: Callable[[Server], T], /) -> T: ...


def audit(job: Job, evaluation: Evaluation, texts: dict[str, HeldOut], ask: Ask) -> tuple[dict[str, Score], str]:
    """Corrected score of each split, and a complaint about a model that is not causal, or "".

    Raises WireError or JobFault as ``ask`` does, ValueError or OSError when the audited run's answers do not fit.
    """
    answers = _answers(job.bulk, texts)

    def uniformly(server: Server) -> tuple[dict[str, Score], str]:
        found, complaints = {}, []
        for name, text in texts.items():
            found[name], complaint = uniform(server, text, answers[name], evaluation, job.device,
                                             random.SystemRandom())
            complaints += [f"{name}: {complaint}"] if complaint else []
        server.end()
        return found, "; ".join(complaints)

    def where_it_gains(server: Server) -> tuple[dict[str, float], str]:
        found = targeted(server, texts, answers, _answers(job.reference, texts), evaluation, job.device)
        server.end()
        return found

    scores, complaint = ask("audit", uniformly)
    if job.reference and not complaint:
        largest, complaint = ask("targeted", where_it_gains)
        scores = {name: replace(found, targeted_max=largest[name]) for name, found in scores.items()}
    return scores, complaint


def uniform(server: Server, text: HeldOut, answers: Nats, evaluation: Evaluation, device: str,
            chance: random.Random) -> tuple[Score, str]:
    """The corrected score of one split, and a complaint or "". Raises WireError or JobFault.

    ``answers``: the bulk NLLs of the audited run [rows, sequence].
    """
    spots = cut(min(evaluation.audit, len(text.rows)), len(text.rows), text.rows.shape[1] - 1, chance)
    d = _differences(server, text, answers, spots)
    total, count = float(answers[text.counted].sum()), int(text.counted.sum())
    mean = float(d.mean()) if len(d) else 0.0
    error = float(d.std(ddof=1)) / math.sqrt(len(d)) if len(d) > 1 else 0.0
    largest = float(np.abs(d).max(initial=0.0))
    result = Score(text.per_byte(total + mean * count), text.per_byte(total), mean, largest, error,
                   error=text.per_byte(error * count))
    most, least = thresholds(evaluation, device)
    if largest <= most and abs(mean) <= max(4 * error, least):
        return result, ""
    return result, (f"predictions change when later tokens are hidden: over {len(d)} positions by {mean:+.4f} nats on "
                    f"average (SE {error:.4f}), at most {largest:.3f}; the model is not causal or not deterministic")


def targeted(server: Server, texts: dict[str, HeldOut], answers: dict[str, Nats], incumbent: dict[str, Nats],
             evaluation: Evaluation, device: str) -> tuple[dict[str, float], str]:
    """Largest |d| of each split where the model beats the incumbent most, and a complaint or "".

    A position's target is shown as soon as a longer prefix of its row is asked, so all questions of the process go in
    the order of their length: none is asked of a process that has seen its answer. Raises WireError or JobFault.
    """
    found: dict[str, float] = {}
    complaints: list[str] = []
    for name, text in texts.items():
        spots = hot_spots(incumbent[name] - answers[name], text, min(TARGETED, evaluation.audit))
        d = _differences(server, text, answers[name], spots)
        found[name] = float(np.abs(d).max(initial=0.0))
        most = thresholds(evaluation, device)[0]
        if found[name] > most:
            count = int((np.abs(d) > most).sum())
            complaints.append(f"{name}: predictions change when later tokens are hidden: at {count} of the {len(d)} "
                              f"positions where it gains most, by up to {found[name]:.3f} nats")
    return found, "; ".join(complaints)


def thresholds(evaluation: Evaluation, device: str) -> tuple[float, float]:
    """(largest |d|, smallest mean that counts) in nats: the device's, or what the caller allows if that is wider."""
    kind = device.partition(":")[0]
    return max(evaluation.largest, LARGEST[kind]), max(evaluation.mean, MEAN[kind])


def cut(count: int, rows: int, sequence: int, chance: random.Random) -> list[Spot]:
    """``count`` rows with one prefix length each, from 1 to ``sequence``, evenly covered."""
    order = chance.sample(range(rows), count)
    groups = min(CUTS, sequence, count)
    lengths = [1 + chance.randrange(sequence * group // groups, sequence * (group + 1) // groups)
               for group in range(groups)]
    return [(row, lengths[number % groups]) for number, row in enumerate(order)]


def hot_spots(gain: Nats, text: HeldOut, count: int) -> list[Spot]:
    """The ``count`` counted positions of the largest ``gain`` [rows, sequence] in nats."""
    ranked = np.argsort(np.where(text.counted, gain, -np.inf), axis=None)[::-1][:count]
    rows, places = np.unravel_index(ranked, gain.shape)
    return [(int(row), int(place) + 1) for row, place in zip(rows, places, strict=True) if text.counted[row, place]]


def nll(logits: Nats, targets: Ids) -> Nats:
    """Own log-softmax in float64: n x vocab logits, n targets -> n NLLs in nats."""
    top = logits.max(axis=1, keepdims=True)
    normaliser = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    answer: Nats = normaliser - logits[np.arange(len(targets)), targets]
    return answer


def _differences(server: Server, text: HeldOut, answers: Nats, spots: Sequence[Spot]) -> Nats:
    """d at each counted spot. Shortest prefixes first; those of one length go in one question."""
    found: list[Nats] = []
    for length in sorted({length for _, length in spots}):
        rows = np.array([row for row, at in spots if at == length])
        targets, held = text.rows[rows, length], text.counted[rows, length - 1]
        prefix = nll(server.logits(text.rows[rows, :length]), targets)
        found.append((prefix - answers[rows, length - 1])[held])
    return np.concatenate(found) if found else np.zeros(0)


def _answers(folder: str, texts: dict[str, HeldOut]) -> dict[str, Nats]:
    """The kept bulk answers of a run. Raises ValueError when they are of other rows."""
    found: dict[str, Nats] = {}
    for name, text in texts.items():
        found[name] = np.load(bulk_file(Path(folder), name), allow_pickle=False).astype(np.float64)
        if found[name].shape != text.weight.shape:
            raise ValueError(f"{folder} holds answers on {found[name].shape} tokens of {name}, not {text.weight.shape}")
    return found
