"""One training run in a box: what is counted, what is refused, and what every kind of failure is called."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sandbox_world import GOOD, ROWS, SEQUENCE, World, alive

from sandbox.job import Evaluation, Limits
from sandbox.serve_batches import Rows


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_served_run_counts_steps_itself(world: World) -> None:
    result = world.run(world.job(world.source(), steps=6, keep_weights=True))
    assert (result.fault, result.steps, result.tokens) == (None, 6, 6 * ROWS * SEQUENCE)
    assert result.curve[0] == (1, 2.5) and len(result.curve) == 6
    assert result.parameters == 32 * 32 and len(result.weights_sha256) == 64
    assert (world.last / "weights.safetensors").stat().st_size == result.weights_bytes
    assert 0 < result.charge_seconds < result.seconds and result.startup_seconds > 0
    assert set(result.fingerprint) == {"device", "driver", "torch", "python", "ruler"}
    assert not (world.last / "boxes").exists()


def test_same_seed_same_weights_other_seed_other_weights(world: World) -> None:
    source = world.source()
    first, again = world.run(world.job(source)), world.run(world.job(source))
    other = world.run(world.job(source, seed=4))
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256


def test_data_order_is_fixed_by_the_seed_alone(world: World) -> None:
    path, length = world.folder / "train.bin", SEQUENCE + 1
    one, four = Rows(path, length, 5), Rows(path, length, 5)
    count = len(world.tokens) // length + 50  # crosses into the second epoch
    singly = b"".join(one.take(1) for _ in range(count * 4 // 4))
    assert singly == b"".join(four.take(4) for _ in range(count // 4)) + four.take(count % 4)
    assert singly != Rows(path, length, 6).take(count)


def test_rows_of_one_epoch_do_not_overlap(tmp_path: Path) -> None:
    np.arange(10_000, dtype="<u2").tofile(tmp_path / "tokens.bin")
    rows = np.frombuffer(Rows(tmp_path / "tokens.bin", 25, 1).take(399), "<u2").reshape(-1, 25)
    assert len(np.unique(rows)) == rows.size and (np.diff(rows.astype(int), axis=1) == 1).all()
    assert (np.diff(rows[:, 0].astype(int)) < 0).any()


def test_no_more_batches_than_granted(world: World) -> None:
    greedy = GOOD.replace("save(table)", "save(table)").replace(
        "sock, table = train()", "sock, table = train()\nfor _ in range(20):\n"
        "    send(sock, b'?', struct.pack('<I', 4))\n    kind, payload = receive(sock)\n"
        "    assert (kind, payload) == (b'E', b'')")
    assert world.run(world.job(world.source(greedy), steps=5)).steps == 5


def test_more_rows_count_as_more_tokens_and_too_many_are_refused(world: World) -> None:
    fine = world.run(world.job(world.source(GOOD.replace("train()", "train(rows=16)")), steps=3))
    assert (fine.fault, fine.tokens) == (None, 3 * 16 * SEQUENCE)
    greedy = world.run(world.job(world.source(GOOD.replace("train()", "train(rows=17)")), steps=3))
    assert greedy.fault == "crash" and "17 rows" in greedy.message


def test_printed_metric_is_shown_and_never_believed(world: World) -> None:
    result = world.run(world.job(world.source("print('val_bpb: 0.10')\n"), evaluation=world.sealed()))
    assert (result.fault, result.scores) == ("no_metric", {})
    assert result.reported == {"val_bpb": 0.1}


def test_crash_names_the_exception(world: World) -> None:
    source = world.source("from fake import *\ntrain(on_batch=lambda step: 1 // (3 - step))\n")
    result = world.run(world.job(source))
    assert (result.fault, result.steps) == ("crash", 3)
    assert result.message.startswith("ZeroDivisionError") and "Traceback" in result.log_tail


@pytest.mark.parametrize("train", [
    GOOD.replace("send(sock", "table[3][4] = math.nan\nsend(sock"),
    GOOD.replace("train()", "train(loss=math.nan)"),
    GOOD.replace("train()", "train(loss=math.inf)").replace("send(sock", "raise ArithmeticError('loss')\nsend(sock"),
])
def test_nan(world: World, train: str) -> None:
    result = world.run(world.job(world.source(train)))
    assert result.fault == "nan", result
    assert result.nonfinite in ((), ("table",))


def test_hang_is_killed_at_the_wall_limit_with_all_its_children(world: World) -> None:
    mark = f"mark{uuid.uuid4().hex}"
    hang = ("import subprocess, sys, time\n"
            f"for _ in range(3): subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'],"
            " start_new_session=True)\ntime.sleep(60)\n")
    for level in (3, 0):
        limits = Limits(wall_seconds=1.5, memory_mb=512, processes=64)
        began = time.monotonic()
        result = world.run(world.job(world.source(hang), limits=limits, max_level=level))
        assert (result.fault, alive(mark)) == ("timeout", [])
        assert "1.5 s" in result.message and time.monotonic() - began < 6


@pytest.mark.parametrize("level", [3, 0])
def test_daemon_that_outlives_its_job_is_killed(world: World, level: int) -> None:
    mark = f"mark{uuid.uuid4().hex}"
    daemon = ("import os, sys, time\nfrom fake import *\n"
              "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
              f"        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])\n"
              "    os._exit(0)\n"
              "time.sleep(0.3)\n") + GOOD
    result = world.run(world.job(world.source(daemon), max_level=level))
    assert (result.fault, alive(mark)) == (None, [])


def test_memory_hog_is_killed(world: World) -> None:
    hog = "import time\nkept = []\nwhile True:\n    kept.append(bytearray(b'x') * (8 << 20)); time.sleep(0.01)\n"
    result = world.run(world.job(world.source(hog), limits=Limits(wall_seconds=20, memory_mb=200)))
    assert result.fault == "oom" and "200 MiB" in result.message
    assert result.peak_memory_mb > 200


def test_out_of_memory_error_is_oom(world: World) -> None:
    source = world.source("raise MemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')\n")
    assert world.run(world.job(source)).fault == "oom"


def test_fork_bomb_is_stopped(world: World) -> None:
    bomb = ("import os, time\nwhile True:\n    try:\n        if os.fork() == 0: time.sleep(30); os._exit(0)\n"
            "    except OSError: time.sleep(0.05)\n    time.sleep(0.002)\n")
    limits = Limits(wall_seconds=3, memory_mb=2048, processes=40)
    for level in (3, 0):
        result = world.run(world.job(world.source(bomb), limits=limits, max_level=level))
        assert result.fault in ("crash", "timeout") and result.seconds < 8


def test_log_is_bounded_and_clean_and_keeps_its_end(world: World) -> None:
    flood = ("import sys\nsys.stdout.write('first\\x1b[31m red\\x07\\n')\n"
             "for _ in range(4000): sys.stdout.write('y' * 999 + '\\n')\nprint('last')\n") + GOOD
    result = world.run(world.job(world.source(flood)))
    assert result.fault is None
    assert (world.last / "log.txt").stat().st_size < 1.1 * 2**20
    text = world.log()
    assert text.startswith("first red\n") and "left out" in text and text.endswith("last\nval_bpb: 0.10\n")
    assert len(result.log_tail) <= 4096


def test_log_flood_is_stopped(world: World) -> None:
    result = world.run(world.job(world.source("while True: print('y' * 9999)\n")))
    assert result.fault == "crash" and "log limit" in result.message


def test_weights_too_big_or_malformed_are_refused(world: World) -> None:
    big = world.run(world.job(world.source(GOOD.replace("save(table)", "bytes(2 << 20)"))))
    assert big.fault == "crash" and "over the limit" in big.message
    pickled = world.run(world.job(world.source(GOOD.replace("save(table)", "b'\\x80\\x04' * 100"))))
    assert pickled.fault == "crash" and "safetensors" in pickled.message


def test_job_may_import_beside_its_script_and_gets_only_the_environment_it_was_given(world: World) -> None:
    source = world.source("import os\nfrom fake import *\nprint(sorted(os.environ))\n" + GOOD)
    result = world.run(world.job(source, threads=2, environment={"EXTRA": "1"}))
    assert result.fault is None
    line = world.log().splitlines()[0]
    assert "'EXTRA'" in line and "'OMP_NUM_THREADS'" in line and "PYTEST" not in line


def test_unserved_job_reports_by_pattern(world: World) -> None:
    source = world.source("from fake import burn\nburn(0.3)\nprint('loss 9.5')\nprint('loss 3.25')\n")
    job = world.job(source, steps=0, batches=None, evaluation=Evaluation("reported", pattern=r"loss ([\d.]+)"))
    result = world.run(job)
    assert (result.fault, result.tier, result.scores["val"].value) == (None, "reported", 3.25)
    assert 0.3 <= result.charge_seconds < 1.0 and result.steps == 0
    silent = world.run(replace(job, source=str(world.source("print('done')\n"))))
    assert silent.fault == "no_metric"
    crashed = world.run(replace(job, source=str(world.source("print('loss 1.0')\nraise ValueError('boom')\n"))))
    assert (crashed.fault, crashed.scores) == ("crash", {}) and "boom" in crashed.message


@pytest.mark.parametrize("level", [3, 2, 0])
def test_protected_evaluation_restores_its_files_and_reads_only_the_output(world: World, level: int) -> None:
    train = "import os\nopen(os.environ['OUT_DIR'] + '/model.txt', 'w').write('0.75')\n"
    cheat = "print('loss 0.0')\n"
    honest = ("import os\nfolder = os.environ['OUT_DIR']\n"
              "try:\n    open(folder + '/new', 'w').close(); print('wrote')\nexcept OSError: pass\n"
              "print('loss ' + open(folder + '/model.txt').read())\n")
    overlay = world.folder / f"overlay{level}"
    overlay.mkdir()
    (overlay / "evaluate.py").write_text(honest, encoding="utf-8")
    evaluation = Evaluation("protected", ("python", "evaluate.py"), pattern=r"loss ([\d.]+)", overlay=str(overlay))
    job = world.job(world.source(train, evaluate=cheat), steps=0, batches=None, evaluation=evaluation, max_level=level)
    result = world.run(job)
    assert result.fault is None, result
    assert (result.tier, result.scores["val"].value) == ("protected", 0.75)
    if result.level:
        assert "wrote" not in (world.last / "evaluate.txt").read_text(encoding="utf-8")
    assert not (world.last / "out").exists()


def test_a_job_is_not_run_below_its_least_level(world: World) -> None:
    result = world.run(world.job(world.source(), max_level=0, min_level=1))
    assert result.fault == "infra" and "level 0" in result.message and world.last.joinpath("log.txt").exists() is False


def test_a_broken_job_file_is_infra(tmp_path: Path) -> None:
    world = World(tmp_path)
    job = world.job(world.source(), batches=None, evaluation=world.sealed())
    assert world.run(job).fault == "infra"
    missing = world.run(world.job(tmp_path / "nowhere"))
    assert missing.fault == "infra" and "nowhere" in missing.message


def test_an_orphan_is_charged_to_its_own_box_alone(world: World) -> None:
    """At level 1 as root the boxes of a twin job differ by user id; an orphan of one is not the other's cost."""
    work = GOOD.replace("train()", "train(on_batch=lambda step: burn(0.05))")
    burner = ("import ctypes, os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
              "        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\n        end = time.monotonic() + 20\n"
              "        while time.monotonic() < end: pass\n    os._exit(0)\nos.wait()\n")
    result = world.run(world.job(world.source(work), steps=12, kind="twin",
                                 twin_source=str(world.source(burner + work)), max_level=1))
    if result.level != 1 or os.geteuid() != 0:
        pytest.skip("needs level 1 as root")
    assert result.fault is None and result.twin is not None and result.twin.ratio < 0.8, result
