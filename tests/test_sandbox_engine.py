"""Jobs from the agent's side: detached, stoppable, and never lost without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from sandbox_world import World, alive, until

from sandbox import process
from sandbox.engine import LocalEngine
from sandbox.job import Result, read_progress


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def finished(engine: LocalEngine, folder: Path) -> Result:
    until(lambda: engine.poll(folder) is not None)
    result = engine.poll(folder)
    assert result is not None
    return result


def slow(world: World, mark: str) -> Path:
    return world.source("from fake import *\nimport subprocess\n"
                        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])\n"
                        "train(on_batch=lambda step: time.sleep(0.2))\n")


def test_start_and_poll(world: World) -> None:
    engine, folder = LocalEngine(), world.folder / "job"
    engine.start(folder, world.job(world.source()))
    assert engine.alive(folder)
    assert finished(engine, folder).fault is None
    until(lambda: not engine.alive(folder))
    assert (folder / "supervisor.log").read_text(encoding="utf-8") == ""
    with pytest.raises(FileExistsError):
        engine.start(folder, world.job(world.source()))
    engine.stop(folder)  # of an ended job: nothing happens


def test_an_interrupt_while_a_job_is_started_leaves_no_job_that_nobody_can_stop(world: World) -> None:
    """Ctrl-C at every moment of the start: the job is known by its pid file afterwards, so it can be stopped."""
    mark = f"interrupted-{uuid.uuid4().hex}"
    source, job = slow(world, mark), None
    for number in range(20):
        engine, folder = LocalEngine(), world.folder / f"job{number}"
        job = job or world.job(source, steps=100)
        before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + number * 0.0004)
            engine.start(folder, job)
            time.sleep(0.05)  # a start that was quicker than the alarm
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGALRM, before)
        LocalEngine().stop(folder)
        assert not alive(str(folder)), f"after {number}"


def test_the_environment_of_the_agent_does_not_reach_the_supervisor(world: World, monkeypatch: pytest.MonkeyPatch
                                                                    ) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    engine, folder = LocalEngine(), world.folder / "job"
    engine.start(folder, world.job(slow(world, "x"), steps=100))
    pid = int((folder / "supervisor.pid").read_text(encoding="ascii").split()[0])
    until(lambda: b"PYTHONPATH" in Path(f"/proc/{pid}/environ").read_bytes())
    assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()
    engine.stop(folder)


def test_stop_kills_the_tree_and_keeps_what_was_counted(world: World) -> None:
    mark = f"mark{uuid.uuid4().hex}"
    engine, folder = LocalEngine(), world.folder / "job"
    engine.start(folder, world.job(slow(world, mark), steps=100))
    until(lambda: (seen := read_progress(folder)) is not None and seen.step >= 2 and seen.eta_seconds)
    engine.stop(folder)
    result = finished(engine, folder)
    assert (result.fault, result.message, alive(mark)) == ("infra", "stopped", [])
    assert 2 <= result.steps < 100 and result.train_seconds > 0.3


def test_another_agent_sees_the_same_job(world: World) -> None:
    folder = world.folder / "job"
    first = LocalEngine()
    first.start(folder, world.job(slow(world, "x"), steps=3))
    second = LocalEngine()
    assert second.alive(folder) and second.poll(folder) is None
    until(lambda: not first.alive(folder))
    assert finished(second, folder).steps == 3


def test_lost_supervisor_is_told_and_leaves_nothing(world: World) -> None:
    mark = f"mark{uuid.uuid4().hex}"
    engine, folder = LocalEngine(), world.folder / "job"
    engine.start(folder, world.job(slow(world, mark), steps=100))
    until(lambda: alive(mark))
    os.kill(int((folder / "supervisor.pid").read_text(encoding="ascii").split()[0]), signal.SIGKILL)
    result = finished(engine, folder)
    assert result.fault == "infra" and result.message.startswith("lost")
    if world.job(folder).max_level:
        until(lambda: not alive(mark), 3)


def test_a_folder_without_a_supervisor_is_lost(world: World) -> None:
    folder = world.job_folder(world.job(world.source()))
    result = LocalEngine().poll(folder)
    assert result is not None and result.fault == "infra"


def test_a_handle_is_of_one_process_and_tells_its_end_also_before_it_is_reaped() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    found = process.stat(child.pid)
    assert found is not None and process.hold(child.pid, found.start_ticks + 1) is None  # the number is another's now
    handle = process.hold(child.pid, found.start_ticks)
    if handle is None:
        child.kill()
        pytest.skip("this kernel gives no handle of a process")
    assert not handle.ended
    child.kill()
    until(lambda: handle.ended)
    child.wait()
    assert handle.ended and process.hold(child.pid, found.start_ticks) is None
    handle.close()


@pytest.mark.parametrize("handles", [True, False])
def test_the_end_of_a_job_is_seen_with_and_without_handles(world: World, monkeypatch: pytest.MonkeyPatch,
                                                           handles: bool) -> None:
    if not handles:
        monkeypatch.delattr(os, "pidfd_open")
    engine, folders = LocalEngine(), [world.folder / name for name in ("first", "second")]
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for folder in folders:
        engine.start(folder, world.job(world.source()))
    deadline = time.monotonic() + 15
    while None in [engine.poll(folder) for folder in folders]:
        assert time.monotonic() < deadline
        engine.rest([folder for folder in folders if engine.poll(folder) is None], 1.0)
    assert [result.fault for folder in folders if (result := engine.poll(folder))] == [None, None]
    engine.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_before
