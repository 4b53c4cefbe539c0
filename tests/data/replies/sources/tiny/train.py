"""Editable: counts pairs of tokens, and turns the counts into log-probabilities."""

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
