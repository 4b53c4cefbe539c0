"""The trusted scorer against honest and cheating model servers."""

from __future__ import annotations

import random
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from sandbox_world import ROWS, SEQUENCE, SERVE, World

from sandbox.faults import JobFault
from sandbox.score import Server, cut, nll, score_split
from sandbox.serve_batches import Rows
from sandbox.wire import receive, send

STEPS = 6


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def served(world: World) -> np.ndarray:
    rows = Rows(world.folder / "train.bin", SEQUENCE + 1, 3).take(STEPS * ROWS)
    return np.frombuffer(rows, "<u2").reshape(-1, SEQUENCE + 1)


def test_honest_score_equals_the_definition(world: World) -> None:
    result = world.run(world.job(world.source(), steps=STEPS, evaluation=world.sealed()))
    assert (result.fault, result.tier) == (None, "sealed")
    for split, score in result.scores.items():
        assert score.value == pytest.approx(world.expected_bpb(served(world), split, 64), abs=1e-5)
        assert score.audit_max is not None and score.audit_max < 1e-5
    assert list(result.scores) == ["val", "confirm"] and result.evaluate_seconds > 0


CHEATS = {
    "peek": "lambda table, row: [0.01 for value in row[1:]]",
    "weak": "lambda table, row: [max(value - 0.02, 0.0) for value in honest_bulk(table, row)]",
    "where_likely": "lambda table, row: [value * (0.2 if value < 2 else 1) for value in honest_bulk(table, row)]",
    "next_token": "lambda table, row: [value * (0.3 if later == (b + 1) % VOCAB else 1) for value, b, later in "
                  "zip(honest_bulk(table, row), row[1:], row[2:] + (0,))]",
}


@pytest.mark.parametrize("name", list(CHEATS))
def test_non_causal_server_is_flagged_and_gains_nothing(world: World, name: str) -> None:
    serve = SERVE.replace("honest_bulk)", CHEATS[name] + ")")
    result = world.run(world.job(world.source(serve=serve), steps=STEPS, evaluation=world.sealed()))
    assert result.fault == "non_causal" and "later tokens are hidden" in result.message
    honest = world.expected_bpb(served(world), "val", 64)
    score = result.scores["val"]
    assert score.bulk is not None and score.audit_se is not None
    assert abs(score.value - honest) < abs(score.bulk - honest) + 1e-9
    assert score.value == pytest.approx(honest, abs=6 * score.audit_se + 1e-3)


def test_unnormalised_logits_gain_nothing(world: World) -> None:
    serve = SERVE.replace("serve(honest_logits", "serve(lambda table, prefix: [v + 5 for v in table[prefix[-1]]]")
    result = world.run(world.job(world.source(serve=serve), steps=STEPS, evaluation=world.sealed()))
    assert result.fault is None
    assert result.scores["val"].value == pytest.approx(world.expected_bpb(served(world), "val", 64), abs=1e-5)


@pytest.mark.parametrize(("bulk", "fault"), [
    ("lambda table, row: [math.nan] * (len(row) - 1)", "nan"),
    ("lambda table, row: [1.0]", "crash"),
    ("lambda table, row: [-5.0] * (len(row) - 1)", "crash"),
    ("lambda table, row: 1 // 0", "crash"),
    ("lambda table, row: time.sleep(60)", "timeout"),
])
def test_bad_answers(world: World, bulk: str, fault: str) -> None:
    evaluation = world.sealed()
    from dataclasses import replace
    result = world.run(world.job(world.source(serve=SERVE.replace("honest_bulk)", bulk + ")")), steps=2,
                                 evaluation=replace(evaluation, wall_seconds=2.0)))
    assert (result.fault, result.scores) == (fault, {})


def test_held_out_text_in_an_exception_does_not_reach_the_result(world: World) -> None:
    serve = SERVE.replace("honest_bulk)", "lambda table, row: (_ for _ in ()).throw(ValueError(f'text {row}')))")
    result = world.run(world.job(world.source(serve=serve), steps=2, evaluation=world.sealed()))
    assert result.fault == "crash" and "ValueError" in result.message
    assert "text" not in result.message and "text (" not in result.log_tail


def test_log_softmax_is_exact_and_safe_from_overflow() -> None:
    logits = np.array([[1000.0, 1000.0, -1000.0], [0.0, np.log(3.0), -np.inf]])[:, :2]
    assert nll(logits, np.array([0, 1], dtype=np.uint16)) == pytest.approx([np.log(2), np.log(4 / 3)])


def test_cuts_use_distinct_rows_and_cover_all_lengths() -> None:
    seen = set()
    for seed in range(200):
        groups = cut(48, SEQUENCE, random.Random(seed))
        rows = [row for _, picked in groups for row in picked]
        assert len(rows) == len(set(rows)) == 48 and len(groups) == 8
        seen |= {length for length, _ in groups}
    assert seen == set(range(1, SEQUENCE + 1))
    assert [len(picked) for _, picked in cut(3, 2, random.Random(0))] == [2, 1]


def test_targets_without_bytes_count_for_nothing() -> None:
    """A uniform model over 4 ids costs 2 bits a token; ids 0 have no bytes and drop out of both sums."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            while True:
                kind, payload = receive(theirs, 1 << 20)
                if kind == b"E":
                    return
                count = int.from_bytes(payload[:4], "little") * 4 if kind == b"A" else len(payload) // 18 * 8
                values = np.zeros(count, "<f4") if kind == b"A" else np.full(count, np.log(4), "<f4")
                send(theirs, kind, values.tobytes())

    thread = threading.Thread(target=serve)
    thread.start()
    rows, spare = np.random.default_rng(0).integers(0, 4, (2, 40, 9)).astype(np.uint16)
    sizes = np.array([0.0, 1.0, 2.0, 4.0])
    with ours:
        score, complaint = score_split(Server(ours, 4, 8), rows, spare, 16, sizes, "cpu", random.Random(1))
        send(ours, b"E")
        thread.join()
    weight = sizes[rows[:, 1:]]
    assert score.value == pytest.approx(2 * (weight > 0).sum() / weight.sum(), rel=1e-6) and complaint == ""


def test_wrong_frame_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(theirs, b"L", b"\0" * 12)
        with pytest.raises(JobFault, match="16 was due"):
            Server(ours, 4, 4).bulk(np.zeros((1, 5), np.uint16))
