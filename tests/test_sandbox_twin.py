"""Two trees in lock step."""

from __future__ import annotations

from pathlib import Path

import pytest
from sandbox_world import GOOD, World

SLOW = "from fake import *\nsock, table = train(on_batch=lambda step: burn({}))\nsend(sock, b'W', save(table))\n"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_twin_sees_a_source_twice_as_slow(world: World) -> None:
    job = world.job(world.source(SLOW.format(0.04)), steps=12, kind="twin",
                    twin_source=str(world.source(SLOW.format(0.02))))
    result = world.run(job)
    assert result.fault is None and result.twin is not None
    assert result.twin.ratio == pytest.approx(2.0, abs=0.3)
    assert result.twin.identical and result.twin.steps == result.steps == 12


def test_work_done_after_an_early_request_is_charged(world: World) -> None:
    """A job that asks for its next batch first and works afterwards must not look free."""
    early = ("from fake import *\nimport threading\nsock = connect()\nreceive(sock)\n"
             "send(sock, b'?', struct.pack('<I', 4))\n"
             "while receive(sock)[0] == b'B':\n    send(sock, b'?', struct.pack('<I', 4))\n    burn(0.04)\n"
             "send(sock, b'W', save([[1.0] * VOCAB] * VOCAB))\n")
    result = world.run(world.job(world.source(early), steps=10, kind="twin",
                                 twin_source=str(world.source(SLOW.format(0.02)))))
    assert result.twin is not None and result.twin.ratio > 1.6 and not result.twin.identical


def test_children_that_do_the_work_are_charged(world: World) -> None:
    forked = ("from fake import *\nimport signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
              "def work(step):\n    pid = os.fork()\n    if pid == 0:\n        burn(0.5); os._exit(0)\n"
              "    try:\n        os.waitpid(pid, 0)\n    except ChildProcessError: pass\n"
              "sock, table = train(on_batch=work)\nsend(sock, b'W', save(table))\n")
    result = world.run(world.job(world.source(forked), steps=3))
    assert result.fault is None and result.charge_seconds > 0.6  # at least what the samples, 0.2 s apart, saw


def test_a_fault_of_the_source_is_its_own_and_of_the_twin_alone_is_infra(world: World) -> None:
    good = str(world.source(GOOD))
    bad = world.source("from fake import *\ntrain(on_batch=lambda step: 1 // (2 - step))")
    ours = world.run(world.job(bad, kind="twin", twin_source=good))
    assert (ours.fault, ours.twin) == ("crash", None) and "ZeroDivisionError" in ours.message
    theirs = world.run(world.job(Path(good), kind="twin", twin_source=str(bad)))
    assert theirs.fault == "infra" and "twin" in theirs.message


def test_nan_of_the_source(world: World) -> None:
    result = world.run(world.job(world.source(GOOD.replace("send(sock", "table[0][0] = math.nan\nsend(sock")),
                                 kind="twin", twin_source=str(world.source(GOOD))))
    assert result.fault == "nan" and result.nonfinite == ("table",)
