"""The audit against honest models and against every way of cheating a scorer that shows its targets."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from sandbox_world import ROWS, SEQUENCE, SERVE, World

from sandbox.audit import cut, hot_spots, nll
from sandbox.score import HeldOut
from sandbox.serve_batches import Rows

STEPS = 6


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


CHEATS = {
    "peek": "lambda table, row: [0.01 for value in row[1:]]",
    "weak": "lambda table, row: [max(value - 0.02, 0.0) for value in honest_bulk(table, row)]",
    "where_likely": "lambda table, row: [value * (0.2 if value < 2 else 1) for value in honest_bulk(table, row)]",
    "next_token": "lambda table, row: [value * (0.3 if later == (b + 1) % VOCAB else 1) for value, b, later in "
                  "zip(honest_bulk(table, row), row[1:], row[2:] + (0,))]",
    "state": "lambda table, row: [value * (0.5 if seen(a, b) else 1) for value, a, b in "
             "zip(honest_bulk(table, row), row, row[1:])]",
}
"""Bulk answers of servers whose answers to prefixes are honest: they can tell an audit by its shape."""
SEEN = """
rows_so_far = set()
def seen(a, b):
    if (a, b) in rows_so_far:
        return True
    rows_so_far.add((a, b))
    return False
"""


@pytest.mark.parametrize("name", list(CHEATS))
def test_what_bulk_answers_gain_by_seeing_the_text_is_flagged_and_taken_off(world: World, name: str) -> None:
    serve = SERVE.replace("honest_bulk)", CHEATS[name] + ")").replace("serve(honest", SEEN + "serve(honest")
    result = world.audited(world.source(serve=serve), STEPS)
    assert result.fault == "non_causal" and "later tokens are hidden" in result.message
    rows = np.frombuffer(Rows(world.folder / "train.bin", SEQUENCE + 1, 3).take(STEPS * ROWS), "<u2")
    honest = world.expected_bpb(rows.reshape(-1, SEQUENCE + 1), "val", 64)
    score = result.scores["val"]
    assert score.bulk is not None and score.error is not None and score.bulk < honest - 0.01
    assert abs(score.value - honest) < abs(score.bulk - honest)
    assert score.value == pytest.approx(honest, abs=6 * score.error + 1e-3)


def test_a_leak_too_sparse_for_chance_is_found_where_it_gains(world: World) -> None:
    """At the one position in a hundred where it is worth most: a draw of 48 prefixes misses that more often than not,
    the positions where it beats the incumbent most never do."""
    source = world.source()
    world.run(world.job(source, steps=STEPS, evaluation=world.sealed()))
    reference = np.load(world.last / "bulk-val.npy")
    dear = float(np.quantile(reference, 0.99))
    sparse = f"lambda table, row: [0.0 if value > {dear} else value for value in honest_bulk(table, row)]"
    result = world.audited(world.source(serve=SERVE.replace("honest_bulk)", sparse + ")")), STEPS, world.last)
    gains = reference - np.load(world.trained / "bulk-val.npy")
    assert 0 < (gains > 0.1).mean() <= 0.01
    assert result.fault == "non_causal"


def test_a_server_that_is_honest_on_the_rows_it_was_audited_on_gains_nothing(world: World) -> None:
    """Audit and bulk go to different processes, so a memory of the one is worth nothing in the other."""
    serve = SERVE.replace("serve(honest_logits, honest_bulk)", """
asked = set()
def logits(table, prefix):
    asked.add(prefix[:4])
    return honest_logits(table, prefix)
def bulk(table, row):
    return honest_bulk(table, row) if row[:4] in asked else [0.01] * (len(row) - 1)
serve(logits, bulk)
""")
    assert world.audited(world.source(serve=serve), STEPS).fault == "non_causal"


def test_the_log_of_an_audit_is_not_quoted(world: World) -> None:
    tell = "lambda table, prefix: (_ for _ in ()).throw(ValueError(f'text {prefix}')),"
    serve = SERVE.replace("honest_logits,", tell)
    result = world.audited(world.source(serve=serve), 2)
    assert result.fault == "crash" and "ValueError" in result.message
    assert "text" not in result.message and "text (" not in result.log_tail


def test_log_softmax_is_exact_and_safe_from_overflow() -> None:
    logits = np.array([[1000.0, 1000.0, -1000.0], [0.0, np.log(3.0), -np.inf]])[:, :2]
    assert nll(logits, np.array([0, 1], dtype=np.uint16)) == pytest.approx([np.log(2), np.log(4 / 3)])


def test_cuts_use_distinct_rows_and_cover_all_lengths() -> None:
    seen = set()
    for seed in range(200):
        spots = cut(48, 64, SEQUENCE, random.Random(seed))
        assert len({row for row, _ in spots}) == 48 and all(row < 64 for row, _ in spots)
        lengths = [length for _, length in spots]
        assert {lengths.count(length) for length in lengths} == {6}
        seen |= set(lengths)
    assert seen == set(range(1, SEQUENCE + 1))
    assert sorted(length for _, length in cut(3, 3, 2, random.Random(0))) in ([1, 1, 2], [1, 2, 2])


def test_hot_spots_are_the_largest_gains_that_count() -> None:
    gain = np.array([[0.0, 3.0, -1.0], [5.0, 2.0, 4.0]])
    rows = np.arange(8, dtype=np.uint16).reshape(2, 4)
    weight = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    assert hot_spots(gain, HeldOut(rows, weight), 3) == [(1, 3), (0, 2), (1, 2)]
