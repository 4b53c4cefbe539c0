"""Warm start: a waiting box gives the run that a cold one gives, serves one job, and is gone with whoever made it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from sandbox_people import world_of
from sandbox_world import GOOD, World, alive, until

from sandbox import box, process, warm, warm_inside
from sandbox.engine import AHEAD, LocalEngine
from sandbox.job import Job, Limits, Result

MODULES = ("json", "struct", "statistics")
LEVELS = [level for level in (0, 1, 2, 3) if box.probe(level) == level]


@contextmanager
def engine_of(world: World) -> Iterator[LocalEngine]:
    engine = LocalEngine()
    try:
        yield engine
    finally:
        engine.close()


def job_of(world: World, source: Path, **more: object) -> Job:
    return world.job(source, **({"warm": MODULES} | more))


def run(engine: LocalEngine, world: World, job: Job, ready: bool = True) -> Result:
    """The job's result from a supervisor that waited for it, with its boxes ready (unless ``ready`` is False)."""
    folder = world.job_folder(job)
    if ready:
        engine.prepare(folder.parent, job)
        until(lambda: engine.ready(job.device) is not None)
    engine.start(folder, job)
    until(lambda: engine.poll(folder) is not None)
    until(lambda: not engine.alive(folder))
    world.last = folder
    result = engine.poll(folder)
    assert result is not None
    return result


@pytest.mark.parametrize("level", LEVELS)
def test_a_warm_run_is_the_cold_run_and_leaves_nothing(level: int) -> None:
    with world_of("root") as world, engine_of(world) as engine:
        source = world.source(GOOD + "print(sys.argv, sys.path[0] == os.getcwd(), __file__.startswith(os.getcwd()), "
                                     "__name__, sorted(globals()), __spec__, os.listdir('.'))\n")
        job = job_of(world, source, command=("python", "train.py", "--more", "x"), evaluation=world.sealed(),
                     max_level=level)
        cold = run(engine, world, replace(job, warm=()), ready=False)
        printed = sorted(world.log().splitlines())
        engine.close()
        hot = run(engine, world, job)
        assert (cold.warm, hot.warm, hot.level, cold.fault, hot.fault) == (0, 2, level, None, None), hot
        assert (hot.weights_sha256, hot.scores) == (cold.weights_sha256, cold.scores)
        assert sorted(world.log().splitlines()) == printed
        assert 0 < hot.startup_seconds <= hot.first_batch_seconds < hot.seconds
        assert hot.startup_cpu_seconds < cold.startup_cpu_seconds and hot.startup_cpu_seconds < hot.startup_charge
        assert cold.startup_cpu_seconds <= 1.5 * hot.startup_charge  # the same imports, paid twice on a busy machine
        engine.close()
        assert not list(world.folder.glob(f"{AHEAD}*"))
        assert not alive(str(world.folder))


def test_both_sides_of_a_twin_and_of_an_audit_take_waiting_boxes(tmp_path: Path) -> None:
    world = World(tmp_path)
    with engine_of(world) as engine:
        source = world.source()
        found = run(engine, world, job_of(world, source, kind="twin", twin_source=str(world.source()), steps=4))
        assert found.fault is None and found.warm == 2 and found.twin is not None and found.twin.identical
        job = job_of(world, source, evaluation=world.sealed(), keep_weights=True)
        trained = run(engine, world, job)
        place = world.last
        audited = run(engine, world, replace(job, kind="audit", bulk=str(place), reference=str(place),
                                             weights=str(place / "weights.safetensors")))
        assert (trained.fault, audited.fault, audited.warm) == (None, None, 1 if not audited.scores else 2)


def test_the_next_supervisor_waits_once_a_job_trains_and_takes_the_next_job(tmp_path: Path) -> None:
    world = World(tmp_path)
    with engine_of(world) as engine:
        source = world.source(GOOD.replace("train()", "train(on_batch=lambda step: time.sleep(0.1))"))
        first = run(engine, world, job_of(world, source), ready=False)
        until(lambda: engine.ready("cpu") is not None)
        second = run(engine, world, job_of(world, source), ready=False)
        assert (first.fault, first.warm, second.fault, second.warm) == (None, 0, None, 1)
        other = run(engine, world, job_of(world, source, environment={"MORE": "1"}), ready=False)
        assert (other.fault, other.warm) == (None, 0)  # what waits was made for another environment


def test_a_crash_looks_as_it_does_from_cold(tmp_path: Path) -> None:
    world = World(tmp_path)
    with engine_of(world) as engine:
        job = job_of(world, world.source("from fake import *\ntrain(on_batch=lambda step: 1 // (3 - step))\n"))
        results, logs = [], []
        for wanted in (replace(job, warm=()), job):
            results.append(run(engine, world, wanted, ready=bool(wanted.warm)))
            logs.append(world.log())
        assert [found.warm for found in results] == [0, 1] and logs[0] == logs[1] and "Traceback" in logs[0]
        assert results[0].fault == results[1].fault == "crash" and results[0].message == results[1].message
        for text, fault in (("import sys\nsys.exit(3)\n", "crash"), ("x = (\n", "crash"), ("print(1)\n", "no_metric")):
            found = run(engine, world, job_of(world, world.source(text)))
            assert (found.warm, found.fault) == (1, fault), found


def test_a_file_with_the_name_of_a_loaded_module_is_imported_as_from_cold(tmp_path: Path) -> None:
    world = World(tmp_path)
    with engine_of(world) as engine:
        source = world.source(GOOD + "import statistics\nprint(statistics.mine)\n", statistics="mine = 'shadow'\n")
        found = run(engine, world, job_of(world, source))
        assert (found.fault, found.warm) == (None, 0) and "shadow" in world.log()
        assert run(engine, world, job_of(world, world.source())).warm == 1


def test_a_waiting_box_that_died_means_a_cold_start_and_no_error(tmp_path: Path) -> None:
    world = World(tmp_path)
    with engine_of(world) as engine:
        job = job_of(world, world.source())
        folder = world.job_folder(job)
        engine.prepare(folder.parent, job)
        until(lambda: engine.ready("cpu") is not None)
        supervisor = next(pid for pid in process.descendants(os.getpid()) if _says(pid, f"{folder.parent}/.ahead-"))
        for pid in [pid for pid in process.descendants(supervisor) if _says(pid, "python")]:
            with suppress(ProcessLookupError):  # it went with its parent
                os.kill(pid, signal.SIGKILL)
        found = run(engine, world, job, ready=False)
        assert (found.fault, found.warm) == (None, 0)
        engine.prepare(folder.parent, job)
        until(lambda: engine.ready("cpu") is not None)
        supervisor = next(pid for pid in process.descendants(os.getpid()) if _says(pid, f"{folder.parent}/.ahead-"))
        inside = {pid: line.start_ticks for pid in process.descendants(supervisor) if (line := process.stat(pid))}
        os.kill(supervisor, signal.SIGKILL)
        found = run(engine, world, job, ready=False)
        assert (found.fault, found.warm) == (None, 0)
        assert inside
        until(lambda: not any(process.running(*known) for known in inside.items()))


def _says(pid: int, text: str) -> bool:
    try:
        return text in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def test_nothing_waits_when_the_agent_is_killed(tmp_path: Path) -> None:
    world = World(tmp_path)
    job = job_of(world, world.source())
    agent = subprocess.Popen([sys.executable, "-c", f"""
import time
from pathlib import Path
from sandbox.engine import LocalEngine
from sandbox.job import read_job
engine = LocalEngine()
engine.prepare(Path({str(tmp_path)!r}), read_job(Path({str(world.job_folder(job))!r})))
while engine.ready("cpu") is None:
    time.sleep(0.02)
print("ready", flush=True)
time.sleep(60)
"""], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    assert agent.stdout is not None and agent.stdout.readline() == b"ready\n"
    assert alive(str(tmp_path / AHEAD))
    agent.kill()
    agent.wait()
    agent.stdout.close()
    until(lambda: not alive(str(tmp_path / AHEAD)) and not list(tmp_path.glob(f"{AHEAD}*")))


def test_the_waiting_time_is_not_the_jobs(tmp_path: Path) -> None:
    world = World(tmp_path)
    with engine_of(world) as engine:
        limits = Limits(wall_seconds=2, memory_mb=512, processes=64, log_mb=1, scratch_mb=64, weights_mb=1)
        source = world.source(GOOD.replace("train()", "train(on_batch=lambda step: time.sleep(20 * (step == 5)))"))
        job = job_of(world, world.source(), limits=limits)
        folder = world.job_folder(job)
        engine.prepare(folder.parent, job)
        time.sleep(2.5)  # longer than the limit
        found = run(engine, world, job, ready=False)
        assert (found.fault, found.warm) == (None, 1) and found.train_seconds < 2
        late = run(engine, world, replace(job, source=str(source)))
        assert (late.fault, late.warm) == ("timeout", 1) and 2 <= late.seconds < 6


def test_a_stopped_job_takes_its_waiting_boxes_along(tmp_path: Path) -> None:
    world = World(tmp_path)
    with engine_of(world) as engine:
        job = job_of(world, world.source(GOOD.replace("train()", "train(on_batch=lambda step: time.sleep(5))")))
        folder = world.job_folder(job)
        engine.prepare(folder.parent, job)
        until(lambda: engine.ready("cpu") is not None)
        engine.start(folder, job)
        until(lambda: (folder / "progress.json").exists())
        engine.stop(folder)
        found = engine.poll(folder)
        assert found is not None and (found.fault, found.message) == ("infra", "stopped")
        assert not alive(str(folder)) and not list(tmp_path.glob(f"{AHEAD}*"))


@pytest.mark.parametrize("change", [
    {"warm": ()}, {"command": ("python", "-m", "train")}, {"command": ("sh", "train.py")}, {"batches": None},
    {"keep_compile_cache": True}, {"environment": {"PYTHONPATH": "."}}, {"command": ("python", "/elsewhere/train.py")}])
def test_what_could_come_out_otherwise_starts_cold(tmp_path: Path, change: dict[str, object]) -> None:
    world = World(tmp_path)
    assert warm.key(job_of(world, tmp_path)) is not None
    assert warm.key(job_of(world, tmp_path, **change)) is None


def test_hidden_files_in_the_source_start_cold(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert warm.key(job_of(world, tmp_path / "src", hidden=(str(tmp_path / "src" / "val.bin"),))) is None
    assert warm.key(job_of(world, tmp_path / "src", hidden=(str(tmp_path / "val.bin"),))) is not None


def test_a_module_that_is_not_there_is_left_to_the_job() -> None:
    assert warm_inside.warm_up(["json", "nosuchmodule", "os.nothing"]) == ["nosuchmodule", "os.nothing"]


def test_an_unused_folder_of_a_killed_agent_is_swept(tmp_path: Path) -> None:
    world = World(tmp_path)
    old = tmp_path / f"{AHEAD}999999999-0"
    old.mkdir()
    (old / "job.json").write_text(json.dumps({}))
    with engine_of(world) as engine:
        engine.prepare(tmp_path, job_of(world, world.source()))
        assert not old.exists() and list(tmp_path.glob(f"{AHEAD}{os.getpid()}-*"))
