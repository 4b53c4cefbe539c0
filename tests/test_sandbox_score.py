"""The trusted scorer against honest and cheating model servers."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from sandbox_world import ROWS, SEQUENCE, SERVE, World

from sandbox.faults import JobFault
from sandbox.score import HeldOut, Server, score
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
    for split, found in result.scores.items():
        assert found.value == pytest.approx(world.expected_bpb(served(world), split, 64), abs=1e-5)
        assert found.audit_mean is None
        assert np.load(world.last / f"bulk-{split}.npy").shape == (64, SEQUENCE)
    assert list(result.scores) == ["val", "confirm"] and result.evaluate_seconds > 0


def test_an_audit_of_an_honest_model_changes_nothing(world: World) -> None:
    source = world.source()
    world.run(world.job(source, steps=STEPS - 2, evaluation=world.sealed()))  # a poorer model, to compare with
    result = world.audited(source, STEPS, reference=world.last)
    assert (result.fault, result.tier, list(result.scores)) == (None, "sealed", ["val", "confirm"])
    assert world.scored is not None and result.weights_sha256 == world.scored.weights_sha256
    for split, found in result.scores.items():
        assert found.value == pytest.approx(world.scored.scores[split].value, abs=1e-6)
        assert found.audit_max is not None and found.audit_max < 1e-5
        assert found.targeted_max is not None and found.targeted_max < 1e-5


def test_unnormalised_logits_gain_nothing(world: World) -> None:
    serve = SERVE.replace("serve(honest_logits", "serve(lambda table, prefix: [v + 5 for v in table[prefix[-1]]]")
    result = world.audited(world.source(serve=serve), STEPS)
    assert result.fault is None
    assert result.scores["val"].value == pytest.approx(world.expected_bpb(served(world), "val", 64), abs=1e-5)


def test_an_audit_needs_the_answers_that_it_compares_with(world: World) -> None:
    source = world.source()
    world.audited(source, STEPS)
    job = world.job(source, steps=STEPS, evaluation=world.sealed(), kind="audit", bulk=str(world.folder),
                    weights=str(world.folder / "none"))
    result = world.run(job)
    assert result.fault == "infra" and "FileNotFoundError" in result.message


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


def test_targets_without_bytes_count_for_nothing(world: World) -> None:
    """A uniform model over 4 ids costs 2 bits a token; ids 0 have no bytes and drop out of both sums."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            while True:
                kind, payload = receive(theirs, 1 << 20)
                if kind == b"E":
                    return
                send(theirs, kind, np.full(len(payload) // 18 * 8, np.log(4), "<f4").tobytes())

    thread = threading.Thread(target=serve)
    thread.start()
    rows = np.random.default_rng(0).integers(0, 4, (40, 9)).astype(np.uint16)
    weight = np.array([0.0, 1.0, 2.0, 4.0])[rows[:, 1:]]
    with ours:
        scores = score(Server(ours, 4, 8), {"val": HeldOut(rows, weight)}, world.folder, lambda done, all: None)
        thread.join()
    assert scores["val"].value == pytest.approx(2 * (weight > 0).sum() / weight.sum(), rel=1e-6)


def test_wrong_frame_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(theirs, b"L", b"\0" * 12)
        with pytest.raises(JobFault, match="16 was due"):
            Server(ours, 4, 4).bulk(np.zeros((1, 5), np.uint16))
